"""What the benchmarks on preference pairs share: the rows, an equal start for all contenders, our training, and the comparison."""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import (
    ALPHA,
    MODEL,
    RANK,
    ROOT,
    SHARED,
    StepClock,
    counted,
    gibibytes,
    loop_arguments,
    run_contender,
    save_rows,
    train,
)

BATCH_PAIRS = 4
EQUAL_STEPS = 3  # compared in float32, on the shortest pairs
MARGINS = ("reward_margin", "rewards/margins", "margin")  # ours in DPO, TRL's there, both in reward modelling
MEMORY_TARGET = 0.4
UNITS = {"end_to_end": "pairs/s end to end", "per_second": "pairs/s in training alone", "peak_bytes": "peak memory"}

Row = dict[str, Any]


def prepared_pairs(n_pairs: int, longest_tokens: int) -> tuple[list[Row], list[Row]]:
    """(the first pairs that fit, the shortest of all that fit), as ids, by the project's own loader."""
    from posttrain.data.load import DataPlan, DataSource, stream_rows
    from posttrain.data.template import apply_template
    from posttrain.data.tokenize_pairs import EncodePair
    from posttrain.model.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    apply_template(tokenizer, None)
    shared = SHARED / "reward" / "dpo_zh_400.jsonl"
    source = shared if shared.is_file() else ROOT / "examples" / "pairs"
    encode = EncodePair(tokenizer, 1 << 20, 1 << 20, keep_stop=True)
    stream = stream_rows(DataSource(str(source)), DataPlan(kind="pair", bad_rows="skip"), encode)
    rows = [row for row in stream if longest_sequence(row) <= longest_tokens]
    return rows[:n_pairs], sorted(rows, key=longest_sequence)[: EQUAL_STEPS * BATCH_PAIRS]


def longest_sequence(row: Row) -> int:
    """Tokens of the prompt and the longer answer."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def same_start(model: Any) -> None:
    """The adapter's first matrices and the score head, drawn by name: every contender starts from the same weights."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                drawn = torch.Generator().manual_seed(zlib.crc32(name[name.index("layers.") :].encode()))
                parameter.copy_((2 * torch.rand(parameter.shape, generator=drawn) - 1) / math.sqrt(parameter.shape[1]))
            elif ".score." in name and parameter.ndim == 2:
                head = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                parameter.copy_(head / math.sqrt(parameter.shape[1] + 1))


def pair_arguments(steps: int, dtype: str) -> dict[str, Any]:
    """The loop's arguments: batches in the order of the rows."""
    return {**loop_arguments(steps, BATCH_PAIRS, dtype), "train_sampling_strategy": "sequential"}


def build_ours(dtype: str, reward: bool) -> Any:
    """The model of `posttrain dpo` or `posttrain rm`, made ready in their order."""
    from posttrain.model.adapter import Lora, attach_lora
    from posttrain.model.attention import enable_segments
    from posttrain.model.fused import fuse
    from posttrain.model.load import load_model
    from posttrain.model.logprobs import install_logprobs
    from posttrain.model.reward import install_scores, load_reward_model

    base = (load_reward_model if reward else load_model)(MODEL, dtype)  # type: ignore[operator]
    model = attach_lora(base, Lora(rank=RANK, alpha=ALPHA))
    same_start(model)
    assert enable_segments(model).packed
    (install_scores if reward else install_logprobs)(model)
    fuse(model)
    return model


