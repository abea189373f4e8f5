"""docs/results/memory.md: memory a GPU for models of 1.5B to 70B, by the arithmetic of `posttrain plan` on configs written here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from posttrain import config
from posttrain.commands import plan
from posttrain.commands.table import understood
from posttrain.flags import PlanFlags
from posttrain.training.forecast import forecast, peak_bytes


def shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    """A config.json."""
    return {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


MODELS = {
    "1.5B": shape(1536, 28, 12, 2, 8960, 151936, tie_word_embeddings=True),
    "7B": shape(3584, 28, 28, 4, 18944, 152064),
    "14B": shape(5120, 48, 40, 8, 13824, 152064),
    "70B": shape(8192, 80, 64, 8, 28672, 128256, model_type="llama", architectures=["LlamaForCausalLM"]),
}
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
ENGINES: dict[str, tuple[int, Any]] = {
    "one GPU": (1, None),
    "DDP, 8 GPUs": (8, None),
    "ZeRO-1, 8 GPUs": (8, {"zero_optimization": {"stage": 1}}),
    "ZeRO-2, 8 GPUs": (8, {"zero_optimization": {"stage": 2}}),
    "ZeRO-3, 8 GPUs": (8, {"zero_optimization": {"stage": 3}}),
    "ZeRO-3 with offload, 8 GPUs": (8, OFFLOADED),
    "FSDP2, 8 GPUs": (8, "fsdp"),
}
METHODS: dict[str, list[str]] = {"all weights": ["--use_peft", "False"], "LoRA": [], "QLoRA, 4 bits": ["--qlora", "True"]}
NOT_WITH_BITS = ("ZeRO-3", "FSDP2")  # packed weights are not sharded
COMMON = [
    "--device",
    "cuda",
    "--gradient_checkpointing",
    "True",
    "--model_max_length",
    "4096",
    "--per_device_train_batch_size",
    "1",
]
PPO = ["--device", "cuda", "--gradient_checkpointing", "True", "--rollout_batch_size", "64", "--mini_batch_size", "64",
       "--forward_tokens", "4096"]  # fmt: skip


def gib(stage: str, folder: Path, flags: list[str]) -> float:
    """What `posttrain plan` says of a run, in GiB a device."""
    whose, command, words = understood("plan", [stage, "--model_name_or_path", str(folder), *flags])
    parsed = config.parse(whose, command.groups, command.training, words)
    wanted = parsed.group(PlanFlags)
    known, cpu = plan.resolved(parsed, wanted)
    return peak_bytes(forecast(plan.describe(known, wanted, cpu))) / 2**30


def engine_flags(engine: str, root: Path) -> list[str]:
    """The flags that choose an engine."""
    world, how = ENGINES[engine]
    flags = ["--num_processes", str(world)]
    if how == "fsdp":
        return [*flags, "--fsdp", "True"]
    if how is None:
        return flags
    file = root / f"{engine}.json"
    file.write_text(json.dumps(how))
    return [*flags, "--deepspeed", str(file)]


def rows_of(title: str, cells: list[float | None]) -> str:
    """A row of a table."""
    return f"| {title} | " + " | ".join("" if cell is None else f"{cell:,.1f}" for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    names = list(MODELS)
    lines = [
        "# Memory a GPU, by arithmetic",
        "",
        "Made by `python benchmarks/plan.py --table`: what `posttrain plan` forecasts, in GiB a GPU. Nothing here is measured; how far",
        "its forecasts are from measured peaks is in [plan.md](plan.md). Shapes are those of Qwen2.5 (1.5B, 7B, 14B) and Llama (70B).",
        "A GPU's context (0.3 to 0.6 GiB) and what the allocator holds back are not in it: leave a tenth of the memory free.",
        "",
        "`posttrain sft`, rows of 4,096 tokens, one at a time, gradient checkpointing, bfloat16, AdamW, LoRA of rank 8 on all linear",
        "layers. ZeRO-3 and FSDP2 do not shard a base in 4 bits, so these cells are empty: take DDP.",
        "",
        f"| method, engine | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, content in MODELS.items():
            (root / name).mkdir()
            (root / name / "config.json").write_text(json.dumps(content))
        for method, flags in METHODS.items():
            for engine in ENGINES:
                if method.startswith("QLoRA") and engine.startswith(NOT_WITH_BITS):
                    lines.append(rows_of(f"{method}, {engine}", [None] * len(names)))
                    continue
                chosen = [*COMMON, *flags, *engine_flags(engine, root)]
                lines.append(rows_of(f"{method}, {engine}", [gib("sft", root / name, chosen) for name in names]))
        lines += [
            "",
            "`posttrain ppo`, one GPU: 64 answers of at most 256 tokens to prompts of at most 512, parts of 4,096 tokens, values by an",
            "adapter (or a model) of their own, checkpointing, a reward that is a function.",
            "",
            f"| method | {' | '.join(names)} |",
            "|---|" + "---|" * len(names),
        ]
        lines += [
            rows_of(method, [gib("ppo", root / name, [*PPO, *flags]) for name in names]) for method, flags in METHODS.items()
        ]
    return "\n".join(lines) + "\n"
