"""Supervised fine-tuning beside TRL: tokens per second, peak memory and the loss at step 1, same model, rows and adapter.

    make bench                                   # installs TRL beside the project and runs this
    .venv/bin/python benchmarks/sft.py --rows 40 # fewer or more rows; --only ours,trl_packed to choose

Each contender runs in a process of its own, one after the other, so that peak memory (the process's largest resident set,
libraries and loading included) and speed are not shared. Rows are the shared medical chats where they are present beside the
checkout, else the project's examples. All get the very same token ids and trained flags. Speed leaves out the first step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import (
    ALPHA,
    MODEL,
    OUT,
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
    trl_lora,
)

LONGEST_TOKENS, PACKED_TOKENS, BATCH_ROWS = 1024, 4096, 8
CONTENDERS = ("ours", "trl_packed", "trl_padded")
TARGETS = {"trl_packed": 3.0, "trl_padded": 4.0}  # speed ratios to reach
MEMORY_TARGET = 0.5  # of TRL packed


def prepared_rows(n_rows: int) -> list[dict[str, Any]]:
    """The first rows that fit, as ids and trained flags, by the project's own loader."""
    from posttrain.data.load import DataPlan, DataSource, stream_rows
    from posttrain.data.template import apply_template
    from posttrain.data.tokenize import EncodeChat
    from posttrain.model.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    apply_template(tokenizer, None)
    shared = SHARED / "sft" / "medical_sft_800.jsonl"
    source = shared if shared.is_file() else ROOT / "examples" / "sft"
    stream = stream_rows(DataSource(str(source)), DataPlan(kind="chat", bad_rows="skip"), EncodeChat(tokenizer, 1 << 20))
    rows = []
    for row in stream:
        if len(row["input_ids"]) <= LONGEST_TOKENS:
            rows.append(row)
        if len(rows) == n_rows:
            break
    return rows


def run_ours(rows: list[dict[str, Any]], steps: int, dtype: str) -> dict[str, Any]:
    """The parts of `posttrain sft` in its order, on rows that are ready."""
    from transformers import TrainingArguments

    from posttrain.data.pack import collate
    from posttrain.model.adapter import Lora, attach_lora
    from posttrain.model.attention import enable_segments
    from posttrain.model.fused import fuse
    from posttrain.model.load import load_model, load_tokenizer
    from posttrain.model.logprobs import install_logprobs
    from posttrain.objectives.lm import LanguageModel
    from posttrain.training.batches import Groups
    from posttrain.training.resolve import CPU_FORWARD_TOKENS
    from posttrain.training.trainer import ObjectiveTrainer, TrainingData, use_callbacks

    model = attach_lora(load_model(MODEL, dtype), Lora(rank=RANK, alpha=ALPHA))  # type: ignore[arg-type]
    enable_segments(model)
    install_logprobs(model)
    fuse(model)
    arguments = TrainingArguments(**loop_arguments(steps, min(BATCH_ROWS, len(rows)), dtype), remove_unused_columns=False)
    clock = StepClock()
    data = TrainingData(Groups(rows), None, counted(collate, clock, lambda batch: batch.n_tokens), CPU_FORWARD_TOKENS)
    trainer = ObjectiveTrainer(model, arguments, data, LanguageModel(), load_tokenizer(MODEL))
    use_callbacks(trainer, [])
    return train(trainer, clock)


