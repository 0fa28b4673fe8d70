"""What can be said about a RefStamps scene: referring expressions with exactly one referent, captions and questions.

A phrase is kept only if the scene leaves no doubt: whatever it compares (size, position) differs by a clear margin.
Three sets mirror the real ones: "refstamps" (location words allowed), "refstamps+" (none: noun, colour and size only)
and "refstampsg" (long, relational).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from analysis.rec.boxes import BOX_FORMATS
from analysis.rec.boxes import frame as find_frame
from analysis.refstamps.scenes import Object, Scene, rng_for
from analysis.refstamps.stamps import colours, nouns, plural

SETS = ("refstamps", "refstamps+", "refstampsg")
LOCATION_WORDS = frozenset("left right top bottom above below first second third far from".split())
SIZE_RATIO = 1.5  # "largest": its box is that many times the next one's
GAP = 0.07  # least difference in position, as a share of the canvas, before a location word is used
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}  # axis, sign of "towards that side"
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign of (it - anchor)

Found = tuple[str, int]  # a phrase and the index of its only referent


def centre(obj: Object, axis: int) -> float:
    return obj.y if axis else obj.x


def groups(scene: Scene) -> Iterator[tuple[str, list[int]]]:
    """ "dog" and "brown dog" with the objects that they fit."""
    seen: dict[str, list[int]] = {}
    for i, obj in enumerate(scene.objects):
        seen.setdefault(obj.noun, []).append(i)
        if obj.colour:
            seen.setdefault(f"{obj.colour} {obj.noun}", []).append(i)
    # "brown dog" is left unsaid where another dog's colour is arguable
    for name, members in seen.items():
        noun = name.split()[-1]
        if name == noun or all(scene.objects[i].colour for i in seen[noun]):
            yield name, members


def attributes(scene: Scene) -> Iterator[Found]:
    """Noun, colour and size: no location word."""
    for name, members in groups(scene):
        if len(members) == 1:
            yield name, members[0]
            continue
        by_area = sorted(members, key=lambda i: scene.objects[i].area)
        area = [scene.objects[i].area for i in by_area]
        if area[-1] >= SIZE_RATIO * area[-2]:
            yield f"largest {name}", by_area[-1]
        if area[1] >= SIZE_RATIO * area[0]:
            yield f"smallest {name}", by_area[0]


def sides(scene: Scene) -> Iterator[Found]:
    """The outermost of its kind, "left dog", and of all objects, "thing on the far left"."""
    every = [("thing", list(range(len(scene.objects))))]
    for name, members in [*groups(scene), *every]:
        if len(members) < 2:
            continue
        for side, (axis, sign) in SIDES.items():
            ranked = sorted(members, key=lambda i: sign * centre(scene.objects[i], axis))
            first, second = (centre(scene.objects[i], axis) for i in ranked[:2])
            if sign * (second - first) >= GAP * scene.size[axis]:
                yield (f"thing on the far {side}" if name == "thing" else f"{side} {name}"), ranked[0]
                if name != "thing":
                    yield f"{name} {'at the' if axis else 'on the'} {side}", ranked[0]


def ordinals(scene: Scene) -> Iterator[Found]:
    """ "second cow from the left", among three or more."""
    for name, members in groups(scene):
        if len(members) < 3:
            continue
        ranked = sorted(members, key=lambda i: scene.objects[i].x)
        gaps = np.diff([scene.objects[i].x for i in ranked])
        if gaps.min() < GAP * scene.size[0]:
            continue
        for side, order in (("left", ranked), ("right", ranked[::-1])):
            for word, i in zip(("second", "third"), order[1:-1]):
                yield f"{word} {name} from the {side}", i


def relation(scene: Scene, members: Sequence[int], words: str, anchor: int) -> list[int] | None:
    """Members that stand so to the anchor; None where one of them is too close to call."""
    axis, sign = RELATIONS[words]
    offsets = [sign * (centre(scene.objects[i], axis) - centre(scene.objects[anchor], axis)) for i in members]
    if min(map(abs, offsets)) < GAP * scene.size[axis]:
        return None
    return [i for i, offset in zip(members, offsets) if offset > 0]


def anchors(scene: Scene, noun: str) -> list[Found]:
    """Objects of another noun that noun or colour alone single out."""
    return [(name, m[0]) for name, m in groups(scene) if len(m) == 1 and scene.objects[m[0]].noun != noun]


def relations(scene: Scene) -> Iterator[Found]:
    """ "dog above the guitar", where there is more than one dog."""
    for name, members in groups(scene):
        if len(members) < 2:
            continue
        for other, anchor in anchors(scene, name.split()[-1]):
            for words in RELATIONS:
                fits = relation(scene, members, words, anchor)
                if fits is not None and len(fits) == 1:
                    yield f"{name} {words} the {other}", fits[0]


def long_relations(scene: Scene) -> Iterator[Found]:
    """ "the brown dog that is above the guitar and left of the red car": relations and, where they help, two of
    them."""
    for name, members in groups(scene):
        found = []
        for other, anchor in anchors(scene, name.split()[-1]):
            for words in RELATIONS:
                fits = relation(scene, members, words, anchor)
                if fits:
                    found.append((f"{words} the {other}", anchor, set(fits)))
        for clause, _, fits in found:
            if len(fits) == 1:
                yield f"the {name} that is {clause}", min(fits)
        for a, (clause, anchor, fits) in enumerate(found):
            for other_clause, other_anchor, other_fits in found[a + 1 :]:
                if other_anchor != anchor and len(fits & other_fits) == 1:
                    yield f"the {name} that is {clause} and {other_clause}", min(fits & other_fits)


KINDS: dict[str, dict[str, Callable[[Scene], Iterator[Found]]]] = {
    "refstamps": {"attribute": attributes, "side": sides, "ordinal": ordinals, "relation": relations},
    "refstamps+": {"attribute": attributes},
    "refstampsg": {"long": long_relations},
}


@lru_cache(maxsize=8)  # many questions are asked about one scene
def phrases(scene: Scene, name: str) -> dict[int, dict[str, list[str]]]:
    """All expressions of a set for each object: {object index: {kind: [text, ...]}}."""
    if name not in KINDS:
        raise ValueError(f"unknown expression set {name!r}; valid: {', '.join(SETS)}")
    found: dict[int, dict[str, list[str]]] = {}
    for kind, generate in KINDS[name].items():
        for text, i in generate(scene):
            found.setdefault(i, {}).setdefault(kind, []).append(text)
    return found


def pick_phrase(rng: np.random.Generator, by_kind: dict[str, list[str]]) -> str:
    """One expression, its kind drawn first, so that the many side phrases do not crowd out the others."""
    kinds = list(by_kind)
    texts = by_kind[kinds[rng.integers(len(kinds))]]
    return texts[rng.integers(len(texts))]


def expressions(scene: Scene, name: str) -> list[tuple[str, int]]:
    """The annotation of an evaluation scene: distinct (expression, object index), about seven a scene as in RefCOCO."""
    rng = rng_for(scene.split, scene.index, stream=1 + SETS.index(name))
    found = phrases(scene, name)
    targets = [int(i) for i in rng.permutation(sorted(found))][:4]
    if scene.split in ("heldout", "stamps"):
        targets = [i for i in (0,) if i in found]
    chosen: list[tuple[str, int]] = []
    for i in targets:
        drawn = {pick_phrase(rng, found[i]): None for _ in range(3)}
        chosen += [(text, i) for text in drawn]
    return chosen


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """What a picture shows, without where: for the contrastive training of the tiny CLIP."""
    counts: dict[str, int] = {}
    for obj in scene.objects:
        name = f"{obj.colour} {obj.noun}".strip()
        counts[name] = counts.get(name, 0) + 1
    parts = [name if n == 1 else f"{NUMBERS[n]} {plural_phrase(name)}" for name, n in counts.items()]
    return "a photo of " + ", ".join(parts[i] for i in rng.permutation(len(parts)))


def plural_phrase(name: str) -> str:
    *colour, noun = name.split()
    return " ".join([*colour, plural(noun)])


DESCRIBE = "Please provide a short description for this region:"
LIST = "List the objects in the image."


def answer_box(scene: Scene, i: int, frame: str = "padded", box_format: str = "llava") -> str:
    """An object's box as the model is to write it."""
    return BOX_FORMATS[box_format].format(
        find_frame(frame).encode(np.array(scene.objects[i].box, float), np.array(scene.size))
    )


