"""Any data format -> canonical JSONL: `posttrain convert` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
