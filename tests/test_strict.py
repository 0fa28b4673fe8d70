"""Strict parsing: 2,000 answers a dialect, most of them malformed, counted as the script counts them that is named.

The references below say again, one answer at a time and without the library, what lmms-eval's utils_rec.py, Shikra's
rec.py and MiniGPT-4's eval_ref.py do with an answer.
"""

import re
import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from analysis.rec.boxes import BOX_FORMATS, FRAMES
from analysis.rec.scoring import TRUTH, score

N = 2000
FRAME = {"llava": "original", "shikra": "padded", "minigpt_v2": "resized"}  # in which the script compares
JUNK = [" ", "  ", "\n", "<unk>", "-", "+", ".", ",", ";", "[", "]", "{", "}", "<", ">", "0", "1", "7", "٣", "e", "1.5"]


def truths(n, rng):
    """Images of which the longer side is 1,000 pixels, and boxes of whole pixels in them."""
    size = np.full((n, 2), 1000)
    size[np.arange(n), rng.integers(0, 2, n)] = 2 * rng.integers(50, 501, n)
    low = (rng.uniform(0, 0.6, (n, 2)) * size).astype(int)
    high = np.minimum(low + (rng.uniform(0.1, 0.5, (n, 2)) * size).astype(int) + 1, size)
    return size, np.concatenate([low, high], 1).astype(float)


def mangled(text, kind, rng, another):
    """An answer spoilt in one of the ways in which models spoil theirs."""
    cut = int(rng.integers(len(text) + 1))
    match kind:
        case 0:
            return text
        case 1:
            return text[:cut]
        case 2:
            return text[:cut] + rng.choice(JUNK) + text[cut:]
        case 3:
            return text[:cut] + text[cut + 1 :]
        case 4:
            return f"It is at {text}."
        case 5:
            return f"{text} and {another}"
        case 6:
            return re.sub(r"[.,<\[{]", lambda found: found[0] + " ", text)
        case 7:
            return f"{text} 2" if rng.random() < 0.5 else f"{text} dogs"
        case 8:
            return text.replace("0.", ".").replace("<", "<0") if rng.random() < 0.5 else text.replace("0.", "1.")
        case 9:
            return f" <unk>{text}</s> "
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    if kind == 10 and len(numbers) > 3:  # inverted
        return text.replace(numbers[0], numbers[2], 1)
    return text.replace("[", "[-", 1) if rng.random() < 0.3 else text.replace("]", f";{another[1:]}")


def answers(dialect, size, truth, rng):
    near = truth + rng.normal(0, 1, truth.shape) * rng.choice([5, 60, 200], (len(truth), 1))
    boxes = FRAMES[FRAME[dialect]].encode(near, size)
    texts = [BOX_FORMATS[dialect].format(box) for box in boxes]
    kinds = np.arange(len(texts)) % 12
    return [mangled(text, kind, rng, texts[i - 1]) for i, (text, kind) in enumerate(zip(texts, kinds))]


# ------------------------------------------------------------------------------------------- what the scripts do


def plain_iou(a, b, extra=0):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + extra for i in (0, 1))
    overlap = max(0, width) * max(0, height)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    union = sum(areas) - overlap
    return overlap / union if union else 0.0


def lmms_eval(text, size, truth):
    number = r"-?\d+(\.\d+)?"
    starts = [place for place, letter in enumerate(text) if letter == "["]
    for start in starts:  # the first list that holds, from left to right
        for end in [place for place, letter in enumerate(text) if letter == "]" and place > start]:
            parts = text[start + 1 : end].split(",")
            if len(parts) != 4:
                continue
            parts = [part.lstrip() for part in parts[:3]] + [parts[3].strip()]
            if all(re.fullmatch(number, part) for part in parts):
                box, (width, height) = [float(part) for part in parts], size
                return plain_iou([truth[0] / width, truth[1] / height, truth[2] / width, truth[3] / height], box) >= 0.5
    return False


