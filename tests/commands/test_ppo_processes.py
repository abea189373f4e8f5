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
from ppo_runs import digest, lines, run, save_speaker, weights, words, write_prompts

# Several runs by one start of the processes: starting is what takes the time. `cut`: a copy of a run that ended after a checkpoint.
SCRIPT = """
import json, shutil, sys
from pathlib import Path
from torch import distributed
from posttrain.cli import main

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


def two_processes(tmp_path: Path, jobs: list[list[Any]]) -> str:
    """Run the jobs in two processes that must end well; what was said."""
    script = tmp_path / "jobs.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


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
    said = two_processes(tmp_path, jobs)
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
    stopped = [line for line in said.splitlines() if "stopped at step" in line]
    assert len(set(stopped)) == 1  # every process ended for the same reason at the same step
    assert f"the last good checkpoint is {ended / 'checkpoint-'}" in stopped[0]
    assert json.loads((two / "ledger.json").read_text())["train"]["trained"] == len(ASKED)
