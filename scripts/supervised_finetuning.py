"""Supervised fine-tuning: `posttrain sft` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["sft", *sys.argv[1:]]))
