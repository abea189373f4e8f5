"""`posttrain run pipeline.yaml`: stages and merges one after the other, each a command of its own; what is finished is not done twice."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain import flags
from posttrain.commands.pipeline_file import Pipeline, read_pipeline
from posttrain.commands.pipeline_steps import Step, build_steps
from posttrain.commands.report import say
from posttrain.config import Config
from posttrain.training import artifacts
from posttrain.types import UserError

STATE_FILE = "pipeline.json"
Verdict = Literal["finished", "run", "resume", "again"]
EXTRA: dict[Verdict, tuple[str, ...]] = {
    "run": (), "resume": ("--resume_from_checkpoint", "auto"), "again": ("--overwrite_output_dir", "True"), "finished": (),
}  # fmt: skip


def run(config: Config) -> None:
    """Read, check everything, then run what is not finished."""
    chosen = config.group(flags.PipelineFlags)
    pipeline = read_pipeline(chosen.pipeline)
    for note in pipeline.notes:
        say(f"note: {note}")
    steps = build_steps(pipeline)
    selected = select(pipeline, steps, chosen.only)
    runner = Runner(pipeline.output_dir, forced=behind(pipeline, chosen.from_stage), dry=chosen.dry_run)
    for step in selected:
        runner.take(step)
    say(f"pipeline {'looked at' if chosen.dry_run else 'finished'}: {pipeline.output_dir}")


def behind(pipeline: Pipeline, name: str | None) -> set[str]:
    """A stage and those that stand behind it."""
    names = [stage.name for stage in pipeline.stages]
    return set() if name is None else set(names[names.index(_stage_name(pipeline, name, "--from_stage")) :])


def _stage_name(pipeline: Pipeline, name: str, flag: str) -> str:
    names = [stage.name for stage in pipeline.stages]
    if name not in names:
        raise UserError(f"{flag} {name}: {pipeline.file} has the stages {', '.join(names)}")
    return name


def select(pipeline: Pipeline, steps: Sequence[Step], only: str | None) -> list[Step]:
    """The steps of the stages in `only`. UserError when what they start from is neither there nor made by one of them."""
    if only is None:
        return list(steps)
    names = {_stage_name(pipeline, name.strip(), "--only") for name in only.split(",")}
    chosen = [step for step in steps if step.stage in names]
    made = {str(step.folder): step for step in steps}
    for step in chosen:
        for model in step.models:
            maker = made.get(model)
            if maker is not None and maker.stage not in names and not Path(model).is_dir():
                raise UserError(f"--only {only}: {step.name} starts from {model}, which stage {maker.stage} has not made yet")
    return chosen


@dataclass
class Runner:
    """Goes through the steps and remembers in `pipeline.json` what was run, from which rows, and what came out.

    forced  stages that start over even if they are finished
    made    folders that a dry run would have filled anew
    """

    output_dir: Path
    forced: set[str] = field(default_factory=set)
    dry: bool = False
    made: set[str] = field(default_factory=set)

    def take(self, step: Step) -> None:
        """Run a step unless it is finished; say which and why."""
        record = self._state().get(step.name)
        verdict, why = self.judge(step, record)
        if verdict == "finished":
            say(f"{step.name}: finished before ({step.folder})")
            return
        said = {"run": "", "resume": ": goes on", "again": ": starts over"}[verdict]
        say(f"{step.name}{said}{f', {why}' if why else ''}")
        command = command_line(step, EXTRA[verdict])
        say(
            f"$ {' '.join(step.launcher) + ' -m ' if step.launcher else ''}{shlex.join(['posttrain', *step.words, *EXTRA[verdict]])}"
        )
        if self.dry:
            self.made.add(str(step.folder))
            return
        self._keep(step, {"words": list(step.words), "data": data_hash(step.data), "finished": False})
        code = start(command)
        if code != 0:
            raise UserError(
                f"{step.where}: {step.name} ended with exit code {code}: once mended, the same `posttrain run` goes on there"
            )
        self._keep(step, {**self._state()[step.name], "finished": True, "output": artifacts.content_hash(step.folder)})

    def judge(self, step: Step, record: dict[str, Any] | None) -> tuple[Verdict, str]:
        """What is to be done with a step, and why."""
        filled = step.folder.is_dir() and any(step.folder.iterdir())
        if not filled:
            return "run", ""
        if step.stage in self.forced:
            return "again", "as --from_stage asks"
        if record is None:
            raise UserError(
                f"{step.where}: {step.folder} holds what this pipeline did not make: move it away; --from_stage {step.stage} overwrites it"
            )
        changed = self._changed(step, record)
        if changed:
            return "again", changed
        if record["finished"]:
            if artifacts.content_hash(step.folder) != record["output"]:
                raise UserError(
                    f"{step.where}: {step.folder} was changed after this pipeline filled it: --from_stage {step.stage} makes it anew"
                )
            return "finished", ""
        if step.trains and any(step.folder.glob("checkpoint-*")):
            return "resume", "it was interrupted"
        return "again", "it was interrupted"

    def _changed(self, step: Step, record: dict[str, Any]) -> str:
        """What a filled folder was made from and is no longer so; "" when all is the same."""
        if record["words"] != list(step.words):
            return f"its flags have changed: {' '.join(differing(record['words'], step.words))}"
        if record["data"] != data_hash(step.data):
            return "its rows have changed"
        for model in step.models:
            if model in self.made:
                return f"{model} would be made anew"
        file = step.folder / artifacts.RUN_FILE
        parents = json.loads(file.read_text(encoding="utf-8"))["parents"] if file.is_file() else {}
        for parent in parents.values():
            folder = Path(parent["name"])
            if folder.is_dir() and artifacts.content_hash(folder) != parent["hash"]:
                return f"{parent['name']} has changed since"
        return ""

    def _state(self) -> dict[str, Any]:
        file = self.output_dir / STATE_FILE
        if not file.is_file():
            return {}
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state

    def _keep(self, step: Step, record: dict[str, Any]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self._state(), step.name: record}, indent=2, ensure_ascii=False) + "\n"
        partial = self.output_dir / f"{STATE_FILE}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.output_dir / STATE_FILE)


def differing(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The flags whose values differ between two command lines."""
    pairs = [dict(zip(words[1::2], words[2::2], strict=False)) for words in (old, new)]
    return sorted(name for name in pairs[0].keys() | pairs[1].keys() if pairs[0].get(name) != pairs[1].get(name))


def data_hash(names: Sequence[str]) -> str:
    """Hash of the files of rows, by their names and content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        root = Path(name).expanduser()
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.is_file():
                digest.update(f"{file}:{file.stat().st_size}\n".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()


def command_line(step: Step, extra: Sequence[str]) -> list[str]:
    """The process of a step: this Python, or the launcher of training stages in front."""
    launcher = list(step.launcher) if step.trains else []
    if not launcher:
        return [sys.executable, "-m", "posttrain", *step.words, *extra]
    beside = Path(sys.executable).with_name(launcher[0])
    program = str(beside) if beside.is_file() else shutil.which(launcher[0])
    if program is None:
        raise UserError(f"{step.where}: launcher {launcher[0]}: no such program")
    return [program, *launcher[1:], "-m", "posttrain", *step.words, *extra]


def start(command: Sequence[str]) -> int:
    """Run a command to its end; its output is ours. A process of its own: its memory is free afterwards."""
    return subprocess.run(command, check=False).returncode
