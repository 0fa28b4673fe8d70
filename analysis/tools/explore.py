"""Explore: one picture and one expression under any selection, order and IDs. What a change leaves alone is not redone.

`notebooks/00_explore.ipynb` shows a `Board`; the rest of this module works without one. Needs the extra "notebooks".

    explorer = Explorer()
    explorer.show(image, "val_00000")
    draw(explorer.view("tiny-llava", "left dog", Cell("fastervlm", 0.25, ids="original+cache"))).savefig("seen.png")
"""

from __future__ import annotations

import html
import io
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from analysis import models, style
from analysis.engine.attention import captured
from analysis.engine.decode import Context, Inputs, PromptInputs, greedy, hidden_states, joined, prefill_shared
from analysis.engine.decode import prompt_inputs as prompt_parts
from analysis.engine.evaluate import box_draft, check_cells, image_seed, texts
from analysis.models import Model
from analysis.positions import assign, parse_spec, reorder
from analysis.pruning import all_pruners
from analysis.pruning import pruner as find_pruner
from analysis.pruning.images import prune_images
from analysis.rec.boxes import BOX_FORMATS, frame, iou
from analysis.rec.pictures import read_picture
from analysis.tools import ask
from analysis.types import Cell, RecDataset, Selection, VisualTokens

T = TypeVar("T")

SCREEN = 6.0  # inches of the drawing in a board, which shows them as wide as there is room
LONGEST = 480  # pixels of a picture's longer side in the drawing
REMEMBERED = 32  # settings of a picture whose answers are kept
FIRST = Cell("fastervlm", 0.25, ids="original")  # what a board shows if it is told nothing else
HEAT = colormaps["YlOrRd"]

# What the menus offer; the notebook's parameters take any specification, and add theirs.
ORDERS = ("method", "raster", "shuffled:0.25", "shuffled:0.5", "shuffled")
IDS = (
    "original",
    "compact",
    "compact:0.5",
    "compressed:0.5",
    "shifted:20",
    "shuffled:0.25",
    "shuffled",
    "stretched",
    "prefix",
)
IDS_IN_PLANES = ("sequential", "regrid", "shuffled_rows", "shuffled_columns")  # of models that rotate by several IDs
TEXT = {"the rule's own": "", "after the last kept": "@after", "original": "@original", "compact": "@compact"}
GENERATED = {"go on after the text": "", "original": "+original", "counted by the cache": "+cache"}


class Seen(NamedTuple):
    """What a model says in one cell, and where it looked.

    answer: `shown` in pixels of the thumbnail, `box` and `merged` in the picture's; attention: [H, W] float32, at each
    pixel of the thumbnail the share that its token has of the attention to the image, for each answered token the
    query that chose it, mean over these, layers and heads, None without an answer; to_image: the image's share of all
    attention; seconds: of prefill and answer.
    """

    answer: ask.Answer
    attention: NDArray[np.float32] | None
    to_image: float
    seconds: float


class View(NamedTuple):
    """All that is shown of one setting: unpruned, pruned with compact, with original, and with the chosen IDs.

    thumbnail: [H, W, 3] in 0..1; size: width, height of the picture; truth: [4] x1, y1, x2, y2 in its pixels, where it
    is known; done: seconds of each step that was not remembered; new: how many cells were answered now.
    """

    model: str
    image_id: str
    expression: str
    thumbnail: NDArray[np.float32]
    size: tuple[int, int]
    seen: list[Seen]
    truth: NDArray[np.float64] | None
    done: dict[str, float]
    new: int


