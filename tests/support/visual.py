"""Visual tokens at random, for pruners."""

import torch

from analysis.types import Signals, VisualTokens


def visual(batch=3, rows=6, columns=4, seed=0, dtype=torch.float32, **given):
    """Random features and signals, or the `given` ones. Features are not made from patches, to tell the two apart."""
    draw, n = torch.Generator().manual_seed(seed), rows * columns
    shapes = dict(
        features=(n, 5),
        patches=(n, 7),
        cls=(7,),
        cls_attention=(n,),
        keys=(1 + n, 7),
        cls_query=(7,),
        clip_patches=(n, 6),
        clip_text=(6,),
        clip_prompt=(6,),
        read_keys=(1 + n, 3),
        clip_read=(n, 6),
        target=(4,),
    )
    values = {name: torch.randn(batch, *shape, generator=draw).to(dtype) for name, shape in shapes.items()} | given
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    signals = Signals(**{name: lambda name=name: values[name] for name in shapes if name != "features"})
    return VisualTokens(values["features"], (rows, columns), signals, lambda x: x @ weight + 1)
