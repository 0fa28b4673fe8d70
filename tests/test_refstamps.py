"""RefStamps: deterministic, unambiguous, and no evaluation scene near training."""

import hashlib
import re

import numpy as np
import pytest

from analysis.rec import datasets
from analysis.rec.scoring import check_boxes
from analysis.refstamps import grammar
from analysis.refstamps.scenes import (
    FIRST,
    OVERLAP,
    SECOND,
    SPLITS,
    covered,
    heldout_region,
    heldout_stamps,
    is_eval_combination,
    region,
    scene,
)
from analysis.refstamps.stamps import colours, nouns, plural, stamps

VAL = [scene("val", i) for i in range(80)]


def test_enough_to_say():
    assert len(nouns()) >= 24
    assert {s.kind for s in stamps()} == {"animate", "thing"}


@pytest.mark.parametrize(
    ("edition", "splits", "expected"),
    [
        (FIRST, SPLITS[:-1], "6afda6fb268d1757fa9fe25684a8839887bea52468b80c847c2ea6f434e1342a"),
        (SECOND, SPLITS, "0c67ee491df4d8ff2126409bd699fb17e0b90c1c51615ec72528dca43e17d614"),
    ],
    ids=["first", "second"],
)
def test_scenes_are_the_same_on_every_machine(edition, splits, expected):
    digest = hashlib.sha256()
    for split in splits:
        for index in range(3):
            drawn = scene(split, index, edition=edition)
            digest.update(repr((drawn.size, [(o.stamp.file, o.box) for o in drawn.objects])).encode())
            digest.update(drawn.image.tobytes())
            for name in grammar.SETS:
                digest.update(repr(grammar.expressions(drawn, name)).encode())
    assert digest.hexdigest() == expected


def test_heldout_stamps_are_shown_only_in_their_split():
    kept = {stamps()[i].file for i in heldout_stamps()}
    assert 10 < len(kept) < len(stamps()) / 4
    for split in SPLITS[:-1]:
        shown = {o.stamp.file for i in range(25) for o in scene(split, i, edition=SECOND).objects}
        assert not shown & kept
    for i in range(25):
        files = [o.stamp.file in kept for o in scene("stamps", i, edition=SECOND).objects]
        assert files[0] and not any(files[1:])
    with pytest.raises(ValueError, match="holds no stamps out"):
        scene("stamps", 0)


def test_sizes_go_from_4_3_to_3_4_and_boxes_are_tight_and_hardly_overlap():
    shapes = {s.size for s in VAL}
    assert (192, 144) in shapes and (192, 192) in shapes and (144, 192) in shapes
    for drawn in VAL:
        boxes = [o.box for o in drawn.objects]
        for i, box in enumerate(boxes):
            assert 0 <= box[0] < box[2] <= drawn.size[0] and 0 <= box[1] < box[3] <= drawn.size[1]
            assert all(covered(box, other) <= OVERLAP for other in boxes[:i])


def test_no_combination_of_stamps_is_shared_by_training_and_evaluation():
    """Stronger than no twin: whatever the mirroring, scaling or layout, the stamps themselves never come together."""
    combination = {
        split: {tuple(sorted(o.stamp.file for o in scene(split, i).objects)) for i in range(40)}
        for split in SPLITS[:-1]
    }
    index = {s.file: i for i, s in enumerate(stamps())}
    for split, seen in combination.items():
        assert all(is_eval_combination([index[f] for f in files]) == (split != "train") for files in seen)


def test_heldout_pairs_stand_only_in_their_split():
    for split in ("train", "val", "testA", "testB", "test"):
        for i in range(25):
            drawn = scene(split, i)
            assert all(region(o.x, o.y, drawn.size) != heldout_region(o.noun) for o in drawn.objects)
    for i in range(25):
        drawn = scene("heldout", i)
        inside = [region(o.x, o.y, drawn.size) == heldout_region(o.noun) for o in drawn.objects]
        assert inside[0] and not any(inside[1:])


def test_a_and_b_hold_their_kinds():
    for split, kind in (("testA", "animate"), ("testB", "thing")):
        assert {o.stamp.kind for i in range(20) for o in scene(split, i).objects} == {kind}


# An independent reading of an expression: from its text alone, by the plain meaning of its words.


def named(objects, words):
    """Objects that "brown dog" or "thing" names."""
    *colour, noun = words.split()
    return [o for o in objects if noun in ("thing", o.noun) and (not colour or o.colour == colour[0])]


def stands(obj, relation, anchor):
    return {
        "left of": obj.x < anchor.x,
        "right of": obj.x > anchor.x,
        "above": obj.y < anchor.y,
        "below": obj.y > anchor.y,
    }[relation]


