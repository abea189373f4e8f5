"""rm and dpo in two processes: the update and the held-out figures are those of one, also where a process has a row too few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from preference_runs import lines, logged, pairs, run, weights, words, write

# Both stages by one start of the processes: starting is what takes the time. What is registered first is done last.
# Without DeepSpeed: once imported, it keeps connections open to the very end.
SCRIPT = """
import atexit, glob, importlib.util, json, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "deepspeed" else find_spec(name, *rest)
atexit.register(lambda: print("at exit:", *(open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm"))))
from posttrain.cli import main
sys.exit(max(main(argv) for argv in json.loads(sys.argv[1])))
"""


def test_two_processes_are_as_one(model_folder: Path, tmp_path: Path) -> None:
    """13 and 5 pairs in global batches of 4: at the end one process has a row and the other a filler, in training and evaluation."""
    data = {"train_file_dir": write(tmp_path / "pairs.jsonl", pairs(13)), "validation_file_dir": tmp_path / "held_out.jsonl"}
    write(tmp_path / "held_out.jsonl", pairs(5, "dog"))
    flags: dict[str, Any] = {
        "model_name_or_path": model_folder, **data, "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant",
        "max_steps": None, "num_train_epochs": 1, "per_device_eval_batch_size": 4, "audit": False,
    }  # fmt: skip
    halves = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "cache_dir": tmp_path / "cache"}
    commands = [words(stage, tmp_path / f"two-{stage}", **{**flags, **halves}) for stage in ("rm", "dpo")]
    # Figures alone, of a model that is as it was, in batches of the same rows: not a bit may differ.
    figures_alone = {**flags, "do_train": False, "per_device_eval_batch_size": 2, "cache_dir": tmp_path / "cache"}
    commands += [words(stage, tmp_path / f"figures-two-{stage}", **figures_alone) for stage in ("rm", "dpo")]
    script = tmp_path / "both.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A thread of the connection that outlives the interpreter aborts a finished run, now and then.
    assert done.stdout.count("at exit: ") == 2
    assert "gloo" not in done.stdout
    for stage in ("rm", "dpo"):
        alone = run(stage, tmp_path / f"figures-one-{stage}", **figures_alone)
        found = [
            {k: v for k, v in lines(folder)[-1].items() if k.startswith("eval_")}
            for folder in (alone, tmp_path / f"figures-two-{stage}")
        ]
        assert len(found[0]) > 5
        assert found[0] == found[1]
    for said in ("reference log-probs: 13 pairs, computed", "reference log-probs: 5 pairs, computed"):
        assert done.stderr.count(said) == 1  # said once per job
    for stage in ("rm", "dpo"):
        one, two = run(stage, tmp_path / f"one-{stage}", **flags), tmp_path / f"two-{stage}"
        still = run(stage, tmp_path / f"still-{stage}", **{**flags, "learning_rate": 0})
        assert float((weights(one) - weights(still)).abs().max()) > 1e-3
        assert float((weights(one) - weights(two)).abs().max()) <= 1e-6
        assert [line["step"] for line in lines(two)] == [1, 2, 3, 4, 4, 4]
        assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-6)
        assert logged(two, "tokens")[-1] >= logged(one, "tokens")[-1]
        figures = [{k: v for k, v in lines(folder)[-1].items() if k.startswith("eval_")} for folder in (one, two)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-5, abs=1e-5)
