"""Words on the terminal: once per job, and the libraries' own chatter off."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def is_main_process() -> bool:
    """Whether this is the job's first process (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print for the user, once per job."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


class _CurrentStderr(logging.Handler):
    """Writes to what standard error is at the moment, not to what it was when logging began."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Our own log lines plain and once per job; libraries only with errors that we do not turn into ours."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("posttrain")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers)\..*")
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line per product and type
    if not sys.stderr.isatty():
        library_logging.disable_progress_bar()
