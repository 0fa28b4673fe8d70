"""The training loop: resumable, logged, by steps or by seconds; on a GPU each kind of step is captured as one CUDA
graph.

A small model's step is hundreds of kernels of a few microseconds each, which cost more to launch than to run; a
captured graph launches them all at once. What a step needs from outside is a handful of index tensors.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from analysis import ROOT

RUNS = ROOT / "runs"
CHECKPOINTS = (
    RUNS / "checkpoints"
)  # what training writes, in Hugging Face form; analysis/checkpoints holds what is shipped
BEGUN = Path(__file__).parent / "begun"  # weights of stages so far, in half precision, that a new run goes on from
TRAINED = "trained.safetensors"  # in a run's folder: what it has trained
WARM_UP = 200  # steps

Inputs = dict[str, Tensor]
LossOf = Callable[[Inputs], tuple[Tensor, dict[str, Tensor]]]


def rate(step: int, progress: float, args) -> float:
    """Warm-up, constant, linear decay to zero over the last `args.decay` of the run. progress: share of the run, in [0,
    1]."""
    return args.lr * min(1.0, (step + 1) / WARM_UP, (1 - progress) / max(args.decay, 1e-9))


def autocast(device: torch.device):
    # a captured graph must not keep casts of weights that the next step changes
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=device.type != "cuda")


class Stepper:
    """One optimisation step for a kind of input: eager on the CPU, on a GPU a graph captured at the kind's first
    step."""

    def __init__(self, loss_of: LossOf, optimizer: torch.optim.Optimizer, trainable: list[Tensor], capture: bool):
        self.loss_of, self.optimizer, self.trainable, self.capture = loss_of, optimizer, trainable, capture
        self.graph: torch.cuda.CUDAGraph | None = None

    def eager(self, inputs: Inputs) -> dict[str, Tensor]:
        loss, numbers = self.loss_of(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        return {"loss": loss.detach()} | {name: value.detach() for name, value in numbers.items()}

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        if not self.capture:
            return self.eager(inputs)
        if self.graph is None:
            self._record(inputs)
            return self.found if self.graph else self.eager(inputs)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.found

    def _record(self, inputs: Inputs) -> None:
        """Three eager steps, as CUDA wants them before a capture, then the capture, which computes nothing itself."""
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.found = self.eager(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.found = {name: value.clone() for name, value in self.found.items()}
        first = self.found
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads (the loader's) may go on calling CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.found = self.eager(self.inputs)
            self.graph = graph
        except RuntimeError as error:
            tqdm.write(f"no CUDA graph ({str(error).splitlines()[0]}); going on without")
            torch.cuda.synchronize()
            self.capture, self.found = False, first


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a run: all but the frozen tower's, which comes from another stage."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def fit(model: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Load the weights of a run. Raises ValueError where they are of another model."""
    absent, surplus = model.load_state_dict(weights, strict=False)
    if surplus or (absent := sorted(set(absent) & set(trained(model)))):
        raise ValueError(
            f"{file} is of another model (missing {absent}, surplus {surplus}); move it away to start anew"
        )


def adamw(model: nn.Module, args) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """AdamW over what is trainable, without decay of norms and biases; on a GPU its rate is a tensor that a graph
    reads."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    cuda = args.device.type == "cuda"
    lr = torch.tensor(args.lr, device=args.device) if cuda else args.lr
    groups = [
        dict(params=[p for p in trainable if p.ndim > 1], weight_decay=0.05),
        dict(params=[p for p in trainable if p.ndim <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=cuda, capturable=cuda), trainable


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def run(
    stage: str,
    model: nn.Module,
    args,
    feed: Callable[[dict], Iterator[tuple[str, Inputs, int]]],
    loss_of: LossOf,
    evaluate: Callable[[], float],
    export: Callable[[], None],
    capture: bool = True,
) -> None:
    """Train `model`'s trainable weights, then export.

    feed(state) yields (kind, inputs, scenes drawn so far); inputs are tensors on the device whose shapes depend on the
    kind alone. loss_of(inputs) -> (loss, {name: number as a tensor}). args: steps or seconds (the whole run's, over all
    resumptions), lr, decay, log, evaluate (steps between two measurements), device, export.
    """
    folder = RUNS / stage
    folder.mkdir(parents=True, exist_ok=True)
    before = folder / TRAINED if args.export and (folder / TRAINED).exists() else BEGUN / f"{stage}.safetensors"
    if before.exists() and not (args.afresh or args.start or (folder / "state.pt").exists()):
        fit(model, load_file(before), before)
        print(f"{stage}: going on from the weights in {before}")
    optimizer, trainable = adamw(model, args)
    state = dict(step=0, scenes=0, seconds=0.0)
    if (folder / "state.pt").exists():
        saved = torch.load(folder / "state.pt", map_location=args.device, weights_only=True)
        fit(model, saved["model"], folder / "state.pt")
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"{stage}: going on from step {state['step']}")

    def progress() -> float:
        return min(1.0, state["seconds"] / args.seconds if args.seconds else state["step"] / args.steps)

    def save() -> None:
        torch.save(dict(model=trained(model), optimizer=optimizer.state_dict(), state=state), folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")

    def log(row: dict) -> None:
        new = not (folder / "log.csv").exists()
        with open(folder / "log.csv", "a", newline="") as f:
            writer = csv.DictWriter(f, row.keys())
            if new:
                writer.writeheader()
            writer.writerow(row)

    if args.export:
        export()
        return
    if progress() < 1:
        capture = capture and args.device.type == "cuda"
        steppers: dict[str, Stepper] = {}
        bar = tqdm(initial=state["step"], total=args.steps or None, desc=stage, mininterval=10)
        sums: dict[str, Tensor] = {}
        began, earlier, span = time.monotonic(), state["seconds"], 0
        saved_at = began
        for kind, inputs, scenes in feed(state):
            lr = rate(state["step"], progress(), args)
            set_rate(optimizer, lr)
            if kind not in steppers:
                steppers[kind] = Stepper(loss_of, optimizer, trainable, capture)
            for name, value in steppers[kind](inputs).items():
                sums[name] = sums.get(name, 0.0) + value
            span += 1
            state |= dict(step=state["step"] + 1, scenes=scenes, seconds=earlier + time.monotonic() - began)
            bar.update()
            done = progress() >= 1
            if state["step"] % args.log == 0 or done:
                row = dict(state, lr=lr, **{name: round(float(value) / span, 4) for name, value in sums.items()})
                row["seconds"] = round(row["seconds"], 1)
                row["accuracy"] = evaluate() if state["step"] % args.evaluate == 0 or done else ""
                sums, span = {}, 0
                bar.set_postfix({name: row[name] for name in ("loss", "accuracy") if row[name] != ""})
                log(row)
                if row["accuracy"] != "" or time.monotonic() - saved_at > args.save:
                    save()
                    saved_at = time.monotonic()
            if done:
                break
        bar.close()
        save()
    # small enough to carry from the machine that trained to the one that exports
    save_file({k: v.contiguous() for k, v in trained(model).items()}, folder / TRAINED)
    export()


def ship_log(stage: str, folder: Path) -> None:
    """The curve goes with the checkpoint."""
    if (RUNS / stage / "log.csv").exists():
        shutil.copy(RUNS / stage / "log.csv", folder / "log.csv")
