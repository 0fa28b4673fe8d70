"""Train all embedded models in waves: the tower, then tiny-llava in several seeds, then families that begin as it.

    python -m analysis.training.everything --seconds 480 --workers 14    # one GPU: a wave's stages run side by side
    python -m analysis.training.everything --wave 2 --seconds 200        # one wave alone

`--seconds` is what all waves together may take, start-up included; each stage learns at the pace that its time allows.
A stage's output goes to runs/<stage>/output.txt. Stages resume, so a second call with more seconds goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from analysis import ROOT
from analysis.training import loop

START_UP = 15  # seconds that a wave spends on imports, the first scenes and the export, beyond the training itself
# waves of stages that run side by side: (share of the whole time, {stage: its options}); see `train --help`
LLAVA = "--batch 64 --questions 8 --pool 12800 --fresh 8 --every 16 --easy 15000 --log 100 --evaluate 3000".split()
LATER = "--start tiny-llava --lr 1e-3 --decay 0.7 --batch 64 --questions 8 --pool 5120 --fresh 8 --every 16".split() + (
    "--easy 2000 --log 100 --evaluate 100000".split()
)
TOWER = "--batch 192 --pool 6144 --fresh 32 --every 8 --easy 20000 --log 50 --evaluate 500 --decay 0.6".split()
WAVES: list[tuple[float, dict[str, list[str]]]] = [
    (0.16, {"tiny-clip": ["--lr", "1.5e-3", *TOWER]}),
    (0.46, {
        "tiny-llava": ["--seed", "0", *LLAVA],
        "tiny-llava-seed1": ["--seed", "1", *LLAVA],
        "tiny-llava-seed2": ["--seed", "2", *LLAVA],
        "tiny-eva": ["--lr", "1e-3", *TOWER, "--fresh", "8"],
        "tiny-qwen-tower": ["--lr", "1e-3", *TOWER, "--fresh", "8", "--batch", "48"],
    }),
    (0.38, {
        "tiny-llava-wide": LATER,
        "tiny-llava-next": [*LATER, "--batch", "24"],
        "tiny-shikra": LATER,
        "tiny-minigpt-v2": LATER,
        "tiny-qwen2.5-vl": LATER,
    }),
]  # fmt: skip


def wave(number: int, seconds: float, workers: int, device: str) -> dict[str, int]:
    """Run the stages of a wave side by side, for `seconds` in all. Returns their exit codes."""
    stages = WAVES[number][1]
    running = {}
    for stage, options in stages.items():
        folder = loop.RUNS / stage
        folder.mkdir(parents=True, exist_ok=True)
        output = open(folder / "output.txt", "a")  # noqa: SIM115 (it lives as long as the process)
        limit = str(max(1.0, seconds - START_UP))
        command = [sys.executable, "-m", "analysis.training.train", stage, "--seconds", limit,
                   "--workers", str(max(1, workers // len(stages))), "--device", device, *options]  # fmt: skip
        running[stage] = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    codes = {stage: process.wait() for stage, process in running.items()}
    for stage, code in codes.items():
        lines = (loop.RUNS / stage / ("output.txt" if code else "log.csv")).read_text().splitlines()
        print(f"{stage}: exit code {code}", *([] if code else lines[:1]), *lines[-8:], sep="\n  ", flush=True)
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4 * 3600)
    parser.add_argument("--wave", type=int, nargs="*", default=list(range(len(WAVES))), help="which waves, from 0")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw scenes, for all stages together")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    began, left = time.monotonic(), sum(WAVES[number][0] for number in args.wave)
    failed = 0
    for number in args.wave:
        share, _ = WAVES[number]
        seconds = (args.seconds - (time.monotonic() - began)) * share / left
        left -= share
        print(f"wave {number}: {', '.join(WAVES[number][1])}, {seconds:.0f} s", flush=True)
        failed += sum(code != 0 for code in wave(number, seconds, args.workers, args.device).values())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