def train_ours(rows: list[Row], steps: int, dtype: str, reward: bool, shared_prefix: bool) -> dict[str, Any]:
    """The parts of `posttrain dpo` or `posttrain rm` in their order, on rows that are ready."""
    from transformers import TrainingArguments

    from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart
    from posttrain.model.load import load_tokenizer
    from posttrain.objectives.dpo import Preference
    from posttrain.objectives.reward import Reward
    from posttrain.training.batches import Groups
    from posttrain.training.resolve import CPU_FORWARD_TOKENS
    from posttrain.training.trainer import ObjectiveTrainer, TrainingData, use_callbacks

    arguments = TrainingArguments(
        **pair_arguments(steps, dtype), per_device_eval_batch_size=BATCH_PAIRS, remove_unused_columns=False
    )
    model = build_ours(dtype, reward)
    collate = collate_pairs if shared_prefix else collate_pairs_apart
    extra: dict[str, Any] = {"reference_seconds": 0.0}
    if not reward:
        rows, extra["reference_seconds"] = with_reference(model, collate, rows, arguments)
    clock = StepClock()
    timed = counted(collate, clock, lambda batch: batch.n_sequences // 2)
    data = TrainingData(Groups(rows), None, timed, CPU_FORWARD_TOKENS)
    trainer = ObjectiveTrainer(model, arguments, data, Reward() if reward else Preference(), load_tokenizer(MODEL))
    # Ours always shuffles in training; evaluation keeps the rows in order.
    trainer.get_train_dataloader = lambda: trainer.get_eval_dataloader(data.train)  # type: ignore[method-assign]
    use_callbacks(trainer, [])
    return finish(trainer, clock, extra)


def with_reference(model: Any, collate: Any, rows: list[Row], arguments: Any) -> tuple[Any, float]:
    """(rows with the reference log-probs, the seconds it took), computed anew whatever is cached."""
    import tempfile
    import time

    from datasets import Dataset

    from posttrain.training.reference import ReferencePass
    from posttrain.training.resolve import CPU_FORWARD_TOKENS

    data = Dataset.from_list(rows)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache_dir:
        data, _ = ReferencePass(model, collate, True, CPU_FORWARD_TOKENS, (), cache_dir).add_columns(data, arguments)
    return data, time.perf_counter() - began


def finish(trainer: Any, clock: StepClock, extra: dict[str, Any]) -> dict[str, Any]:
    """Train; speed with the reference pass, first step included, and the margins of all steps."""
    result = {**train(trainer, clock), **extra}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result["margins"] = [log[name] for log in logs for name in MARGINS if name in log]
    result["end_to_end"] = sum(result["units"]) / (result["train_seconds"] + result["reference_seconds"])
    return result


def measure(script: str, rows: list[Row], short_rows: list[Row], contenders: list[str]) -> dict[str, Any]:
    """Every contender in bfloat16 on the rows by the clock, and in float32 on the short rows for its numbers."""
    lengths = [longest_sequence(row) for row in rows]
    prompts = [len(row["prompt_ids"]) for row in rows]
    print(
        f"{len(rows)} pairs, {BATCH_PAIRS} a batch: prompt and longer answer {min(lengths)}-{max(lengths)} tokens,"
        f" prompts {sum(prompts) / len(rows):.0f} on average; LoRA r={RANK} on all linear layers, bf16\n"
        f"fp32 numbers: {EQUAL_STEPS} steps over the {len(short_rows)} shortest pairs"
    )
    stem = Path(script).stem
    files = {"bfloat16": save_rows(f"{stem}_all", rows), "float32": save_rows(f"{stem}_short", short_rows)}
    results: dict[str, Any] = {}
    for name in contenders:
        result = run_contender(script, name, files["bfloat16"], len(rows) // BATCH_PAIRS, "bfloat16")
        if "unavailable" in result:
            print(f"{name}: not measured: {result['unavailable']}", flush=True)
            continue
        result["float32"] = run_contender(script, name, files["float32"], EQUAL_STEPS, "float32")
        results[name] = result
        exact = result["float32"]
        print(
            f"{name:<16} {result['per_second']:6.3f} pairs/s in training, {result['end_to_end']:6.3f} end to end"
            f"   peak {gibibytes(result['peak_bytes'])}   trainable {result['trainable']:,}\n"
            f"{'':16} loss at step 1: bf16 {result['losses'][0]:.5f}, fp32 {exact['losses'][0]:.6f};"
            f" fp32 at step {EQUAL_STEPS}: loss {exact['losses'][-1]:.6f}, margin {exact['margins'][-1]:.6f}",
            flush=True,
        )
    return results


def report(results: dict[str, Any], targets: dict[str, float]) -> dict[str, Any]:
    """Ours beside the TRL mode that is best in each respect, and the largest gaps of the numbers to any mode."""
    theirs = {name: result for name, result in results.items() if not name.startswith("ours")}
    ours = results.get("ours")
    if ours is None or not theirs:
        return {}
    ratios: dict[str, Any] = {}
    for key, target in {**targets, "peak_bytes": MEMORY_TARGET}.items():
        least = key == "peak_bytes"
        best = (min if least else max)(theirs, key=lambda name: theirs[name][key])
        ratio = ours[key] / theirs[best][key]
        reached = ratio <= target if least else ratio >= target
        ratios[key] = {"beside": best, "ratio": ratio, "to_reach": target, "reached": reached}
        sign = "≤" if least else "≥"
        print(f"ours / {best}, {UNITS[key]}: {ratio:.2f}x (to reach: {sign} {target}x){'' if reached else ' MISSED'}")
    for name, result in theirs.items():
        gaps = {
            "loss at step 1 in bf16": abs(ours["losses"][0] - result["losses"][0]),
            "fp32 losses, largest": largest_gap(ours, result, "losses"),
            "fp32 margins, largest": largest_gap(ours, result, "margins"),
        }
        ratios[f"gaps to {name}"] = gaps
        print(f"gap ours - {name}: " + ", ".join(f"{what} {gap:.1e}" for what, gap in gaps.items()))
    if "ours_apart" in results:
        apart = results["ours_apart"]
        ratios["prefix_sharing"] = {key: ours[key] / apart[key] for key in (*targets, "peak_bytes")}
        shown = ", ".join(f"{UNITS[key]} {ratio:.2f}x" for key, ratio in ratios["prefix_sharing"].items())
        print(f"prefix sharing alone (ours / ours with each prompt twice): {shown}")
    return ratios


def largest_gap(a: dict[str, Any], b: dict[str, Any], key: str) -> float:
    """Over the float32 steps."""
    return max(abs(x - y) for x, y in zip(a["float32"][key], b["float32"][key], strict=True))


def pair_parser(description: str | None, contenders: Sequence[str], hidden: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The flags of both benchmarks; the hidden ones are what a contender's own process is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="pairs to train on, in batches of 4; at least 8")
    parser.add_argument(
        "--max_length", type=int, default=1024, help="longest prompt + answer in tokens; longer pairs are left out"
    )
    parser.add_argument("--only", default=",".join(contenders), help="contenders, with commas")
    parser.add_argument("--contender", choices=(*contenders, *hidden), help=argparse.SUPPRESS)
    parser.add_argument("--rows_file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    return parser


def contend(args: argparse.Namespace, run: Callable[[str, list[Row], int, str], dict[str, Any]]) -> None:
    """In a contender's process: run it and print its result."""
    print(json.dumps(run(args.contender, json.loads(args.rows_file.read_text()), args.steps, args.dtype)))
