"""Merge an adapter into its base: `posttrain merge` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["merge", *sys.argv[1:]]))