def _remembered(store: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """store[key], made where it is not there; the least recently used beyond `REMEMBERED` go."""
    store[key] = store.pop(key) if key in store else make()
    if len(store) > REMEMBERED:
        del store[next(iter(store))]
    return store[key]


@contextmanager
def _threads(name: str) -> Iterator[None]:
    """Within, one thread for an embedded model: two have no use for so small a one, and wait for each other for seconds
    where something else runs as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if name in models.MODELS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attention_to_image(
    model: Model, prompt: PromptInputs, context: Context, answer: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """[K] shares of the attention to the K visual tokens, and the image's share of all attention.

    As `attention.look`: teacher-forced over the answer of T >= 1 tokens, the query of each is the token before it; mean
    over these, layers and heads. context: the prompt up to the image's end, prefilled.
    """
    said = torch.tensor(answer, dtype=torch.int64, device=prompt.image.embeds.device)
    ids = prompt.after.next_id + torch.arange(len(said), device=said.device)
    planes = prompt.after.position_ids.shape[1:]
    ids = ids.view(-1, *[1] * len(planes)).expand(-1, *planes)
    with captured(model.decoder) as seen:
        hidden_states(model.decoder, [joined(prompt.after, Inputs(model.embed(said), ids))], "right", context)
    first, end = len(prompt.before.embeds), len(prompt.before.embeds) + len(prompt.image.embeds)
    alpha = torch.stack(seen).mean(dim=0)[0, -len(said) - 1 : -1, first:end].mean(dim=0).cpu()
    return alpha / alpha.sum(), float(alpha.sum())


class Explorer:
    """What stays in memory between changes: models, and of one picture its tokens, selections and answers."""

    def __init__(self, device: str | None = None):
        self.device, self.image, self.image_id = device, None, ""
        self._models: dict[str, Model] = {}
        self._encoded, self._selected, self._seen = {}, {}, {}

    def model(self, name: str) -> Model:
        """Loaded once. Raises as `models.load`, and ValueError for a model that the engine cannot run."""
        if name not in self._models:
            loaded = models.load(name, device=self.device)
            if not isinstance(loaded, Model):
                raise ValueError(
                    f"{name} is answered for by generate alone, whose attention is not seen here; "
                    f"{', '.join(models.MODELS)}, LLaVA, LLaVA-NeXT and Qwen2.5-VL can be explored"
                )
            self._models[name] = loaded
        return self._models[name]

    def show(self, image: Image.Image, image_id: str) -> None:
        """Take a picture (RGB), and forget the last one. image_id: seeds what is random, as in `evaluate`."""
        if image is not self.image:
            self.image, self.image_id = image, image_id
            self._encoded, self._selected, self._seen = {}, {}, {}

    def encoded(self, name: str) -> VisualTokens:
        """The picture's tokens, encoded once for a model. Raises ValueError for a picture that it cannot read."""
        if name not in self._encoded:
            model = self.model(name)
            model.layout(self.image.size)
            self._encoded[name] = model.encode([self.image])
        return self._encoded[name]

    def _select(self, name: str, expression: str, cell: Cell) -> Selection:
        def make() -> Selection:
            model, visual = self.model(name), self.encoded(name)
            asked = visual.take(torch.tensor([0], device=model.device), **model.texts([expression]))
            seed = image_seed(cell.seed, self.image_id)
            try:
                return prune_images(find_pruner(cell.pruner), asked, cell.keep, [seed])[0]
            except (ValueError, AttributeError, OSError) as error:
                raise ValueError(
                    f"pruner {cell.pruner!r} cannot run on {name} with keep {cell.keep}: {error}"
                ) from error

        return _remembered(self._selected, (name, expression, cell.pruner, cell.keep, cell.seed), make)

    def _answer(self, name: str, expression: str, cell: Cell, small: tuple[int, int]) -> Seen:
        """What the model says; each cell alone, so that it does not depend on which others are remembered."""
        model, visual = self.model(name), self.encoded(name)
        seed = image_seed(cell.seed, self.image_id)
        selection = reorder(self._select(name, expression, cell), cell.order, seed)
        ids = assign(selection.origin, visual.unpruned, cell.ids, seed)
        start = time.perf_counter()
        prompt = prompt_parts(model.embed, model.prompt(expression), selection.features, ids)
        context = prefill_shared(model.decoder, [joined(prompt.before, prompt.image)], [0])
        [tokens] = said = greedy(model, [prompt.after], context, draft=box_draft(model))
        seconds = time.perf_counter() - start
        [raw], [error] = texts(model, said)
        box = BOX_FORMATS[model.box_format].parse(raw)
        if box is not None:
            box = frame(model.frame).decode(box, self.image.size)
        kept, merged = ask.kept_pixels(model, small, visual, selection)
        merged = merged * np.divide(self.image.size, small)
        answer = ask.Answer(cell, raw, error, box, len(selection.origin), len(visual.unpruned.visual), kept, merged)
        if not tokens:
            return Seen(answer, None, float("nan"), seconds)
        alpha, share = attention_to_image(model, prompt, context, tokens)
        return Seen(answer, ask.spread(model, small, visual, selection.origin, alpha), share, seconds)

    def view(self, name: str, expression: str, cell: Cell, truth: Sequence[float] | None = None) -> View:
        """The picture that was shown last under a cell and what it is compared with, see `View`.

        Raises ValueError for an empty expression and for a cell that cannot run, and what a model or a pruner raises.
        """
        if not expression.strip():
            raise ValueError("the expression is empty: type what to find, such as left dog")
        if self.image is None:
            raise ValueError("there is no picture yet: show one")
        check_cells([cell])
        unpruned = Cell(ids="original")  # its order and seed change nothing
        same = [replace(cell, ids=ids) for ids in ("compact", "original")]
        grid = list(dict.fromkeys([unpruned, *same, cell]))
        thumbnail = self.image.copy()
        thumbnail.thumbnail((LONGEST, LONGEST))
        chosen = (name, expression, cell.pruner, cell.keep, cell.seed)
        steps = (
            ("model loaded", self._models, name, lambda: self.model(name)),
            ("picture encoded", self._encoded, name, lambda: self.encoded(name)),
            ("tokens selected", self._selected, chosen, lambda: self._select(name, expression, cell)),
        )
        done: dict[str, float] = {}
        with torch.inference_mode(), _threads(name):
            for what, store, key, do in steps:
                start, known = time.perf_counter(), key in store
                do()
                if not known:
                    done[what] = time.perf_counter() - start
            new = sum((name, expression, one) not in self._seen for one in grid)
            seen = [
                _remembered(
                    self._seen, (name, expression, one), lambda: self._answer(name, expression, one, thumbnail.size)
                )
                for one in grid
            ]
        return View(
            model=name,
            image_id=self.image_id,
            expression=expression,
            thumbnail=np.asarray(thumbnail, dtype=np.float32) / 255,
            size=self.image.size,
            seen=seen,
            truth=None if truth is None else np.asarray(truth, dtype=float),
            done=done,
            new=new,
        )


def _kind(cell: Cell) -> str:
    return "unpruned" if cell.pruner == "none" else cell.ids


def _colours(view: View) -> dict[str, str]:
    """Of each kind of IDs, as in every figure, and one more for what was chosen besides."""
    known = style.COLOURS | {"unpruned": style.COLOURS["full"]}
    kinds = [_kind(one.answer.cell) for one in view.seen]
    return {kind: known.get(kind, style.COLOURS["permuted"]) for kind in kinds}


def _name(kind: str, width: float) -> str:
    """A panel's name, in lines of so many inches; a specification is broken before its rules of text and answer."""
    name = {"unpruned": "unpruned", "original": "original IDs (GAP)"}.get(kind, f"{kind} IDs")
    return "\n".join(style.wrap(name.replace("@", " @").replace("+", " +"), width, 8, "bold"))


def _overlap(view: View, one: Seen) -> float | None:
    """IoU with the truth, None where that is unknown; an answer that is no box has 0."""
    if view.truth is None:
        return None
    return 0.0 if one.answer.box is None else float(iou(one.answer.box, view.truth))


def _outline(axis: Axes, box: NDArray, colour: str, line: str = "-") -> None:
    x1, y1, x2, y2 = box
    for edge, width, dashes in (("white", 2.4, "-"), (colour, 1.0, line)):  # a white rim shows on any picture
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, lw=width, ls=dashes))


