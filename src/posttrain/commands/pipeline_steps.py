"""From the stages of a pipeline to its steps: one command each, with the folder it fills and what it is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain import config
from posttrain.commands.pipeline_file import TRAINED, Pipeline, Stage
from posttrain.commands.table import COMMANDS
from posttrain.model.embedded import EMBEDDED, resolve_model
from posttrain.types import UserError

DATA = ("train_file_dir", "validation_file_dir")
SCORES = ("reward_adapter", "reward_model_name_or_path", "reward_func")
MODELS = ("model_name_or_path", "tokenizer_name_or_path", "peft_path", "reward_model_name_or_path", "reward_adapter")


@dataclass(frozen=True)
class Step:
    """One command. `models`: what it starts from, as named; `data`: files and folders of rows."""

    name: str
    stage: str
    where: str
    words: tuple[str, ...]
    folder: Path
    models: tuple[str, ...]
    data: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether it can go on from a checkpoint and be started by a launcher: not so a merge, or a vocabulary that grows."""
        return self.words[0] in TRAINED


@dataclass(frozen=True)
class Placed:
    """A stage with its model and its flags worked out."""

    stage: Stage
    step: Step
    parsed: config.Config
    merged: Path  # where its merge goes

    @property
    def adapter(self) -> bool:
        """Whether it trains a LoRA adapter, which the next stage needs merged."""
        return self.stage.command in TRAINED and bool(self.parsed["use_peft"])

    @property
    def result(self) -> Path:
        """The folder of its model."""
        return self.merged if self.adapter else self.step.folder


def build_steps(pipeline: Pipeline) -> list[Step]:
    """The steps in order. UserError, with file:line, for an input that is missing or flags that do not fit together."""
    placed: dict[str, Placed] = {}
    needed: set[str] = set()  # stages whose merge is made because somebody uses it
    for stage in pipeline.stages:
        model, source = _model(pipeline, stage, placed)
        if source is not None:
            _need_merge(stage, source, needed)
        scores: dict[str, str] = {}
        if stage.command == "ppo":
            scores = _scores(stage, model, placed, needed)
        placed[stage.name] = _place(pipeline, stage, {**scores, "model_name_or_path": model})
    steps: list[Step] = []
    for name, one in placed.items():
        steps.append(one.step)
        wanted = one.stage.merge not in (None, False) or (one.stage.merge is None and one.stage.command != "rm")
        if one.adapter and (wanted or name in needed):
            steps.append(_merge_step(one))
    return steps


def _model(pipeline: Pipeline, stage: Stage, placed: Mapping[str, Placed]) -> tuple[str, Placed | None]:
    """(the model a stage starts from, the stage that makes it)."""
    named = stage.flags.get("model_name_or_path")
    if named is not None:
        if stage.start is not None:
            raise UserError(f"{stage.where}: from and model_name_or_path both name the model: give one")
        return named, None
    before = [one for one in placed.values() if one.stage.command != "rm"]
    if stage.start is not None:
        source = placed[stage.start]
        if source.stage.command == "rm":
            raise UserError(f"{stage.where}: from {stage.start!r}: a reward model is no model to go on from")
        return str(source.result), source
    if before:
        return str(before[-1].result), before[-1]
    if pipeline.model is None:
        raise UserError(f"{stage.where}: {stage.command} has no model: model_name_or_path at the top names the first stage's")
    return pipeline.model, None


def _need_merge(stage: Stage, source: Placed, needed: set[str]) -> None:
    if source.adapter and source.stage.merge is False:
        raise UserError(f"{stage.where}: {stage.name} starts from {source.stage.name}, which `merge: false` leaves unmerged")
    needed.add(source.stage.name)


def _scores(stage: Stage, model: str, placed: Mapping[str, Placed], needed: set[str]) -> dict[str, str]:
    """The flag that names ppo's reward model where its stage does not."""
    if any(name in stage.flags for name in SCORES) or (stage.recipe is not None and _says_scores(stage)):
        return {}
    rewards = [one for one in placed.values() if one.stage.command == "rm"]
    if not rewards:
        raise UserError(f"{stage.where}: ppo needs scores: an rm stage before it, or one of {', '.join(SCORES)}")
    reward = rewards[-1]
    same_base = reward.parsed["model_name_or_path"] == model
    if reward.adapter and same_base and stage.flags.get("use_peft", "True").lower() not in ("false", "0", "no", "off"):
        return {"reward_adapter": str(reward.step.folder)}
    _need_merge(stage, reward, needed)
    return {"reward_model_name_or_path": str(reward.result)}


