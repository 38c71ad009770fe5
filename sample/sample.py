"""Sample images: `python sample/sample.py CONFIG.yaml key=value …`."""

import sys

from mhla_gen.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