def _heat(axis: Axes, view: View, attention: NDArray[np.float32], most: float) -> None:
    """Attention in colour over the picture in pale grey; what gets none, as dropped tokens do, stays grey."""
    grey = 0.55 + 0.45 * view.thumbnail.mean(axis=2, keepdims=True)
    strength = np.sqrt(np.clip(attention / most, 0, 1))[..., None]  # the root, so that weak attention is seen, too
    pixels = grey * (1 - 0.85 * strength) + 0.85 * strength * HEAT(strength[..., 0])[..., :3]
    axis.imshow(pixels, extent=(0, view.size[0], view.size[1], 0), interpolation="nearest")


def setting(view: View) -> str:
    """What the panels have in common, in a line: expression, picture, model and cell."""
    cell, said = view.seen[-1].answer.cell, " ".join(view.expression.split())
    said = said if len(said) <= 60 else f"{said[:59]}…"
    order = "" if cell.order == "method" else f", {cell.order} order"
    return (
        f"“{said}” in {view.image_id}, {view.model}; {style.pruner_label(cell.pruner)}, {100 * cell.keep:g} % "
        f"kept{order}, seed {cell.seed}"
    )


def draw(view: View, width: float = style.PAGE) -> Figure:
    """Above: kept tokens bright, and the box of each IDs; below: the attention to the image while answering.

    width: inches. The figure is not pyplot's, so that nothing has to be closed.
    """
    count, colours, rim = len(view.seen), _colours(view), ask.MARGIN * max(view.size)
    wide, high = (side + 2 * rim for side in view.size)
    gap, title, heads = 0.08, 0.3, [0.36, 0.24]  # inches: between panels, above them, above each row
    side = (width - gap) / count - gap
    names = [_name(_kind(one.answer.cell), side) for one in view.seen]
    heads[0] += 0.13 * max(name.count("\n") for name in names)
    tall = min(side * high / wide, 1.5 * side)
    lines = style.wrap(setting(view).replace("$", r"\$"), width - 0.2, 8)  # dollars start no formula
    most = max([float(one.attention.max()) for one in view.seen if one.attention is not None], default=1.0)
    below = f"Coloured: attention to the image while answering; the darkest token gets {100 * most:.0f} % of it."
    if view.truth is not None:
        below += " Dotted: ground truth."
    if any(len(one.answer.merged) for one in view.seen):
        below += " Dots: tokens that stand for several."
    notes = style.wrap(below, width - 0.2)
    title += 0.14 * (len(lines) - 1)
    height = title + sum(heads) + 2 * tall + 0.1 + 0.13 * len(notes)
    figure = Figure(figsize=(width, height))
    plain = dict(fontsize=style.SMALLEST)
    figure.text(0.1 / width, 1 - 0.06 / height, "\n".join(lines), va="top", **plain | dict(fontsize=8))
    figure.text(0.1 / width, 0.05 / height, "\n".join(notes), va="bottom", **plain)
    for column, (name, one) in enumerate(zip(names, view.seen)):
        answer, kind = one.answer, _kind(one.answer.cell)
        left, upper = gap + column * (side + gap), height - title - heads[0] - tall
        places = [(left, y, side, tall) for y in (upper, upper - heads[1] - tall)]
        above, under = (figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in places)
        ask.draw_panel(above, view.thumbnail, view.size, [answer], {kind: (colours[kind], "-")})
        above.set_title("")
        for note in above.texts:
            note.set_text("no box")  # whose, stands above it
        overlap = "" if view.truth is None else f", IoU {_overlap(view, one):.2f}"
        tokens = f"{answer.tokens}/{answer.tokens_full} tokens{overlap}"
        x, top = left / width, (upper + tall) / height
        figure.text(x, top + 0.19 / height, name, color=colours[kind], weight="bold", **plain | dict(fontsize=8))
        figure.text(x, top + 0.05 / height, tokens, **plain)
        if one.attention is None:
            under.text(0.5, 0.5, "no answer", transform=under.transAxes, ha="center", **plain)
        else:
            _heat(under, view, one.attention, most)
            share = f"image: {100 * one.to_image:.0f} % of all attention"
            figure.text(x, (upper - heads[1] + 0.05) / height, share, **plain)
            if answer.box is not None:
                _outline(under, answer.box, colours[kind])
        for axis in (above, under):
            if view.truth is not None:
                _outline(axis, view.truth, "black", ":")
            axis.set(xlim=(-rim, view.size[0] + rim), ylim=(view.size[1] + rim, -rim), aspect="equal", anchor="NW")
            axis.axis("off")
    return figure