def shikra(text, size, truth):
    found = []
    for inside in re.findall(r"\[([^\[\]]*)\]", text):
        boxes = [one.split(",") for one in inside.split(";")]
        digits = all(re.fullmatch(r"\d(\.\d*)?", number) for box in boxes for number in box)
        if digits and all(len(box) == 4 for box in boxes):
            found.append(boxes)
    if len(found) != 1 or len(found[0]) != 1:
        return False
    side = max(size)
    offset = [(side - length) // 2 for length in size] * 2
    padded = [(value + shift) / side for value, shift in zip(truth, offset)]  # three decimals hold it: 1,000 pixels
    return plain_iou([1000 * float(number) for number in found[0][0]], [1000 * value for value in padded]) > 0.5


def minigpt_4(text, size, truth):
    text = text.replace("<unk>", "").replace(" ", "").strip()
    pieces = text.split(">")[:4]
    starts = ["{<", "<", "<", "<"]
    if len(text.split(">")) < 6 - 1 or not all(
        piece.startswith(start) and re.fullmatch(r"\d{1,3}", piece.removeprefix(start))
        for piece, start in zip(pieces, starts)
    ):
        return False
    if not text.startswith(">".join(pieces) + ">}"):
        return False
    runs = [a for a, b in pairwise([*text, " "]) if a.isdecimal() and not b.isdecimal()]  # ends of whole numbers
    if len(runs) != 4:
        return False
    (width, height), numbers = size, [int(piece.lstrip("{<")) for piece in pieces]
    box = [numbers[0] / 100 * width, numbers[1] / 100 * height, numbers[2] / 100 * width, numbers[3] / 100 * height]
    return plain_iou(box, truth, 1) > 0.5


SCRIPTS = {"llava": lmms_eval, "shikra": shikra, "minigpt_v2": minigpt_4}


def table(dialect, seed=0):
    rng = np.random.default_rng(seed)
    size, truth = truths(N, rng)
    said = answers(dialect, size, truth, rng)
    return pd.DataFrame(
        dict(ref_id=range(N), width=size[:, 0], height=size[:, 1], raw=said, dialect=dialect, frame=FRAME[dialect])
        | dict(zip(TRUTH, truth.T))
    )


@pytest.mark.parametrize("dialect", FRAME)
def test_strict_is_the_script(dialect):
    rows = table(dialect)
    scored = score(rows, parsing="strict")
    expected = [
        SCRIPTS[dialect](row.raw, (row.width, row.height), [row.x1, row.y1, row.x2, row.y2])
        for row in rows.itertuples()
    ]
    wrong = rows["raw"][scored["correct"].to_numpy() != np.array(expected)].tolist()
    assert not wrong
    assert 0.1 < np.mean(expected) < 0.6  # neither reading accepts or refuses all
    lenient = score(rows)["correct"]
    assert lenient.mean() > scored["correct"].mean() + 0.02  # and the choice between them matters


@pytest.mark.parametrize(
    "dialect, text, box",
    [
        ("llava", "so: [ 0.1, 0.2,0.3,\n0.4 ] [0, 0, 1, 1]", [0.1, 0.2, 0.3, 0.4]),
        ("llava", "[0.5, 0.2, 1.5, -0.25]", [0.5, 0.2, 1.5, -0.25]),  # as they are
        ("llava", "[1., 0.2, 0.3, 0.4] [0, 0, 1, 1]", [0, 0, 1, 1]),  # the first one that can be read
        ("llava", "[.1, 0.2, 0.3, 0.4]", None),
        ("llava", "[0.1 , 0.2, 0.3, 0.4]", None),
        ("llava", "[+0.1, 0.2, 0.3, 0.4]", None),
        ("shikra", "Answer: [0.100,0.2,3.,1] .", [0.1, 0.2, 3, 1]),
        ("shikra", "Answer: [0.1, 0.2, 0.3, 0.4] .", None),
        ("shikra", "[0.1,0.2,0.3,0.4;0.1,0.2,0.3,0.4]", None),
        ("shikra", "[0.1,0.2,0.3,0.4] [0.1,0.2,0.3,0.4]", None),
        ("shikra", "[10,0.2,0.3,0.4]", None),
        ("minigpt_v2", " {<1 0><20>< 30><4>} dogs", [0.1, 0.2, 0.3, 0.04]),
        ("minigpt_v2", "{<90><20><30><999>}", [0.9, 0.2, 0.3, 9.99]),
        ("minigpt_v2", "It is {<10><20><30><40>}", None),
        ("minigpt_v2", "{<10><20><30><40>} 2 dogs", None),
        ("minigpt_v2", "{<10><20>\n<30><40>}", None),
        ("minigpt_v2", "{<10><20><30><40>", None),
    ],
)
def test_strict_by_hand(dialect, text, box):
    found = BOX_FORMATS[dialect].strict(text)
    assert (found if found is None else found.tolist()) == box


@pytest.mark.parametrize("dialect", BOX_FORMATS)
def test_what_a_model_is_trained_to_write_is_read_alike(dialect):
    for box in np.random.default_rng(0).uniform(0, 0.5, (50, 4)) + [0, 0, 0.5, 0.5]:
        text, kind = BOX_FORMATS[dialect].format(box), BOX_FORMATS[dialect]
        np.testing.assert_allclose(kind.strict(text), kind.parse(text), rtol=0, atol=1e-15)


def test_an_unknown_parsing_is_told_what_is_right():
    with pytest.raises(ValueError, match="unknown parsing 'strikt'; did you mean 'strict'"):
        score(table("llava")[:1], parsing="strikt")


@pytest.mark.parametrize("dialect", BOX_FORMATS)
@pytest.mark.parametrize("text", ["[", "[0", "[0.1,", "0", " ", "[ ", "{<1>", ";", "[0.1,0.1,0.1,0.1;", "<unk>"])
def test_strict_takes_linear_time(dialect, text):

    start = time.process_time()
    BOX_FORMATS[dialect].strict(text * 50_000)
    assert time.process_time() - start < 1
