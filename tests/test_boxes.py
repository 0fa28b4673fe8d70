"""Dialects, frames and IoU against naive references; identities and invariants on generated boxes."""

import math
import re
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from analysis.rec.boxes import BOX_FORMATS, CONVENTIONS, FRAMES, format_llava, hit, iou, parse_llava, parse_minigpt_v2
from analysis.registry import pick

sides = st.integers(1, 2000)
unit = st.floats(0, 1)


@st.composite
def boxes(draw, numbers=st.floats(-3000, 3000)):
    x1, x2 = sorted((draw(numbers), draw(numbers)))
    y1, y2 = sorted((draw(numbers), draw(numbers)))
    return np.array([x1, y1, x2, y2])


@pytest.mark.parametrize("frame", FRAMES)
@given(box=boxes(), width=sides, height=sides)
def test_frames_round_trip(frame, box, width, height):
    encode, decode = FRAMES[frame]
    size = np.array([width, height])
    np.testing.assert_allclose(decode(encode(box, size), size), box, rtol=0, atol=1e-9)
    fractions = box / 3000
    np.testing.assert_allclose(encode(decode(fractions, size), size), fractions, rtol=0, atol=1e-9)


@given(width=st.integers(1, 40), height=st.integers(1, 40), data=st.data())
def test_padded_frame_is_where_padding_puts_the_pixel(width, height, data):
    """Paint one pixel, centre the image in a square as LLaVA's padding does, and find the pixel again."""
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    image = np.zeros((height, width))
    image[y, x] = 1
    side = max(width, height)
    square = np.zeros((side, side))
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    (row,), (column,) = np.nonzero(square)
    fractions = FRAMES["padded"].encode([x, y, x + 1, y + 1], [width, height])
    np.testing.assert_allclose(fractions * side, [column, row, column + 1, row + 1], atol=1e-9)


def test_frames_by_hand_and_batched():
    sizes = np.array([[400, 200], [200, 401]])
    boxes_px = np.array([[100, 50, 300, 150], [0, 0, 200, 401]])
    padded = [[100 / 400, 150 / 400, 300 / 400, 250 / 400], [100 / 401, 0, 300 / 401, 1]]
    stretched = [[0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1]]
    np.testing.assert_allclose(FRAMES["padded"].encode(boxes_px, sizes), padded)
    for name in ("resized", "original"):
        np.testing.assert_allclose(FRAMES[name].encode(boxes_px, sizes), stretched)
    assert (FRAMES["padded"].decode([0, 0, 1, 1], [400, 200]) == [0, -100, 400, 300]).all()  # no clipping


@pytest.mark.parametrize("dialect", [name for name in BOX_FORMATS if name != "qwen2_5_vl"])  # which is in pixels
@given(box=boxes(unit), around=st.text(st.characters(exclude_characters="["), max_size=20))
def test_a_formatted_box_parses_back(dialect, box, around):
    written = BOX_FORMATS[dialect].format(box)
    parsed = BOX_FORMATS[dialect].parse(around + written + around)
    np.testing.assert_allclose(parsed, box, rtol=0, atol=0.005 + 1e-12)
    assert BOX_FORMATS[dialect].format(parsed) == written


