"""Continued pretraining: `posttrain pt` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["pt", *sys.argv[1:]]))
