"""PyPI's torchvision is built for CUDA: beside a CPU's torch its operators do not load, and then it cannot be imported.
None of them is run here, but two must be known by name. Before transformers is imported, which takes it."""

import importlib.util

import torch

NAMES = torch.library.Library("torchvision", "FRAGMENT")

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            NAMES.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
