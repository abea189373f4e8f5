"""`posttrain plan <stage> <flags>`: what a device must hold for a run, from its flags and the model's config alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from posttrain import flags
from posttrain.commands.ppo import ROLLOUT_ROWS
from posttrain.commands.report import quiet_libraries
from posttrain.config import Config
from posttrain.model.adapter import Lora
from posttrain.model.fused_cuda import has_liger
from posttrain.model.load import read_config
from posttrain.model.quantize import quantization_of
from posttrain.model.skeleton import count_adapter, count_weights, lora_of, skeleton
from posttrain.objectives.dpo import DpoLoss
from posttrain.training.engine_setup import read_json, read_settings, wants_fsdp
from posttrain.training.forecast import by_phase, forecast, peak_bytes
from posttrain.training.forecast_run import ALWAYS, TRAINING, Engine, Item, Load, Rollout, Run, Shape
from posttrain.training.resolve import GPU_FORWARD_TOKENS, resolve
from posttrain.training.resolve_context import row_tokens
from posttrain.training.resolve_ppo import in_turn, pass_tokens, resolve_ppo
from posttrain.types import UserError

PHASES = {
    "start": "start: the packing proof",
    "rollout": "sampling answers",
    "backward": "forward and backward",
    "step": "the optimizer's step",
}
NOT_COUNTED = (
    "not counted: the interpreter and its libraries, a GPU's context (0.3 to 0.6 GiB a process) and communication buffers, free memory that"
    " an allocator holds back, and what loading takes for a moment"
)
ON_CPU = "on a CPU glibc holds back much of what is freed; MALLOC_MMAP_THRESHOLD_=131072 in the environment returns it: docs/results/plan.md"


def run(config: Config) -> None:
    """Print the table of a stage's run, its total, and whether it fits."""
    quiet_libraries()
    wanted = config.group(flags.PlanFlags)
    if wanted.num_processes < 1:
        raise UserError(f"--num_processes {wanted.num_processes}: must be at least 1")
    planned, cpu = resolved(config, wanted)
    what = describe(planned, wanted, cpu)
    items = forecast(what)
    print(heading(planned, what))
    print(table(items))
    print(totals(items, wanted.device_memory_gib))
    print(NOT_COUNTED)
    if cpu:
        print(ON_CPU)


# --- from flags to numbers ---------------------------------------------------------------------------------------------------


def resolved(config: Config, wanted: flags.PlanFlags) -> tuple[Config, bool]:
    """(the flags as the stage would fill them in, whether it runs on a CPU). Data need not be there, nor the engine's package."""
    cpu = wanted.device == "cpu" or (wanted.device == "auto" and (config["use_cpu"] or not torch.accelerator.is_available()))
    ppo = config.command == "ppo"
    if not (config["train_file_dir"] or config["dataset_name"]):
        config = config.replace("train_file_dir", "data")
    engine = {name: config[name] for name in ("deepspeed", "fsdp") if name in config.values}
    for name in engine:
        config = config.replace(name, None)
    if ppo and not (config["reward_adapter"] or config["reward_model_name_or_path"] or config["reward_func"]):
        config = config.replace("reward_func", "rewards.py:score")
    if config["forward_tokens"] < 0 and not cpu:
        config = config.replace("forward_tokens", GPU_FORWARD_TOKENS)
    known = resolve_ppo(config) if ppo else resolve(config)
    half = config["bf16"] if config.given("bf16") else not (not ppo and config["fp16"])
    if not cpu and config["dtype"] != "float32":  # of any GPU of these years, whatever this machine has
        known = known.replace("bf16", half)
        if config["dtype"] == "auto":
            known = known.replace("dtype", "bfloat16" if half and config["use_peft"] else "float32")
    for name, value in engine.items():
        known = known.replace(name, value)
    return known, cpu


def describe(config: Config, wanted: flags.PlanFlags, cpu: bool) -> Run:
    """All numbers of the arithmetic."""
    shape = shape_of(config)
    ppo = config.command == "ppo"
    quantised = quantization_of(config["load_in_4bit"], config["load_in_8bit"], double=config["qlora"])
    stored = 4 if config["dtype"] == "float32" else 2
    half = config["bf16"] or (not ppo and config["fp16"])
    load = load_of(config, wanted)
    run = Run(
        config.command, shape, load, engine_of(config, wanted.num_processes), stored, 2 if half else stored,  # type: ignore[arg-type]
        bits=int(quantised[0]) if quantised else None, double=bool(config["qlora"]),
        optimizer="adamw_torch" if ppo else str(config["optim"]), cpu=cpu,
        packed=config["padding_free"], fused=cpu and config["fused"],
        liger=not cpu and config["fused"] and has_liger(),
    )  # fmt: skip
    return with_roles(config, run, wanted.num_processes) if ppo else run


