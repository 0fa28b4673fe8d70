"""Train the tiny models on RefStamps.

    python -m analysis.training.train tiny-clip   --steps 1600 --decay 400 --lr 1.5e-3
    python -m analysis.training.train tiny-llava  --steps 13500 --decay 7000
    python -m analysis.training.train tiny-shikra --steps 6000 --decay 5000 --start tiny-llava

Each stage keeps `RUNS/<stage>/state.pt` (weights, optimizer, step) and `log.csv`, and goes on from there when it is
started again, also with more steps: the learning rate is constant after its warm-up and falls linearly to zero over
the last `--decay` steps, so a run can be lengthened as long as it has not begun to decay. At the end (and with
`--export`, at any time) the stage writes its checkpoint in Hugging Face form to `analysis/checkpoints/`.
"""

from __future__ import annotations

import argparse

import torch

from analysis.models import MODELS
from analysis.training import contrast, instruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tiny-clip", *MODELS])
    parser.add_argument("--steps", type=int, default=10_000, help="train up to this step in all")
    parser.add_argument("--decay", type=int, default=0, help="linear fall of the learning rate over the last steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--questions", type=int, default=6, help="questions on each image (not tiny-clip)")
    parser.add_argument(
        "--alone",
        type=float,
        default=0.5,
        help="tiny-shikra: share of the steps that ask with the image after the expression",
    )
    parser.add_argument("--pool", type=int, default=4000, help="scenes kept to draw from")
    parser.add_argument("--fresh", type=int, default=12, help="new scenes a step")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log", type=int, default=50, help="steps between two lines of log.csv")
    parser.add_argument("--evaluate", type=int, default=500, help="steps between two measurements of the accuracy")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start",
        help="a model without saved state begins as this one: embedded, or a folder of the same shape or smaller",
    )
    parser.add_argument("--export", action="store_true", help="only write the checkpoint from the saved state")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.stage == "tiny-clip":
        contrast.train(args)
    else:
        instruct.train(args.stage, args)


if __name__ == "__main__":
    main()
