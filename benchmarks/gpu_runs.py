"""Whole runs of `posttrain` on a GPU for `make gpu-check`: every stage through its command line, what it says and how fast it is.

The model has the shape of Qwen2.5-0.5B and random weights; a token of its tokenizer is a letter. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "src")]
LOGGED = 8  # steps of a run
Line = tuple[str, str, bool | None]  # check, result, passed (None: a figure)


def reward(answers: list[str]) -> list[float]:
    """Shorter answers are better: something that any answer has."""
    return [-len(answer) / 1000 for answer in answers]


def save_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A random model in bfloat16 and a tokenizer of its vocabulary: letters, ChatML's marks, and words that no text has."""
    from ppo_tiny import ALPHABET, CHATML, SPECIAL, STOP
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *ALPHABET]
    tokens += [f"<{i}>" for i in range(shape["vocab_size"] - len(tokens))]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[STOP], pad_token=SPECIAL[-1], model_max_length=4096
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **shape, eos_token_id=STOP, pad_token_id=len(SPECIAL) - 1, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_data(folder: Path, n_rows: int, longest: int) -> dict[str, Path]:
    """Chats, pairs and prompts of random letters, between a tenth of `longest` and all of it."""
    draw = random.Random(0)

    def letters(low: int, high: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=draw.randint(low, high)))

    made: dict[str, list[dict[str, Any]]] = {"sft": [], "dpo": [], "ppo": []}
    for _ in range(n_rows):
        size = draw.randint(longest // 10, longest - 40)
        asked = {"role": "user", "content": letters(size // 3, size // 3)}
        answers = [{"role": "assistant", "content": letters(size // 3, size - size // 3)} for _ in range(2)]
        made["sft"].append({"messages": [asked, answers[0]]})
        made["dpo"].append({"prompt": [asked], "chosen": [answers[0]], "rejected": [answers[1]]})
        made["ppo"].append({"messages": [asked]})
    files = {}
    for stage, rows in made.items():
        files[stage] = folder / f"{stage}.jsonl"
        files[stage].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Fills in the largest allocation on the device, in GiB."""
    peak: list[float] = []
    gc.collect()  # the run before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.append(torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"))


def words(stage: str, base: Path, data: Path, out: Path, **flags: Any) -> list[str]:
    """The command line of a run."""
    flags = {
        "model_name_or_path": base, "train_file_dir": data, "output_dir": out, "max_steps": LOGGED, "report_to": "none",
        "overwrite_output_dir": True, "save_strategy": "no", "disable_tqdm": True, **flags,
    }  # fmt: skip
    if stage != "ppo":
        flags = {"logging_steps": 1, **flags}
    else:
        flags.pop("disable_tqdm")
    return [stage, *(str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value))]


def measure(stage: str, base: Path, data: Path, out: Path, **flags: Any) -> tuple[dict[str, float], str]:
    """(what the last half of the steps logged on average, with `peak_gib`; what was said) of a run in this process."""
    from posttrain.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as said, peak_memory() as peak:
        code = main(words(stage, base, data, out, **flags))
    if code != 0:
        raise RuntimeError(said.getvalue().strip().splitlines()[-1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "grad_norm" in line or "policy_loss" in line]
    late = lines[len(lines) // 2 :]
    figures = {
        name: statistics.fmean(line[name] for line in late if name in line)
        for name, v in late[-1].items()
        if isinstance(v, float)
    }
    if "tokens" in late[-1]:
        figures["tokens_per_step"] = (late[-1]["tokens"] - late[0]["tokens"]) / (len(late) - 1)
    return {**figures, "peak_gib": peak[0]}, said.getvalue()


def stage_lines(folder: Path, shape: dict[str, Any], n_rows: int, longest: int, peak_flops: float | None) -> Iterator[Line]:
    """Every stage by its command line: it runs, and its speed."""
    base, data = save_model(folder / "base", shape), save_data(folder, n_rows, longest)
    on_gpu = torch.cuda.is_available()
    rows = {"per_device_train_batch_size": min(n_rows, 16), "model_max_length": longest, "bf16": on_gpu or None}
    pairs = {
        **rows,
        "per_device_train_batch_size": min(n_rows, 8),
        "model_max_length": None,
        "max_source_length": longest,
        "max_target_length": longest,
    }
    paged = {"qlora": True, "load_in_4bit": True, "dtype": "bfloat16", "optim": "paged_adamw_32bit"}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "SFT, LoRA": ("sft", rows),
        "SFT, LoRA, --flash_attn": ("sft", {**rows, "flash_attn": True}),
        "SFT, LoRA, gradient checkpointing": ("sft", {**rows, "gradient_checkpointing": True}),
        "SFT, all weights": ("sft", {**rows, "use_peft": False, "learning_rate": 1e-5}),
        "SFT, QLoRA, paged AdamW": ("sft", {**rows, **paged}),
        "RM, LoRA": ("rm", pairs),
        "DPO, LoRA": ("dpo", pairs),
        "DPO, QLoRA, paged AdamW": ("dpo", {**pairs, **paged}),
    }
    if importlib.util.find_spec("bitsandbytes") is None:
        yield "QLoRA", "bitsandbytes is not installed: skipped", None
        runs = {name: run for name, run in runs.items() if "QLoRA" not in name}
    matrices = layer_weights(shape)
    for name, (stage, flags) in runs.items():
        kind = "dpo" if stage == "rm" else stage
        figures, said = measure(stage, base, data[kind], folder / "run", **flags)
        rate = figures["tokens_per_second"]
        # A trained weight takes 6 operations a token, a frozen one 4: its own gradient is not computed.
        share = (
            f", {(6 if 'all' in name else 4) * matrices * rate / peak_flops:.1%} of matrix peak"
            if peak_flops and stage == "sft"
            else ""
        )
        # Pairs are what compares with others: of a pair's prompt, that we compute once, others count the tokens twice.
        n_pairs = (
            f" ({rate / figures['tokens_per_step'] * flags['per_device_train_batch_size']:.1f} pairs/s)" if kind == "dpo" else ""
        )
        yield name, f"{rate:,.0f} tokens/s{n_pairs}, peak {figures['peak_gib']:.2f} GiB{share}", None
        yield (
            f"{name}: the loss is finite and moves",
            f"{figures['loss']:.4f}",
            figures["loss"] == figures["loss"] and figures["grad_norm"] > 0,
        )
        if "flash" in name:
            line = next((line for line in said.splitlines() if "ttention" in line), "")
            yield f"{name}: says", line.strip(), bool(line)
    yield from ppo_lines(folder, base, data["ppo"], on_gpu)


def layer_weights(shape: dict[str, Any]) -> int:
    """Weights of the matrices of all layers. Like gpu_check's own step this leaves the head out, which only trained tokens pass."""
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    narrow = width // heads * shape["num_key_value_heads"]
    return int(shape["num_hidden_layers"] * (2 * width * width + 2 * width * narrow + 3 * width * shape["intermediate_size"]))


def ppo_lines(folder: Path, base: Path, data: Path, on_gpu: bool) -> Iterator[Line]:
    """PPO: rollouts and updates."""
    flags = {
        "reward_func": f"{os.path.relpath(__file__)}:reward", "rollout_batch_size": 64 if on_gpu else 4, "max_target_length": 128 if on_gpu else 8,
        "mini_batch_size": 32 if on_gpu else 2, "max_steps": 3, "guards": False, "missing_eos_penalty": 0, "max_source_length": 512,
    }  # fmt: skip
    figures, _ = measure("ppo", base, data, folder / "run", **flags)
    rates = f"rollout {figures['rollout_tokens_per_second']:,.0f}, update {figures['update_tokens_per_second']:,.0f} response tokens/s"
    yield "PPO, LoRA", f"{rates}, peak {figures['peak_gib']:.2f} GiB", None
    parts = {name.removeprefix("seconds_"): value for name, value in figures.items() if name.startswith("seconds_")}
    yield "PPO, LoRA: where a step's time goes", ", ".join(f"{part} {value:.2f} s" for part, value in parts.items()), None
    yield (
        "PPO, LoRA: the losses are finite",
        f"policy {figures['policy_loss']:.4f}",
        figures["policy_loss"] == figures["policy_loss"],
    )


def engine_lines(folder: Path) -> Iterator[Line]:
    """FSDP2 and ZeRO on this one device, each started as a user starts it."""
    base, data = folder / "base", folder / "sft.jsonl"
    engines = {
        "FSDP2": ("accelerate", {"fsdp": "full_shard", "fsdp_config": ROOT / "scripts" / "fsdp2_config.json"}),
        "ZeRO-2": ("deepspeed", {"deepspeed": ROOT / "scripts" / "deepspeed_zero_stage2_config.json"}),
        "ZeRO-3": ("deepspeed", {"deepspeed": ROOT / "scripts" / "deepspeed_zero_stage3_config.json"}),
    }
    for name, (package, flags) in engines.items():
        if importlib.util.find_spec(package) is None:
            yield f"SFT, LoRA, {name}", f"{package} is not installed: skipped", None
            continue
        argv = words("sft", base, data, folder / "run", **flags, per_device_train_batch_size=2, model_max_length=512, max_steps=3)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "posttrain", *argv]
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(start, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
        last = [line for line in done.stderr.splitlines() if line.startswith(("step", "posttrain:")) or "Error" in line]
        yield (
            f"SFT, LoRA, {name}, one process",
            (last or ["(said nothing)"])[-1].strip()[:160].replace("|", "/"),
            done.returncode == 0,
        )
