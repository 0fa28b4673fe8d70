"""The explorer without a browser: answers as `ask` gives them, attention against a naive run, nothing done twice."""

import copy
import io
from datetime import datetime

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from analysis import style
from analysis.engine.decode import causal_mask, greedy, prompt_inputs
from analysis.engine.evaluate import image_seed
from analysis.positions import assign, parse_spec, reorder
from analysis.pruning import pruner
from analysis.pruning.images import prune_images
from analysis.tools import ask, explore
from analysis.types import Cell, RecDataset
from tests.support.checkpoint import noise
from tests.support.rows import Noise

CELLS = [
    Cell("random", 0.5, ids="original", seed=3),
    Cell("prumerge", 0.5, "shuffled", "original+cache", 3),
    Cell("trim", 0.25, "raster", "shifted:3@compact", 1),
]


@pytest.fixture
def model(tiny, monkeypatch):
    """The random model, whatever name is asked for; its answers are short."""
    short = type(tiny)(**vars(tiny) | {"max_new_tokens": 6})
    monkeypatch.setattr(explore.models, "load", lambda name, device=None: short)
    return short


@pytest.fixture
def explorer(model):
    made = explore.Explorer()
    made.show(noise(40, 31), "scene")
    return made


@pytest.fixture(scope="module", autouse=True)
def looks():
    style.paper_style()


@pytest.mark.parametrize("cell", CELLS)
def test_answers_are_those_of_ask(cell, model, explorer):
    view = explorer.view("tiny", "red cat", cell)
    ids = ["original", *dict.fromkeys(["compact", "original", cell.ids])]
    assert [one.answer.cell.ids for one in view.seen] == ids and view.seen[0].answer.cell.pruner == "none"
    expected = ask.answers(model, explorer.image, "red cat", [one.answer.cell for one in view.seen], "scene")
    for one, other in zip(view.seen, expected, strict=True):
        for name, value in one.answer._asdict().items():
            np.testing.assert_equal(value, getattr(other, name), name)


@pytest.mark.parametrize("cell", CELLS)
def test_attention_is_that_of_a_plain_run(cell, model, explorer):
    """All of prompt and answer at once, in transformers' own eager attention, read pixel by pixel."""
    seed = image_seed(cell.seed, "scene")
    visual = model.encode([explorer.image]).take(torch.tensor([0]), **model.texts(["red cat"]))
    [selection] = prune_images(pruner(cell.pruner), visual, cell.keep, [seed])
    selection = reorder(selection, cell.order, seed)
    ids = assign(selection.origin, visual.unpruned, cell.ids, seed)
    before, after = model.prompt("red cat")
    whole = prompt_inputs(model.embed, (before, after), selection.features, ids).whole
    one = next(one for one in explorer.view("tiny", "red cat", cell).seen if one.answer.cell == cell)
    said = torch.tensor(greedy(model, [whole])[0])
    assert model.text(said) == one.answer.raw and len(said) > 2

    plain = copy.deepcopy(model.decoder)
    plain.config._attn_implementation = "eager"
    weights = []
    for layer in plain.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    states = torch.cat([whole.embeds, model.embed(said)])
    places = torch.cat([whole.position_ids, whole.next_id + torch.arange(len(said))])
    with torch.inference_mode():
        plain(
            inputs_embeds=states[None],
            position_ids=places[None],
            attention_mask=causal_mask(torch.ones(1, len(states), dtype=torch.bool), states.dtype),
        )
    asking = slice(len(whole.embeds) - 1, len(states) - 1)
    to_image = torch.stack(weights)[:, 0, :, asking, len(before) : len(before) + len(ids.visual)].mean(dim=(0, 1, 2))
    assert one.to_image == pytest.approx(float(to_image.sum()), rel=1e-4)
    share = np.zeros(16)
    np.add.at(share, selection.origin.numpy(), (to_image / to_image.sum()).numpy())
    for y in range(31):
        for x in range(40):
            token = 4 * int((y + 4 + 0.5) / 10) + int((x + 0.5) / 10)  # 4 rows of padding above
            assert one.attention[y, x] == pytest.approx(share[token], rel=1e-4, abs=1e-7)


