"""`python -m analysis ask`: answers as the engine gives them, kept tokens where they are, any picture, clear errors."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import __main__ as cli
from analysis.engine.evaluate import cells
from analysis.rec.scoring import PREDICTION, score
from analysis.tools import ask
from analysis.types import Cell
from tests.support.checkpoint import noise
from tests.support.rows import Noise, run

IDS = ["original", "compact", "shuffled:0.5", "original+cache"]


def test_answers_are_the_engines(tiny, tmp_path):
    data = Noise(images=2)
    grid = [*cells("none"), *cells(["random", "prumerge", "trim"], 0.5, ["method", "shuffled"], IDS, 3)]
    rows = score(run(tiny, tmp_path / "rows.parquet", grid, data)).set_index(["sent_id", *Cell().columns()])
    for image_id, sent_id, expression in data.rows[["image_id", "sent_id", "expression"]].itertuples(index=False):
        short = type(tiny)(**vars(tiny) | {"max_new_tokens": 6})
        for answer in ask.answers(short, data.image(image_id), expression, grid, image_id):
            columns = answer.cell.columns() | {"keep": answer.cell.keep if answer.cell.keep else np.nan}
            row = rows.loc[(sent_id, *columns.values())]
            assert (answer.raw, answer.tokens, answer.tokens_full) == (row["raw"], row["tokens"], row["tokens_full"])
            assert (answer.box is None) == row["invalid"]
            if answer.box is not None:
                np.testing.assert_array_equal(answer.box, row[PREDICTION].to_numpy(float))


@pytest.mark.parametrize("size", [(40, 40), (64, 24), (31, 52)])
def test_what_is_bright_is_what_was_kept(size, tiny, monkeypatch):
    """Pixel by pixel: its place in the padded square, and the token that reads that place."""
    image = noise(*size)
    seen = []
    monkeypatch.setattr(ask, "reorder", lambda selection, *_: seen.append(selection) or selection)
    answer = ask.answers(tiny, image, "cup", cells("prumerge", 0.4))[0]
    [selection] = seen
    kept = set(selection.origin[~selection.synthetic].tolist())
    side = max(size)
    left, top = ((side - length) // 2 for length in size)
    for y in range(size[1]):
        for x in range(size[0]):
            row, column = (int((place + 0.5) * 4 / side) for place in (y + top, x + left))
            assert answer.shown[y, x] == (4 * row + column in kept), (x, y)
    [place] = selection.origin[selection.synthetic].tolist()
    x, y = answer.merged[0]
    assert (int((y + top) * 4 / side), int((x + left) * 4 / side)) == divmod(place, 4)


def test_pictures_and_expressions_come_from_the_line_or_from_a_csv(tmp_path):
    for name in ("a.png", "b.png"):
        noise(8, 8).save(tmp_path / name)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert ask.pairs([a, b, "left mug"]) == [(tmp_path / "a.png", "left mug"), (tmp_path / "b.png", "left mug")]
    table = pd.DataFrame({"note": [1, 2], "expression": ["a, b", "NA"], "image": ["a.png", b]})
    table.to_csv(tmp_path / "c.csv", index=False, encoding="utf-8-sig")
    assert ask.pairs([str(tmp_path / "c.csv")]) == [(tmp_path / "a.png", "a, b"), (tmp_path / "b.png", "NA")]
    (tmp_path / "d.csv").write_text("picture,text\n")
    (tmp_path / "e.csv").write_text("image,expression\n")
    (tmp_path / "f.csv").write_bytes(b"\xff\xfe\0")
    for asked, error, message in [
        ([a], ValueError, "give pictures and an expression"),
        ([a, " "], ValueError, "is empty"),
        (["left mug", a], FileNotFoundError, "left mug is not there; the expression comes last"),
        ([str(tmp_path / "z.csv")], FileNotFoundError, "z.csv is not there"),
        ([str(tmp_path / "d.csv")], ValueError, "columns image and expression; it has: picture, text"),
        ([str(tmp_path / "e.csv")], ValueError, "holds no rows"),
        ([str(tmp_path / "f.csv")], ValueError, "is no CSV file"),
    ]:
        with pytest.raises(error, match=message):
            ask.pairs(asked)


def test_the_command_on_a_phones_picture(tiny_folder, tmp_path, monkeypatch, capsys):
    """Lying in the file, upright for a viewer: the model gets it upright, and its box is in an upright picture."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(64, 48).save("phone.jpg", exif=exif)
    (tmp_path / "broken.jpg").write_text("no picture")
    given = [
        "ask",
        "phone.jpg",
        "red $cat_$",
        "--model",
        str(tiny_folder),
        "--ids",
        "original,compact",
        "--keep",
        "0.5",
    ]
    sizes = []
    answers = ask.answers
    monkeypatch.setattr(
        ask, "answers", lambda model, image, *rest: sizes.append(image.size) or answers(model, image, *rest)
    )
    assert cli.main([*given, "--pruner", "random", "trim:anchor=last"]) == 0
    assert sizes == [(48, 64)]
    said = capsys.readouterr().out
    for part in ("unpruned", "16 of 16", "random 50 %, original IDs", "trim:anchor=last 50 %, compact IDs", "8 of 16"):
        assert part in said
    first = (tmp_path / "boxes.png").read_bytes()
    assert cli.main(given) == 0 and (tmp_path / "boxes-2.png").is_file()
    assert (tmp_path / "boxes.png").read_bytes() == first
    assert cli.main([*given[:2], "broken.jpg", *given[2:], "--out", "mine.pdf"]) == 1
    assert (tmp_path / "mine.pdf").is_file() and "broken.jpg: cannot identify" in capsys.readouterr().err
    for more, message in [
        (["--pruner", "randon"], "did you mean 'random'"),
        (["--keep", "2"], "keep ratio must be in"),
        (["--keep", "a"], "could not convert string to float: 'a'"),
        (["--ids", "gap"], "unknown IDs 'gap'"),
        (["--model", "tiny-lava"], "did you mean 'tiny-llava'"),
        (["--pruner", "trim", "--keep", "none", "--model", "tiny-minigpt-v2"], "offers no signal 'clip_prompt'"),
    ]:
        assert cli.main([*given, *more]) == 2 and message in capsys.readouterr().err


