"""Ask a model: `posttrain inference` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["inference", *sys.argv[1:]]))
