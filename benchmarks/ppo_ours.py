"""Our side of benchmarks/ppo.py: the commands themselves, run in a contender's process and watched."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from common import ALPHA, MODEL, OUT, RANK, StepClock

PARTS = ("rollout", "score", "measure", "update")
SFT_STEPS = 4
TOP_LAYERS = 10  # of 30

Job = dict[str, Any]


def run_ours(name: str, job: Job, rollouts: int, dtype: str) -> dict[str, Any]:
    """`posttrain ppo` in this process, watched from the moment that its loop is built."""
    from posttrain import cli
    from posttrain.commands import ppo

    sizes, result = job["sizes"], {}
    k = sizes["generations"] if name == "ours_group" else 1
    words = [
        "ppo", "--model_name_or_path", MODEL, "--train_file_dir", OUT / "ppo_prompts", "--reward_adapter", OUT / "ppo_reward",
        "--output_dir", OUT / f"ppo_{name}", "--overwrite_output_dir", True, "--use_cpu", True, "--bf16", dtype == "bfloat16",
        "--dtype", dtype, "--lora_rank", RANK, "--lora_alpha", ALPHA, "--max_steps", rollouts, "--temperature", job["temperature"],
        "--rollout_batch_size", sizes["episodes"] // k, "--num_generations", k, "--mini_batch_size", sizes["mini_batch"],
        "--num_ppo_epochs", sizes["epochs"], "--max_source_length", sizes["prompt_tokens"], "--max_target_length",
        sizes["response_tokens"], "--forward_tokens", micro_batch_tokens(job), "--guards", False, "--report_to", "none",
        "--value_sharing", "trunk" if name == "ours_trunk" else "adapter",
    ]  # fmt: skip
    if name == "ours_top":
        words += ["--value_layers", TOP_LAYERS]
    train = ppo.train

    def watched(loop: Any) -> None:
        result.update(watch(loop, train, job, rollouts))

    ppo.stop_token_ids = lambda tokenizer: []  # answers go on to the limit
    ppo.train = watched
    assert cli.main([str(word) for word in words]) == 0
    return result


def watch(loop: Any, train: Callable[[Any], Any], job: Job, rollouts: int) -> dict[str, Any]:
    """Train by the clock; then, the peak being known, the widest tensor over the vocabulary that log-probs cost."""
    clock = StepClock()
    seconds: list[dict[str, float]] = []
    kept: list[Any] = []
    report = loop.on_log

    def on_log(step: int, metrics: dict[str, float], rollout: Any) -> None:
        for episode in rollout.episodes:
            lengths = (len(episode.prompt_ids), len(episode.answer_ids))
            assert lengths == (job["sizes"]["prompt_tokens"], job["sizes"]["response_tokens"])
        clock.collated.append(len(rollout.episodes))
        clock.end_step()
        seconds.append({part: metrics[f"seconds_{part}"] for part in PARTS})
        kept[:] = [rollout]
        report(step, metrics, rollout)

    loop.on_log = on_log
    passes = count_passes(loop)
    train(loop)
    return {
        "per_second": clock.units_per_second(),
        "units": clock.units,
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable": sum(p.numel() for p in loop.trained.parameters() if p.requires_grad),
        "passes": {role: {what: n / rollouts for what, n in found.items()} for role, found in passes.items()},
        "logits": widest_logits(loop, kept[0]),
    }


def count_passes(loop: Any) -> dict[str, Counter[str]]:
    """Forward passes of the decoder and their tokens, by what they are for and the adapter that is on; filled as the loop runs.

    A pass that begins at an upper layer counts for its share of the layers.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from posttrain.model.attention import find_decoder, unwrap
    from posttrain.model.boundary import decoder_layers

    decoder = find_decoder(unwrap(loop.trained.policy_model))
    layers = len(decoder_layers(decoder))
    tuner = next(module for module in decoder.modules() if isinstance(module, BaseTunerLayer))
    passes: dict[str, Counter[str]] = {}

    def count(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        adapter = "reference" if tuner._disable_adapters else tuner._active_adapter[0]
        role = "policy" if adapter == loop.trained.policy.adapter else adapter
        boundary = inputs.get("boundary")
        share = 1 - boundary.first / layers if boundary is not None and boundary.given else 1
        what = "generate" if inputs.get("use_cache") else "train" if torch.is_grad_enabled() else "measure"
        passes.setdefault(f"{what} {role}", Counter()).update(passes=share, tokens=share * inputs["input_ids"].numel())

    decoder.register_forward_pre_hook(count, with_kwargs=True)
    return passes


def widest_logits(loop: Any, rollout: Any) -> dict[str, int]:
    """Rows of the largest tensor over the vocabulary while a micro-batch is measured (old log-probs, entropy, values, reference)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from posttrain.model.attention import unwrap
    from posttrain.training.ppo_rollout import Rollout, measure

    weight = unwrap(loop.trained.policy_model).get_output_embeddings().weight
    found = {"rows": 0, "tokens": 0, "vocabulary": weight.shape[0]}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for x in output if isinstance(output, (tuple, list)) else (output,):
                over = isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[-1] == weight.shape[0]
                if over and x.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                    found["rows"] = max(found["rows"], x.numel() // weight.shape[0])
            return output

    groups = rollout.groups[: len(next(loop.cutter.parts(rollout.groups, range(len(rollout.groups)))))]
    found["tokens"] = sum(len(answer) for _, answers in groups for answer in answers)
    with loop.autocast(), Watch():
        measure(Rollout(groups, [], rollout.scores_S), loop.trained, loop.reference, loop.cutter, loop.sampling.temperature)
    return found


def run_sft(job: Job, dtype: str) -> dict[str, Any]:
    """`posttrain sft` on sequences of the same length, as many trained tokens and tokens a micro-batch: its peak."""
    from posttrain import cli

    words = [
        "sft", "--model_name_or_path", MODEL, "--train_file_dir", OUT / "ppo_chats", "--output_dir", OUT / "ppo_ours_sft",
        "--overwrite_output_dir", True, "--use_cpu", True, "--bf16", dtype == "bfloat16", "--dtype", dtype, "--lora_rank", RANK,
        "--lora_alpha", ALPHA, "--max_steps", SFT_STEPS, "--per_device_train_batch_size", job["sizes"]["mini_batch"],
        "--gradient_accumulation_steps", 1, "--forward_tokens", micro_batch_tokens(job), "--report_to", "none",
    ]  # fmt: skip
    began = time.perf_counter()
    assert cli.main([str(word) for word in words]) == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "seconds_in_all": time.perf_counter() - began}


def micro_batch_tokens(job: Job) -> int:
    """Of as many episodes as TRL's micro-batch has rows."""
    return int(job["micro_rows"] * (job["sizes"]["prompt_tokens"] + job["sizes"]["response_tokens"]))
