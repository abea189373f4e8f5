"""Supervised fine-tuning: `posttrain sft` under the guide's name."""

import sys

from posttrain.cli import main

if __name__ == "__main__":  # where a GPU is in use, preprocessing starts processes that import this file
    sys.exit(main(["sft", *sys.argv[1:]]))
