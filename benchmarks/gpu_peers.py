"""TRL on the GPU for `make gpu-check`: supervised fine-tuning and DPO of the model that our own runs train, where TRL is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import StepClock, counted, train, trl_lora
from gpu_runs import LOGGED, Line, peak_memory


def trl_lines(folder: Path, n_rows: int, longest: int) -> Iterator[Line]:
    """LoRA by TRL on the rows of `gpu_runs.save_data`, padded; its recomputation of activations is off, as ours is."""
    if importlib.util.find_spec("trl") is None:
        yield "TRL", "trl is not installed: skipped", None
        return
    for name, build in (("SFT, LoRA, TRL", sft_trainer), ("DPO, LoRA, TRL", dpo_trainer)):
        clock = StepClock()
        with contextlib.redirect_stdout(io.StringIO()), peak_memory() as peak:
            trainer = build(folder, min(n_rows, 16 if "SFT" in name else 8), longest)
            trainer.data_collator = counted(trainer.data_collator, clock, real_tokens if "SFT" in name else n_pairs)
            found = train(trainer, clock)
        del trainer
        rate = f"{found['per_second']:,.0f} tokens/s" if "SFT" in name else f"{found['per_second']:.1f} pairs/s"
        yield name, f"{rate}, peak {peak[0]:.2f} GiB", None


def real_tokens(batch: dict[str, Any]) -> int:
    """Tokens that are not padding."""
    return int(batch["attention_mask"].sum())


def n_pairs(batch: dict[str, Any]) -> int:
    """Half of the sequences."""
    return len(batch["input_ids"]) // 2


def arguments(folder: Path, batch_rows: int) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": batch_rows, "max_steps": LOGGED, "logging_steps": 1,
        "learning_rate": 1e-4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": on_gpu, "use_cpu": not on_gpu,
        "gradient_checkpointing": False, "seed": 1,
    }  # fmt: skip


def parts(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16), AutoTokenizer.from_pretrained(
        folder / "base"
    )


def sft_trainer(folder: Path, batch_rows: int, longest: int) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = parts(folder)
    rows = [json.loads(line)["messages"] for line in (folder / "sft.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": [asked], "completion": [answer]} for asked, answer in rows])
    config = SFTConfig(**arguments(folder, batch_rows), max_length=longest)
    return SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, peft_config=trl_lora("CAUSAL_LM"))


def dpo_trainer(folder: Path, batch_rows: int, longest: int) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = parts(folder)
    data = Dataset.from_list([json.loads(line) for line in (folder / "dpo.jsonl").read_text().splitlines()])
    config = DPOConfig(**arguments(folder, batch_rows), max_length=2 * longest)
    return DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=trl_lora("CAUSAL_LM"))
