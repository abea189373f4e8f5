"""Words on the terminal: once per job, and the libraries' own chatter off."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path


def is_main_process() -> bool:
    """Whether this is the job's first process (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print for the user, once per job."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def first_to_say(text: str) -> bool:
    """Whether no other process of this node has ended with this line. One that fails in a way of its own has a line of its own.

    The processes that torchrun starts at once share a folder, in which the first leaves a mark. Without one each speaks.
    """
    of_process = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not of_process:
        return True
    mark = Path(of_process).parent.parent / f"said-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    try:
        with mark.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return mark.read_text() == str(os.getpid())
    except OSError:
        pass
    return True


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
