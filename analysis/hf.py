"""Pruning under transformers' own `generate`: three lines around a model, nothing else of one's code changes.

    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from analysis.hf import pruned

    model = LlavaForConditionalGeneration.from_pretrained(name).eval()
    processor = AutoProcessor.from_pretrained(name)
    question = "Please provide the bounding box coordinate of the region this sentence describes: " + expression
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for ids in ("compact", "original"):
        with pruned(model, processor, "fastervlm", keep=0.25, ids=ids):
            out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(ids, processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

`generate` keeps its own books at full length: prompts, `max_length`, logits processors and the shape of the output
stay as they are. The cut happens where the text decoder is called. Its input loses the pruned tokens, the rest is
padded on the left and given the IDs of the cell; its output is brought back to full length, where a dropped token
shows the state of the last kept one before it. While decoding, the IDs go on from each row's own last one.

What is special to a model is which of its tokens are whose (`models.towers`). Its layers are touched only where tokens
are dropped, or IDs change, inside the decoder (`hf_stages`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from analysis.engine.decode import for_decoder
from analysis.engine.stages import Shown, layer_mean
from analysis.hf_stages import Inside
from analysis.models import clip as clips
from analysis.models.towers import TOWERS, offers
from analysis.positions import ORDERS, assign, by_layer, parse_spec, reads_truth, reorder
from analysis.pruning import Pruner, all_pruners
from analysis.pruning import pruner as find_pruner
from analysis.pruning.images import staged_images
from analysis.types import Cell, Ids, Selection, Signals, Stage, VisualTokens

_ACTIVE: WeakSet[nn.Module] = WeakSet()  # models that a `pruned` block is changing now
KERNELS = ("sdpa", "eager")  # of the decoder's attention


class _Placed(NamedTuple):
    """One run of visual tokens. unpruned: its IDs before pruning; selection, ids: after it, in physical order, as the
    decoder's first layer reads them; drops: what happens to them inside; seed: of the cell, for this prompt."""

    unpruned: Ids
    selection: Selection
    ids: Ids
    drops: list[Stage]
    seed: int


class _Row(NamedTuple):
    """What the decoder reads of one row. source: [K] the place of each token in the full row; embeds: [K, D]; ids: [K]
    or [K, planes]; next_id: of the first generated token; words: tokens before the first image."""

    source: Tensor
    embeds: Tensor
    ids: Tensor
    next_id: int
    words: int


class _Cut(NamedTuple):
    """The last prefill. valid: [B, K] which places of the cache are tokens; next_id: [B]; planes: of IDs, 0 for none;
    back: [B, L] the place in the pruned row that each place of the full row shows."""

    valid: Tensor
    next_id: Tensor
    planes: int
    back: Tensor


def _resume(*args, **kwargs):
    raise RuntimeError(
        "this cache holds a pruned prompt, and generate would go on from it by the full prompt's length; leave out "
        "past_key_values and give generate the whole conversation inside `with pruned(...)`"
    )


