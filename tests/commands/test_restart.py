"""A process that dies: its error comes first, torchrun starts all of them again, and they go on from the last whole checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from preference_runs import logged, pairs, run, weights, words, write

# In the first life of the job, its second process dies in step 4, and a checkpoint is left half-written.
SCRIPT = """
import os, pathlib, sys
from posttrain.cli import main
from posttrain.training.trainer import ObjectiveTrainer
take = ObjectiveTrainer.training_step
def training_step(self, *args, **kwargs):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.state.global_step == 3 and self.args.process_index == 1:
        pathlib.Path(self.args.output_dir, "checkpoint-3").mkdir()
        raise RuntimeError("this process is broken")
    return take(self, *args, **kwargs)
ObjectiveTrainer.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


# The first life ends when both have met. In the second the first process comes two seconds after the other looked for it.
MEET = """
import os, pathlib, sys, time
import torch
from torch import distributed
from posttrain.training.job import connect
rank, life, there = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), pathlib.Path(sys.argv[1])
if life and rank:
    there.touch()
while life and not there.exists():
    time.sleep(0.01)
time.sleep(2 if life and not rank else 0)
connect(True, None, 20)
one = torch.ones(1)
distributed.all_reduce(one)
print(f"life {life}: process {rank} met {int(one)}", flush=True)
distributed.barrier()
os._exit(not life)
"""


def torchrun(restarts: int, *command: Any) -> subprocess.CompletedProcess[str]:
    """A script in two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", str(restarts),
         *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_processes_meet_again_though_one_comes_late(tmp_path: Path) -> None:
    """torchrun's store still has the addresses of the life before: who is early must not take them for those of its partner."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    done = torchrun(1, script, tmp_path / "there")
    assert done.returncode == 0, done.stderr
    for life in range(2):
        for rank in range(2):
            assert f"life {life}: process {rank} met 2" in done.stdout


@pytest.mark.slow
def test_a_job_goes_on_after_a_process_died(model_folder: Path, tmp_path: Path) -> None:
    flags = {
        "model_name_or_path": model_folder, "train_file_dir": write(tmp_path / "pairs.jsonl", pairs(13)), "max_steps": 5,
        "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto", "audit": False,
    }  # fmt: skip
    script = tmp_path / "dies.py"
    script.write_text(SCRIPT)
    two = tmp_path / "two"
    done = torchrun(1, script, *words("rm", two, **{**flags, "per_device_train_batch_size": 2}))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeError: this process is broken") == 1
    assert done.stderr.count(f"resuming from {two / 'checkpoint-2'}") == 1
    assert done.stderr.count(f"{two / 'checkpoint-3'}: cut short before it was whole, passed over") == 1
    one = run("rm", tmp_path / "one", **flags)
    assert float((weights(one) - weights(two)).abs().max()) <= 1e-5
    assert len(logged(two, "grad_norm")) == 5, "every step is logged once"
