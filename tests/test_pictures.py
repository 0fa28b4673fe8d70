"""Pictures are read as a viewer shows them."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from analysis.rec.pictures import read_picture
from tests.support.checkpoint import noise

PIXELS = np.asarray(noise(7, 5))


def stored(image, kind="PNG", **options):
    """What is read back of an image that went through a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return read_picture(file)


def test_plain_pictures_are_themselves(tmp_path):
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), open(tmp_path / "a.png", "rb"), image):  # noqa: SIM115
        made = read_picture(source)
        assert made.mode == "RGB" and (np.asarray(made) == PIXELS).all()
    grey = Image.fromarray(PIXELS[..., 0])
    assert (np.asarray(stored(grey)) == PIXELS[..., :1]).all()
    assert (np.asarray(stored(grey.convert("1"))) == np.asarray(grey.convert("1").convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    "orientation, turned",
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_a_phones_rotation_is_applied(orientation, turned, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(PIXELS[:2, :3, :1], np.ones((32, 32, 3), np.uint8))  # large enough for JPEG to keep
    made = np.asarray(stored(Image.fromarray(blocks), kind, exif=exif), dtype=int)
    expected = turned(blocks)
    assert made.shape == expected.shape and np.abs(made - expected).mean() < 3


@given(st.binary(max_size=60))
def test_broken_exif_says_nothing(junk):
    assert stored(Image.fromarray(PIXELS), exif=b"Exif\0\0" + junk).size in ((7, 5), (5, 7))


def test_what_is_transparent_shows_white_and_not_the_hidden_colour():
    alpha = np.array([[0, 128, 255]] * 5, np.uint8).repeat([3, 3, 1], axis=1)
    expected = np.rint(255 + (PIXELS.astype(float) - 255) * alpha[..., None] / 255)
    made = np.asarray(stored(Image.fromarray(np.dstack([PIXELS, alpha]))), dtype=float)
    assert np.abs(made - expected).max() <= 1
    made = np.asarray(stored(Image.fromarray(np.dstack([PIXELS[..., 0], alpha]))), dtype=float)  # grey and alpha
    assert np.abs(made - expected[..., :1]).max() <= 1


def test_palettes_and_a_transparent_colour():
    image = Image.fromarray(PIXELS).quantize(16)
    assert (np.asarray(stored(image)) == np.asarray(image.convert("RGB"))).all()
    clear = image.getpixel((0, 0))
    hidden = np.asarray(image) == clear
    for kind in ("PNG", "GIF"):
        made = np.asarray(stored(image, kind, transparency=clear))
        assert (made[hidden] == 255).all() and (made[~hidden] == np.asarray(image.convert("RGB"))[~hidden]).all()
    made = np.asarray(stored(Image.fromarray(PIXELS), transparency=tuple(map(int, PIXELS[0, 0]))))
    assert (made[0, 0] == 255).all() and (made[1:] == PIXELS[1:]).all()


def test_inks_become_colours():
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 0] = 255
    for kind in ("JPEG", "TIFF"):
        red, green, blue = np.asarray(stored(Image.fromarray(inks, "CMYK"), kind))[4, 4].tolist()
        assert red < 10 and green > 245 and blue > 245, "all cyan"
    torn = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}  # none of four inks
    assert np.asarray(stored(Image.fromarray(inks, "CMYK"), "TIFF", **torn))[4, 4, 0] < 10


def test_more_than_8_bits_are_scaled_and_not_cut_off():
    deep = PIXELS[..., 0].astype(np.uint16) * 257
    for kind in ("PNG", "TIFF", "PPM"):
        assert (np.asarray(stored(Image.fromarray(deep), kind)) == PIXELS[..., :1]).all(), kind
    floats = Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255)
    assert (np.asarray(stored(floats, "TIFF")) == PIXELS[..., :1]).all()


@pytest.mark.parametrize("values", [np.float32([[0, 7.5]]), np.float32([[0, np.nan]]), np.int32([[-4, 9]])])
def test_pixels_without_a_known_white_are_refused(values):
    with pytest.raises(ValueError, match="nothing says which of them is white; save it with 8 or 16 bits"):
        stored(Image.fromarray(values), "TIFF")


def test_what_is_no_picture_and_a_torn_one(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(OSError, match=r"a\.jpg"):
        read_picture(tmp_path / "a.jpg")
    noise(64, 64).save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:2000])
    with pytest.raises(OSError, match="truncated"):
        read_picture(tmp_path / "b.jpg")
