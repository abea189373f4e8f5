"""ppo in two processes: the update, the statistics, the guards and the files are those of one, and a resume is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import ROOT
from posttrain.cli import main
from ppo_runs import digest, lines, run, save_speaker, weights, words, write_prompts

# Several runs by one start of the processes: starting is what takes the time. `cut`: a copy of a run that ended after a checkpoint.
# What a rollout gathers is counted where torch hands it to the connection, and told on standard output.
SCRIPT = """
import json, shutil, sys
from pathlib import Path
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from posttrain.cli import main
from posttrain.training import ppo

class Seen(TorchDispatchMode):
    gathers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.gathers += "c10d" in str(function) and "gather" in str(function)
        return function(*args, **(kwargs or {}))

collect = ppo.collect

def counted(*arguments):
    with Seen() as seen:
        rollout = collect(*arguments)
    if distributed.get_rank() == 0:
        print("gathers", seen.gathers, flush=True)
    return rollout

ppo.collect = counted

def cut(source, target, lost):
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.copytree(source, target)
        for name in lost:
            shutil.rmtree(Path(target, name))
    distributed.barrier()

for kind, *arguments, expected in json.loads(sys.argv[1]):
    code = main(*arguments) if kind == "run" else cut(*arguments)
    assert code == expected, (code, arguments)
"""
ASKED = [f"question {letter}" for letter in "abcdefghijk"]
SPLIT = {  # uneven: 11 prompts and 3 held-out ones, answers of any length, parts of a step that differ between the processes
    "bf16": False, "dtype": "float32", "rollout_batch_size": 8, "num_generations": 2, "mini_batch_size": 8, "forward_tokens": 130,
    "max_steps": 4, "eval_steps": 2, "adap_kl_ctrl": True, "kl_target": 2.0, "kl_horizon": 40, "early_stopping": True, "target_kl": 0.05,
    "adam_epsilon": 1e-3, "value_learning_rate": 1e-3,
}  # fmt: skip


def two_processes(tmp_path: Path, jobs: list[list[Any]]) -> tuple[str, list[int]]:
    """Run the jobs in two processes that must end well; what was said, and what each rollout gathered."""
    script = tmp_path / "jobs.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr, [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("gathers ")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    held_out = write_prompts(folder / "held_out.jsonl", ["an unseen one", "another", "third"])
    asked = write_prompts(folder / "prompts.jsonl", ASKED)
    return {
        "model_name_or_path": save_speaker(folder / "model", scale=8),
        "train_file_dir": asked,
        "validation_file_dir": held_out,
    }


def test_two_processes_are_as_one(base: dict[str, Any], tmp_path: Path) -> None:
    flags = {**base, **SPLIT, "save_steps": 2, "cache_dir": tmp_path / "cache"}
    guarded = {**flags, "save_steps": 1, "kl_target": 0.001, "learning_rate": 0.05, "max_steps": 9}
    two, cut, ended = tmp_path / "two", tmp_path / "cut", tmp_path / "ended"
    jobs = [
        ["run", words(two, **flags), 0],
        ["cut", str(two), str(cut), ["checkpoint-4", "value"], None],
        ["run", words(cut, **flags, resume_from_checkpoint="auto"), 0],
        ["run", words(ended, **guarded), 2],
    ]
    said, gathers = two_processes(tmp_path, jobs)
    assert set(gathers) == {0}
    assert said.count(f"run folder: {two}") == 1
    one = run(tmp_path / "one", **flags)
    started_at_zero = [tensor for name, tensor in load_file(one / "adapter_model.safetensors").items() if "lora_B" in name]
    assert max(float(tensor.abs().max()) for tensor in started_at_zero) > 1e-2
    assert float((weights(one) - weights(two)).abs().max()) <= 1e-5
    assert [line["step"] for line in lines(two)] == [0, 1, 2, 2, 3, 4, 4]
    assert {line["stop_rate"] for line in lines(two) if "stop_rate" in line} - {0, 1}
    for line, expected in zip(lines(two), lines(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name in (
        "adapter_model.safetensors",
        "value/value.safetensors",
        "checkpoint-4/optimizer.pt",
        "checkpoint-4/trainer_state.json",
    ):
        assert digest(two / name) == digest(cut / name), name
    assert lines(two) == lines(cut)
    # Two processes write to one pipe: a line's end may be followed by the other's next line.
    stopped = [
        line[line.index("stopped at step") :].partition("checkpoint-")[0]
        for line in said.splitlines()
        if "stopped at step" in line
    ]
    assert len(set(stopped)) == 1  # every process ended for the same reason at the same step
    assert f"the last good checkpoint is {ended / 'checkpoint-'}" in said
    assert json.loads((two / "ledger.json").read_text())["train"]["trained"] == len(ASKED)


ENGINES = ("fsdp", "zero1", "zero2", "zero3", "offload")
FILES = {"zero1": "stage2", "zero2": "stage2", "zero3": "stage3", "offload": "stage3_offload"}


def engine(name: str, folder: Path) -> dict[str, Any]:
    """The flags of an engine: DeepSpeed's files are ours, and ZeRO-3 keeps no small parameter whole."""
    if name == "fsdp":
        return {"fsdp": True}
    settings = json.loads((ROOT / "scripts" / f"deepspeed_zero_{FILES[name]}_config.json").read_text())
    if name == "zero1":
        settings["zero_optimization"]["stage"] = 1
    if FILES[name].startswith("stage3"):
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings))
    return {"deepspeed": file}