def with_roles(config: Config, run: Run, world: int) -> Run:
    """What PPO has beside the policy."""
    lora, kl = run.lora, config["init_kl_coef"] > 0
    rows = min(ROLLOUT_ROWS, max(1, config["rollout_batch_size"] // world) * config["num_generations"])
    reward = 0
    if config["reward_model_name_or_path"]:
        code = config["trust_remote_code"]
        counts = count_weights(skeleton(read_config(config["reward_model_name_or_path"], code, score_head=True), code))
        reward = counts.weights - counts.head
    value_layers, kept = config["value_layers"] or None, 0
    if value_layers and in_turn(config, world):
        kept = config["rollout_batch_size"] * (
            config["max_source_length"] + config["num_generations"] * config["max_target_length"]
        )
    return dataclasses.replace(
        run, rollout=Rollout(rows, row_tokens(config), kept), value_layers=value_layers, value_model=config["value_sharing"] == "adapter",
        frozen_copies=int(kl and not lora), reward_weights=reward,
        frozen_adapters=int(lora and bool(config["reward_adapter"])) + int(lora and kl and bool(config["peft_path"])),
    )  # fmt: skip


def shape_of(config: Config) -> Shape:
    """The model's shape, from its config and a skeleton on the meta device."""
    code = config["trust_remote_code"]
    known = read_config(config["model_name_or_path"], code, config["model_revision"] or "main")
    model = skeleton(known, code)
    counts = count_weights(model)
    text = known.get_text_config()
    adapter = ranks = 0
    if config["use_peft"]:
        a = config.group(flags.AdapterFlags)
        lora = Lora(a.lora_rank, a.lora_alpha, a.lora_dropout, a.target_modules, a.modules_to_save, a.use_rslora, a.use_dora)
        adapter, ranks = count_adapter(model, lora_of(a.peft_path) if a.peft_path else lora)
    heads = text.num_attention_heads
    without_head = counts.head if config.command == "rm" else 0
    experts = getattr(text, "num_experts_per_tok", None)
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return Shape(
        layers=text.num_hidden_layers, hidden=text.hidden_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=width * (experts or 1), vocabulary=text.vocab_size,
        weights=counts.weights - without_head, linear_weights=counts.linear, attention_weights=counts.attention,
        layer_weights=counts.layer, tied=counts.head == 0, adapter_weights=adapter, adapter_columns=ranks // text.num_hidden_layers,
    )  # fmt: skip


def load_of(config: Config, wanted: flags.PlanFlags) -> Load:
    """The largest part that is computed at once, rows as long as the flags allow."""
    stage = config.command
    pairs, ppo = stage in ("rm", "dpo"), stage == "ppo"
    limit = pass_tokens(config, wanted.num_processes) if ppo else config["forward_tokens"]
    if wanted.example_tokens is not None and (pairs or ppo):
        raise UserError(f"--example_tokens is for pt and sft; in {stage} say --max_source_length and --max_target_length")
    if pairs or ppo:
        prompt, answer = config["max_source_length"], config["max_target_length"]
        answers = config["num_generations"] if ppo else 2
        if pairs and not (config["prefix_sharing"] and config["padding_free"]):
            unit: tuple[tuple[int, int], ...] = ((prompt + answer, 0),) * 2
        else:
            unit = ((prompt, 0), *((answer, prompt),) * answers)
        targets = answers * answer
        n_units = (
            max(1, config["mini_batch_size"] // answers // wanted.num_processes) if ppo else config["per_device_train_batch_size"]
        )
    else:
        longest = row_tokens(config)
        packed = config["padding_free"] and (stage == "pt" or config["packing"])
        example = min(wanted.example_tokens or longest, longest)
        unit = ((example, 0),)
        rows = config["per_device_train_batch_size"]
        n_units, targets = rows * max(1, longest // example) if packed else rows, example
    size = sum(queries for queries, _ in unit)
    # Cut between examples of any length, a part is as large as the limit; one example that is longer stays whole.
    tokens = min(n_units * size, max(limit, size)) if limit and config["padding_free"] else n_units * size
    parts = -(-n_units * size // tokens) * (1 if ppo else config["gradient_accumulation_steps"])
    checkpointing = bool(config["gradient_checkpointing"])
    # Parts of all rows come by in every epoch, and in the reference pass of dpo; ppo measures its parts before it trains on them.
    many = config["max_steps"] < 1 or (stage == "dpo" and DpoLoss(config["loss_type"]).needs_reference)
    lengths = None if many else config["max_steps"] * (parts + ppo)
    return Load(tokens, targets * tokens // size, parts, unit * max(1, tokens // size), checkpointing, lengths)


def engine_of(config: Config, world: int) -> Engine:
    """The engine that the flags choose. Raises UserError for a file that cannot be read."""
    deepspeed, fsdp = _given(config, "deepspeed"), _given(config, "fsdp")
    if deepspeed:
        zero = read_settings(deepspeed).get("zero_optimization") or {}
        stage = int(zero.get("stage", 0))
        offload = [((zero.get(name) or {}).get("device") or "none") != "none" for name in ("offload_optimizer", "offload_param")]
        return Engine(f"zero{stage}", world, *offload) if stage else Engine("ddp", world)  # type: ignore[arg-type]
    if wants_fsdp(fsdp):
        given = _given(config, "fsdp_config") or {}
        told = given if isinstance(given, dict) else read_json("--fsdp_config", given)
        settings = {key.removeprefix("fsdp_"): value for key, value in told.items()}
        offload_all = bool(settings.get("cpu_offload")) or "offload" in str(fsdp)
        return Engine("fsdp2", world, offload_all, offload_all)
    return Engine("ddp" if world > 1 else "one", world)


def _given(config: Config, name: str) -> Any:
    """A flag's value, None in a stage that does not have it."""
    return config[name] if name in config.values else None


# --- what is printed ---------------------------------------------------------------------------------------------------------


def heading(config: Config, run: Run) -> str:
    """What is planned, in two lines."""
    engine, load = run.engine, run.load
    how = "LoRA" if run.lora else "all weights"
    if run.bits:
        how = f"LoRA on a base in {run.bits} bits"
    name = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}.get(engine.kind, f"ZeRO-{engine.kind[-1]}")
    place = "CPU" if run.cpu else "GPU"
    products = "float32" if run.compute_bytes == 4 else "bfloat16" if config["bf16"] else "float16"
    return (
        f"posttrain {config.command}, {config['model_name_or_path']}: {how}, {name}, {engine.world} × {place},"
        f" weights {config['dtype']}, products {products}\n"
        f"{load.tokens:,} tokens at once, {load.parts} parts a step and process, checkpointing {'on' if load.checkpointing else 'off'}"
    )


def table(items: list[Item]) -> str:
    """An item a line: name, arithmetic, bytes, GiB, and in which phase where it is not always there."""
    rows = []
    for item in items:
        when = "" if item.phases in (ALWAYS, TRAINING) else ", ".join(item.phases)
        where = "host" if item.host_bytes else when
        size = item.host_bytes or item.size_bytes
        rows.append((item.name, item.how, f"{size:,.0f}", f"{size / 2**30:.3f}", where))
    head = ("item", "arithmetic", "bytes", "GiB", "when")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(5)]
    lines = [
        "  ".join(text.rjust(w) if i in (2, 3) else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def totals(items: list[Item], device_gib: float | None) -> str:
    """The sum of each phase, the largest, and whether it fits."""
    peak = peak_bytes(items)
    lines = [f"{PHASES[phase]}: {size / 2**30:.3f} GiB" for phase, size in by_phase(items).items()]
    lines.append(f"total: {peak:,.0f} bytes, {peak / 2**30:.3f} GiB a device")
    host = sum(item.host_bytes for item in items)
    if host:
        lines.append(f"in the host's memory: {host / 2**30:.3f} GiB a process")
    if device_gib is not None:
        room = device_gib - peak / 2**30
        fits = f"fits, with {room:.2f} GiB to spare" if room >= 0 else f"does not fit: {-room:.2f} GiB too much"
        lines.append(f"in {device_gib:g} GiB: {fits}")
    return "\n".join(lines)
