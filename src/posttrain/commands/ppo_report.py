"""What a PPO run tells while it goes: lines, metrics.jsonl, TensorBoard, and a table of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from posttrain.commands.report import say
from posttrain.training import artifacts
from posttrain.training.callbacks import METRICS_FILE
from posttrain.training.ppo import Loop
from posttrain.training.ppo_rollout import Rollout
from posttrain.training.ppo_state import save_checkpoint

SAMPLES_FILE = "samples.jsonl"
SHOWN_SAMPLES, PROMPT_CHARACTERS, ANSWER_CHARACTERS = 3, 36, 72
SHOWN = (
    "score", "kl_nats", "entropy_nats", "clip_fraction", "explained_variance", "stop_rate", "response_tokens",
    "rollout_tokens_per_second", "update_tokens_per_second", "eval_score", "eval_kl_nats", "eval_stop_rate", "eval_response_tokens",
)  # fmt: skip


class Reporter:
    """Writes on the first process only. A resumed run first cuts off what lies beyond its checkpoint."""

    def __init__(self, folder: Path, accelerator: Accelerator, save_total_limit: int | None, tokenizer: Any):
        self.folder, self.accelerator, self.save_total_limit, self.tokenizer = folder, accelerator, save_total_limit, tokenizer

    def begin(self, step: int) -> None:
        """Keep the lines up to the step that training goes on from."""
        if self.accelerator.log_with:
            self.accelerator.init_trackers("ppo")
        for name in (METRICS_FILE, SAMPLES_FILE) if self.accelerator.is_main_process else ():
            file = self.folder / name
            if file.is_file():
                kept = [line for line, row in artifacts.json_lines(file) if step and row["step"] <= step]
                file.write_text("".join(kept), encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float], rollout: Rollout | None) -> None:
        """A step's metrics, and (with a rollout) some of its answers."""
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=step)
        if not self.accelerator.is_main_process:
            return
        self._append(METRICS_FILE, {"step": step, **metrics})
        say(f"step {step}  " + "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics))
        if rollout is not None:
            samples = _samples(rollout)
            for sample in samples:
                self._append(SAMPLES_FILE, {"step": step, **sample})
            say(_table(samples))

    def save(self, loop: Loop) -> None:
        """A checkpoint."""
        save_checkpoint(loop, self.folder, self.save_total_limit, self.tokenizer)

    def results(self) -> None:
        """What a finished run of the other stages leaves too: the last figures as text, and all of them in trainer_state.json."""
        if not self.accelerator.is_main_process:
            return
        lines = [row for _, row in artifacts.json_lines(self.folder / METRICS_FILE)]
        for name, is_eval in (("train", False), ("eval", True)):
            rows = [line for line in lines if ("eval_score" in line) is is_eval]
            if rows:
                artifacts.write_results(self.folder, name, rows[-1])
        state = {"global_step": lines[-1]["step"] if lines else 0, "log_history": lines}
        (self.folder / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _append(self, name: str, content: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False) + "\n")


def _samples(rollout: Rollout) -> list[dict[str, Any]]:
    """Prompt, answer, score and KL (nats, Σ log π/π_ref; None without a reference) of the first episodes."""
    columns, sequence_N = rollout.columns, rollout.sequence_N
    kl: list[Any] = [None] * len(rollout.episodes)
    if "reference_N" in columns:
        log_ratio_N = columns["old_logprobs_N"] - columns["reference_N"]
        kl = log_ratio_N.new_zeros(len(rollout.episodes)).index_add(0, sequence_N, log_ratio_N).tolist()
    return [
        {
            "source": episode.source,
            "prompt": episode.messages[-1]["content"],
            "answer": episode.answer,
            "stopped": episode.stopped,
            "score": float(rollout.scores_S[i]),
            "kl_nats": kl[i],
        }
        for i, episode in enumerate(rollout.episodes[:SHOWN_SAMPLES])
    ]


def _table(samples: list[dict[str, Any]]) -> str:
    lines = [f"  {'prompt':<{PROMPT_CHARACTERS}}  {'answer':<{ANSWER_CHARACTERS}}  {'score':>8}  {'KL':>8}"]
    for sample in samples:
        prompt, said = (" ".join(str(sample[name]).split()) for name in ("prompt", "answer"))
        kl = "" if sample["kl_nats"] is None else f"{sample['kl_nats']:.3f}"
        lines.append(
            f"  {prompt[:PROMPT_CHARACTERS]:<{PROMPT_CHARACTERS}}  {said[:ANSWER_CHARACTERS]:<{ANSWER_CHARACTERS}}"
            f"  {sample['score']:>8.3f}  {kl:>8}"
        )
    return "\n".join(lines)
