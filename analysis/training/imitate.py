"""Train the towers of other architectures to see as the tiny CLIP does: EVA for MiniGPT-v2, Qwen2.5-VL's.

The student's patches (Qwen's tokens) are to equal the teacher's, normalised: a regression on scenes, no labels. Real
towers are trained each by itself; this saves that, and the cards say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionModel, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from analysis.models import clip, towers
from analysis.models.llava import Llava
from analysis.refstamps.scenes import Scene
from analysis.training import loop
from analysis.training.contrast import normalised
from analysis.training.design import GRID, IMAGE, PATCH, QWEN, eva_config, qwen_vision
from analysis.training.stream import Item, Pool, Scenes, held_out


class Student(NamedTuple):
    """build(CLIP's vision configuration) -> tower; write(scene, rng) -> item with the teacher's pixels; see(tower,
    batch) -> tokens [..., C]; places(batch) -> [B, N] bool, which of the teacher's patches these are, None for all."""

    build: Callable
    write: Callable[[Scene, np.random.Generator], Item]
    see: Callable[[nn.Module, Item], Tensor]
    places: Callable[[Item], Tensor | None]


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def write_eva(drawn: Scene, rng: np.random.Generator) -> Item:
    """The scene resized to the tower's square, as MiniGPT-v2 sees it: uint8 [3, IMAGE, IMAGE]."""
    return dict(pixels=as_tensor(drawn.image.convert("RGB").resize((IMAGE, IMAGE))))


def write_qwen(drawn: Scene, rng: np.random.Generator) -> Item:
    """Qwen's patches, padded, and their grid; for the teacher the same picture in the corner of its square."""
    seen = Qwen2VLImageProcessorPil(**QWEN)([drawn.image.convert("RGB")], return_tensors="pt")
    _, rows, columns = seen.image_grid_thw[0].tolist()
    square = Image.new("RGB", (IMAGE, IMAGE), Llava.fill)
    square.paste(drawn.image.resize((columns * PATCH // 2, rows * PATCH // 2), Image.Resampling.BICUBIC))
    patches = F.pad(seen.pixel_values, (0, 0, 0, 4 * GRID**2 - len(seen.pixel_values)))
    return dict(pixels=as_tensor(square), patches=patches.half(), grid=torch.tensor([1, rows, columns]))


def see_qwen(tower: nn.Module, batch: Item) -> Tensor:
    counts = batch["grid"].prod(1)
    there = torch.arange(batch["patches"].shape[1], device=counts.device) < counts[:, None]
    states = tower(batch["patches"][there].float(), grid_thw=batch["grid"]).last_hidden_state
    return towers.merger(tower)(towers.merged_patches(tower, states, batch["grid"]))


def places_qwen(batch: Item) -> Tensor:
    rows, columns = (batch["grid"][:, 1:] // 2).unbind(1)
    side = torch.arange(GRID, device=rows.device)
    return ((side < rows[:, None])[:, :, None] & (side < columns[:, None])[:, None]).flatten(1)


STUDENTS = {
    "tiny-eva": Student(
        lambda vision: Blip2VisionModel(eva_config(vision)),
        write_eva,
        lambda tower, batch: tower(normalised(batch["pixels"])).last_hidden_state,
        lambda batch: None,
    ),
    "tiny-qwen-tower": Student(
        lambda vision: Qwen2_5_VisionTransformerPretrainedModel(qwen_vision(vision)), write_qwen, see_qwen, places_qwen
    ),
}


def teacher_on(device: torch.device) -> nn.Module:
    return clip.load(loop.CHECKPOINTS / "tiny-clip", device, torch.float32).model.vision_model


def load(stage: str) -> nn.Module:
    """The trained tower of a stage."""
    tower = STUDENTS[stage].build(teacher_on(torch.device("cpu")).config)
    file = loop.RUNS / stage / loop.TRAINED
    loop.fit(tower, load_file(file), file)
    return tower.eval().requires_grad_(False)


def train(stage: str, args) -> None:
    """Mean squared error between the student's tokens and the teacher's layer that connectors read, normalised."""
    student, teacher = STUDENTS[stage], teacher_on(args.device)
    tower = student.build(teacher.config).to(args.device)

    def feed(state):
        scenes = Scenes(student.write, args.seed, state["scenes"], args.easy)
        pool = Pool(scenes, args.pool, args.fresh * args.every, args.workers,
                    lambda items: {name: value.to(args.device) for name, value in items.items()})  # fmt: skip
        rng = np.random.default_rng([19, args.seed, state["step"]])
        for _ in pool.steps(args.every):
            index = pool.pick(rng, args.batch)
            yield "imitate", {name: value[index] for name, value in pool.items.items()}, pool.drawn

    @torch.no_grad()
    def wanted(batch: Item) -> Tensor:
        hidden = teacher(normalised(batch["pixels"]), output_hidden_states=True).hidden_states[-2]
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        places = student.places(batch)
        return hidden if places is None else hidden[:, 1:][places]

    def losses(batch: Item):
        with loop.autocast(args.device):
            loss = F.mse_loss(student.see(tower, batch).float(), wanted(batch).float())
        return loss, dict(unexplained=loss)

    @torch.no_grad()
    def evaluate():
        """Share of the teacher's variance that is explained, on scenes never seen."""
        items = [student.write(drawn, None) for drawn in held_out(args.held_out)]
        batch = {name: torch.stack([item[name] for item in items]).to(args.device) for name in items[0]}
        return round(1 - losses(batch)[0].item(), 4)

    loop.run(stage, tower, args, feed, losses, evaluate, export=lambda: None, capture=False)
