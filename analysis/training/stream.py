"""Training data on the move: worker processes draw scenes and write questions, a pool on the device keeps the latest.

Everything that costs Python time happens in the workers, so that the training process only copies and computes: a
worker yields tensors of fixed shapes, the pool holds them (or what a frozen tower makes of them) and a step picks from
it by index. A scene stays for some steps, each time with other questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from analysis.refstamps.scenes import SECOND, Scene, scene

Item = dict[str, Tensor]
SEEDS = 10**8  # scenes of one training seed lie this far from those of the next
HELD_OUT = 10**9  # scenes of the training side from here on are never trained on; they follow the accuracy without val


def objects_wanted(index: int, easy: int) -> int | None:
    """Curriculum by the number of scenes drawn: one-object scenes fall from 70 to 15 % over about the first `easy`; of
    the rest, three in ten have two objects, the others as many as in evaluation (None)."""
    rng = np.random.default_rng([7, index])
    if rng.random() < max(0.15, 0.7 - index / easy):
        return 1
    return 2 if rng.random() < 0.3 else None


class Scenes(IterableDataset):
    """Endless training scenes of a seed from the number `start` on, each as `write(scene, rng)` puts it."""

    def __init__(self, write: Callable[[Scene, np.random.Generator], Item], seed: int, start: int, easy: int):
        self.write, self.seed, self.start, self.easy = write, seed, start, easy

    def __iter__(self) -> Iterator[Item]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for index in range(self.start + worker, SEEDS, workers):
            drawn = scene("train", self.seed * SEEDS + index, objects_wanted(index, self.easy), SECOND)
            yield self.write(drawn, np.random.default_rng([23, self.seed, index]))


class Pool:
    """The last `size` items; `refresh` replaces the `fresh` oldest. `prepare` turns a batch of items into what is
    kept."""

    def __init__(self, scenes: Scenes, size: int, fresh: int, workers: int, prepare: Callable[[Item], Item]):
        loader = DataLoader(scenes, batch_size=fresh, num_workers=workers, prefetch_factor=4 if workers else None)
        self.source, self.prepare, self.fresh = iter(loader), prepare, fresh
        self.size, self.drawn, self.place, self.filled = -(-size // fresh) * fresh, scenes.start, 0, 0
        self.items: Item = {}
        for _ in tqdm(
            range(-(-self.size // fresh // 5)), desc="first scenes", unit=f" x {fresh} scenes", mininterval=10
        ):
            self.refresh()

    def refresh(self) -> None:
        """The tensors stay where they are, so that a captured graph goes on reading them."""
        new = self.prepare(next(self.source))
        if not self.items:
            self.items = {name: value.new_zeros(self.size, *value.shape[1:]) for name, value in new.items()}
        for name, value in new.items():
            self.items[name][self.place : self.place + self.fresh] = value
        self.place = (self.place + self.fresh) % self.size
        self.drawn += self.fresh
        self.filled = min(self.size, self.filled + self.fresh)

    def steps(self, every: int) -> Iterator[None]:
        """Endless steps, after each `every` of which new items come."""
        for step in count():
            if step and step % every == 0:
                self.refresh()
            yield

    def pick(self, rng: np.random.Generator, size: int) -> Tensor:
        """[size] places of items drawn at random, where the items are."""
        device = next(iter(self.items.values())).device
        return torch.from_numpy(rng.integers(self.filled, size=size)).to(device)


def held_out(count: int) -> list[Scene]:
    """Scenes of the training side that no training run sees."""
    return [scene("train", HELD_OUT + i, edition=SECOND) for i in range(count)]
