"""DPO: `posttrain dpo` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["dpo", *sys.argv[1:]]))
