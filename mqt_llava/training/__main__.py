"""`python -m mqt_llava.training RECIPE.yaml [--key value ...]`, also under `accelerate launch`."""

import sys

from ..cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
