"""python train.py --config configs/X.yaml [--section.field VALUE ...] is `jaxgpt train`, without installing it."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