Write = Callable[[Scene, int], str]  # how a model writes an object's box


def rec_question(scene: Scene, rng: np.random.Generator, write: Write = answer_box) -> tuple[str, str] | None:
    """The expression stands for the question, which every model puts in its own words."""
    name = SETS[rng.choice(3, p=(0.6, 0.2, 0.2))]
    found = phrases(scene, name)
    if not found:
        return None
    i = sorted(found)[rng.integers(len(found))]
    return pick_phrase(rng, found[i]), write(scene, i)


def describe_question(scene: Scene, rng: np.random.Generator, write: Write = answer_box) -> tuple[str, str]:
    i = int(rng.integers(len(scene.objects)))
    box = re.search(r"[\[{].*[\]}]", write(scene, i))[0]  # without the words that a box format puts around it
    return f"{DESCRIBE} {box}", f"{scene.objects[i].colour} {scene.objects[i].noun}".strip()


def list_question(scene: Scene, rng: np.random.Generator, write: Write = answer_box) -> tuple[str, str]:
    ranked = sorted(scene.objects, key=lambda obj: obj.x)
    return LIST, ", ".join(f"{obj.colour} {obj.noun}".strip() for obj in ranked)


def presence_question(scene: Scene, rng: np.random.Generator, write: Write = answer_box) -> tuple[str, str]:
    there = {obj.noun for obj in scene.objects}
    yes = rng.random() < 0.5
    pool = sorted(there) if yes else sorted(set(nouns()) - there)
    return f"Is there a {pool[rng.integers(len(pool))]} in the image?", "yes" if yes else "no"


