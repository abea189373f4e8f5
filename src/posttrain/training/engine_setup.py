"""The sharding engines of the shared trainer: what the library needs to be told so that they run, on a CPU too."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from posttrain.model.attention import unwrap
from posttrain.types import UserError

LAYOUT_FILE = "engine.json"  # in a checkpoint


def engine_arguments(deepspeed: Any, fsdp: Any, on_cpu: bool, timeout_seconds: int) -> dict[str, Any]:
    """Fields of TrainingArguments for the chosen engine. Starts DeepSpeed's communication, which must stand before they are built."""
    if on_cpu:  # the library imports DeepSpeed where it is installed, which looks for an accelerator and tells that it found none
        os.environ["DS_ACCELERATOR"] = "cpu"
    found: dict[str, Any] = {"fsdp": fsdp_argument(fsdp)} if fsdp else {}
    if not (deepspeed or wants_fsdp(fsdp)):
        return found
    if on_cpu and torch.accelerator.is_available():
        engine = "--deepspeed" if deepspeed else "--fsdp"
        raise UserError(f"--use_cpu True with {engine}: the engine takes this machine's accelerator; leave one of the two out")
    if deepspeed:
        start_deepspeed(on_cpu, timeout_seconds)
    return found


def check_engines(deepspeed: Any, fsdp: Any) -> None:
    """Raises UserError for an engine that cannot start: its file, its package, processes to shard over, or another engine beside it."""
    if deepspeed and wants_fsdp(fsdp):
        raise UserError("--deepspeed and --fsdp both shard the model: give one")
    if deepspeed:
        if isinstance(deepspeed, str):
            read_settings(deepspeed)
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError("--deepspeed needs the package: pip install 'posttrain[deepspeed]'")
    for flag, wanted in (("deepspeed", deepspeed), ("fsdp", wants_fsdp(fsdp))):
        if wanted and "WORLD_SIZE" not in os.environ:
            raise UserError(f"--{flag} shards over processes: start them with torchrun --nproc_per_node, also a single one")


def read_settings(file: str) -> dict[str, Any]:
    """The content of a DeepSpeed file. Raises UserError where it is none."""
    settings = read_json("--deepspeed", file)
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed {file}: zero_optimization must be an object with stage 1, 2 or 3")
    return settings


def read_json(flag: str, file: str) -> dict[str, Any]:
    """The object in an engine's file."""
    if not Path(file).is_file():
        raise UserError(f"{flag} {file}: no such file")
    try:
        read = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: cannot be read as JSON ({error})") from error
    if not isinstance(read, dict):
        raise UserError(f"{flag} {file}: expected a JSON object")
    return read


def wants_fsdp(fsdp: Any) -> bool:
    """Whether the flag asks for sharding: True, or the words of the older form (full_shard auto_wrap)."""
    return bool(fsdp) and str(fsdp).lower() != "false"


def fsdp_argument(fsdp: Any) -> Any:
    """The library's value of the flag: a truth value, or the older form as it is."""
    return {"true": True, "false": None}.get(str(fsdp).lower(), fsdp)


def start_deepspeed(on_cpu: bool, timeout_seconds: int) -> None:
    """Connect the processes DeepSpeed's way. Without it the library takes each process for a job of its own on a CPU."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo" if on_cpu else None, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_seconds))


def load_whole(args: TrainingArguments) -> None:
    """Let every process load the whole model, on the host. The library would partition it as it is read (ZeRO-3).

    Then the probes of the model, its adapter, its fingerprint and the reference pass meet plain weights, whatever the engine.
    """
    if args.deepspeed:
        unset_hf_deepspeed_config()


def shard(model: nn.Module, args: TrainingArguments) -> None:
    """The model is ready for its engine. Under ZeRO-3 it is partitioned here, weight by weight, so that no device holds all of it."""
    if not args.deepspeed:
        return
    set_hf_deepspeed_config(args.hf_deepspeed_config)
    if args.hf_deepspeed_config.is_zero3():
        deepspeed: Any = importlib.import_module("deepspeed")
        deepspeed.zero.Init(module=model, config_dict_or_path=args.hf_deepspeed_config.config)


@contextmanager
def fsdp_on_cpu(args: TrainingArguments) -> Iterator[None]:
    """The library makes its accelerator. It knows FSDP on accelerators only, and would train with DDP on a CPU without a word."""
    state = PartialState._shared_state
    if args.fsdp and state.get("distributed_type") is DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU  # from which it goes on to FSDP
    yield
    if args.fsdp and state["distributed_type"] is not DistributedType.FSDP:
        raise RuntimeError(f"--fsdp: the library chose {state['distributed_type']}")


@contextmanager
def unfinished(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A backward pass that is not the last of its micro-batch: gradients are not exchanged, and DeepSpeed, which steps in it, does not."""
    state = accelerator.gradient_state
    last = state.sync_gradients
    state._set_sync_gradients(last and accelerator.distributed_type is not DistributedType.DEEPSPEED)
    with accelerator.no_sync(model) if accelerator.num_processes > 1 else nullcontext():
        yield
    state._set_sync_gradients(last)


def without_tied(model: nn.Module, weights: dict[str, Any] | None) -> dict[str, Any] | None:
    """Gathered weights without the second name of a tied matrix, which gathering gives a copy of its own."""
    if not weights:
        return weights
    tied = getattr(unwrap(model), "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if not (name in tied and tied[name] in weights)}


def check_layout(checkpoint: str | None, args: TrainingArguments) -> None:
    """UserError where the optimizer's state of a checkpoint was written by another engine, which the library would leave out unsaid."""
    if checkpoint is None:
        return
    there, here = _saved_layout(Path(checkpoint)), _layout(args)
    if there != here:
        names = {"plain": "one process or DDP"}
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: was saved by {names.get(there, there)}, and this run is of {names.get(here, here)}:"
            " the optimizer's state does not carry over; go on with the same, or start a new run from its weights"
        )


def write_layout(checkpoint: Path, args: TrainingArguments) -> None:
    """Say in a checkpoint what saves it: a node that shares no file system has the files of its own processes only."""
    if args.local_process_index == 0:
        (checkpoint / LAYOUT_FILE).write_text(json.dumps({"layout": _layout(args)}) + "\n", encoding="utf-8")


def _layout(args: TrainingArguments) -> str:
    if args.deepspeed:
        stage = "ZeRO-3" if args.hf_deepspeed_config.is_zero3() else "ZeRO-1/2"
        return f"DeepSpeed {stage} over {args.world_size} processes"
    return "FSDP" if args.fsdp else "plain"


def _saved_layout(checkpoint: Path) -> str:
    said = checkpoint / LAYOUT_FILE
    if said.is_file():
        return str(json.loads(said.read_text(encoding="utf-8"))["layout"])
    shards = list(checkpoint.glob("global_step*/*_optim_states.pt"))
    if shards:
        stage = "ZeRO-3" if any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")) else "ZeRO-1/2"
        return f"DeepSpeed {stage} over {len(shards)} processes"
    fsdp = any(checkpoint.glob("pytorch_model_fsdp*")) or (checkpoint / "optimizer.bin").is_file()
    return "FSDP" if fsdp else "plain"