def table(view: View) -> pd.DataFrame:
    """One row for each panel: tokens, box in whole pixels, IoU where the truth is known, the model's words, seconds."""
    rows = []
    for one in view.seen:
        answer = one.answer
        box = "none" if answer.box is None else " ".join(f"{side:.0f}" for side in answer.box)
        row = dict(IDs=_kind(answer.cell), tokens=f"{answer.tokens} of {answer.tokens_full}", box=box)
        if view.truth is not None:
            row["IoU"] = f"{_overlap(view, one):.2f}"
        rows.append(row | {"answer": answer.error or answer.raw, "seconds": f"{one.seconds:.2f}"})
    return pd.DataFrame(rows)


def _html(shown: pd.DataFrame) -> str:
    """The table with its looks at each cell: JupyterLab drops a sheet of styles, and has its own for tables."""
    look = 'style="text-align: left; vertical-align: top; padding: 0 14px 0 0; line-height: 1.5"'
    written = shown.to_html(index=False, border=0)  # escapes what the model said
    return written.replace("<td>", f"<td {look}>").replace("<th>", f"<th {look}>")


def times(view: View, whole: float) -> str:
    """What was done for a view and how long it took; whole: seconds, drawing included."""
    done = [f"{what} in {seconds:.2g} s" for what, seconds in view.done.items()]
    return f"{whole:.2f} s in all: {', '.join([*done, f'{view.new} of {len(view.seen)} answers new'])}"


