"""From the command line and a YAML file to checked values, each with its origin (default, file, flag, derived).

Nothing here imports torch: a wrong flag is answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from posttrain import hf_flags
from posttrain.types import UserError

Origin = Literal["default", "file", "flag", "derived"]
T = TypeVar("T")
LIBRARY_OWNER = "transformers.TrainingArguments"


@dataclass(frozen=True)
class Value:
    """A flag's value and where it comes from."""

    value: Any
    origin: Origin


@dataclass(frozen=True)
class Option:
    """One accepted flag: how its text is read, its default and its help. `owner` is the heading it stands under."""

    name: str
    read: Callable[[str], Any]
    default: Any
    help: str
    owner: str
    takes: Literal["bool", "one", "many"]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """The resolved flags of one command."""

    command: str
    values: Mapping[str, Value]
    notes: tuple[str, ...] = ()  # one line each: a renamed flag, a flag that is needed no more

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value

    def given(self, name: str) -> bool:
        """Whether the user set it, by file or flag."""
        return name in self.values and self.values[name].origin in ("file", "flag")

    def group(self, cls: type[T]) -> T:
        """The values of one flag class."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: self.values[name].value for name in names})

    def derive(self, **derived: Any) -> Config:
        """The same flags with values worked out from others; a value that the user gave stays."""
        new = {name: Value(value, "derived") for name, value in derived.items() if not self.given(name)}
        return dataclasses.replace(self, values={**self.values, **new})

    def replace(self, name: str, value: Any) -> Config:
        """The same flags with one value worked out, for flags whose given value asks for that (auto, -1)."""
        return dataclasses.replace(self, values={**self.values, name: Value(value, "derived")})

    def table(self) -> str:
        """What is not a default, one line each with its origin."""
        rows = [(n, v) for n, v in self.values.items() if v.origin != "default"]
        width = max((len(n) for n, _ in rows), default=0)
        return "\n".join(f"  {n:<{width}}  {_shown(n, v.value)}  ({v.origin})" for n, v in rows)

    def saved(self) -> dict[str, Any]:
        """Every value as plain JSON, secrets left out."""
        return {n: _plain(_shown(n, v.value)) for n, v in self.values.items()}


def _shown(name: str, value: Any) -> Any:
    return "(hidden)" if name.endswith("_token") and value else value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _read_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError("expected True or False")


def _read_dict(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else text


def _reader(kind: str) -> Callable[[str], Any]:
    readers: dict[str, Callable[[str], Any]] = {"bool": _read_bool, "int": int, "float": float, "dict": _read_dict}
    return readers.get(kind, str)


def _own_option(f: dataclasses.Field[Any], hint: Any, owner: str) -> Option:
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        choices, hint = tuple(str(a) for a in typing.get_args(hint)), str
    kind = hint.__name__
    return Option(f.name, _reader(kind), f.default, f.metadata["help"], owner, "bool" if kind == "bool" else "one", choices)


def options_of(groups: Sequence[type], training: bool) -> dict[str, Option]:
    """Every flag of a command: its groups' fields, then (for a training command) those of TrainingArguments."""
    found: dict[str, Option] = {}
    for cls in groups:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            found[f.name] = _own_option(f, hints[f.name], (cls.__doc__ or "").strip())
    if training:
        for name, flag in hf_flags.library_flags().items():
            if name in found or name in hf_flags.REFUSED or hf_flags.RENAMED.get(name):
                continue
            default = hf_flags.DEFAULTS.get(name, flag.default)
            takes: Literal["bool", "one", "many"] = "many" if flag.kind == "list" else "bool" if flag.kind == "bool" else "one"
            found[name] = Option(name, _reader(flag.kind), default, flag.help, LIBRARY_OWNER, takes)
    return found


def parse(command: str, groups: Sequence[type], training: bool, argv: Sequence[str]) -> Config:
    """Read `argv` (and the YAML file that `--config` names) for a command. UserError on anything that is not understood."""
    options = options_of(groups, training)
    notes: list[str] = []
    given = _read_argv(options, argv, notes, command)
    config_file = given.pop("config", None)
    values = {o.name: Value(o.default, "default") for o in options.values() if o.default is not dataclasses.MISSING}
    if config_file is not None:
        values |= {n: Value(v, "file") for n, v in _read_yaml(options, Path(config_file), notes, command).items()}
    values |= {n: Value(v, "flag") for n, v in given.items()}
    missing = [f"--{n}" for n in options if n not in values]
    if missing:
        raise UserError(f"posttrain {command} needs {', '.join(missing)}: see `posttrain {command} --help`")
    return Config(command, {n: values[n] for n in options}, tuple(notes))


