"""Every command: the module that does it, and the flags it takes. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from posttrain import flags
from posttrain.types import Stage, UserError

STAGES = get_args(Stage)


@dataclass(frozen=True)
class Command:
    """One verb: the module whose `run(config)` does it, a line of help, its flag groups, and whether it trains.

    training    takes the fields of transformers.TrainingArguments too
    positional  the flag that a first word without -- is the value of
    of_stage    takes all flags of the stage that --stage names, too
    """

    module: str
    purpose: str
    groups: tuple[type, ...]
    training: bool = False
    positional: str | None = None
    of_stage: bool = False

    def words(self, argv: Sequence[str]) -> list[str]:
        """The command line with its positional word spelt as a flag."""
        given = bool(argv) and not argv[0].startswith("-")
        return [f"--{self.positional}", *argv] if self.positional and given else list(argv)


_TRAIN = (
    flags.ModelFlags,
    flags.AdapterFlags,
    flags.QuantizeFlags,
    flags.RouterFlags,
    flags.ContextFlags,
    flags.NoiseFlags,
    flags.DataFlags,
    flags.PrepareFlags,
)
_PAIRS = (*_TRAIN, flags.TemplateFlags, flags.PairFlags, flags.SharingFlags)
COMMANDS: dict[str, Command] = {
    "pt": Command(
        "train", "continued pretraining on plain text", (*_TRAIN, flags.ShiftFlags, flags.TextFlags, flags.RunFlags), True,
    ),
    "sft": Command(
        "train", "supervised fine-tuning on conversations",
        (*_TRAIN, flags.ShiftFlags, flags.TemplateFlags, flags.ChatFlags, flags.PackFlags, flags.RunFlags), True,
    ),
    "rm": Command(
        "train", "reward model on preference pairs", (*_PAIRS, flags.ShiftFlags, flags.RewardFlags, flags.RunFlags), True,
    ),
    "dpo": Command("train", "direct preference optimization on pairs", (*_PAIRS, flags.DpoFlags, flags.RunFlags), True),
    "ppo": Command(
        "ppo", "reinforcement learning from rewards (PPO)",
        (
            flags.ModelFlags, flags.AdapterFlags, flags.QuantizeFlags, flags.DataFlags, flags.PrepareFlags, flags.TemplateFlags,
            flags.PromptFlags, flags.RewardSourceFlags, flags.PpoFlags, flags.LoopFlags, flags.RunFlags,
        ),
    ),
    "merge": Command("merge", "adapter + base -> one model folder", (flags.MergeFlags,)),
    "generate": Command("generate", "answer a file of prompts", (flags.InferenceFlags, flags.GenerateFlags, flags.SamplingFlags)),
    "score": Command("score", "rate a file of chats or pairs by a reward model", (flags.InferenceFlags, flags.ScoreFlags)),
    "inference": Command(
        "infer", "the guide's inference.py: --interactive, or answer a file or two built-in questions",
        (flags.InferenceFlags, flags.AskFlags, flags.SamplingFlags),
    ),
    "chat": Command("chat", "talk to a model in the terminal", (flags.InferenceFlags, flags.SamplingFlags)),
    "show": Command(
        "show", "print rows as the model sees them, trained tokens in colour",
        (flags.ShowFlags, flags.ShowModelFlags, flags.DataFlags, flags.TemplateFlags, flags.ChatFlags, flags.ShowTextFlags, flags.PairFlags),
    ),
    "extend-vocab": Command(
        "extend_vocab", "add a domain's pieces to a model's tokenizer", (flags.VocabularyFlags, flags.DataFlags)
    ),
    "convert": Command("convert", "any data format -> canonical JSONL", (flags.ConvertFlags,)),
    "plan": Command(
        "plan", "forecast the memory of a stage's run: plan sft <its flags>", (flags.PlanFlags,), positional="stage", of_stage=True
    ),
    "run": Command("run", "a pipeline of stages from one YAML file", (flags.PipelineFlags,), positional="pipeline"),
}  # fmt: skip


def understood(name: str, argv: Sequence[str]) -> tuple[str, Command, list[str]]:
    """(whose words they are, the command with all groups it takes, its words): for a command of a stage, those of that stage too.

    Raises UserError for a stage that there is not.
    """
    command = COMMANDS[name]
    words = command.words(argv)
    if not command.of_stage or "--stage" not in words[:-1]:
        return name, command, words
    stage = words[words.index("--stage") + 1]
    if stage not in STAGES:
        raise UserError(f"posttrain {name} {stage}: expected one of {', '.join(STAGES)}")
    of_stage = COMMANDS[stage]
    return stage, replace(command, groups=(*command.groups, *of_stage.groups), training=of_stage.training), words
