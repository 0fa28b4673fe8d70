"""Sentences for captions, made of the rows and of the models' own files, so that they fit whatever rows come."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import ROOT
from analysis.rec.boxes import BOX_FORMATS
from analysis.stats import EXPRESSION_ID

CHECKPOINTS = ROOT / "analysis" / "checkpoints"
INTERVALS = (
    "Intervals are 95 %: Wilson's for the effective number of expressions, since those about one image are alike."
)
DATASETS = {
    "refstamps": "RefStamps",
    "refstamps+": "RefStamps+",
    "refstampsg": "RefStampsg",
    "refstamps-control": "RefStamps' control questions",
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCO+",
    "refcocog": "RefCOCOg",
}
RULES = {"ge": "IoU ≥ 0.5", "gt": "IoU > 0.5", "plus_one": "IoU > 0.5 of boxes one pixel larger"}
_WORDS = "no one two three four five six seven eight nine ten".split()


def count(number: int, what: str) -> str:
    """ "three models", "1 image", "12 splits": small numbers in words, and the plural."""
    word = _WORDS[number] if 1 < number < len(_WORDS) else f"{number:,}"
    return f"{word} {what}{'' if number == 1 else 's'}"


def listed(names: Iterable[Any]) -> str:
    """ "a", "a and b", "a, b and c"."""
    names = [str(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def data(rows: pd.DataFrame) -> str:
    """Which models on which data, with n: "tiny-llava on RefStamps val: 3,812 expressions, 500 images."

    Columns read: model, dataset, split, image_id, ref_id, sent_id.
    """
    splits = rows[["dataset", "split"]].drop_duplicates()
    order = [*DATASETS, "val", "testA", "testB", "test"]
    splits = splits.sort_values(["dataset", "split"], key=lambda names: names.map({n: i for i, n in enumerate(order)}))
    sets = listed(
        f"{DATASETS.get(name, name)} {listed(part['split'])}" for name, part in splits.groupby("dataset", sort=False)
    )
    names = ["dataset", "split", *EXPRESSION_ID]
    each = rows[["model", *names]].drop_duplicates().groupby("model", sort=False)
    sizes = {name: (len(part), len(part[["dataset", "split", "image_id"]].drop_duplicates())) for name, part in each}
    told = {name: f"{n:,} expressions, {images:,} images" for name, (n, images) in sizes.items()}
    if len(set(told.values())) == 1:
        each = " for each model" if len(told) > 1 else ""
        return f"{listed(told)} on {sets}: {next(iter(told.values()))}{each}."
    return f"{listed(told)} on {sets}: {'; '.join(f'{name} {said}' for name, said in told.items())}."


def scoring(rows: pd.DataFrame, parsing: str) -> str:
    """When an answer is right, and how it was read. Columns read: dialect. parsing: as given to `rec.scoring.score`."""
    rules = list(dict.fromkeys(RULES[BOX_FORMATS[name].convention] for name in rows["dialect"].unique()))
    how = {
        "lenient": "a box counts wherever the answer has one (lenient parsing)",
        "strict": "answers are read as the model's own published script reads them (strict parsing)",
    }
    return (
        f"Acc@0.5 counts {listed(rules)}{' (each model its own)' * (len(rules) > 1)}; "
        f"{how.get(parsing, parsing)}, an answer without one is a miss."
    )


def level(chances: pd.Series) -> str:
    """What the chance line is, from `rec.chance.chances`: "Chance, 1.4 %: ..."."""
    low, high = (f"{100 * value:.1f}" for value in (chances.min(), chances.max()))
    return (
        f"Chance is {low if low == high else f'{low} to {high}'} %: the right box of an expression about another image."
    )


def _facts(folder: Path) -> dict[str, Any]:
    """What a model's own files say of how it was made; only what they do say."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.get("text_config", config), config.get("vision_config", {})
    theta = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta"))
    found = {"begun": config.get("begun"), "positions": "no" if vision.get("stem") else "learned"}
    if theta:
        found["base"] = f"{theta:,.0f}"
    if (folder / "log.csv").is_file():
        found["steps"] = int(pd.read_csv(folder / "log.csv")["step"].max())
    return found


def testbed(models: Iterable[str], folder: Path = CHECKPOINTS) -> str:
    """How the embedded models among these were made; empty where none is embedded.

    Reads config.json (rotary base, whether the tower has position embeddings, `begun`: the model that another began as)
    and log.csv (steps) of each one's folder.
    """
    facts = {name: _facts(folder / name) for name in models if (folder / name / "config.json").is_file()}
    if not facts:
        return ""
    towers = listed(dict.fromkeys(fact["positions"] for fact in facts.values()))
    bases = listed(dict.fromkeys(fact["base"] for fact in facts.values() if "base" in fact))
    text = (
        f"Testbed: {listed(facts)} {'are tiny models' if len(facts) > 1 else 'is a tiny model'} of the real classes, "
        f"trained on scenes composed of cut-out photographs; a vision tower with {towers} position "
        f"embeddings"
    )
    text += f", rotary base {bases}" if bases else ""
    steps = [f"{fact['steps']:,}" for fact in facts.values() if "steps" in fact]
    text += f", {' / '.join(steps)} steps" if steps else ""
    begun = {name: fact["begun"] for name, fact in facts.items() if fact["begun"]}
    text += "".join(f"; {name} began as {other}" for name, other in begun.items())
    return f"{text}. The numbers say nothing about the accuracy of a real model."


def points(difference: Mapping[str, float], scale: float = 100, digits: int = 1) -> str:
    """ "+1.2 [-0.3, 2.7]": a difference with its interval, from difference, low and high."""
    number, low, high = (scale * difference[name] for name in ("difference", "low", "high"))
    return f"{number:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def extremes(shares: Sequence[float], digits: int = 0) -> str:
    """ "12 to 75 %": lowest and highest of shares in 0..1, or the one."""
    low, high = (f"{100 * value:.{digits}f}" for value in (min(shares), max(shares)))
    return f"{low if low == high else f'{low} to {high}'} %"


def alternative_texts(markdown: str, captions: Path | None = None) -> str:
    """Markdown in which the alternative text of every picture figures/<name>.png is that figure's caption.

    captions: the folder of the .txt files, figures/ by default. A picture that has none is left as it is.
    """
    folder = captions or ROOT / "figures"

    def told(found: re.Match[str]) -> str:
        file = folder / f"{found['name']}.txt"
        if not file.is_file():
            return found[0]
        text = re.sub(r"([][\\])", r"\\\1", file.read_text().strip())
        return f"![{text}](figures/{found['name']}.png)"

    return re.sub(r"!\[(?:\\.|[^]\\])*\]\(figures/(?P<name>[\w+.-]+)\.png\)", told, markdown)


def main() -> None:
    """Put the captions of figures/ as alternative texts into Markdown files, such as README.md."""
    parser = argparse.ArgumentParser(prog="python -m analysis.drawing.captions", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files, changed in place")
    for file in parser.parse_args().files:
        file.write_text(alternative_texts(file.read_text()))


if __name__ == "__main__":
    main()
