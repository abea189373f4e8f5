"""The YAML file of a pipeline: what it may say, checked word by word, each mistake with its line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain import config
from posttrain.commands.table import COMMANDS
from posttrain.commands.table import STAGES as TRAINED
from posttrain.types import UserError

STAGES = ("extend-vocab", *TRAINED)
TOP = ("output_dir", "model_name_or_path", "launcher", "flags", "stages")
OF_STAGE = ("stage", "name", "from", "merge", "launcher", "config")
# Flags that the pipeline sets itself, and where the user says them instead.
OURS = {
    "output_dir": "folders are <output_dir>/<stage>; output_dir stands at the top",
    "resume_from_checkpoint": "an interrupted stage goes on by itself",
    "overwrite_output_dir": "a stage that must start over does so by itself; --from_stage asks for it",
}


@dataclass(frozen=True)
class Stage:
    """One stage as it is written down. `flags`: name → text, as on a command line; `lines`: where each of them stands.

    start  the stage whose model this one starts from; None: the one before that has a model to go on from
    merge  flags of the merge; None: merged where its model is needed or the last word on it; False: never
    """

    name: str
    command: str
    where: str
    flags: Mapping[str, str]
    lines: Mapping[str, str]
    start: str | None = None
    merge: Mapping[str, str] | bool | None = None
    launcher: tuple[str, ...] = ()
    recipe: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """The whole file."""

    file: str
    output_dir: Path
    model: str | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = field(default=())


def read_pipeline(file: str) -> Pipeline:
    """Parse and check the words; what they name is looked at later. UserError names file:line."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such pipeline file")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    top = _mapping(root, file, "expected output_dir, model_name_or_path, flags and stages")
    for name, (_, where) in top.items():
        _known(name, TOP, where)
    for needed in ("output_dir", "stages"):
        if needed not in top:
            raise UserError(f"{file}:1: a pipeline needs {needed}")
    stages_node, where = top["stages"]
    if not isinstance(stages_node, yaml.SequenceNode) or not stages_node.value:
        raise UserError(f"{where}: expected a list of stages: - stage: sft")
    notes: list[str] = []
    shared = _mapping(top["flags"][0], file, "flags: expected lines of `flag: value`") if "flags" in top else {}
    launcher = tuple(shlex.split(_text(top["launcher"]))) if "launcher" in top else ()
    stages = tuple(_stage(node, file, shared, launcher, notes) for node in stages_node.value)
    _check_shared(shared, stages)
    _check_names(stages)
    model = _text(top["model_name_or_path"]) if "model_name_or_path" in top else None
    return Pipeline(file, Path(_text(top["output_dir"])), model, stages, tuple(dict.fromkeys(notes)))


Placed = tuple[yaml.Node, str]  # a value and file:line:key


def _mapping(node: yaml.Node | None, file: str, expected: str) -> dict[str, Placed]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node is not None else 1
        raise UserError(f"{file}:{line}: {expected}")
    found: dict[str, Placed] = {}
    for key, value in node.value:
        where = f"{file}:{key.start_mark.line + 1}:{key.value}"
        if key.value in found:
            raise UserError(f"{where}: written twice")
        found[str(key.value)] = (value, where)
    return found


def _value(placed: Placed) -> Any:
    return yaml.safe_load(yaml.serialize(placed[0]))


def _text(placed: Placed) -> str:
    value = _value(placed)
    if not isinstance(value, str) or not value:
        raise UserError(f"{placed[1]}: expected a text")
    return value


def _known(name: str, names: tuple[str, ...], where: str) -> None:
    if name not in names:
        raise UserError(f"{where} is unknown: expected one of {', '.join(names)}; flags of all stages stand under flags")


