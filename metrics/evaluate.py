"""Launcher: `accelerate launch metrics/evaluate.py CONFIG.yaml key=value …`."""

import sys

from mhla_gen.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
