"""The end of a process that is one of several."""

from __future__ import annotations

import atexit
import gc

from torch import distributed


def leave_at_exit() -> None:
    """Close the connections to the other processes when this one ends.

    Left open until the interpreter is taken down, their threads may ask for it when it is gone, which aborts a run that has finished.
    """
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_initialized():
        gc.collect()  # a trainer is full of cycles, and while its DDP module lives the connections do
        distributed.destroy_process_group()
