"""TRL's side of benchmarks/ppo.py: the last release that has a PPOTrainer, in an environment of its own.

Its packages are newer or older than the project's; what they do not pin (torch, peft, accelerate, datasets) is the project's own copy, so
that both sides compute with the same libraries.
"""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import OUT, StepClock, trl_lora

ENVIRONMENT = OUT / "trl024"
PINS = ("trl==0.24.0", "transformers==5.6.0")
SHARED_PACKAGES = ("torch", "peft", "accelerate", "datasets")  # found in the project's environment, and not installed again
LEAST_ROWS_TO_WHITEN = 8  # the trainer refuses to whiten rewards over fewer


def python() -> Path:
    """The interpreter of the environment, which is made on first use (150 MB). Exits with pip's last lines where that fails."""
    found, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "pins.txt"
    if ready.is_file() and ready.read_text() == "\n".join(PINS):
        return found
    print(f"installing {', '.join(PINS)} into {ENVIRONMENT}", flush=True)
    _call(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT))
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)}))
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")  # comes after the environment's own packages
    _call(str(found), "-m", "pip", "install", "--quiet", *PINS, *SHARED_PACKAGES)
    ready.write_text("\n".join(PINS))
    return found


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")


class Timeline:
    """Seconds of each step by part. What is no generation, no scoring and no training is `measure`: reference log-probs and values."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.mark = now, now()
        self.step = {"rollout": 0.0, "score": 0.0}
        self.steps: list[dict[str, float]] = []

    def generated(self) -> None:
        """Generation has ended, which the step began with."""
        self._close("rollout")

    def scored(self, seconds: float) -> None:
        """The reward model was asked, for so long."""
        self.step["score"] += seconds

    def training(self) -> None:
        """A forward with gradients begins; the first of a step ends what came before."""
        if "measure" not in self.step:
            self._close("measure")
            self.step["measure"] -= self.step["score"]

    def end_step(self) -> None:
        """The update has ended."""
        self._close("update")
        self.steps.append(self.step)
        self.step = {"rollout": 0.0, "score": 0.0}

    def _close(self, part: str) -> None:
        before, self.mark = self.mark, self.now()
        self.step[part] = self.mark - before


def watch(module: Any, trainer: Any, timeline: Timeline) -> None:
    """Let the functions that the trainer's module calls tell the timeline."""
    import torch

    generate, reward, forward = module.batch_generation, module.get_reward, module.forward
    longest = trainer.args.response_length

    def batch_generation(policy: Any, queries: Any, *args: Any) -> Any:
        found = generate(policy, queries, *args)
        assert found[0].shape[1] == queries.shape[1] + longest  # nothing stopped early
        timeline.generated()
        return found

    def get_reward(model: Any, *args: Any) -> Any:
        began = time.perf_counter()
        found = reward(model, *args)
        if model is trainer.reward_model:
            timeline.scored(time.perf_counter() - began)
        return found

    def counted_forward(*args: Any) -> Any:
        if torch.is_grad_enabled():
            timeline.training()
        return forward(*args)

    module.batch_generation, module.get_reward, module.forward = batch_generation, get_reward, counted_forward


def build(job: dict[str, Any], rollouts: int, dtype: str) -> Any:
    """PPOTrainer: LoRA policy whose base is the reference, LoRA value model, reward model with its adapter merged (the fastest)."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.trainer.ppo_config import PPOConfig
    from trl.trainer.ppo_trainer import PPOTrainer

    sizes, kind = job["sizes"], getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    # Outside the model's vocabulary, so that no answer is taken to end where it was sampled; the trainer masks it before any forward.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=kind)
    assert tokenizer.pad_token_id >= policy.config.vocab_size
    reward, value = (AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=kind, num_labels=1) for _ in range(2))
    reward.requires_grad_(False).eval()
    arguments = PPOConfig(
        output_dir=str(OUT / "ppo_trl"), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        num_sample_generations=0, learning_rate=1e-5, lr_scheduler_type="constant", seed=1, gradient_checkpointing=False,
        per_device_train_batch_size=job["micro_rows"], gradient_accumulation_steps=sizes["episodes"] // job["micro_rows"],
        num_mini_batches=sizes["episodes"] // sizes["mini_batch"], num_ppo_epochs=sizes["epochs"],
        total_episodes=rollouts * sizes["episodes"], response_length=sizes["response_tokens"], temperature=job["temperature"],
        local_rollout_forward_batch_size=job["trl_rollout_rows"], whiten_rewards=sizes["mini_batch"] >= LEAST_ROWS_TO_WHITEN,
    )  # fmt: skip
    # A batch more than is used: in the last one of its dataset the trainer steps after every micro-batch.
    prompts = Dataset.from_list([{"input_ids": ids} for ids in job["prompt_ids"] + job["prompt_ids"][: sizes["episodes"]]])
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
        train_dataset=prompts, value_model=with_adapter(value), eval_dataset=prompts, peft_config=trl_lora("CAUSAL_LM"),
    )  # fmt: skip
    # As many optimizer steps as ours: left alone it takes one a rollout and epoch, whatever the minibatches.
    trainer.accelerator.gradient_accumulation_steps = sizes["mini_batch"] // job["micro_rows"]
    return trainer


def with_adapter(value: Any) -> Any:
    """The value model with LoRA in its layers and a trained head; its class stays, for the trainer reads the layers off it."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(trl_lora("SEQ_CLS"), value)
    for parameter in value.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as peft has it for the policy
    value.score.requires_grad_(True)
    return value


def run_trl(job: dict[str, Any], rollouts: int, dtype: str) -> dict[str, Any]:
    """Episodes a second without the first rollout, the peak, and where the time goes."""
    from transformers import TrainerCallback

    trainer = build(job, rollouts, dtype)
    clock = StepClock()

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.collated.append(job["sizes"]["episodes"])
            clock.end_step()
            timeline.end_step()

    trainer.add_callback(Clock())
    timeline = Timeline()
    watch(importlib.import_module("trl.trainer.ppo_trainer"), trainer, timeline)
    trainer.train()
    assert len(clock.ends) == rollouts
    return {
        "per_second": clock.units_per_second(),
        "units": clock.units,
        "seconds": timeline.steps,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
