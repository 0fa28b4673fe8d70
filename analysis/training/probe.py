"""Does the tower hand absolute positions over? A linear probe for each visual token's row and column.

    python -m analysis.training.probe tiny-llava

Ridge regression from single tokens, images held out, reported as R^2 (0: nothing, 1: all) on: the frozen tower's
features, the connector's output, and the language model's hidden states after each block, once with the right position
IDs and once with IDs shuffled among the visual tokens (there the target is still where the token truly lies). If the
features told the position, the shuffled curve would stay high and misaligned IDs would cost little. The table of an
embedded model is kept beside its checkpoint as probe.csv.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from torch import Tensor

from analysis.engine.decode import causal_mask, prompt_inputs
from analysis.models import MODELS, load
from analysis.positions import assign
from analysis.pruning import none
from analysis.pruning.images import prune_images
from analysis.rec import datasets


def ridge_r2(train: Tensor, test: Tensor, target_train: Tensor, target_test: Tensor, penalty: float = 10.0) -> Tensor:
    """R^2 of a ridge regression for each target column. train, test: [M, C]; targets: [M, 2]."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean) / scale for x in (train, test))
    centre = target_train.mean(0)
    gram = train.T @ train + penalty * torch.eye(train.shape[1])
    guess = test @ torch.linalg.solve(gram, train.T @ (target_train - centre)) + centre
    return 1 - ((guess - target_test) ** 2).sum(0) / ((target_test - target_test.mean(0)) ** 2).sum(0)


@torch.no_grad()
def probe(name: str, images: int = 100, seed: int = 0) -> pd.DataFrame:
    """R^2 by place and kind of IDs; columns place, ids, row, column."""
    model = load(name)
    data = datasets.load("refstamps", "val", limit=images)
    pictures = [data.image(i) for i in data.rows.image_id.unique()]
    seen = [model.encode([picture]) for picture in pictures]  # one by one: their layouts may differ
    count, columns = seen[0].features.shape[1], seen[0].grid[1]  # of the whole image, where there are tiles besides
    prefix, _ = model.prompt("dog")
    places = {
        ("tower", "none"): torch.cat([visual.signals.patches for visual in seen]),
        ("connector", "none"): torch.cat([visual.features for visual in seen]),
    }
    for label, spec in (("right", "original"), ("shuffled", "shuffled")):
        states = []
        for i, visual in enumerate(seen):
            features = prune_images(none.prune, visual, None, [seed])[0].features
            ids = assign(torch.arange(len(features)), visual.unpruned, spec, seed + i)
            inputs = prompt_inputs(model.embed, (prefix, prefix[:0]), features, ids).whole
            mask = causal_mask(torch.ones(1, len(inputs.embeds), dtype=torch.bool), inputs.embeds.dtype)
            out = model.decoder(
                inputs_embeds=inputs.embeds[None],
                position_ids=inputs.position_ids[None],
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
            )
            states.append(torch.stack([h[0, len(prefix) :][:count] for h in out.hidden_states]))
        for block, hidden in enumerate(torch.stack(states, 1)):
            places[f"language model, block {block}" if block else "language model, input", label] = hidden
    where = torch.stack([torch.arange(count) // columns, torch.arange(count) % columns], 1).float()
    cut, found = int(0.7 * images), []
    for (place, ids), values in places.items():
        train, test = values[:cut].flatten(0, 1).float(), values[cut:].flatten(0, 1).float()
        r2 = ridge_r2(train, test, where.repeat(cut, 1), where.repeat(images - cut, 1))
        found.append(dict(place=place, ids=ids, row=float(r2[0]), column=float(r2[1])))
    return pd.DataFrame(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-llava")
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    found = probe(args.model, args.images).round(3)
    print(found.to_string(index=False))
    if args.model in MODELS:
        found.to_csv(MODELS[args.model] / "probe.csv", index=False)
