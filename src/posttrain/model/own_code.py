"""Whose code raised an error: that of a model which brings its own code gets one line that says so. Imports nothing heavy."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from posttrain.types import UserError

OWN_MODULES = "transformers_modules"  # the package into which transformers imports the code of models
MISSING_PACKAGES = "were not found in your environment: "
# What a call of something that is no more, or has changed, ends in. Others (out of memory, say) are the same whoever's code calls.
MISFITS = (AttributeError, ImportError, NameError, NotImplementedError, TypeError)
AT_LOAD = (AssertionError, LookupError, RuntimeError, SyntaxError)  # these too, where nothing of ours is computed
OTHER_SHAPES = "ignore_mismatched_sizes"  # the library's word on weights that do not fit, which has a line of its own
MISFIT_CALL = re.compile(r"(\w+)[\w.]*\(\) (?:got an unexpected|missing|takes|got multiple)")
LACKS = re.compile(r"'(\w+)' object has no attribute")
WHAT_TO_DO = "take a newer --model_revision, a model of its family that transformers has a class for, or mend that file"


def is_own_code(thing: object) -> bool:
    """Whether the class of a model, module or tokenizer came with a model."""
    return type(thing).__module__.split(".")[0] == OWN_MODULES


@contextmanager
def own_code(name: str) -> Iterator[None]:
    """While a model (or its config or tokenizer) is loaded: an error out of its own code becomes a UserError of one line."""
    try:
        yield
    except (*MISFITS, *AT_LOAD) as error:
        line = misfit_line(error, name)
        if line is None:
            raise
        raise UserError(line) from error


def misfit_line(error: Exception, name: str = "the model") -> str | None:
    """One line for an error of a model's own code; None for any other."""
    if OTHER_SHAPES in str(error):
        return None
    if isinstance(error, ImportError) and MISSING_PACKAGES in str(error):
        packages = str(error).partition(MISSING_PACKAGES)[2].partition(". Run")[0]
        return f"{name}: its own code needs packages that are not installed: pip install {packages.replace(',', '')}"
    place = _own_place(error) or _own_class(error)
    if place is None:
        return None
    said = (str(error).strip().splitlines() or [""])[0].partition(" (/")[0]
    return (
        f"{name}: its own code, written for {_written_for(name)}, does not run under transformers {version('transformers')}:"
        f" {type(error).__name__}: {said} ({place}); {WHAT_TO_DO}"
    )


def _own_place(error: Exception) -> str | None:
    """File and line of the model's own code that is nearest to the error, if it went through any, and not from there into ours."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package == __name__.split(".")[0]:
            return None
        if package == OWN_MODULES:
            return f"{Path(frame.f_code.co_filename).name}, line {line}"
    return None


def _own_class(error: Exception) -> str | None:
    """File of the class of the model's own code that a call did not fit, or that lacks what the library asks for: raised outside it."""
    named = MISFIT_CALL.match(str(error)) if isinstance(error, TypeError) else None
    named = LACKS.match(str(error)) if isinstance(error, AttributeError) else named
    if named is None:
        return None
    own = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == OWN_MODULES]
    # Defined there, not imported: Tensor and the like are named in such modules, too.
    defining = (module for module in own if getattr(getattr(module, named[1], None), "__module__", "") == module.__name__)
    return next((f"{module.__name__.split('.')[-1]}.py" for module in defining), None)


def _written_for(name: str) -> str:
    """The transformers that wrote a local folder's config.json."""
    file = Path(name) / "config.json"
    try:
        wrote = json.loads(file.read_text(encoding="utf-8")).get("transformers_version") if file.is_file() else None
    except ValueError:
        wrote = None
    return f"transformers {wrote}" if wrote and wrote != version("transformers") else "another version"