def _stage(node: yaml.Node, file: str, shared: Mapping[str, Placed], launcher: tuple[str, ...], notes: list[str]) -> Stage:
    written = _mapping(node, file, "expected `stage: sft` and its flags")
    where = f"{file}:{node.start_mark.line + 1}"
    if "stage" not in written:
        raise UserError(f"{where}: a stage begins with `stage:` and one of {', '.join(STAGES)}")
    command = _text(written["stage"])
    if command not in STAGES:
        raise UserError(f"{written['stage'][1]} {command!r}: expected one of {', '.join(STAGES)}")
    flags, lines = _flags(shared, command, notes, skip_unknown=True)
    own = {name: placed for name, placed in written.items() if name not in OF_STAGE}
    own_flags, own_lines = _flags(own, command, notes)
    if command not in TRAINED:
        _check_untrained(command, written)
        launcher = ()
    elif "launcher" in written:
        launcher = tuple(shlex.split(_text(written["launcher"])))
    return Stage(
        _text(written["name"]) if "name" in written else command, command, where, {**flags, **own_flags}, {**lines, **own_lines},
        _text(written["from"]) if "from" in written else None, _merge(written.get("merge"), file), launcher,
        _text(written["config"]) if "config" in written else None,
    )  # fmt: skip


def _check_untrained(command: str, written: Mapping[str, Placed]) -> None:
    """A stage that trains nothing is one process and leaves nothing to merge."""
    for name in ("launcher", "merge"):
        if name in written:
            raise UserError(f"{written[name][1]}: does nothing in {command}, which does not train")


def _merge(placed: Placed | None, file: str) -> Mapping[str, str] | bool | None:
    if placed is None:
        return None
    if isinstance(placed[0], yaml.ScalarNode):
        value = _value(placed)
        if not isinstance(value, bool):
            raise UserError(f"{placed[1]}: expected true, false or flags of posttrain merge")
        return value
    written = _mapping(placed[0], file, "expected flags of posttrain merge")
    for name in ("base_model", "lora_model"):
        if name in written:
            raise UserError(f"{written[name][1]}: the pipeline knows what is merged")
    return _flags(written, "merge", [])[0]


def _flags(
    written: Mapping[str, Placed], command: str, notes: list[str], skip_unknown: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Flags of a command and their places."""
    table = COMMANDS[command]
    options = config.options_of(table.groups, table.training)
    flags: dict[str, str] = {}
    lines: dict[str, str] = {}
    for name, placed in written.items():
        _, where = placed
        if name in OURS:
            raise UserError(f"{where}: the pipeline sets it: {OURS[name]}")
        try:
            known = config.canonical(options, name, where, notes, command)
        except UserError:
            if skip_unknown:
                continue
            raise
        if known is not None:
            config.yaml_value(options[known], _value(placed), where)
            flags[known], lines[known] = as_word(_value(placed)), where
    return flags, lines


def as_word(value: Any) -> str:
    """A value of YAML as it stands on a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _check_shared(shared: Mapping[str, Placed], stages: tuple[Stage, ...]) -> None:
    """A shared flag must be one of at least one stage; else the first stage says why it is not."""
    if "model_name_or_path" in shared:
        raise UserError(
            f"{shared['model_name_or_path'][1]}: model_name_or_path stands at the top: only the first stage starts from it"
        )
    for name, placed in shared.items():
        errors = []
        for command in dict.fromkeys(stage.command for stage in stages):
            try:
                _flags({name: placed}, command, [])
            except UserError as error:
                errors.append(error)
        if len(errors) == len({stage.command for stage in stages}):
            raise errors[0]


def _check_names(stages: tuple[Stage, ...]) -> None:
    seen: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in seen:
            raise UserError(f"{stage.where}: a second stage {stage.name!r}: give it a name of its own (`name:`)")
        if "/" in stage.name or stage.name.endswith("-merged"):
            raise UserError(f"{stage.where}: name {stage.name!r}: a plain word that does not end in -merged")
        if stage.start is not None and stage.start not in seen:
            raise UserError(
                f"{stage.where}: from {stage.start!r}: expected a stage before it ({', '.join(seen) or 'there is none'})"
            )
        seen[stage.name] = stage