def canonical(options: Mapping[str, Option], name: str, where: str, notes: list[str], command: str) -> str | None:
    """The option's name, following renames; None for a word that is needed no more. UserError for an unknown one."""
    if name in options:
        return name
    renamed = hf_flags.renamed(command)
    if name in renamed:
        new, why = renamed[name]
        while new is not None and new not in options and new in renamed:
            new, why = renamed[new]
        if new is None and (name in hf_flags.OF_COMMAND.get(command, {}) or _is_taken(name, options)):
            notes.append(f"{where} is not needed: {why}")
            return None
        if new is not None and new in options:
            notes.append(f"{where} is now --{new}" + (f" ({why})" if why else ""))
            return new
    if name in hf_flags.REFUSED_BY.get(command, {}):
        raise UserError(f"{where} cannot be used here: {hf_flags.REFUSED_BY[command][name]}")
    if name in hf_flags.REFUSED and "output_dir" in options:
        raise UserError(f"{where} would do nothing here: {hf_flags.REFUSED[name]}")
    old = [word for word, (new, _) in renamed.items() if new in options]
    near = difflib.get_close_matches(name, [*options, *old], n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else "see --help for the flags of this command"
    raise UserError(f"{where} is unknown: {hint}")


def _is_taken(word: str, options: Mapping[str, Option]) -> bool:
    """Whether an old word that is needed no more was one of this command's."""
    of_models = not {"model_name_or_path", "base_model"}.isdisjoint(options)
    return "learning_rate" in options or (of_models and word in hf_flags.ABOUT_MODELS)


def _read_value(option: Option, texts: Sequence[str], where: str) -> Any:
    try:
        if option.takes == "many":
            return [part for text in texts for part in text.split(",")]
        value = option.read(texts[0]) if texts else True
    except ValueError as error:
        wanted = {"_read_bool": "True or False"}.get(option.read.__name__, f"a value of type {option.read.__name__}")
        wanted = "JSON or a file name" if option.read is _read_dict else wanted
        raise UserError(f"{where} {texts[0]!r}: expected {wanted}") from error
    if isinstance(value, str) and value.lower() == "none" and option.default is None:
        return None
    if option.choices and value not in option.choices:
        raise UserError(f"{where} {value!r}: expected one of {', '.join(option.choices)}")
    return value


def _read_argv(options: Mapping[str, Option], argv: Sequence[str], notes: list[str], command: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} is not a flag: flags start with -- and their value follows")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        texts = [text] if equals else []
        while not equals and words and not words[0].startswith("--"):
            texts.append(words.pop(0))
        if name == "config":
            given[name] = _single(texts, "--config")
            continue
        known = canonical(options, name, f"--{name}", notes, command)
        if known is None:
            continue
        option = options[known]
        if not texts and option.takes != "bool":
            raise UserError(f"--{name} needs a value")
        if len(texts) > 1 and option.takes != "many":
            raise UserError(f"--{name} takes one value, got {' '.join(texts)!r}")
        given[known] = _read_value(option, texts, f"--{name}")
    return given


def _single(texts: Sequence[str], where: str) -> str:
    if len(texts) != 1:
        raise UserError(f"{where} needs one value")
    return texts[0]


def _read_yaml(options: Mapping[str, Option], path: Path, notes: list[str], command: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text)
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or node is None:
        raise UserError(f"{path}: expected lines of `flag: value`")
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    given: dict[str, Any] = {}
    for name, value in loaded.items():
        where = f"{path}:{lines.get(str(name), 1)}:{name}"
        known = canonical(options, str(name), where, notes, command)
        if known is not None:
            given[known] = yaml_value(options[known], value, where)
    return given


def yaml_value(option: Option, value: Any, where: str) -> Any:
    """A flag's value in a YAML file. UserError, with `where`, for one that does not fit."""
    if value is None:
        return None
    if isinstance(value, dict):
        if option.read is not _read_dict:
            raise UserError(f"{where}: expected one value, got a mapping; flags are flat")
        return value
    if isinstance(value, list):
        return _read_value(option, [str(v) for v in value] if option.takes == "many" else [",".join(map(str, value))], where)
    return _read_value(option, [str(value)], where)