def test_format_llava():
    assert format_llava([0.123, 0.345, 0.5, 1]) == "[0.12, 0.34, 0.50, 1.00]"
    assert format_llava([-0.2, -0.0, 1.7, 0.999]) == "[0.00, 0.00, 1.00, 1.00]"
    for bad in ([0, 0, 1], [[0, 0, 1, 1]], [0, 0, math.nan, 1], [0, 0, 1, math.inf]):
        with pytest.raises(ValueError, match="four finite numbers"):
            format_llava(bad)


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0.12, 0.34, 0.56, 0.78]", [0.12, 0.34, 0.56, 0.78]),
        ("The box is [ 0.1 ,0.2,\n0.3,\t0.4 ]. Or [0, 0, 1, 1].", [0.1, 0.2, 0.3, 0.4]),
        ("[0, 0., .5, +1.000]", [0, 0, 0.5, 1]),
        ("[0.3, 0.3, 0.3, 0.3]", [0.3, 0.3, 0.3, 0.3]),
        ("[see] [1, 2] [0.1, 0.2, 0.3, 0.4, 0.5] [0.5, 0.5, 0.6, 0.6]", [0.5, 0.5, 0.6, 0.6]),
        ("[[0.1, 0.2, 0.3, 0.4]]", [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_parse_llava_accepts(text, box):
    parsed = parse_llava(text)
    assert parsed.dtype == np.float64 and parsed.tolist() == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[]",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4",
        "0.1, 0.2, 0.3, 0.4",
        "(0.1, 0.2, 0.3, 0.4)",
        "[0.1 0.2 0.3 0.4]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1, 0.2, nan, 0.4]",
        "[1e-3, 0, 1, 1]",
        "[0.1, 0.2, 0.3, .]",
        "[0.5, 0.2, 0.3, 0.4]",
        "[0.1, 0.5, 0.3, 0.4]",  # inverted
        "[-0.01, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 1.01]",
        "[12, 34, 56, 78]",  # outside
        "[0, 0, 1, 2] [0, 0, 1, 1]",  # the first list is the answer, even where it is invalid
        "[٠, ٠, ١, ١]",  # digits, but not ASCII
    ],
)
def test_parse_llava_rejects(text):
    assert parse_llava(text) is None


@given(st.text(st.sampled_from("[]0123456789.,-+ \neE{}<>") | st.characters(), max_size=60))
@example("[0, 0, 1, 1]")
def test_parse_llava_never_raises_and_returns_only_valid_boxes(text):
    box = parse_llava(text)
    if box is not None:
        x1, y1, x2, y2 = box
        assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1


@pytest.mark.parametrize("unit_text", ["1", " ", "[", "[1", "[ ", "[0.1,", "[0,0,0,", "[1." + "1" * 50])
def test_parse_llava_takes_linear_time(unit_text):
    start = time.process_time()
    parse_llava("[" + unit_text * 50_000)
    assert time.process_time() - start < 1