def _says_scores(stage: Stage) -> bool:
    parsed = _parse(stage, ["--config", str(stage.recipe), "--model_name_or_path", "-"])
    return any(parsed[name] for name in SCORES)


def _parse(stage: Stage, argv: list[str]) -> config.Config:
    table = COMMANDS[stage.command]
    try:
        return config.parse(stage.command, table.groups, table.training, argv)
    except UserError as error:
        raise UserError(f"{stage.where}: {error}") from error


def _place(pipeline: Pipeline, stage: Stage, defaults: Mapping[str, str]) -> Placed:
    folder = pipeline.output_dir / stage.name
    flags = {**defaults, **stage.flags, "output_dir": str(folder)}
    argv = ["--config", stage.recipe] if stage.recipe is not None else []
    argv += [word for name, value in flags.items() for word in (f"--{name}", value)]
    parsed = _parse(stage, argv)
    data = (*_check_inputs(stage, parsed, pipeline.output_dir), *_code(stage, parsed))
    if not stage.launcher:  # some flags are only right under one
        _check_together(stage, parsed)
    models = tuple(str(parsed[name]) for name in MODELS if name in parsed.values and parsed[name])
    step = Step(stage.name, stage.name, stage.where, (stage.command, *argv), folder, models, data, stage.launcher)
    return Placed(stage, step, parsed, pipeline.output_dir / f"{stage.name}-merged")


def _code(stage: Stage, parsed: config.Config) -> list[str]:
    """Files beside the rows that a stage's result depends on: its recipe, functions that score, pieces trained before."""
    functions = (parsed["reward_func"] or "").split(",") if stage.command == "ppo" else []
    files = [function.rpartition(":")[0].strip() for function in functions]
    files += [parsed["domain_sp_model"] or ""] if stage.command == "extend-vocab" else []
    return [file for file in (stage.recipe or "", *files) if Path(file).is_file()]


def _check_together(stage: Stage, parsed: config.Config) -> None:
    """What the stage would refuse when its turn comes, said before the first one starts."""
    from posttrain.commands.extend_vocab import check_growth  # these import torch: a misspelt word is answered without
    from posttrain.training.resolve import resolve
    from posttrain.training.resolve_ppo import resolve_ppo

    checks: dict[str, Callable[[config.Config], object]] = {"ppo": resolve_ppo, "extend-vocab": check_growth}
    try:
        checks.get(stage.command, resolve)(parsed)
    except UserError as error:
        raise UserError(f"{stage.where}: {error}") from error


def _check_inputs(stage: Stage, parsed: config.Config, output_dir: Path) -> tuple[str, ...]:
    """Files and folders of rows. UserError when they, or a model outside the pipeline, are not there."""
    if not (parsed["train_file_dir"] or parsed["dataset_name"]):
        raise UserError(f"{stage.where}: {stage.command} needs training data: train_file_dir or dataset_name")
    data = []
    for name in DATA:
        for part in (parsed[name] or "").split(","):
            if part.strip():
                data.append(part.strip())
                if not Path(part.strip()).expanduser().exists():
                    raise UserError(f"{stage.lines.get(name, f'{stage.where}: {name}')} {part.strip()}: no such file or folder")
    for name in MODELS:
        model = parsed[name] if name in parsed.values else None
        if model and model.lower() not in EMBEDDED and output_dir not in Path(model).parents:
            try:
                resolve_model(model)
            except UserError as error:
                raise UserError(f"{stage.lines.get(name, stage.where)}: {error}") from error
    return tuple(data)


def _merge_step(one: Placed) -> Step:
    base, adapter = one.parsed["model_name_or_path"], str(one.step.folder)
    flags = {"base_model": base, "lora_model": adapter, "output_dir": str(one.merged)}
    if one.parsed["trust_remote_code"]:
        flags["trust_remote_code"] = "True"
    if isinstance(one.stage.merge, Mapping):
        flags |= one.stage.merge
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return Step(one.merged.name, one.stage.name, one.stage.where, ("merge", *words), one.merged, (base, adapter))
