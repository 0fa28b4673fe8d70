"""Pictures as a viewer shows them: upright, on white, in 8 bits of red, green and blue."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as the camera's EXIF says; broken EXIF says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # PIL raises whatever broken bytes lead to
        return image


def _from_cmyk(image: Image.Image) -> Image.Image:
    """RGB of four inks, by the file's own profile where it has one: without, colours are far too loud."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            return ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):  # not a profile, or none of these inks
            pass
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: 16 bits by their whole range, floats as 0 to 1.

    Raises ValueError where the pixels do not say what white is.
    """
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    white = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= white):  # also where there is a NaN
        raise ValueError(
            f"its pixels go from {low:g} to {high:g}, and nothing says which of them is white; save it with 8 or 16 "
            "bits of grey, or as floats from 0 to 1"
        )
    return Image.fromarray(np.rint(pixels * (255 / white)).astype(np.uint8)).convert("RGB")


def read_picture(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """The picture in a file, or an opened one, as RGB.

    EXIF's rotation is applied; what is transparent shows white; four inks and palettes become their colours; 16 bits
    are scaled, not cut off. Of several frames it is the first. Embedded profiles of RGB pictures are not applied, as in
    the models' own pipelines. Raises OSError for what is no picture or a torn one, ValueError for one whose pixels have
    no known white, Image.DecompressionBombError for one of absurdly many pixels.
    """
    image = source if isinstance(source, Image.Image) else Image.open(source)
    image.load()
    image = _upright(image)
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.mode[0] in "IF":
        return _from_deep(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of what `read_picture` makes of an opened image, whose pixels are not read for it."""
    try:
        sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # as in `_upright`
        sideways = False
    return image.size[::-1] if sideways else image.size