def referents(objects, text):
    if match := re.fullmatch(r"the (.+) that is (.+)", text):
        fits = named(objects, match[1])
        for clause in match[2].split(" and "):
            relation, anchor = re.fullmatch(r"(left of|right of|above|below) the (.+)", clause).groups()
            (anchor,) = named(objects, anchor)
            fits = [o for o in fits if stands(o, relation, anchor)]
        return fits
    if match := re.fullmatch(r"(.+) (left of|right of|above|below) the (.+)", text):
        (anchor,) = named(objects, match[3])
        return [o for o in named(objects, match[1]) if stands(o, match[2], anchor)]
    if match := re.fullmatch(r"(second|third) (.+) from the (left|right)", text):
        ranked = sorted(named(objects, match[2]), key=lambda o: o.x, reverse=match[3] == "right")
        return [ranked[{"second": 1, "third": 2}[match[1]]]]
    if match := re.fullmatch(r"(largest|smallest) (.+)", text):
        ranked = sorted(named(objects, match[2]), key=lambda o: o.area)
        assert len(ranked) > 1
        return [ranked[-1 if match[1] == "largest" else 0]]
    if match := (
        re.fullmatch(r"(?P<side>left|right|top|bottom) (?P<name>.+)", text)
        or re.fullmatch(r"(?P<name>.+) (on the far|on the|at the) (?P<side>left|right|top|bottom)", text)
    ):
        key = {"left": lambda o: o.x, "right": lambda o: -o.x, "top": lambda o: o.y, "bottom": lambda o: -o.y}
        fits = sorted(named(objects, match["name"]), key=key[match["side"]])
        assert len(fits) > 1
        return fits[:1]
    return named(objects, text)


@pytest.mark.parametrize("name", grammar.SETS)
def test_every_expression_has_exactly_one_referent(name):
    said = 0
    for drawn in VAL:
        for target, by_kind in grammar.phrases(drawn, name).items():
            for text in sum(by_kind.values(), []):
                found = referents(drawn.objects, text)
                assert found == [drawn.objects[target]], (drawn.index, text)
                said += 1
    assert said > 200


def test_plus_has_no_location_word_and_the_others_do():
    def words(name):
        return {w for drawn in VAL for text, _ in grammar.expressions(drawn, name) for w in text.split()}

    assert not words("refstamps+") & grammar.LOCATION_WORDS
    assert words("refstamps") & grammar.LOCATION_WORDS and words("refstampsg") & grammar.LOCATION_WORDS


def test_refstamps_val_is_shaped_like_refcoco_val():
    data = datasets.load("refstamps", "val", limit=80)
    check_boxes(data.rows)
    assert data.rows.image_id.nunique() == 80
    assert 6 <= len(data.rows) / 80 <= 8
    assert not data.rows.duplicated(["image_id", "expression"]).any()
    assert data.image(data.rows.image_id[0]).size == tuple(data.rows.loc[0, ["width", "height"]])
    long = datasets.load("refstampsg", "val", limit=40).rows.expression.str.split().str.len().mean()
    assert long > 2 * data.rows.expression.str.split().str.len().mean()


@pytest.mark.parametrize("bad", [("refcocoo", "val", None), ("refstamps", "testC", None), ("refstamps", "val", 0)])
def test_bad_requests_say_what_is_right(bad):
    with pytest.raises(ValueError, match="refstamps|has: val|at least 1"):
        datasets.load(*bad)


def test_questions_hold_their_answers():
    rng = np.random.default_rng(0)
    tasks = set()
    for drawn in VAL:
        for task, question, answer in grammar.questions(drawn, rng, 10):
            tasks.add(task)
            if task == "colour":
                assert answer in colours()
            if task == "presence":
                noun = question.split()[3]
                assert (answer == "yes") == any(o.noun == noun for o in drawn.objects)
            if task == "count":
                assert answer in grammar.NUMBERS
            if task == "describe":
                assert answer.split()[-1] in nouns()
    assert tasks == set(grammar.TASKS)


def test_control_questions_are_answered_right_and_presence_is_balanced():
    rows = datasets.load("refstamps-control", "val", 40).rows
    presence = rows[rows["task"] == "presence"]
    assert presence["answer"].value_counts().to_dict() == {"yes": 40, "no": 40}
    assert not rows.duplicated(["image_id", "ref_id", "sent_id"]).any()
    for image_id, question, task, answer in rows[["image_id", "expression", "task", "answer"]].itertuples(index=False):
        drawn = scene("val", int(image_id.split("_")[1])).objects
        words = question.rstrip("?").split()
        if task == "presence":
            assert (answer == "yes") == any(obj.noun in words for obj in drawn), question
        elif task == "colour":
            (obj,) = [obj for obj in drawn if obj.noun == words[-1]]
            assert answer == obj.colour
        else:
            count = sum(plural(obj.noun) == words[2] for obj in drawn)
            assert answer == grammar.NUMBERS[count]
