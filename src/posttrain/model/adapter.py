"""Attach a new LoRA adapter or resume a saved one: targets, extra trained modules, float32 master weights, identity of the base."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.model import lora_forward
from posttrain.model.adapter_file import RUNS_CODE, check_weights_there, layers_by_name, names_single_experts
from posttrain.model.quantize import check_experts, check_trainable
from posttrain.model.reward import HEAD, has_score_head, score_head
from posttrain.model.rope import RopeScaling, rope_scaling
from posttrain.model.shards import heads, stored_fingerprint, update_fingerprint
from posttrain.types import UserError

logger = logging.getLogger(__name__)

# Leaf names that 'all' leaves alone: heads are trained whole or not at all, and a router that moves makes experts collapse.
HEAD_NAMES = {"lm_head", "output_layer", "score", "v_head", "classifier"}  # output_layer: ChatGLM, which does not say where it is
ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}
LACKS_WEIGHTS = "Found missing adapter keys"  # how peft's warning begins
# Keys inside the adapter config's `auto_mapping`, which peft keeps and does not read.
FINGERPRINT, ROPE = "base_fingerprint", "rope_scaling"


@dataclass(frozen=True)
class Lora:
    """Settings of a new adapter. `target_modules` is "all" or comma-separated names; the update is alpha/rank · B·A·x."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str = "all"
    modules_to_save: str | None = None
    rslora: bool = False  # alpha/√rank (arXiv 2312.03732)
    dora: bool = False  # weight-decomposed (arXiv 2402.09353)


def attach_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Freeze the model and add a trainable adapter; a reward model's head is trained whole beside it.

    Raises UserError for names that the model does not have.
    """
    saved = _names(lora.modules_to_save)
    check_experts(model, _names(lora.target_modules))
    modules, parameters = _targets(model, lora.target_modules)
    _check_names("--modules_to_save", saved, {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    check_trainable(model, saved, "--modules_to_save")
    if parameters and lora.dropout:
        raise UserError("--lora_dropout: fused experts take no dropout; set it to 0 or leave the experts out of --target_modules")
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    config = LoraConfig(
        # With SEQ_CLS peft trains the head and saves it with the adapter, and its own classes load both.
        task_type=TaskType.SEQ_CLS if has_score_head(model) else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # A tied pair that is trained stays one tensor, or the merged model would need twice the vocabulary's memory.
        ensure_weight_tying=bool(tied and {"embed_tokens", "lm_head"} & set(saved)),
        auto_mapping={FINGERPRINT: base_fingerprint(model), ROPE: rope_scaling(model.config)},
    )
    with layers_by_name():
        return _ready(get_peft_model(model, config))


def load_adapter(model: PreTrainedModel, path: str, *, trainable: bool = True) -> PeftModel:
    """A saved adapter on its base, to go on training it or to use it; safetensors or the older adapter_model.bin.

    Raises UserError when the folder holds none or when it was trained on another base.
    """
    settings = read_adapter_config(path)
    check_weights_there(path)
    _check_head(model, settings, path)
    check_rope(settings, model, path, scaled_since=True)
    expected = (settings.get("auto_mapping") or {}).get(FINGERPRINT)
    actual = base_fingerprint(model)
    if expected and actual and expected != actual:
        raise UserError(
            f"{path}: was trained on another base ({settings.get('base_model_name_or_path')}) than {model.name_or_path}"
            f" (weights {expected[:8]}, here {actual[:8]})"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", LACKS_WEIGHTS)  # what is not in the file would stay random
            with layers_by_name(unless=names_single_experts(path)):
                adapted = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    except (UserWarning, KeyError) as error:
        first = str(error).split("'")[1]  # both quote the names
        raise UserError(f"{path}: lacks weights of the adapter it describes, the first is {first}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {RUNS_CODE}") from error
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path}: does not fit {model.name_or_path} ({lines[min(1, len(lines) - 1)]})") from error
    return _ready(adapted)


def read_adapter_config(path: str) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises UserError where there is none."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        why = "no adapter_config.json in it, so it is not an adapter folder" if Path(path).is_dir() else "no such adapter folder"
        raise UserError(f"{path}: {why}")
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    return settings


def record_rope(model: PeftModel) -> None:
    """Let a loaded adapter's folder say how rotary positions are stretched from now on: its base's own folder does not."""
    for config in model.peft_config.values():
        config.auto_mapping = {**(config.auto_mapping or {}), ROPE: rope_scaling(model.config)}


def adapter_rope(path: str) -> RopeScaling | None:
    """The RoPE scaling that an adapter was trained under, which its base is to be loaded with; None where there was none.

    It may be that of the base's own config, which `scale_rope` then leaves as it is.
    """
    saved = (read_adapter_config(path).get("auto_mapping") or {}).get(ROPE)
    return RopeScaling(saved["rope_type"], saved["factor"]) if saved else None


def check_rope(settings: dict[str, Any], model: nn.Module, path: str, *, scaled_since: bool = False) -> None:
    """Raises UserError where the model's rotary positions are not those that the adapter was trained under.

    With `scaled_since` a model may be scaled where the adapter's was not. Adapters of other tools do not say, and pass.
    """
    known = settings.get("auto_mapping") or {}
    saved, here = known.get(ROPE), rope_scaling(model.config)
    if ROPE not in known or saved == here or (scaled_since and saved is None):
        return
    words = ["none" if s is None else f"--rope_scaling {s['rope_type']} --rope_factor {s['factor']:g}" for s in (saved, here)]
    raise UserError(f"{path}: was trained under another RoPE scaling ({words[0]}) than the model has ({words[1]})")


def is_reward_adapter(settings: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is that of a reward model's adapter, which holds a score head."""
    return settings.get("task_type") == "SEQ_CLS" or HEAD in (settings.get("modules_to_save") or [])


