"""What a run tells while it goes: a progress bar (or lines, when the output is no terminal) and metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.training.artifacts import json_lines

METRICS_FILE = "metrics.jsonl"
SHOWN = (
    "loss", "eval_loss", "eval_perplexity", "accuracy", "eval_accuracy", "reward_margin", "grad_norm", "learning_rate",
    "tokens_per_second",
)  # fmt: skip


class MetricsFile(TrainerCallback):
    """One JSON object a log in `metrics.jsonl`. A resumed run first cuts off what lies beyond its checkpoint."""

    def __init__(self, folder: Path):
        self.file = folder / METRICS_FILE

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        if not args.should_save or not self.file.is_file():
            return
        # The summary of a finished run is written again.
        kept = [
            line
            for line, row in json_lines(self.file)
            if state.global_step and row["step"] <= state.global_step and "train_runtime" not in row
        ]
        self.file.write_text("".join(kept), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the log's values."""
        if args.should_save:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **kwargs["logs"]}) + "\n")


class Progress(TrainerCallback):
    """A bar with steps, ETA, loss and tokens/s; off a terminal one line a log."""

    def __init__(self, bar: bool | None = None):
        """`bar=None`: a bar when standard error is a terminal."""
        self.with_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: Any = None
        self.began, self.first_step = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar at the step that training goes on from."""
        self.began, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.with_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the log's main values."""
        logs = kwargs["logs"]
        values = {name: f"{logs[name]:.4g}" for name in SHOWN if name in logs}
        if not state.is_world_process_zero or not values:
            return
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix(loss=values["loss"], tokens_per_second=values["tokens_per_second"]) if "loss" in values else None
            self.bar.write(f"step {state.global_step}  {text}")
        else:
            eta = self._eta(state)
            print(f"step {state.global_step}/{state.max_steps}  {text}{eta}", file=sys.stderr, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _eta(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done or state.global_step >= state.max_steps:
            return ""
        seconds = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"
