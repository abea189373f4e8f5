"""Scores by a Python function of the user's: `--reward_func module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from posttrain.training.episodes import Episode, Wanted
from posttrain.training.rewards import checked_scores
from posttrain.types import UserError


@dataclass(frozen=True)
class FunctionReward:
    """A function that is called with keyword columns, one entry per answer, and returns as many numbers.

    It gets those columns that its parameters name, all of them with **kwargs: see `columns`, and those of the prompts' rows.
    `spec` is what the user typed.
    """

    name: str
    spec: str
    function: Callable[..., Any]

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """Raises UserError where it returns something else; what it raises itself is told with its place."""
        given = {name: column for name, column in columns(episodes).items() if name in accepted(self.function)}
        given |= row_columns(self.function, episodes)
        with Told(f"--reward_func {self.spec}:"):
            scores = self.function(**given)
        if hasattr(scores, "tolist"):  # a tensor or an array
            scores = scores.tolist()
        if not isinstance(scores, Sequence) or isinstance(scores, str | bytes):
            raise UserError(
                f"--reward_func {self.spec}: returned {type(scores).__name__}, expected a list of {len(episodes)} numbers"
            )
        scores = [score.item() if getattr(score, "ndim", None) == 0 else score for score in scores]
        return checked_scores(f"--reward_func {self.spec}", episodes, scores)


def columns(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """What a function can ask for. Copies: whatever it does to them, the episodes stay."""
    found: dict[str, list[Any]] = {
        "prompts": [episode.messages for episode in episodes],  # lists of {"role", "content", …}
        "answers": [episode.answer for episode in episodes],
        "answer_ids": [episode.answer_ids for episode in episodes],
        "prompt_ids": [episode.prompt_ids for episode in episodes],
        "tools": [episode.tools for episode in episodes],
        "sources": [episode.source for episode in episodes],  # file:line
        "stopped": [episode.stopped for episode in episodes],  # False: cut off by the length limit
    }
    return copy.deepcopy(found)


def accepted(function: Callable[..., Any]) -> set[str]:
    """The columns that a function takes."""
    known = set(columns([]))
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return known if any(p.kind is p.VAR_KEYWORD for p in parameters) else known & named


def wanted(function: Callable[..., Any]) -> Wanted:
    """The columns of the prompts' rows that a function takes: those that its parameters name and an episode does not have."""
    known = set(columns([]))
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in known]
    needed = frozenset(p.name for p in named if p.default is p.empty)
    optional = frozenset(p.name for p in named) - needed
    return Wanted(needed, optional, any(p.kind is p.VAR_KEYWORD for p in parameters))


def row_columns(function: Callable[..., Any], episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """What a function gets of the prompts' rows; None for a row without one that others have."""
    asked, known = wanted(function), set(columns([]))
    names = dict.fromkeys(name for episode in episodes for name in episode.columns if name not in known)
    taken = [name for name in names if asked.every or name in asked.needed | asked.optional]
    return {name: [copy.deepcopy(episode.columns.get(name)) for episode in episodes] for name in taken}


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Modules are also looked for in the current directory.

    Raises UserError where it cannot be imported, is none, or cannot be called with keywords.
    """
    place, _, name = spec.rpartition(":")
    file = Path(place).expanduser().resolve() if place.endswith(".py") else None
    if not name.isidentifier() or not (file or all(part.isidentifier() for part in place.split("."))):
        raise UserError(f"--reward_func {spec}: expected module:function or path/to/file.py:function")
    if file is not None and not file.is_file():
        raise UserError(f"--reward_func {spec}: no such file")
    try:
        with Told(f"--reward_func {spec}: its module"):
            module = _module(place) if file is None else _file_module(file)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"--reward_func {spec}: cannot be imported ({' '.join(str(error).split())})") from error
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [n for n, v in vars(module).items() if callable(v)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--reward_func {spec}: {getattr(module, '__file__', None) or place} has no function {name}{hint}")
    _check_parameters(spec, function)
    found: Callable[..., Any] = function
    return found


def _check_parameters(spec: str, function: Callable[..., Any]) -> None:
    """Raises UserError for a parameter that must be given and cannot be, by a keyword."""
    for p in inspect.signature(function).parameters.values():
        if p.default is p.empty and p.kind is p.POSITIONAL_ONLY:
            known = ", ".join(columns([]))
            raise UserError(
                f"--reward_func {spec}: takes {p.name!r} by position only; a function is called with keywords: {known}, and the"
                " columns of the prompts' rows"
            )


def _module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    return importlib.import_module(name)


@functools.cache
def _file_module(path: Path) -> ModuleType:
    """A module of its own for a file, which may import its neighbours. Loaded once, however many of its functions are named."""
    _look_in(path.parent)
    name = "reward_func_" + re.sub(r"\W", "_", str(path))
    described = importlib.util.spec_from_file_location(name, path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    described.loader.exec_module(module)
    return module


def _look_in(folder: Path) -> None:
    """Imports also look there, last: a file of the user's never stands in for a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


class Told:
    """Whatever is raised inside becomes one line: what, and where in the code of the user's."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError | ImportError | SyntaxError):
            frames = traceback.extract_tb(where)[1:]  # the first is our call
            own = next((f for f in reversed(frames) if "site-packages" not in f.filename), None)
            place = f" ({Path(own.filename).name}:{own.lineno})" if own else ""
            raise UserError(f"{self.what} raised {type(error).__name__}: {' '.join(str(error).split())}{place}") from error