def reason(error: Exception) -> str:
    """What is wrong, in one line; of errors that nobody has worded for a person, their type as well."""
    worded = isinstance(error, ValueError | OSError | MemoryError | AttributeError)
    said = " ".join(str(error).split())
    said = said if worded and said else f"{type(error).__name__}: {said}".rstrip(": ")
    return said if len(said) <= 400 else f"{said[:399]}…"


def read_photo(name: str, content: bytes | Path) -> Image.Image:
    """A photo as a viewer shows it. Raises ValueError, naming it, where it cannot be read."""
    try:
        return read_picture(io.BytesIO(content) if isinstance(content, bytes) else content)
    except UnidentifiedImageError as error:  # its message names the buffer
        raise ValueError(f"{name} is no picture: JPEG, PNG, WebP, TIFF and others can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that PIL raises
        raise ValueError(f"{name} cannot be read: {error}") from error


def _parts(ids: str) -> tuple[str, str, str]:
    """A specification of IDs as the three menus have it: "original@after+cache" is "original", "@after", "+cache"."""
    parse_spec(ids)
    rest, plus, generated = ids.partition("+")
    rest, at, text = rest.partition("@")
    return rest, at + text, plus + generated


def _with(options: Sequence[str], value: str) -> list[str]:
    return list(dict.fromkeys([*options, value]))


class Board(widgets.VBox):
    """The controls, and below or beside them what they lead to; every change of one redraws.

    explorer: what remembers; data: a data set whose scenes can be picked; model, scene (its place), expression (None:
    the scene's first), cell: what is shown first; photo: a file that is shown instead of a scene. Errors are shown as
    one line. view: what is shown now, None after an error, which `wrong` then says.
    """

    def __init__(
        self,
        explorer: Explorer,
        data: RecDataset,
        *,
        model: str = "tiny-llava",
        scene: int = 0,
        photo: str | Path | None = None,
        expression: str | None = None,
        cell: Cell = FIRST,
    ):
        check_cells([cell])
        self.explorer, self.data, self.view, self.wrong, self._held = explorer, data, None, "", True
        self._ids = list(data.rows["image_id"].unique())
        if not 0 <= scene < len(self._ids):
            raise ValueError(f"scene is a place in 0..{len(self._ids) - 1}, got {scene}; a larger limit loads more")
        look = dict(style={"description_width": "76px"}, layout=widgets.Layout(width="310px"))
        late = look | dict(continuous_update=False)
        rule, text, generated = _parts(cell.ids)
        menu = widgets.Dropdown
        self.scene = widgets.IntSlider(value=scene, max=len(self._ids) - 1, description="scene", **late)
        self.photo = widgets.FileUpload(accept="image/*", description="or a photo", layout=look["layout"])
        self.expression = widgets.Combobox(placeholder="what to find", description="expression", **late)
        self.model = menu(options=_with(list(models.MODELS), model), value=model, description="model", **look)
        self.pruner = menu(options=_with(all_pruners(), cell.pruner), value=cell.pruner, description="pruner", **look)
        self.keep = widgets.FloatSlider(
            value=cell.keep,
            min=min(0.02, cell.keep),
            max=1,
            step=0.01,
            readout_format=".0%",
            description="keep",
            **late,
        )
        self.seed = widgets.IntSlider(value=cell.seed, max=max(20, cell.seed), description="seed", **late)
        self.order = menu(options=_with(ORDERS, cell.order), value=cell.order, description="order", **look)
        self.rule = menu(options=_with(IDS, rule), value=rule, description="visual IDs", **look)
        self.text = menu(options=TEXT, value=text, description="text IDs", **look)
        self.generated = menu(options=GENERATED, value=generated, description="decode IDs", **look)
        self.said, self.answers = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout=widgets.Layout(width="100%", max_width="960px"))
        controls = [self.scene, self.photo, self.expression, self.model, self.pruner, self.keep, self.seed]
        controls += [self.order, self.rule, self.text, self.generated]
        shown = widgets.VBox([self.said, self.picture, self.answers], layout=widgets.Layout(flex="1 1 420px"))
        flow = widgets.Layout(flex_flow="row wrap", align_items="flex-start", width="100%")
        super().__init__([widgets.Box([widgets.VBox(controls), shown], layout=flow)])
        if photo is None:
            self._take_scene(expression)
        else:
            self._source = (read_photo(Path(photo).name, Path(photo)), Path(photo).stem, None)
            self.expression.value = expression or ""
        self._held = False
        self.scene.observe(lambda _: self._update(self._take_scene), "value")
        self.photo.observe(lambda _: self._update(self._take_photo), "value")
        for control in controls[2:]:
            control.observe(lambda _: self._update(), "value")
        self._update()

    @property
    def cell(self) -> Cell:
        """What the controls say."""
        ids = self.rule.value + self.text.value + self.generated.value
        return Cell(self.pruner.value, round(self.keep.value, 6), self.order.value, ids, self.seed.value)

    def _take_scene(self, expression: str | None = None) -> None:
        image_id = self._ids[self.scene.value]
        rows = self.data.rows[self.data.rows["image_id"] == image_id]
        self._source = (read_picture(self.data.image(image_id)), str(image_id), rows)
        said = list(rows["expression"].unique())
        self.expression.options = said
        self.expression.value = said[0] if expression is None else expression

    def _take_photo(self) -> None:
        if self.photo.value:
            one = self.photo.value[-1]
            self._source = (read_photo(one["name"], bytes(one["content"])), Path(one["name"]).stem, None)
            self.expression.options = []

    def _truth(self) -> NDArray[np.float64] | None:
        """The box of a scene's own expression, in pixels."""
        rows = self._source[2]
        if rows is None or "x1" not in rows:
            return None
        found = rows.loc[rows["expression"] == self.expression.value, ["x1", "y1", "x2", "y2"]]
        return None if found.empty else found.iloc[0].to_numpy(float)

    def _update(self, first: Callable[[], Any] = lambda: None) -> None:
        """Do what a control asks for first, then show what all of them say; an error is one line."""
        if self._held:
            return
        start = time.perf_counter()
        self.said.value = "<i>working ...</i>"
        try:
            with self._holding():
                first()
                image, image_id, _ = self._source
                self.explorer.show(image, image_id)
            self.view = self.explorer.view(self.model.value, self.expression.value, self.cell, self._truth())
            self.picture.value = png(draw(self.view, SCREEN))
            with self._holding():
                planes = self.explorer.encoded(self.model.value).unpruned.visual.dim() == 2
                self.rule.options = _with(IDS + IDS_IN_PLANES * planes, self.rule.value)
            self.answers.value = _html(table(self.view))
            note, colour, self.wrong = times(self.view, time.perf_counter() - start), "inherit", ""
        except Exception as error:  # a person's own pruner can raise anything, and a widget would swallow it
            self.view, note, colour = None, reason(error), "var(--jp-error-color1, #d32f2f)"
            self.wrong = note
        for shown in (self.picture, self.answers):
            shown.layout.visibility = "visible" if self.view else "hidden"
        self.said.value = f'<span style="color: {colour}">{html.escape(note)}</span>'

    @contextmanager
    def _holding(self):
        """Within, changes of controls redraw nothing."""
        self._held = True
        try:
            yield
        finally:
            self._held = False


def png(figure: Figure, dpi: int = 160) -> bytes:
    """A figure for the screen."""
    written = io.BytesIO()
    figure.savefig(written, dpi=dpi, format="png", pil_kwargs=dict(compress_level=1))  # 40 % faster, 10 % larger
    return written.getvalue()
