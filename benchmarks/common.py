"""What the benchmarks share: a process per contender, the clock, the arguments of the library's loop, and the memory's peak."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
OUT = ROOT / "outputs" / "bench"
MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 8, 16


class StepClock:
    """When training began, when each optimizer step ended, and how many units (tokens, pairs) the step's batch held."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ends: list[float] = []
        self.units: list[int] = []
        self.collated: deque[int] = deque()  # of batches that no step has ended with yet: loaders read ahead

    def end_step(self) -> None:
        self.ends.append(time.perf_counter())
        self.units.append(self.collated.popleft())

    def units_per_second(self) -> float:
        """Over all steps but the first, which warms up."""
        if len(self.ends) < 2:
            return float("nan")
        return sum(self.units[1:]) / (self.ends[-1] - self.ends[0])

    def seconds(self) -> float:
        """From the beginning of training to the end of its last step."""
        return self.ends[-1] - self.began


def counted(collate: Callable[[Any], Any], clock: StepClock, count: Callable[[Any], int]) -> Callable[[Any], Any]:
    """The collator, telling the clock how many units its batch holds. One batch an optimizer step."""

    def wrapped(rows: Any) -> Any:
        batch = collate(rows)
        clock.collated.append(count(batch))
        return batch

    return wrapped


def train(trainer: Any, clock: StepClock) -> dict[str, Any]:
    """Train by the clock; the losses of all steps and the largest resident set of this process, loading included."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end_step()

    trainer.add_callback(Clock())
    clock.began = time.perf_counter()
    trainer.train()
    return {
        "per_second": clock.units_per_second(),
        "train_seconds": clock.seconds(),
        "units": clock.units,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def loop_arguments(steps: int, batch_rows: int, dtype: str) -> dict[str, Any]:
    """What both sides give the library's training loop."""
    return {
        "output_dir": str(OUT), "per_device_train_batch_size": batch_rows, "max_steps": steps, "learning_rate": 2e-4,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": dtype == "bfloat16",
        "lr_scheduler_type": "constant", "disable_tqdm": True, "seed": 1,
    }  # fmt: skip


def trl_lora(task_type: str) -> Any:
    """The adapter of ours in PEFT's words."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type=task_type)


def save_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Rows in a file that the contenders read."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"rows_{name}.json"
    path.write_text(json.dumps(rows))
    return path


SETTLE_SECONDS = 2.0  # the contender before has just let go of its memory, and the machine is to look idle


def run_contender(
    script: str, name: str, rows_file: Path, steps: int, dtype: str, python: str | Path = sys.executable
) -> dict[str, Any]:
    """One contender in a process of its own, by a Python of its own where it needs other libraries; its result is the last line it prints."""
    words = [str(python), script, "--contender", name, "--rows_file", str(rows_file), "--steps", str(steps), "--dtype", dtype]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if name.startswith("ours"):
        from posttrain.commands.threads import set_waiting  # TRL's environment, where this module is read too, lacks the package

        time.sleep(SETTLE_SECONDS)
        set_waiting(env)  # as the command line does; TRL keeps torch's default, whose threads spin longest
        print(
            f"{name}: threads that wait {'spin for a moment' if 'GOMP_SPINCOUNT' in env else 'sleep: the machine is busy'}",
            flush=True,
        )
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def gibibytes(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
