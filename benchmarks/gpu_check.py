"""What a machine with a GPU must show: exact packed rows on its kernels, and training speed beside plain transformers.

    make gpu-check                                   # on a GPU
    POSTTRAIN_GPU_CHECK=dry make gpu-check           # the same code on the CPU with tiny shapes: keeps it from rotting
    .venv/bin/python benchmarks/gpu_check.py --only stages,peers

Prints one Markdown table. Models have random weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gpu_peers
import gpu_runs
from posttrain.data.pack import collate, collate_padded
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.fused_cuda import has_liger
from posttrain.model.logprobs import install_logprobs
from posttrain.objectives.lm import LanguageModel

DRY = os.environ.get("POSTTRAIN_GPU_CHECK") == "dry"
DEVICE = torch.device("cpu" if DRY else "cuda")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SMALL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "sliding_window": 64,
}  # fmt: skip
# The shape of Qwen2.5-0.5B.
HALF_BILLION = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 dense, from the makers' data sheets
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def small_model(family: str, dtype: torch.dtype) -> Any:
    """A random model of two layers on the device."""
    config = AutoConfig.for_model(family)
    for key, value in SMALL.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(DEVICE, dtype)


def random_rows(n_rows: int, longest: int, vocab: int) -> list[dict[str, Any]]:
    """Rows of random ids, a third prompt and two thirds answer, of lengths between a tenth of `longest` and all of it."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(n_rows):
        length = int(torch.randint(longest // 10, longest, (1,), generator=generator)) + 3
        ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "trained": [0] * (length // 3) + [1] * (length - length // 3)})
    return rows


def packed_equals_padded(family: str, dtype: torch.dtype) -> tuple[str, bool]:
    """Largest relative difference of the target log-probs and of the gradient between a packed and a padded batch."""
    rows = random_rows(5, 200, SMALL["vocab_size"])
    results = []
    for packed in (False, True):
        model = small_model(family, dtype)
        if packed and not (attention := enable_segments(model)).packed:
            return attention.reason, False
        install_logprobs(model)
        batch = (collate if packed else collate_padded)(rows).to(DEVICE)
        output = model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
        output.logprobs_N.sum().backward()
        results.append((output.logprobs_N.detach().float(), model.model.layers[0].self_attn.q_proj.weight.grad.float()))
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True)]
    return f"log-probs {errors[0]:.1e}, gradient {errors[1]:.1e}", max(errors) <= TOLERANCE[dtype]


def timed(step: Callable[[], None], n_steps: int) -> float:
    """Seconds a step, after two that warm up."""
    for _ in range(2):
        step()
    synchronize()
    began = time.perf_counter()
    for _ in range(n_steps):
        step()
    synchronize()
    return (time.perf_counter() - began) / n_steps


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def throughput(ours: bool, rows: list[dict[str, Any]], shape: dict[str, Any]) -> dict[str, float]:
    """Tokens per second and peak memory of LoRA steps in bf16: our packed step, or transformers' own loss on padded rows."""
    torch.manual_seed(0)
    model = attach_lora(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape)).to(DEVICE, torch.bfloat16), Lora()
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    if ours:
        enable_segments(model)
        install_logprobs(model)
        fuse(model, DEVICE.type)
        batch = collate(rows).to(DEVICE)
        weight = LanguageModel().weight(batch)
    else:
        padded = collate_padded(rows).to(DEVICE)
        labels = torch.full_like(padded.input_ids_BT, -100)
        labels.view(-1)[padded.predict_N + 1] = padded.targets_N

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            if ours:
                loss = LanguageModel()(model, batch).total / weight
            else:
                loss = model(input_ids=padded.input_ids_BT, attention_mask=padded.attention_mask_BT, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    gc.collect()  # what was measured before
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, 1 if DRY else 8)
    tokens = sum(len(r["input_ids"]) for r in rows)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and p.ndim == 2)
    return {"tokens_per_second": tokens / seconds, "peak_gib": peak, "flops": 4 * weights * tokens / seconds}


def speed_lines(rows: list[dict[str, Any]], shape: dict[str, Any], name: str) -> Iterator[gpu_runs.Line]:
    """A step on these rows, ours beside transformers' own."""
    rates = []
    for who in ("ours", "transformers"):
        check = f"SFT LoRA r=8 bf16, {len(rows)} rows a step, {who}"
        try:
            f = throughput(who == "ours", rows, shape)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield check, "out of memory", None
            return
        rates.append(f["tokens_per_second"])
        peak = peak_flops(name)
        mfu = f", {f['flops'] / peak:.1%} of matrix peak" if peak else ""
        yield check, f"{f['tokens_per_second']:,.0f} tokens/s, peak {f['peak_gib']:.2f} GiB{mfu}", None
    yield f"ours / transformers, {len(rows)} rows a step", f"{rates[0] / rates[1]:.2f}x tokens/s", None


def peak_flops(name: str) -> float | None:
    """Of a device, where it is known."""
    return next((flops for chip, flops in PEAK_FLOPS.items() if chip in name), None)


def packed_lines() -> Iterator[gpu_runs.Line]:
    """Packed rows beside padded ones."""
    for dtype in (torch.float32, torch.bfloat16):
        for family in FAMILIES:
            yield f"packed = padded, {family}, {str(dtype).removeprefix('torch.')}", *packed_equals_padded(family, dtype)


def all_lines(only: list[str], name: str, folder: Path) -> Iterator[gpu_runs.Line]:
    """The parts that were asked for. `engines` and `peers` train the model that `stages` writes."""
    shape = {**SMALL, "head_dim": 32} if DRY else HALF_BILLION
    n_rows, longest = (8, 160) if DRY else (128, 1024)
    if "packed" in only:
        yield from packed_lines()
    if "speed" in only:
        for n in (4,) if DRY else (16, 64):
            yield from speed_lines(random_rows(n, 100 if DRY else 1024, shape["vocab_size"]), shape, name)
    if "stages" in only:
        yield from gpu_runs.stage_lines(folder, shape, n_rows, longest, peak_flops(name))
    elif {"engines", "peers"} & {*only}:
        gpu_runs.save_model(folder / "base", shape)
        gpu_runs.save_data(folder, n_rows, longest)
    if "engines" in only:
        yield from gpu_runs.engine_lines(folder)
    if "peers" in only:
        yield from gpu_peers.trl_lines(folder, n_rows, longest)


PARTS = ("packed", "speed", "stages", "engines", "peers")


def main() -> None:
    """Run every check; exit code 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas [default: {','.join(PARTS)}]")
    only = [part for part in parser.parse_args().only.split(",") if part]
    if unknown := sorted({*only} - {*PARTS}):
        parser.error(f"--only {unknown[0]}: the parts are {', '.join(PARTS)}")
    if not DRY and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; skipped (POSTTRAIN_GPU_CHECK=dry runs the code on the CPU)")
        return
    name = "CPU, dry run" if DRY else torch.cuda.get_device_name()
    liger = "with liger-kernel" if has_liger() else "no liger-kernel"
    print(f"| check on {name}, torch {torch.__version__}, {liger} | result | |\n|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for check, result, passed in all_lines(only, name, Path(folder)):
            failed |= passed is False
            print(f"| {check} | {result} | {'' if passed is None else 'ok' if passed else 'FAIL'} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
