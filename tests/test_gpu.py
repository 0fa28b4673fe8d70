"""The GPU path against the CPU's, with the embedded tiny-llava. Skipped where there is no GPU.

The tie rule: in float32 the two machines add up in different orders, so a token may differ where two logits are all but
equal, and the answer goes on from there. Nearly all answers are the same; on average none is better.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis import models
from analysis.engine.evaluate import cells, evaluate
from analysis.rec import datasets
from analysis.rec.scoring import score
from analysis.stats import paired_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch sees no CUDA device"),
]
GRID = [*cells("none"), *cells(["random", "text_similarity"], 0.5, ids=["compact", "original"])]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """cuDNN's convolutions would otherwise round their inputs to TF32, whose 10 bits show in some answers."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def answered(out, images, device="cuda", dtype="float32", grid=GRID):
    model, data = models.load("tiny-llava", device=device, dtype=dtype), datasets.load("refstamps", "val", images)
    return score(evaluate(model, data, grid, out / f"{device}_{dtype}.parquet", batch_size=100, progress=False))


def test_answers_are_the_cpus_but_for_ties(tmp_path):
    cpu, gpu = (answered(tmp_path, 10, device) for device in ("cpu", "cuda"))
    assert (cpu["raw"] == gpu["raw"]).mean() > 0.98
    assert cpu["tokens"].equals(gpu["tokens"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_costs_no_accuracy_that_an_interval_would_show(dtype, tmp_path):
    whole, half = (answered(tmp_path, 100, dtype=kind, grid=GRID[:1]) for kind in ("float32", dtype))
    found = paired_difference(whole["correct"], half["correct"], whole["image_id"])
    print(f"{dtype} - float32: {found}")
    assert abs(found["difference"]) < 0.03 and found["low"] < 0.02 and found["high"] > -0.02


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_every_kernel_that_takes_a_mask_gives_the_same(kernel, tmp_path):
    """Flash attention takes none, and is never chosen."""
    usual = answered(tmp_path, 5)["raw"]
    (tmp_path / "kernel").mkdir()
    with sdpa_kernel(kernel):
        assert (answered(tmp_path / "kernel", 5)["raw"] == usual).mean() > 0.98


def test_deterministic_runs_are_the_same_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            answered(tmp_path / name, 5, dtype="bfloat16")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (tmp_path / "a/cuda_bfloat16.parquet").read_bytes() == (tmp_path / "b/cuda_bfloat16.parquet").read_bytes()


def test_expressions_share_the_image_in_memory(tmp_path):
    """Twice the expressions of an image take less than half as much again: its keys and values are there once."""
    peaks = []
    for batch in (100, 200):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        data, model = datasets.load("refstamps", "val", 25), models.load("tiny-llava", device="cuda")
        evaluate(model, data, GRID[:1], tmp_path / f"{batch}.parquet", batch_size=batch, progress=False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.5 * peaks[0]
