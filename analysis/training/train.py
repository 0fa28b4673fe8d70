"""Train the tiny models on RefStamps.

    python -m analysis.training.train tiny-clip   --steps 3000 --batch 128
    python -m analysis.training.train tiny-llava  --steps 10000
    python -m analysis.training.train tiny-eva    --steps 2000
    python -m analysis.training.train tiny-shikra --steps 6000 --start tiny-llava

Each stage keeps `runs/<stage>/state.pt` (weights, optimizer, step) and `log.csv`, and goes on from there when it is
started again, also with more steps: the learning rate is constant after its warm-up and falls linearly to zero over the
last `--decay` share of the run, so a run can be lengthened as long as it has not begun to decay. At the end (and with
`--export`, at any time) the stage writes its checkpoint in Hugging Face form to `runs/checkpoints/`. A stage without
saved state goes on from `analysis/training/begun/<stage>.safetensors`, if that is there. On a GPU use a larger batch,
more workers and a larger pool; `--seconds` bounds a run by time. "tiny-llava-seed1" is tiny-llava with `--seed 1`.
"""

from __future__ import annotations

import argparse

import torch

from analysis.training import contrast, imitate, instruct
from analysis.training.design import FAMILY


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["tiny-clip", *imitate.STUDENTS, *FAMILY, "tiny-llava-seed1", "tiny-llava-seed2"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--steps", type=int, default=10_000, help="train up to this step in all")
    parser.add_argument("--seconds", type=float, default=0, help="train for this long in all, instead of --steps")
    parser.add_argument(
        "--decay", type=float, default=0.5, help="share of the run in which the learning rate falls to 0"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--questions", type=int, default=6, help="questions on each image (language models)")
    parser.add_argument(
        "--alone",
        type=float,
        default=0.5,
        help="tiny-shikra: share of the steps that ask with the image after the expression",
    )
    parser.add_argument("--pool", type=int, default=4000, help="scenes kept to draw from")
    parser.add_argument("--fresh", type=int, default=8, help="new scenes a step")
    parser.add_argument("--every", type=int, default=1, help="steps after which the new scenes come, all at once")
    parser.add_argument("--easy", type=int, default=20_000, help="scenes over which one-object scenes become fewer")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log", type=int, default=50, help="steps between two lines of log.csv")
    parser.add_argument("--evaluate", type=int, default=500, help="steps between two measurements of the accuracy")
    parser.add_argument("--held-out", type=int, default=200, help="scenes that are measured on")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start",
        help="a model without saved state begins as this one: embedded, or a folder of the same shape or smaller",
    )
    parser.add_argument("--save", type=float, default=60, help="seconds between two savings of the state, at least")
    parser.add_argument(
        "--afresh", action="store_true", help="do not go on from the weights in analysis/training/begun"
    )
    parser.add_argument("--export", action="store_true", help="only write the checkpoint from the saved state")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.stage == "tiny-clip":
        contrast.train(args)
    elif args.stage in imitate.STUDENTS:
        imitate.train(args.stage, args)
    else:
        instruct.train(args.stage, args)


if __name__ == "__main__":
    main()