def shards(tmp_path: Path, flags: dict[str, Any], names: list[str], n_parameters: int) -> None:
    """Runs under engines equal one process, gather once a rollout, go on exactly, and leave whole files.

    `n_parameters`: of the trained module, with the frozen base.
    """
    jobs, steps = [], flags["max_steps"]
    for name in names:
        chosen = {**flags, **engine(name, tmp_path), "cache_dir": tmp_path / "cache"}
        whole, cut = tmp_path / name, tmp_path / f"{name}-cut"
        jobs.append(["run", words(whole, **chosen), 0])
        jobs.append(["cut", str(whole), str(cut), [f"checkpoint-{steps}", "value"], None])
        jobs.append(["run", words(cut, **chosen, resume_from_checkpoint="auto"), 0])
    _, gathers = two_processes(tmp_path, jobs)
    rollouts = steps + 1
    assert len(gathers) == rollouts * len(names)
    one = run(tmp_path / "one", **flags)
    for number, name in enumerate(names):
        two, cut = tmp_path / name, tmp_path / f"{name}-cut"
        (gathered,) = set(gathers[number * rollouts : (number + 1) * rollouts])  # the same in every rollout
        # FSDP2: two layers and the rest (twice as many layers, where the value has its own). ZeRO-3: every parameter, and no more.
        most = {"fsdp": 5, "zero1": 0, "zero2": 0}.get(name, n_parameters)
        assert most // 2 < gathered <= most or gathered == most == 0, f"{name} {gathered}"
        assert float((weights(one) - weights(two)).abs().max()) <= 1e-5, name
        for line, expected in zip(lines(two), lines(one), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        files = [file.relative_to(one) for file in one.rglob("*.safetensors")]
        assert files
        for file in files:
            mine, theirs = load_file(two / file), load_file(one / file)
            assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in theirs.items()}
            assert digest(two / file) == digest(cut / file), f"{name} {file}"
        assert lines(two) == lines(cut), name


def test_sharded_adapters_are_as_one(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    flags = {**base, **SPLIT, "save_steps": 1, "max_steps": 2}
    shards(tmp_path, flags, ["fsdp", "zero3"], n_parameters=79)
    # What FSDP2 leaves is whole, so one process goes on from it; DeepSpeed's optimizer is not.
    one = run(tmp_path / "fsdp-cut", **flags, resume_from_checkpoint=tmp_path / "fsdp-cut" / "checkpoint-1")
    assert float((weights(one) - weights(tmp_path / "one")).abs().max()) <= 1e-5
    assert main(words(tmp_path / "zero3-cut", **flags, resume_from_checkpoint="auto")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was written under DeepSpeed ZeRO-3 over 2 processes, this run has no DeepSpeed" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("mode", ["adapter", "trunk", "few layers", "all weights", "tied", "checkpointed"])
def test_every_mode_is_as_one_when_sharded(mode: str, name: str, base: dict[str, Any], tmp_path: Path) -> None:
    if name != "fsdp":
        pytest.importorskip("deepspeed")
    flags = {**base, **SPLIT, "save_steps": 1, "max_steps": 2, **{
        "adapter": {"init_kl_coef": 0.1, "kl_loss_coef": 0.1, "entropy_coef": 0.01},
        "trunk": {"value_sharing": "trunk"},
        "few layers": {"value_layers": 1},
        "all weights": {"use_peft": False, "learning_rate": 1e-3},
        "tied": {"use_peft": False, "learning_rate": 1e-3, "value_sharing": "trunk"},
        "checkpointed": {"gradient_checkpointing": True},
    }[mode]}  # fmt: skip
    if mode == "tied":
        flags["model_name_or_path"] = save_speaker(tmp_path / "tied", scale=8, tie_word_embeddings=True)
    shards(
        tmp_path,
        flags,
        [name],
        n_parameters={"adapter": 79, "trunk": 51, "few layers": 79, "all weights": 44, "tied": 22, "checkpointed": 79}[mode],
    )
