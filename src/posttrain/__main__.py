"""`python -m posttrain` (and `torchrun … -m posttrain`) is the same as the command `posttrain`."""

import sys

from posttrain.cli import main

sys.exit(main())