def test_tiles_are_shown_where_there_are_any(tiny):
    """A grid with newlines after a whole view: every token of the tiles lies where its index says."""
    import torch

    from analysis.types import Selection, Signals, VisualTokens

    tiles = VisualTokens(torch.zeros(1, 6, 2), (2, 3), Signals(), newline=torch.zeros(2))
    visual = VisualTokens(torch.zeros(1, 4, 2), (2, 2), Signals(), tiles=tiles)
    origin = torch.tensor(
        [0, 3, 4 + 0, 4 + 3, 4 + 6, 4 + 7]
    )  # two of the whole view; tiles (0, 0), newline, (1, 2), newline
    selection = Selection(torch.zeros(6, 2), origin, torch.zeros(6, dtype=torch.bool))
    shown, merged = ask.kept_pixels(tiny, (30, 20), visual, selection)
    expected = np.zeros((20, 30))
    expected[:10, :10] = expected[10:, 20:] = 1
    np.testing.assert_array_equal(shown, expected)
    assert len(merged) == 0


def test_the_table_says_what_was_said_where_there_is_no_box():
    answer = ask.Answer(Cell(), "a cat", "", None, 4, 16, np.ones((2, 2), np.float32), np.empty((0, 2)))
    row = json.loads(ask.table([(ask.Path("a.png"), "cat", [answer])]).to_json(orient="records"))[0]
    assert row["box"] == "none: 'a cat'" and row["setting"] == "unpruned" and row["tokens"] == "4 of 16"
