"""Reward model: `posttrain rm` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["rm", *sys.argv[1:]]))