def test_only_what_a_change_concerns_is_done_again(model, explorer, monkeypatch):
    done = []

    def counted(where, name):
        plain = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given, **more: done.append(name) or plain(*given, **more))

    counted(explore, "prune_images"), counted(explore, "greedy"), counted(type(model), "encode")
    cell = CELLS[0]

    def counts(expression="red cat", cell=cell):
        done.clear()
        view = explorer.view("tiny", expression, cell)
        assert view.new == done.count("greedy") and ("picture encoded" in view.done) == ("encode" in done)
        return tuple(done.count(name) for name in ("encode", "prune_images", "greedy"))

    def changed(**more):
        return counts(cell=Cell(**cell.columns() | more))

    assert counts() == (1, 2, 3)
    assert counts() == (0, 0, 0)
    assert changed(ids="original+cache") == (0, 0, 1)
    assert changed(seed=4) == (0, 1, 2)
    assert changed(keep=0.25) == (0, 1, 2)
    assert changed(order="raster") == (0, 0, 2)
    assert counts("cup") == (0, 2, 3)
    assert counts() == (0, 0, 0)
    explorer.show(noise(40, 31, seed=1), "other")
    assert counts() == (1, 2, 3)


def test_what_is_remembered_is_bounded(explorer, monkeypatch):
    monkeypatch.setattr(explore, "REMEMBERED", 4)
    for seed in range(5):
        view = explorer.view("tiny", "cup", Cell("random", 0.5, ids="original", seed=seed))
    assert len(explorer._seen) == len(explorer._selected) == 4
    assert explorer.view("tiny", "cup", view.seen[-1].answer.cell).new == 0


@pytest.mark.parametrize("size", [(900, 200), (120, 700)])
def test_the_picture_can_be_read(size, explorer):
    """No text over another or beyond the edge; three panels and four, with and without the truth."""
    explorer.show(noise(*size), "a scene")
    expression = "a $x_$ that costs 5 $ \\ and " + "more words and " * 20
    long = Cell("random", 0.5, ids="compressed:0.5@compact+original")
    for cell, truth in ((CELLS[0], None), (long, [4, 5, 30, 25])):
        figure = explore.draw(explorer.view("tiny", expression, cell, truth), explore.SCREEN)
        assert style.faults(figure) == []
    assert Image.open(io.BytesIO(explore.png(figure))).width > 900


def test_the_table_holds_the_answers(explorer):
    view = explorer.view("tiny", "red cat", CELLS[1], [4, 5, 30, 25])
    shown = explore.table(view)
    assert shown["IDs"].tolist() == ["unpruned", "compact", "original", "original+cache"]
    assert shown["tokens"].tolist() == ["16 of 16"] + 3 * ["8 of 16"]
    assert shown["answer"].tolist() == [one.answer.raw for one in view.seen]
    assert (shown["IoU"][shown["box"] == "none"] == "0.00").all()


# ------------------------------------------------------------------------------------------------------- the board


@pytest.fixture
def board(model):
    data = Noise(images=3)
    data = RecDataset("noise", "val", data.rows, data.image, data.digest)
    return explore.Board(explore.Explorer(), data, model="tiny-llava", scene=1)


def uploaded(name, content):
    return ({"name": name, "type": "", "size": len(content), "content": content, "last_modified": datetime.now()},)


def saved(image, kind="png"):
    written = io.BytesIO()
    image.save(written, kind)
    return written.getvalue()


def test_each_control_says_its_part_and_draws(board):
    assert board.view.image_id == "1" and board.expression.value == "the red cat"
    assert board.cell == explore.FIRST and board.view.truth.tolist() == [1, 2, 20, 25]
    changes = dict(pruner="prumerge", keep=0.5, order="raster", seed=2, rule="compact:0.5", text="@after")
    pictures = [board.picture.value]
    for name, value in (changes | dict(generated="+cache")).items():
        getattr(board, name).value = value
        pictures.append(board.picture.value)
        assert board.view.seen[-1].answer.cell == board.cell and "s in all" in board.said.value
    assert board.cell == Cell("prumerge", 0.5, "raster", "compact:0.5@after+cache", 2)
    assert len(set(pictures)) == len(pictures) and "compact:0.5@after+cache" in board.answers.value
    board.expression.value = "blue dog"
    assert board.view.expression == "blue dog" and board.view.truth is None
    board.scene.value = 2
    assert (board.view.image_id, board.view.expression, board.view.size) == ("2", "the red cat", (40, 32))
    board.model.value = "tiny-shikra"
    assert board.view.model == "tiny-shikra"