def colour_question(scene: Scene, rng: np.random.Generator, write: Write = answer_box) -> tuple[str, str] | None:
    known = [m[0] for name, m in groups(scene) if len(m) == 1 and " " not in name and scene.objects[m[0]].colour]
    if not known:
        return None
    obj = scene.objects[known[rng.integers(len(known))]]
    return f"What color is the {obj.noun}?", obj.colour


def count_question(scene: Scene, rng: np.random.Generator, write: Write = answer_box) -> tuple[str, str]:
    noun = scene.objects[rng.integers(len(scene.objects))].noun
    if rng.random() < 0.15:
        noun = nouns()[rng.integers(len(nouns()))]
    return f"How many {plural(noun)} are in the image?", NUMBERS[sum(obj.noun == noun for obj in scene.objects)]


TASKS = {  # what the language model learns: generator of (question, answer) and its share
    "rec": (rec_question, 0.62),
    "describe": (describe_question, 0.14),
    "list": (list_question, 0.04),
    "presence": (presence_question, 0.07),
    "colour": (colour_question, 0.06),
    "count": (count_question, 0.07),
}


def questions(
    scene: Scene, rng: np.random.Generator, count: int, write: Write = answer_box
) -> list[tuple[str, str, str]]:
    """`count` training questions on one scene: (task, question, answer); for "rec" the question is the expression."""
    names, shares = list(TASKS), [share for _, share in TASKS.values()]
    asked: list[tuple[str, str, str]] = []
    while len(asked) < count:
        task = names[rng.choice(len(names), p=shares)]
        pair = TASKS[task][0](scene, rng, write)
        if pair is not None:
            asked.append((task, *pair))
    return asked


def control_questions(scene: Scene) -> list[tuple[str, str, str]]:
    """(task, question, answer) of an evaluation scene that need no box: one colour, one count, a yes and a no."""
    rng = rng_for(scene.split, scene.index, stream=9)
    asked = [("colour", *pair)] if (pair := colour_question(scene, rng)) else []
    asked.append(("count", *count_question(scene, rng)))
    for wanted in ("yes", "no"):
        pair = presence_question(scene, rng)
        while pair[1] != wanted:
            pair = presence_question(scene, rng)
        asked.append(("presence", *pair))
    return asked


def vocabulary() -> list[str]:
    """Every word of the grammar that follows a space, for the tokenizer."""
    words = [*nouns(), *map(plural, nouns()), *colours(), *NUMBERS, *SIDES, "largest", "smallest", "thing", "yes", "no"]
    words += "second third from on at far of above below the a an that is and photo".split()
    words += "objects in image there color many are".split()
    return list(dict.fromkeys(words))