def run_trl(rows: list[dict[str, Any]], steps: int, dtype: str, packing: bool) -> dict[str, Any]:
    """TRL's SFTTrainer on the same ids, with its memory-saving activation recomputation off (faster) as ours has it."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from posttrain.model.embedded import resolve_model
    from posttrain.model.load import load_tokenizer

    data = Dataset.from_list([{"input_ids": r["input_ids"], "completion_mask": r["trained"]} for r in rows])
    equal_check = steps == 1
    arguments = SFTConfig(
        **loop_arguments(steps, min(BATCH_ROWS, len(rows)) if not packing or equal_check else 1, dtype),
        max_length=PACKED_TOKENS if packing else LONGEST_TOKENS, packing=packing, packing_strategy="bfd",
        completion_only_loss=True, gradient_checkpointing=False,
        model_init_kwargs={"dtype": getattr(torch, dtype)},
    )  # fmt: skip
    clock = StepClock()
    trainer = SFTTrainer(
        resolve_model(MODEL),
        arguments,
        train_dataset=data,
        processing_class=load_tokenizer(MODEL),
        peft_config=trl_lora("CAUSAL_LM"),
    )
    trainer.data_collator = counted(trainer.data_collator, clock, real_tokens)
    return train(trainer, clock)


def real_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a TRL batch that are not padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel())


def matrix_peak_flops() -> float:
    """The best rate of a bf16 matrix product here, in FLOP/s."""
    import torch

    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def flops_per_token(rows: list[dict[str, Any]]) -> float:
    """Matrix FLOPs that a token of LoRA training needs: frozen layers forward and input gradient, adapters, attention, head."""
    from transformers import AutoConfig

    from posttrain.model.embedded import resolve_model

    c = AutoConfig.from_pretrained(resolve_model(MODEL))
    d, f, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    frozen = 4 * sum(i * o for i, o in shapes)  # forward and gradient of the input, 2 FLOPs a weight each
    adapters = 6 * 8 * sum(i + o for i, o in shapes)
    lengths = [len(r["input_ids"]) for r in rows]
    mean_length = sum(n * n for n in lengths) / sum(lengths)  # of the row that a token is in
    attention = 2 * mean_length * d * 3.5  # causal QK and PV forward, five products backward
    trained = sum(sum(r["trained"]) for r in rows) / sum(lengths)
    return c.num_hidden_layers * (frozen + adapters + attention) + trained * 4 * d * c.vocab_size


def compare(n_rows: int, only: list[str]) -> dict[str, Any]:
    """All contenders, and the ratios."""
    rows = prepared_rows(n_rows)
    steps = len(rows) // BATCH_ROWS
    files = {"all": save_rows("all", rows), "first": save_rows("first", rows[:BATCH_ROWS])}
    lengths = [len(r["input_ids"]) for r in rows]
    print(
        f"{len(rows)} rows of {min(lengths)}-{max(lengths)} tokens, {sum(lengths):,} in all; LoRA r=8 on all linear layers, bf16"
    )
    results: dict[str, Any] = {}
    for name in only:
        timed = run_contender(__file__, name, files["all"], steps if name != "trl_packed" else 1000, "bfloat16")
        losses = {d: run_contender(__file__, name, files["first"], 1, d)["losses"][0] for d in ("bfloat16", "float32")}
        results[name] = {**timed, "loss": losses}
        print(
            f"{name:<11} {timed['per_second']:7.1f} tokens/s   peak {gibibytes(timed['peak_bytes'])}"
            f"   loss at step 1: bf16 {losses['bfloat16']:.4f}, fp32 {losses['float32']:.6f}",
            flush=True,
        )
    if "ours" in results:
        share = results["ours"]["per_second"] * flops_per_token(rows) / matrix_peak_flops()
        results["ours"]["share_of_matrix_peak"] = share
        print(f"ours runs at {share:.0%} of this machine's bf16 matrix peak")
    for name in set(TARGETS) & set(results) if "ours" in results else ():
        ours, theirs = results["ours"], results[name]
        speed = ours["per_second"] / theirs["per_second"]
        memory = ours["peak_bytes"] / theirs["peak_bytes"]
        gap = {d: abs(ours["loss"][d] - theirs["loss"][d]) for d in ours["loss"]}
        print(
            f"ours / {name}: speed {speed:.2f}x (to reach: {TARGETS[name]}x), peak memory {memory:.2f}x"
            + (f" (to reach: {MEMORY_TARGET}x)" if name == "trl_packed" else "")
            + f", loss gap bf16 {gap['bfloat16']:.1e}, fp32 {gap['float32']:.1e}"
        )
    return results


def main() -> None:
    """Parse, run, write outputs/bench/sft.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rows_file", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        rows = json.loads(Path(args.rows_file).read_text())
        if args.contender == "ours":
            result = run_ours(rows, args.steps, args.dtype)
        else:
            packing = args.contender == "trl_packed"
            steps = args.steps if args.steps < 1000 else -(-sum(len(r["input_ids"]) for r in rows) // PACKED_TOKENS)
            result = run_trl(rows, steps, args.dtype, packing)
        print(json.dumps(result))
        return
    results = compare(args.rows, args.only.split(","))
    (OUT / "sft.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