def base_fingerprint(model: PreTrainedModel) -> str | None:
    """A hash of the base's names, shapes and 64 values of each weight; None where the weights are not at hand (sharded).

    Values are hashed as bfloat16, so that a base read in float32 and in bfloat16 is the same base. Embedding and heads are left
    out: a grown vocabulary does not make another base, and a causal model and the reward model made from it are one. Of a quantised
    model the full weights in its files are hashed.
    """
    if getattr(model, "is_quantized", False):
        return stored_fingerprint(model)
    score = score_head(model) if has_score_head(model) else None
    left_out = heads(model) | ({id(score.weight)} if score is not None else set())
    digest = hashlib.sha256()
    # Adapters that are on the model already leave no trace: neither their own weights nor the level that peft adds to names.
    named = ((name.replace(".base_layer.", "."), p) for name, p in model.named_parameters() if ".lora_" not in name)
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        if id(parameter) in left_out:
            continue
        if parameter.numel() == 0 or parameter.is_meta:
            return None
        update_fingerprint(digest, name, parameter)
    return digest.hexdigest()


def trainable_summary(model: nn.Module) -> str:
    """One line: trainable and total parameters, exact, and the share. Quantised weights are counted as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit weights into a byte.
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / max(total, 1):.3f} %)"


def linear_names(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Full names of the linear layers that 'all' takes, and of those it leaves alone (output head, routers)."""
    head = model.get_output_embeddings()
    taken: list[str] = []
    left: list[str] = []
    for name, module in model.named_modules():
        # Quantised linears of every make have these two attributes; embeddings and norms do not.
        if isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
            leaf = name.rsplit(".", 1)[-1]
            (left if module is head or leaf in HEAD_NAMES | ROUTER_NAMES else taken).append(name)
    return taken, left


def _targets(model: PreTrainedModel, wanted: str) -> tuple[list[str], list[str]]:
    """peft's `target_modules` and `target_parameters` (fused experts, tensors of three axes) for what the user asked."""
    taken, left = linear_names(model)
    experts = sorted({".".join(n.split(".")[-2:]) for n, p in model.named_parameters() if p.ndim == 3 and "expert" in n})
    if wanted == "all":
        if experts:
            logger.info("LoRA on all linear layers; experts and router stay frozen (add them by name: %s)", ", ".join(experts))
        leaves = {name.rsplit(".", 1)[-1] for name in taken}
        ambiguous = leaves & {name.rsplit(".", 1)[-1] for name in left}
        full = [name for name in taken if name.rsplit(".", 1)[-1] in ambiguous]
        return sorted(leaves - ambiguous) + full, []
    names = _names(wanted)
    known = {suffix for name in taken + left for suffix in _suffixes(name)}
    embeddings = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    _check_names(
        "--target_modules", names, known | embeddings | set(experts), {n.rsplit(".", 1)[-1] for n in taken} | set(experts)
    )
    return [n for n in names if n not in experts], [n for n in names if n in experts]


def _names(comma_separated: str | None) -> list[str]:
    return [name.strip() for name in (comma_separated or "").split(",") if name.strip()]


def _suffixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _check_names(flag: str, names: list[str], known: set[str], shown: set[str] | None = None) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, shown or known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise UserError(f"{flag} {name}: the model has no such layer; {hint}it has {', '.join(sorted(shown or known))}")


def _check_head(model: PreTrainedModel, settings: dict[str, Any], path: str) -> None:
    """Raises UserError where only one of model and adapter has a score head."""
    scores = is_reward_adapter(settings)
    if scores and not has_score_head(model):
        raise UserError(f"{path}: is the adapter of a reward model; its score head does not fit a causal language model")
    if has_score_head(model) and not scores:
        raise UserError(f"{path}: has no score head, so it is not the adapter of a reward model")


def _ready(model: PeftModel) -> PeftModel:
    """Trained tensors in float32 whatever the base's type: a bfloat16 weight near 1 cannot take a step below 0.4 %.

    peft does this for the low-rank matrices; `modules_to_save` copies are left in the base's type, so they are raised here, and
    what they give out is brought back to the base's type, which the next layer expects. A score head is in float32 anyway, and
    nothing comes after it.
    """
    lora_forward.install(model)
    for config in model.peft_config.values():
        if config.task_type == TaskType.SEQ_CLS:  # peft has added its own names again, whether the model has them or not
            config.modules_to_save = sorted({*config.modules_to_save} - {"classifier"})
    heads = set(score_head(model).modules()) if has_score_head(model) else set()
    base_dtype = model.dtype
    lower = functools.partial(_lower_output, dtype=base_dtype)
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and module not in heads and base_dtype != torch.float32:
            for copy in copies.values():
                copy.float()
                copy.register_forward_pre_hook(_raise_input)
                copy.register_forward_hook(lower)
    return model


def _raise_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: floating inputs in the type of the module's weight (token ids stay as they are)."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in args)


def _lower_output(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Forward hook: the output in the base's type."""
    return output.to(dtype)