def test_a_photo_is_shown_upright_and_a_scene_takes_its_place_again(board):
    exif = Image.Exif()
    exif[0x0112] = 6
    written = io.BytesIO()
    noise(64, 48).save(written, "jpeg", exif=exif)
    board.photo.value = uploaded("IMG 1.jpg", written.getvalue())
    assert (board.view.image_id, board.view.size, board.view.truth) == ("IMG 1", (48, 64), None)
    board.keep.value = 0.5
    assert board.view.image_id == "IMG 1" and "picture encoded" not in board.view.done
    board.scene.value = 0
    assert board.view.image_id == "0" and board.view.truth is not None


@pytest.mark.parametrize(
    "control, value, said",
    [
        ("expression", "  ", "the expression is empty: type what to find"),
        ("photo", uploaded("<b>.jpg", b"no picture"), "&lt;b&gt;.jpg is no picture"),
        ("photo", uploaded("torn.png", saved(noise(60, 60))[:900]), "torn.png cannot be read: "),
        ("photo", uploaded("long.png", saved(Image.new("L", (30000, 1)))), "30000 x 1 pixels is too long"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_next_change_goes_on(control, value, said, board):
    getattr(board, control).value = value
    assert said in board.said.value and "\n" not in board.said.value and "Error" not in board.said.value
    assert board.view is None and board.wrong and board.picture.layout.visibility == "hidden"
    board.scene.value = 0
    assert board.view.image_id == "0" and board.wrong == "" and board.picture.layout.visibility == "visible"


def test_a_pruner_that_fails_is_one_line(board, tmp_path):
    (tmp_path / "mine.py").write_text("def prune(visual, keep, *, seeds=()):\n    raise KeyError('a\\nb')\n")
    name = f"{tmp_path / 'mine.py'}:prune"
    board.pruner.options = [*board.pruner.options, name]
    board.pruner.value = name
    assert "KeyError" in board.said.value and "\n" not in board.said.value and board.view is None


def test_what_a_board_is_given_stands_in_its_menus(model, tmp_path):
    cell = Cell("trim:anchor=last", 0.013, "shuffled:1/3", "shifted:7@original+original", 99)
    data = Noise(images=1)
    noise(20, 30).save(tmp_path / "mine.png")
    given = dict(model="a/b", cell=cell, photo=tmp_path / "mine.png", expression="cup")
    made = explore.Board(explore.Explorer(), data, **given)
    assert made.cell == cell and made.view.model == "a/b" and made.view.image_id == "mine"
    for wrong, said in (
        (dict(scene=1), "scene is a place in 0..0, got 1"),
        (dict(photo=tmp_path / "none.png"), "none.png cannot be read"),
        (dict(cell=Cell("random", 2.0)), "keep ratio must be in"),
    ):
        with pytest.raises(ValueError, match=said):
            explore.Board(explore.Explorer(), data, **wrong)


def test_every_entry_of_the_menus_can_run(board, monkeypatch):
    monkeypatch.setattr(explore, "draw", lambda view, width: Figure((1, 1)))

    def shown():
        return [one.answer.cell for one in board.view.seen]

    for ids in explore.IDS:
        board.rule.value = ids
        assert board.wrong == "" and board.cell in shown()
    for control, values in (("text", explore.TEXT), ("generated", explore.GENERATED), ("order", explore.ORDERS)):
        for value in values.values() if isinstance(values, dict) else values:
            getattr(board, control).value = value
            assert board.wrong == "" and board.cell in shown()
    for ids in explore.IDS_IN_PLANES:
        parse_spec(ids)