def _valid(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, L] bool: which tokens of a prefill are no padding, from the mask that the decoder was to take.

    Raises ValueError for a mask that is not causal: what a token sees beyond that, pruning could not keep.
    """
    if isinstance(mask, dict):  # one mask for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :length]
    valid = seen[:, -1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril() & valid[:, None]
    if not torch.equal(seen & valid[:, :, None], causal & valid[:, :, None]):  # what padding sees does not matter
        raise ValueError(
            "the decoder's attention mask is not causal: image tokens see each other in both directions, or it is one "
            "of your own, which pruning cannot rebuild. Pass a 2-D attention_mask, to a model of one of the types "
            f"{', '.join(TOWERS)}"
        )
    return valid


def _left(rows: Sequence[Tensor]) -> Tensor:
    """Rows [K_i, ...] as one tensor [B, K, ...], padded on the left with zeros."""
    return pad_sequence(list(rows), batch_first=True, padding_side="left")


class Pruned:
    """What one `pruned` block hangs on a model, and what its parts tell each other.

    kept, full: of each row of the last prompts the visual tokens that the decoder has read, mean over its layers, and
    would have read; read: the same layer by layer, as in `stages.Prefilled`.
    """

    def __init__(self, model, processor, prune, cell, seeds, words, clip):
        self.model, self.processor = model, processor
        self.prune, self.cell, self.seeds, self.words, self.clip = prune, cell, seeds, words, clip
        self.kept: list[float] = []
        self.full: list[int] = []
        self.read: list[list[tuple[int, int]]] = []
        self.decoder, self.rules = model.get_decoder(), by_layer(cell.ids)
        self.changes = prune.inside or len(self.rules) > 1  # inside the decoder
        self.inside: Inside | None = None  # of the last prefill
        self.tower, self.with_text = TOWERS[model.config.model_type], "clip_text" in offers(model.config)
        self.encode, self.plain_generate = model.base_model.get_image_features, model.generate
        self.input_ids: Tensor | None = None  # of the running forward
        self.shown = False  # whether images come with it
        self.output: Any = None  # of the last get_image_features, as the model passes it on
        self.images: list[tuple[int, list[VisualTokens]]] = []  # its images: slots and runs of tokens
        self.placed: list[list[_Placed]] | None = None  # the same after pruning, None until the first cut
        self.cut: _Cut | None = None
        self.cache: Any = None  # what the last prefill filled
        self.prefilled = 0  # tokens in it after the prefill
        self.filling = False  # while the decoder runs a prefill
        self.fired = 0
        self.repeats = 1  # rows of a prompt

    # -- generate and get_image_features, replaced on the instances

    def generate(self, *args, **kwargs) -> Any:
        config = kwargs.get("generation_config") or self.model.generation_config
        if kwargs.get("prefill_chunk_size", config.prefill_chunk_size):
            raise ValueError(
                "prefill_chunk_size would cut the prompt before it is pruned; leave it out inside `pruned`"
            )
        if kwargs.get("assistant_model") is self.model:
            raise ValueError("the pruned model cannot be its own assistant_model; use another one, or none")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("with inputs_embeds it is unknown where the images are; give generate input_ids")
        if self.changes and (kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens")):
            raise ValueError(
                "inside the decoder the prompt's last token says what is kept, and guesses that come with the prompt "
                "would take its place; leave out assistant_model and prompt_lookup_num_tokens"
            )
        kwargs.setdefault("disable_compile", True)  # the hooks are Python, which a compiled forward would leave out
        made = self.plain_generate(*args, **kwargs)
        for cache in (kwargs.get("past_key_values"), getattr(made, "past_key_values", None)):
            if cache is not None and self.cut is not None:
                cache.get_seq_length = _resume
        return made

    def get_image_features(self, *args, **kwargs) -> Any:
        """The model's own, which also remembers the images."""
        inputs = inspect.signature(self.encode).bind(*args, **kwargs).arguments
        options = kwargs | dict(return_dict=True) | (dict(output_hidden_states=True) if self.tower.hidden else {})
        self.output = self.encode(*args, **options)
        units = self.tower.units(self.model, self.output, inputs, self.clip)
        slots = map(len, self.output.pooler_output)
        self.images = [one for one in zip(slots, units, strict=True) if one[0]]
        self.placed = None
        return self.output

    def get_video_features(self, *args, **kwargs) -> Any:
        raise ValueError("videos cannot be pruned; give the model still images inside `pruned`")

    # -- the model's forward

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("`pruned` needs the model as it is, not compiled; leave out torch.compile")
        self.input_ids = args[0] if args else kwargs.get("input_ids")
        if self.input_ids is None:
            raise ValueError("with inputs_embeds it is unknown where the images are; give the model input_ids")
        given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        self.shown = given is not None or kwargs.get("pixel_values") is not None
        if given is not None and given is not self.output:
            raise ValueError(
                "these image features were made outside of `pruned`; give the model pixel_values inside it"
            )

    # -- the decoder's forward

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if seen:
            return args, self.step(cache, seen, kwargs)
        self.cut, self.cache, self.filling, self.inside = None, cache, True, None
        slots = self.input_ids == self.model.config.image_token_id
        if not slots.any():  # a prompt without images stays as it is
            return args, kwargs
        if not self.shown:
            raise ValueError(
                "the prompt has places for images, but no pixel_values came with it; give both in one call"
            )
        return args, self.prefill(slots, kwargs)

    def step(self, cache: Any, seen: int, kwargs: dict) -> dict:
        """Arguments of a forward that goes on from a cache of `seen` tokens."""
        if cache is not self.cache:
            raise RuntimeError(
                "the model is to go on from a cache that the last prompt inside `pruned` did not fill; give it the "
                "whole prompt first"
            )
        if self.cut is None:
            return kwargs
        embeds, device = kwargs["inputs_embeds"], self.cut.valid.device
        # Steps since the prefill; below zero where a speculative candidate that came with the prompt was taken back.
        self.steps = steps = seen - self.prefilled
        new = embeds.shape[1]
        ids = self.cut.next_id[:, None] + steps + torch.arange(new, device=device)
        if self.inside is not None:
            self.inside.step()
        valid = self.cut.valid[:, :seen] if steps < 0 else pad(self.cut.valid, (0, steps), value=True)
        mask = pad(valid, (0, new), value=True).long()
        planes = ids.expand(self.cut.planes, -1, -1) if self.cut.planes else ids
        return kwargs | dict(position_ids=planes, attention_mask=mask)

    def prefill(self, slots: Tensor, kwargs: dict) -> dict:
        """Arguments of the first forward, without the pruned tokens. slots: [B, L] bool, where visual tokens are."""
        embeds = kwargs["inputs_embeds"]
        batch, length = slots.shape
        valid = _valid(kwargs.get("attention_mask"), batch, length, slots.device)
        images, given = self.shared(slots), self.full_ids(kwargs.get("position_ids"), batch, length, slots.device)
        if self.placed is None:
            self.placed = self.select(images, valid & ~slots)
            self.fired += 1
        rows = [
            self.row(
                embeds[row],
                given[row],
                valid[row],
                slots[row],
                [(self.images[i][0], self.placed[i]) for i in images[row]],
            )
            for row in range(batch)
        ]
        states, ids = _left([row.embeds for row in rows]), _left([row.ids for row in rows])
        kept = _left([torch.ones_like(row.source, dtype=torch.bool) for row in rows])
        self.cut = _Cut(
            valid=kept,
            next_id=torch.tensor([row.next_id for row in rows], device=slots.device),
            planes=ids.shape[2] if ids.ndim == 3 else 0,
            back=torch.stack([self.back(row.source, length) + kept.shape[1] - len(row.source) for row in rows]),
        )
        self.full = slots.sum(dim=1).tolist()
        self.read = [[(0, int(slots[i][row.source].sum()))] for i, row in enumerate(rows)]
        self.kept = [layer_mean(read, 1) for read in self.read]
        if self.changes:
            self.inside = self.begin([[unit for i in row for unit in self.placed[i]] for row in images], rows, kwargs)
            self.sources = [row.source for row in rows]
        changed = dict(
            inputs_embeds=states,
            position_ids=for_decoder(ids),
            attention_mask=kept.long(),
        )
        if kwargs.get("deepstack_visual_embeds") is not None:
            changed |= self.deepstack([row.source for row in rows], slots, kwargs)
        return kwargs | changed

    def begin(self, shown: Sequence[list[_Placed]], rows: Sequence[_Row], kwargs: dict) -> Inside:
        """What is to happen inside the decoder. shown: the runs of tokens of each row. ValueError where it cannot."""
        if any(len(units) != 1 for units in shown):
            raise ValueError(
                "inside the decoder tokens are dropped, and IDs changed, of prompts with one image in one piece; give "
                f"one image a prompt, to a model that does not cut it up (pieces here: {[*map(len, shown)]})"
            )
        if getattr(self.cache, "is_compileable", False):
            raise ValueError(
                "inside the decoder layers come to have keys of different lengths, so the cache must grow; "
                "leave out cache_implementation"
            )
        images = [Shown(unit.selection, unit.unpruned, unit.seed, unit.drops) for (unit,) in shown]
        done = Inside(
            self.decoder,
            [row.embeds for row in rows],
            [row.ids for row in rows],
            [row.words for row in rows],
            images,
            self.cell.ids,
            self.cell.order,
        )
        deep = len(kwargs.get("deepstack_visual_embeds") or ())
        if any(stage.layer < deep for stage in images[0].stages):
            raise ValueError(
                f"this model adds features of its tower to the visual tokens after each of its first {deep} layers, so "
                f"they must all be there; nothing can be dropped before layer {deep}"
            )
        return done

    def before_layer(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The decoder's layer of this number is to read what `inside` says."""
        if self.inside is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if self.filling:
            states = self.inside.enter(number, states)
            kwargs = kwargs | self.inside.now
        elif (mask := self.inside.mask(number, self.steps, states)) is not None:
            kwargs = kwargs | dict(attention_mask=mask)
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | dict(hidden_states=states))

    @staticmethod
    def full_ids(given: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """IDs [B, L] or [B, L, planes] that the decoder was to take at full length."""
        if given is None:
            return torch.arange(length, device=device).expand(batch, -1)
        if given.ndim == 2:
            return given.expand(batch, -1)
        return given[-3:].permute(1, 2, 0).expand(batch, -1, -1)  # before (t, h, w) may stand the text's own plane

    def shared(self, slots: Tensor) -> list[list[int]]:
        """The images of each row by number; beams and further returned sequences show the same ones."""
        counts, lengths = slots.sum(dim=1).tolist(), [length for length, _ in self.images]
        repeats, images, number = max(sum(counts) // max(sum(lengths), 1), 1), [], 0
        self.repeats = repeats
        for count in counts[::repeats]:
            first = number
            while number < len(lengths) and sum(lengths[first:number]) < count:
                number += 1
            images += [list(range(first, number))] * repeats
        if [sum(lengths[i] for i in row) for row in images] != counts or number != len(lengths):
            raise ValueError(
                f"the prompts have {counts} places for visual tokens, the images {lengths} tokens, and that does not "
                "match; give images and prompts to the processor in one call, and all that it returns to the model"
            )
        return images

    def select(self, images: Sequence[Sequence[int]], text: Tensor) -> list[list[_Placed]]:
        """Prune each image once. images: of each row; text: [B, L] bool, where the prompts have words."""
        prompts = len(images) // self.repeats
        given = dict(seed=self.seeds, texts=self.words["clip_text"], questions=self.words["clip_prompt"])
        for name, listed in given.items():
            if listed is not None and len(listed) != prompts:
                raise ValueError(f"{name} must hold one for each prompt, got {len(listed)} for {prompts} prompts")
        made = {}
        for prompt, row in enumerate(range(0, len(images), self.repeats)):
            seed = self.cell.seed if self.seeds is None else self.seeds[prompt]
            said = {name: partial(self.embedded, name, prompt, self.input_ids[row][text[row]]) for name in self.words}
            for number in images[row]:
                made[number] = []
                for unit in self.images[number][1]:
                    if self.with_text:
                        unit = unit.take(torch.zeros(1, dtype=torch.int64, device=unit.features.device), **said)
                    depth = len(self.decoder.layers)
                    ((selection, drops),) = staged_images(self.prune, unit, self.cell.keep, [seed], depth)
                    if not drops:  # else what is dropped is put in order where that happens
                        selection = reorder(selection, self.cell.order, seed)
                    ids = assign(selection.origin, unit.unpruned, self.rules[0][1], seed)
                    made[number].append(_Placed(unit.unpruned, selection, ids, drops, seed))
        return [made[number] for number in range(len(self.images))]

    def embedded(self, name: str, prompt: int, tokens: Tensor) -> Tensor:
        """[1, P] the signal of this name: CLIP's embedding of the words given for a prompt, else its own ones."""
        if (given := self.words[name]) is not None:
            return self.clip().text([given[prompt]])
        if self.processor is None:
            raise ValueError("this method reads words; give `pruned` the processor, or texts and questions")
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return self.clip().text([tokenizer.decode(tokens, skip_special_tokens=True).strip()])

    def row(
        self, embeds: Tensor, given: Tensor, valid: Tensor, slots: Tensor, images: list[tuple[int, list[_Placed]]]
    ) -> _Row:
        """One row without the pruned tokens.

        embeds: [L, D]; given: [L] or [L, planes], its IDs at full length; valid, slots: [L] bool; images: for each that
        the row shows its number of slots and its runs of tokens. Raises ValueError where the model numbers tokens
        otherwise than its unpruned IDs say, for then no rule that starts from them means what it says.
        """
        places, visual = valid.nonzero()[:, 0], slots.nonzero()[:, 0]
        runs, used = [], 0
        for length, units in images:
            at = used
            for unit in units:
                runs.append((visual[at : at + len(unit.unpruned.visual)], unit))
                at += len(unit.unpruned.visual)
            used += length  # what is left of an image, such as the newline after a single tile, stays as text does
        at = int(places[0])
        full = start = int(given[at].max())  # the first token's ID, which is the padding's length in a plain forward
        source, states, ids, whole, more = [], [], [], [], 0
        for here, unit in [*runs, (places[-1:] + 1, None)]:
            text = places[(places >= at) & (places < here[0])]
            count = torch.arange(len(text), device=text.device).view(-1, *[1] * (given.ndim - 1))
            count = count.expand(-1, *given.shape[1:])
            source, states = [*source, text], [*states, embeds[text]]
            ids, whole = [*ids, start + count], [*whole, full + count]
            start, full = start + len(text), full + len(text)
            if unit is None:
                break
            source.append(here[0] + unit.selection.origin)
            states.append(unit.selection.features.to(embeds))
            ids, whole = [*ids, start + unit.ids.visual], [*whole, full + unit.unpruned.visual]
            start, full = start + unit.ids.text_start, full + unit.unpruned.text_start
            more += unit.ids.generated_start - unit.ids.text_start
            at = int(here[0]) + len(here)
        if not torch.equal(torch.cat(whole), given[places]):
            raise ValueError(
                "this prompt's position IDs are not the ones that the model gives to text and images side by side; "
                "give it no position_ids of your own"
            )
        return _Row(torch.cat(source), torch.cat(states), torch.cat(ids), start + more, len(source[0]))

    @staticmethod
    def back(source: Tensor, length: int) -> Tensor:
        """[L] the place in the pruned row that each place of the full row shows: its own or the last kept before.

        source: [K], as in `_Row`, -1 for a token that none of the full row's is.
        """
        shown, own = torch.full((length,), -1, device=source.device), source >= 0
        shown[source[own]] = torch.arange(len(source), device=source.device)[own]
        place = torch.arange(length, device=source.device).masked_fill(shown < 0, -1).cummax(dim=0).values
        return torch.where(place < 0, 0, shown[place.clamp(min=0)])

    @staticmethod
    def deepstack(sources: Sequence[Tensor], slots: Tensor, kwargs: dict) -> dict:
        """Qwen3-VL's first layers add features of the tower's middle to visual tokens: those of the kept ones."""
        number = (slots.flatten().cumsum(0) - 1).view_as(slots)  # which row of the features a place has
        mask = [slots[row][source] for row, source in enumerate(sources)]
        index = torch.cat([number[row][source][mask[row]] for row, source in enumerate(sources)])
        embeds = [layer[index.to(layer.device)] for layer in kwargs["deepstack_visual_embeds"]]
        return dict(visual_pos_masks=_left(mask), deepstack_visual_embeds=embeds)

    def after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The output at full length, after a prefill."""
        if not self.filling:
            return output
        self.filling, self.cache = False, getattr(output, "past_key_values", None)
        if self.cut is None:
            return output
        self.prefilled = self.cut.valid.shape[1]
        if self.inside is not None:
            self.leave(output)

        def full(states: Tensor) -> Tensor:
            return states.take_along_dim(self.cut.back[..., None].to(states.device), dim=1)

        output["last_hidden_state"] = full(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(full(states) for states in output.hidden_states)
        return output

    def leave(self, output: Any) -> None:
        """After a prefill with changes inside the decoder. ValueError where the hidden states of all layers are asked
        for."""
        if output.get("hidden_states") is not None:
            raise ValueError("layers that read different tokens have no common hidden states; leave out the option")
        run, sources = self.inside.run, []
        for source, words, one in zip(self.sources, self.inside.words, run.selections):
            first = run.images[len(sources)].selection.origin
            image = (source[words] - first[0] + one.origin).masked_fill(one.synthetic, -1)
            sources.append(torch.cat([source[:words], image, source[words + len(first) :]]))
        most, length = max(map(len, sources)), self.cut.back.shape[1]
        back = torch.stack([self.back(source, length) + most - len(source) for source in sources])
        self.cut, self.read = self.cut._replace(back=back), self.inside.read
        self.kept = [layer_mean(read, len(self.decoder.layers)) for read in self.read]


def _try(prune: Pruner, keep: float | None, signals: Sequence[str], depth: int) -> None:
    """Run a method on random tokens with these signals, for a decoder of so many layers. AttributeError where it asks
    for another one."""
    made = torch.rand(1, 17, 8)
    shapes = {
        "patches": made[:, 1:],
        "cls": made[:, 0],
        "cls_attention": made[:, 1:, 0],
        "keys": made,
        "cls_query": made[:, 0],
        "read_keys": made,
        "clip_patches": made[:, 1:],
        "clip_read": made[:, 1:],
        "clip_text": made[:, 0],
        "clip_prompt": made[:, 0],
    }
    offered = Signals(**{name: partial(shapes.__getitem__, name) for name in signals})
    staged_images(prune, VisualTokens(made[:, 1:], (4, 4), offered, lambda patches: patches), keep, [0], depth)


def check_pruner(model: PreTrainedModel, cell: Cell) -> Pruner:
    """The cell's method. Raises ValueError where it, or the IDs, cannot run on this model or with this keep ratio."""
    if reads_truth(cell.ids):
        raise ValueError(f"IDs {cell.ids!r} read the ground truth, which only evaluation on data with boxes has")
    prune, signals, depth = find_pruner(cell.pruner), offers(model.config), len(model.get_decoder().layers)
    if (last := by_layer(cell.ids)[-1][0]) >= depth:
        raise ValueError(f"IDs {cell.ids!r} change at layer {last}, and the decoder has the layers 0 to {depth - 1}")
    try:
        _try(prune, cell.keep, signals, depth)
    except AttributeError as error:
        runs = []
        for name in all_pruners():
            with suppress(AttributeError, ValueError):  # a signal, or layers, that are not there
                _try(find_pruner(name), 0.5, signals, depth)
                runs.append(name)
        raise ValueError(
            f"pruner {cell.pruner!r} cannot run on a {model.config.model_type} model: {error}; methods that can: "
            f"{', '.join(runs)}"
        ) from error
    return prune


def _in_place_of(method: Callable, other: Callable) -> Callable:
    """`other` under the name and signature of a method: generate reads there which inputs are the images'."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        return other(*args, **kwargs)

    return call


@contextmanager
def pruned(
    model: PreTrainedModel,
    processor: Any,
    pruner: str = "fastervlm",
    keep: float | None = 0.25,
    ids: str = "original",
    order: str = "method",
    seed: int | Sequence[int] = 0,
    texts: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    clip: str | Path | None = None,
) -> Iterator[Pruned]:
    """Within the block, `model.generate` and `model(...)` read pruned images.

    model: of transformers, of a type in `models.towers.TOWERS`; processor: its processor or tokenizer, asked for the
    words of a prompt where a method reads them; pruner, keep, ids, order: as in `types.Cell`; seed: the same for all
    images, so that an answer does not depend on its batch, or one for each prompt; texts, questions: what a method that
    reads the expression, or the whole question, compares patches with, one for each prompt, else the prompt's own
    words; clip: folder or name of the CLIP for such a method, by default the one that config.json names, or LLaVA's.
    Yields a `Pruned`, which says how many tokens were kept.

    The output has the shape it has without pruning, and with keep=1 and ids="original" its very bits on a CPU. In
    hidden states a dropped token shows the state of the last kept one before it; attentions keep the pruned length.
    Everything is as it was after the block, also after an exception.
    Raises ValueError for a model, kernel, method or mask that cannot be pruned, a bad specification, `inputs_embeds`,
    `prefill_chunk_size` and videos; RuntimeError where blocks are nested on one model, where a model is compiled or
    goes on from a pruned cache, and at the end of a block in which no image was pruned.
    """
    offers(model.config)  # raises for a model that cannot be pruned
    if not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} cannot generate; give the whole model, as ...ForConditionalGeneration loads it"
        )
    decoder = model.get_decoder()
    if (kernel := decoder.config._attn_implementation) not in KERNELS:
        raise ValueError(
            f"the decoder runs on {kernel!r}, which takes position IDs with gaps for several packed prompts; load "
            "the model with attn_implementation='sdpa'"
        )
    listed = None if isinstance(seed, int) else list(seed)
    cell = Cell(pruner, keep, order, ids, 0 if listed is not None else seed)
    parse_spec(order, ORDERS)
    prune = check_pruner(model, cell)
    if model in _ACTIVE:
        raise RuntimeError("this model is being pruned already; leave the outer `with pruned(...)` first")
    named = clip or getattr(model.config, "clip", clips.DEFAULT)
    beside = Path(model.name_or_path).parent / str(named)
    load = functools.cache(lambda: clips.load(beside if beside.is_dir() else named, model.device, model.dtype))
    hooks = Pruned(model, processor, prune, cell, listed, dict(clip_text=texts, clip_prompt=questions), load)
    base, handles = model.base_model, []
    _ACTIVE.add(model)
    try:
        model.generate = _in_place_of(hooks.plain_generate, hooks.generate)
        base.get_image_features = _in_place_of(hooks.encode, hooks.get_image_features)
        if hasattr(base, "get_video_features"):
            base.get_video_features = _in_place_of(base.get_video_features, hooks.get_video_features)
        handles = [
            base.register_forward_pre_hook(hooks.before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(hooks.after_decoder, with_kwargs=True),
        ]
        if hooks.changes:
            handles += [
                layer.register_forward_pre_hook(partial(hooks.before_layer, number), with_kwargs=True)
                for number, layer in enumerate(decoder.layers)
            ]
        yield hooks
    finally:
        _ACTIVE.discard(model)
        for handle in handles:
            handle.remove()
        for owner, name in ((model, "generate"), (base, "get_image_features"), (base, "get_video_features")):
            owner.__dict__.pop(name, None)
    if not hooks.fired:
        raise RuntimeError(
            "no image was pruned: nothing inside `with pruned(...)` gave this model pixel_values; call model.generate("
            "**processor(images=image, text=prompt, return_tensors='pt')) there, on this very model"
        )
