"""Train: `accelerate launch train/train.py CONFIG.yaml key=value …`, or one process with python."""

import sys

from mhla_gen.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
