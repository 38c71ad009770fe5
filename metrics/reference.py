"""Launcher: `accelerate launch metrics/reference.py CONFIG.yaml key=value …`."""

import sys

from mhla_gen.cli import main

if __name__ == "__main__":
    sys.exit(main(["reference", *sys.argv[1:]]))
