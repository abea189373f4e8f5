"""PPO: `posttrain ppo` under the guide's name."""

import sys

from posttrain.cli import main

sys.exit(main(["ppo", *sys.argv[1:]]))
