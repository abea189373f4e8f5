"""A checkpoint of four processes goes on under two, and that under one, to the end of a run that nothing interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from preference_runs import logged, pairs, run, weights, words, write

# Several commands by one start of the processes: starting is what takes the time.
SCRIPT = """
import json, os, sys
from posttrain.cli import main
codes = [main(argv) for argv in json.loads(sys.argv[1])]
print("codes", codes, flush=True)
os._exit(0)
"""
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {}, "whole": {"use_peft": False}, "fsdp-adapter": {"fsdp": True}, "fsdp-whole": {"fsdp": True, "use_peft": False},
}  # fmt: skip
ROWS, STEPS = 4, 2  # a step's rows over all processes, and the steps that each world size takes


def processes(count: int, commands: list[list[str]], folder: Path) -> str:
    """Commands done one after the other by some processes, which must end well; what they said."""
    script = folder / "several.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), script, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.partition("codes ")[2].splitlines()[0])
    assert codes == [0] * len(commands), done.stderr
    return done.stderr


def flags_of(kind: str, model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [
        {"conversations": [*pair["conversations"], {"from": "gpt", "value": pair["chosen"]}]} for pair in pairs(13)
    ]  # an epoch is 4 steps, and its last has a row only
    return {
        "model_name_or_path": model_folder, "train_file_dir": write(tmp_path / "rows.jsonl", rows), "num_train_epochs": 9,
        "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, "save_strategy": "steps", "save_steps": STEPS, "cache_dir": tmp_path / "cache", **KINDS[kind],
    }  # fmt: skip


@pytest.mark.slow
def test_four_then_two_then_one(model_folder: Path, tmp_path: Path) -> None:
    done = 0
    for count in (4, 2, 1):
        done += STEPS
        commands = [
            words("sft", tmp_path / kind, **{
                **flags_of(kind, model_folder, tmp_path), "per_device_train_batch_size": ROWS // count, "max_steps": done,
                "resume_from_checkpoint": "auto",
            })
            for kind in KINDS
        ]  # fmt: skip
        said = processes(count, commands, tmp_path)
        assert said.count("resuming from ") == (len(KINDS) if count < 4 else 0)
    for kind in ("adapter", "whole"):
        flags = {**flags_of(kind, model_folder, tmp_path), "per_device_train_batch_size": ROWS}
        one = run("sft", tmp_path / f"one-{kind}", **{**flags, "max_steps": 3 * STEPS})
        early = run("sft", tmp_path / f"early-{kind}", **{**flags, "max_steps": 2 * STEPS})
        assert float((weights(one) - weights(early)).abs().max()) > 1e-3
        for name in (kind, f"fsdp-{kind}"):
            assert float((weights(one) - weights(tmp_path / name)).abs().max()) <= 1e-5, name
            assert logged(tmp_path / name, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