def naive_iou(a, b, extra=0.0):
    """One pair, one step at a time."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    overlap = width * height if width > 0 and height > 0 else 0.0
    areas = [(x2 - x1 + extra) * (y2 - y1 + extra) for x1, y1, x2, y2 in (a, b)]
    return overlap / (sum(areas) - overlap) if sum(areas) > overlap else 0.0


@given(st.lists(st.tuples(boxes(st.floats(0, 100)), boxes(st.floats(0, 100))), min_size=1, max_size=8), st.booleans())
def test_iou_is_the_naive_one_for_every_pair(pairs, plus_one):
    a, b = (np.array(side) for side in zip(*pairs))
    expected = [naive_iou(x, y, float(plus_one)) for x, y in pairs]
    np.testing.assert_allclose(iou(a, b, plus_one), expected, rtol=1e-12, atol=1e-300)
    assert np.array_equal(iou(a, b, plus_one), iou(b, a, plus_one))


@given(boxes(st.integers(0, 30)), boxes(st.integers(0, 30)), st.booleans())
def test_iou_counts_pixels(a, b, plus_one):
    """Integer boxes against sets of pixels; with plus_one the last row and column belong to the box."""

    def pixels(box):
        x1, y1, x2, y2 = box.astype(int)
        return {(x, y) for x in range(x1, x2 + plus_one) for y in range(y1, y2 + plus_one)}

    either, both = pixels(a) | pixels(b), pixels(a) & pixels(b)
    assert iou(a, b, plus_one) == (len(both) / len(either) if either else 0)


@pytest.mark.filterwarnings("error")
def test_iou_of_boxes_without_area_is_zero():
    point, line, whole = [3, 3, 3, 3], [0, 3, 9, 3], [0, 0, 9, 9]
    inverted, nothing = [9, 9, 0, 0], [math.nan] * 4
    for bad in (point, line, inverted, nothing):
        assert iou(bad, bad) == 0 and iou(bad, whole) == 0 and iou(whole, bad) == 0
    assert iou(whole, whole) == 1


def test_iou_broadcasts():
    a, b = np.array([[0, 0, 2, 2], [1, 0, 3, 2]]), np.array([0, 0, 2, 2])
    np.testing.assert_allclose(iou(a, b), [1, 2 / 6])
    np.testing.assert_allclose(iou(a[:, None], a[None]), [[1, 1 / 3], [1 / 3, 1]])


def test_conventions_differ_at_the_threshold():
    half = [0, 0, 1, 1], [0, 0, 2, 1]  # IoU exactly 0.5; counted in whole pixels 4 / 6
    scores = {name: hit(*half, name) for name in CONVENTIONS}
    assert {name: bool(correct) for name, (_, correct) in scores.items()} == {"ge": True, "gt": False, "plus_one": True}
    assert scores["ge"][0] == scores["gt"][0] == 0.5 and scores["plus_one"][0] == pytest.approx(4 / 6)
    tie = [0, 0, 0, 0], [0, 0, 1, 0]  # exactly 0.5 in whole pixels: plus_one is strict
    assert hit(*tie, "plus_one")[0] == 0.5 and not hit(*tie, "plus_one")[1]
    assert not hit([math.nan] * 4, [0, 0, 1, 1])[1]


def test_unknown_names_are_told_what_is_right():
    with pytest.raises(ValueError, match="unknown frame 'paded'; did you mean 'padded'.*padded, resized, original"):
        pick(FRAMES, "paded", "frame")
    with pytest.raises(ValueError, match="unknown dialect None; valid: llava"):
        pick(BOX_FORMATS, None, "dialect")
    with pytest.raises(ValueError, match="unknown IoU convention 'GE'"):
        hit([0, 0, 1, 1], [0, 0, 1, 1], "GE")


@pytest.mark.parametrize(
    "dialect, steps, pattern",
    [
        ("llava", 100, r"\[{0}, {0}, {0}, {0}\]".format(r"([01]\.\d\d)")),
        ("shikra", 1000, r"Answer: \[{0},{0},{0},{0}\] \.".format(r"([01]\.\d{3})")),
        ("minigpt_v2", 100, r"\{<N><N><N><N>\}".replace("N", r"(\d{1,3})")),
    ],
)
@given(box=boxes(st.floats(-0.5, 1.5)))
def test_what_is_written_is_within_half_a_unit_of_the_last_decimal(dialect, steps, pattern, box):
    written = BOX_FORMATS[dialect].format(box)
    units = [int(number.replace(".", "")) for number in re.fullmatch(pattern, written).groups()]
    np.testing.assert_allclose(units, box.clip(0, 1) * steps, rtol=0, atol=0.5 + 1e-9)
    np.testing.assert_allclose(BOX_FORMATS[dialect].parse(written), np.array(units) / steps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "text, box",
    [
        ("{<12><34><56><78>}", [0.12, 0.34, 0.56, 0.78]),
        ("It is { <0> < 0 ><100>\n<007> }. {<1><2><3><4>}", [0, 0, 1, 0.07]),
        ("{{<1><2><3>} {<5><5><5><5>}", [0.05, 0.05, 0.05, 0.05]),
    ],
)
def test_parse_minigpt_v2_accepts(text, box):
    assert parse_minigpt_v2(text).tolist() == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "{<1><2><3>}",
        "{<1><2><3><4>",
        "<1><2><3><4>}",
        "{<1><2><3><4><5>}",
        "{1 2 3 4}",
        "{<1>,<2>,<3>,<4>}",
        "[0.1, 0.2, 0.3, 0.4]",
        "{<0.1><0.2><0.3><0.4>}",
        "{<-1><2><3><4>}",
        "{<+1><2><3><4>}",
        "{<1><2><3><0004>}",
        "{<0><0><101><1>}",
        "{<1><2><3><101>}",
        "{<5><2><3><4>}",
        "{<1><5><3><4>}",  # outside, inverted
        "{<5><2><3><4>} {<1><2><3><4>}",  # the first box is the answer, even where it is invalid
        "{<١><٢><٣><٤>}",  # digits, but not ASCII
    ],
)
def test_parse_minigpt_v2_rejects(text):
    assert parse_minigpt_v2(text) is None


@pytest.mark.parametrize("unit_text", ["{", "{<1>", "{<", "<1>", "1", " ", "{ ", "{<1 ", "{<1><2><3><4>", "{ < 1 > "])
def test_parse_minigpt_v2_takes_linear_time(unit_text):
    start = time.process_time()
    parse_minigpt_v2("{<1>" + unit_text * 50_000)
    assert time.process_time() - start < 1
