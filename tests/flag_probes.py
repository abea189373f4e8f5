"""What the flag probes share: short runs through the command line, remembered by their flags, and the tiny things they read.

A probe is a function of a `Lab` that fails when its flag does nothing. `PROBES` is the table of all: (family, flag) → probe, where
`pt`, `sft`, `rm` and `dpo` are one family, "train", and every other command is its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flag_probes_models import coded_model, other_model, reward_adapter
from posttrain.cli import main
from posttrain.model import embedded
from posttrain.objectives.ppo import PpoLoss
from posttrain.training.trainer import ObjectiveTrainer
from posttrain.types import Half, PackedBatch, UserError

Probe = Callable[["Lab"], None]
PROBES: dict[tuple[str, str], Probe] = {}

TRAIN: dict[str, Any] = {
    "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no",
    "bf16": False, "report_to": "none",
}  # fmt: skip

PPO: dict[str, Any] = {
    "max_steps": 2, "learning_rate": 1e-2, "rollout_batch_size": 8, "mini_batch_size": 4, "max_target_length": 6, "bf16": False,
    "temperature": 0.2, "report_to": "none", "reward_func": f"{Path(__file__).with_name('ppo_rewards.py')}:vowels",
}  # fmt: skip


def probe(family: str, *flags: str) -> Callable[[Probe], Probe]:
    """Register a probe for flags of a family."""

    def register(function: Probe) -> Probe:
        for flag in flags:
            assert (family, flag) not in PROBES, f"two probes for {family} --{flag}"
            PROBES[family, flag] = function
        return function

    return register


def family(command: str) -> str:
    """The family of a command."""
    return "train" if command in ("pt", "sft", "rm", "dpo") else command


@dataclass(frozen=True)
class Run:
    """What one command left behind. `batches` are the micro-batches whose loss was computed in training, in order."""

    folder: Path
    code: int
    out: str
    err: str
    batches: tuple[PackedBatch, ...]

    @functools.cached_property
    def logs(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def logged(self, name: str) -> list[float]:
        """All logged values of a metric."""
        return [line[name] for line in self.logs if name in line]

    def read(self, name: str) -> Any:
        """A JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors that were saved."""
        adapter = self.folder / "adapter_model.safetensors"
        return load_file(adapter if adapter.is_file() else self.folder / "model.safetensors")

    def state(self, name: str = "optimizer.pt", checkpoint: str = "checkpoint-*") -> Any:
        """A torch file of the first checkpoint that matches."""
        return torch.load(min(self.folder.glob(f"{checkpoint}/{name}")), weights_only=False)

    def checkpoints(self) -> list[int]:
        """Steps whose checkpoint is there."""
        return sorted(int(c.name.rpartition("-")[2]) for c in self.folder.glob("checkpoint-*"))

    def tokens(self) -> list[int]:
        """All input tokens of training, in order."""
        return [token for batch in self.batches for token in batch.input_ids_BT.flatten().tolist()]

    def moved(self, other: Run) -> float:
        """The largest difference between the trained tensors of two runs."""
        return max(float((a - other.weights[name]).abs().max()) for name, a in self.weights.items())


class Lab:
    """Runs commands on tiny inputs. `sft`, `pt`, `rm`, `dpo` and `ppo` remember what they ran; `run` and `fails` do not."""

    def __init__(self, root: Path, model: Path):
        self.root, self.model = root, model
        self.remembered: dict[str, Run] = {}
        self.unmuted: dict[str, Run] = {}  # of a muted lab: runs without the flag, which are the same in both
        self.mute: str | None = None
        self.stage = "sft"  # what `sft` runs
        self.used: set[str] = set()  # commands that were run or remembered
        self.count = 0
        chats: list[dict[str, Any]] = [
            {
                "conversations": [
                    {"from": "human", "value": f"what is {i}?"},
                    {"from": "gpt", "value": f"the fox number {i} rests"},
                ]
            }
            for i in range(17)
        ]
        self.chats = self.jsonl("chats.jsonl", chats)
        self.other_chats = self.jsonl("other.jsonl", [json.loads(json.dumps(row).replace("fox", "dog")) for row in chats[:9]])
        self.bad = self.jsonl("bad.jsonl", [*chats[:5], {"conversations": []}, *chats[5:8]])
        self.pairs = self.jsonl("pairs.jsonl", [as_pair(row) for row in chats])
        self.corpus = root / "corpus.txt"
        lines = [f"the quick brown fox number {i} jumps over the lazy dog in the shade of tree {i}\n\n" for i in range(24)]
        self.corpus.write_text("".join(lines))

    def muted(self, flag: str) -> Lab:
        """A lab in which a flag has no effect: it always has the value that a short run gives it."""
        _ = self.adapter, self.merged, self.prompts, self.pipeline, self.other_model, self.coded_model  # made with all flags
        lab = copy.copy(self)
        lab.mute, lab.remembered, lab.unmuted, lab.root = flag, {}, self.remembered, self.path("muted")
        lab.root.mkdir()
        return lab

    def of(self, stage: str) -> Lab:
        """A lab in which another stage stands in the place of sft, with pairs made of the same chats in files of the same names."""
        lab = copy.copy(self)
        lab.stage, lab.remembered, lab.root, lab.used = stage, {}, self.path(stage), set()
        lab.root.mkdir()
        for made in ("adapter", "merged"):
            lab.__dict__.pop(made, None)
        for name in ("chats", "other_chats", "bad"):
            file: Path = getattr(self, name)
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            setattr(lab, name, lab.jsonl(file.name, [as_pair(row) for row in rows]))
        return lab

    @property
    def measure(self) -> str:
        """A metric that depends on the model at the first step too: the loss, but for dpo, whose first loss is always ln 2, and ppo."""
        return {"dpo": "nll_chosen_nats", "ppo": "entropy_nats"}.get(self.stage, "loss")

    def path(self, name: str = "out") -> Path:
        """A name that is not taken yet, in the lab's folder."""
        self.count += 1
        return self.root / f"{self.count}-{name}"

    def jsonl(self, name: str, rows: list[Any]) -> Path:
        """A file of JSON rows."""
        file = self.root / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def defaults(self, command: str) -> dict[str, Any]:
        """The flags that a short run of a command needs."""
        if family(command) == "train":
            kept = self.chats if command == self.stage else self.pairs
            data = self.corpus if command == "pt" else kept
            return {"model_name_or_path": self.model, "train_file_dir": data, "output_dir": self.path(), **TRAIN}
        if command == "ppo":
            return {"model_name_or_path": self.model, "train_file_dir": self.chats, "output_dir": self.path(), **PPO}
        if command == "show":
            return {"model_name_or_path": self.model, "train_file_dir": self.chats, "output_format": "jsonl", "rows": -1}
        if command == "convert":
            return {"in_file": self.chats, "out_file": self.path("converted.jsonl")}
        if command == "extend-vocab":
            return {"model_name_or_path": self.model, "train_file_dir": self.corpus, "output_dir": self.path(), "vocab_size": 10}
        if command == "merge":
            return {"base_model": self.model, "lora_model": self.adapter, "output_dir": self.path("merged")}
        if command == "score":
            files = {"data_file": self.chats, "output_file": self.path("scores.jsonl")}
            return {"base_model": self.model, "lora_model": self.reward_adapter, "dtype": "float32", **files}
        if command == "run":
            return {"pipeline": self.pipeline}
        if command == "plan":
            return {"stage": "sft", "model_name_or_path": self.model}
        prompts: dict[str, Any] = {}
        if command in ("generate", "inference"):
            prompts = {"data_file": self.prompts, "output_file": self.path("answers.jsonl")}
        return {"base_model": self.model, "max_new_tokens": 8, "dtype": "float32", "temperature": 0, **prompts}

    def run(self, command: str, *, stdin: str = "", **flags: Any) -> Run:
        """One command in this process; a flag of None is left out. What it changes outside its folder is put back."""
        command = self.stage if command == "sft" else command
        self.used.add(command)
        defaults = self.defaults(command)
        flags = {name: value for name, value in {**defaults, **flags}.items() if name != self.mute} | {
            name: value for name, value in defaults.items() if name == self.mute
        }
        flags = {name: value for name, value in flags.items() if value is not None}
        argv = [command]
        for name, value in flags.items():
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        out, err, batches = io.StringIO(), io.StringIO(), []
        compute_loss, ppo_loss = ObjectiveTrainer.compute_loss, PpoLoss.__call__

        def recording(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(inputs)
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        def recording_ppo(objective: PpoLoss, model: Any, inputs: PackedBatch, only: Half | None = None) -> Any:
            if only != "value":  # the value's turn on what the policy has seen
                batches.append(inputs)
            return ppo_loss(objective, model, inputs, only)

        with pytest.MonkeyPatch.context() as patch, untouched(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(ObjectiveTrainer, "compute_loss", recording)
            patch.setattr(PpoLoss, "__call__", recording_ppo)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setattr(embedded, "_download", no_download)
            code = main(argv)
        folder = Path(flags.get("output_dir") or flags.get("output_file") or flags.get("out_file") or self.root)
        return Run(folder, code, out.getvalue(), err.getvalue(), tuple(batches))

    def good(self, command: str, **flags: Any) -> Run:
        """A run that must succeed."""
        done = self.run(command, **flags)
        assert done.code == 0, done.err
        return done

    def sft(self, **flags: Any) -> Run:
        """A successful training run on chats, remembered by its flags."""
        return self._remembered("sft", flags)

    def pt(self, **flags: Any) -> Run:
        """A successful training run on documents, remembered by its flags."""
        return self._remembered("pt", flags)

    def rm(self, **flags: Any) -> Run:
        """A successful run of a reward model on pairs, remembered by its flags."""
        return self._remembered("rm", flags)

    def dpo(self, **flags: Any) -> Run:
        """A successful run of dpo on pairs, remembered by its flags."""
        return self._remembered("dpo", flags)

    def ppo(self, **flags: Any) -> Run:
        """A successful run of ppo on the questions of the chats, remembered by its flags."""
        return self._remembered("ppo", flags)

    def on_ppo(self) -> Lab:
        """A lab in which ppo stands in the place of sft."""
        lab = copy.copy(self)
        lab.stage, lab.root, lab.used = "ppo", self.path("ppo"), set()
        lab.root.mkdir()
        return lab

    def _remembered(self, command: str, flags: Mapping[str, Any]) -> Run:
        command = self.stage if command == "sft" else command
        self.used.add(command)
        key = repr((command, sorted(flags.items(), key=str)))
        known = self.remembered if self.mute is None or self.mute in flags else self.unmuted
        if key not in known:
            known[key] = self.good(command, **flags)
        return known[key]

    def fails(self, command: str, **flags: Any) -> str:
        """The line that a run ends with which must be refused."""
        done = self.run(command, **flags)
        assert done.code == 2, "a mistake went through"
        return done.err.strip().splitlines()[-1]

    # --- things to read -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def adapter(self) -> Path:
        """An adapter trained hard enough to change what the model says."""
        return self.sft(max_steps=12, learning_rate=0.1, per_device_train_batch_size=8).folder

    @functools.cached_property
    def merged(self) -> Path:
        """The model with that adapter in its weights."""
        return self.good("merge").folder

    @functools.cached_property
    def reward_adapter(self) -> Path:
        """The adapter of a reward model."""
        return reward_adapter(self.model, self.root / "reward-adapter")

    @functools.cached_property
    def prompts(self) -> Path:
        """Prompts for generation."""
        return self.jsonl("prompts.jsonl", [{"messages": [{"role": "user", "content": f"what is {i}?"}]} for i in range(3)])

    @functools.cached_property
    def pipeline(self) -> Path:
        """A pipeline of two stages."""
        stages = f"[{{stage: pt, train_file_dir: {self.corpus}}}, {{stage: sft, train_file_dir: {self.chats}}}]"
        file = self.root / "pipeline.yaml"
        file.write_text(f"output_dir: {self.root}/pipeline\nmodel_name_or_path: {self.model}\nstages: {stages}\n")
        return file

    @functools.cached_property
    def other_model(self) -> Path:
        """Another model of the same kind, with another vocabulary order and another template."""
        return other_model(self.model, self.root / "other-model")

    @functools.cached_property
    def coded_model(self) -> Path:
        """The model with classes of its own, which only --trust_remote_code runs."""
        return coded_model(self.model, self.root / "coded-model")


def as_pair(chat: dict[str, Any]) -> dict[str, Any]:
    """A chat of one round with its answer as the chosen one; one without turns stays as it is."""
    if not chat["conversations"]:
        return chat
    asked, answer = chat["conversations"]
    return {"conversations": [asked], "chosen": answer["value"], "rejected": f"no idea, {asked['value']}"}


def no_download(name: str, *args: Any) -> Path:
    """In place of the embedded model's download."""
    raise UserError(f"{name} is not in the cache")


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Environment, loggers, warnings and switches of the libraries as they were."""
    from transformers.utils import logging as library_logging

    environment, ours = dict(os.environ), logging.getLogger("posttrain")
    handlers, propagate, level = ours.handlers, ours.propagate, ours.level
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        ours.handlers, ours.propagate, ours.level = handlers, propagate, level
        library_logging.set_verbosity(verbosity)
        (library_logging.enable_progress_bar if bars else library_logging.disable_progress_bar)()
        torch.use_deterministic_algorithms(False)
