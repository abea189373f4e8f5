"""The flags of `transformers.TrainingArguments`, read from its source without importing it (importing loads torch: seconds).

Tables say how we treat the ones that are not simply passed on: RENAMED and OF_COMMAND (old words that keep working), REFUSED and
REFUSED_BY (what would do nothing here, with the reason), and DEFAULTS (values that we set ourselves).
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.types import UserError


@dataclass(frozen=True)
class LibraryFlag:
    """One field of TrainingArguments. `kind` is how its text is read: bool, int, float, list, dict or str."""

    name: str
    kind: str
    default: Any
    help: str


# Old word -> (new word or None, what is said). A None says that nothing is needed any more. A word is looked up here only where
# the command does not have it, and a new word that the command does not have either is looked up in turn.
RENAMED: dict[str, tuple[str | None, str]] = {
    "evaluation_strategy": ("eval_strategy", ""),
    "warmup_ratio": ("warmup_steps", "a value below 1 is a share of all steps"),
    "torch_dtype": ("dtype", ""),
    "no_cuda": ("use_cpu", ""),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", ""),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", ""),
    "model_name": ("model_name_or_path", ""),
    "max_seq_length": ("model_max_length", ""),
    "cutoff_len": ("model_max_length", ""),
    "model_max_length": ("block_size", "in pt, whose rows are pieces of documents"),
    "lora_r": ("lora_rank", ""),
    "base_model_name_or_path": ("base_model", ""),
    "peft_model_path": ("lora_model", ""),
    "eval_batch_size": ("batch_size", ""),
    "single_tune": ("single_turn", ""),
    "from": ("from_stage", ""),
    "lora_target": ("target_modules", ""),
    "neftune_noise_alpha": ("neft_alpha", "the library's noise would take a packed row for one example"),
    "activation_checkpointing": ("gradient_checkpointing", ""),
    "activation_checkpointing_kwargs": ("gradient_checkpointing_kwargs", ""),
    "group_by_length": (None, "rows carry no padding here, so grouping by length has nothing to save"),
    "train_sampling_strategy": (None, "rows carry no padding here; the order is a seeded shuffle"),
    "length_column_name": (None, "rows carry no padding here"),
    "model_type": (None, "outside training it is read from the model's config"),
    "device_map": (None, "models are placed by themselves; training uses several GPUs through torchrun"),
    "use_fast_tokenizer": (None, "transformers 5 has one tokenizer per model and picks it"),
    "ignore_pad_token_for_loss": (None, "padding is never trained on"),
    "keep_linebreaks": (None, "line breaks inside a document are kept"),
    "save_safetensors": (None, "weights are always saved as safetensors"),
    "remove_unused_columns": (None, "the columns of a batch are ours"),
    "min_target_length": (None, "an answer is as long as its row or its stop token says"),
    "packing": (None, "documents of pt are always packed; pairs and prompts carry no padding"),
    "ddp_find_unused_parameters": (None, "every trainable parameter takes part in every step"),
    "past_index": (None, "not used by causal language models"),
    "jit_mode_eval": (None, "removed from transformers"),
    "use_ipex": (None, "removed from transformers"),
}

# The same for words that one command alone answers so; they come first.
_BY_MINI_BATCH = "an optimizer step is --mini_batch_size episodes, and --forward_tokens cuts what is computed at once"
_BY_STEPS = "--save_steps, --eval_steps and --logging_steps say when"
OF_COMMAND: dict[str, dict[str, tuple[str | None, str]]] = {
    "ppo": {
        "batch_size": ("rollout_batch_size", "over all processes"),
        "response_length": ("max_target_length", ""),
        "sft_model_path": ("model_name_or_path", ""),
        "reward_model_path": ("reward_model_name_or_path", ""),
        "do_train": (None, "ppo trains"),
        "do_eval": (None, "held-out prompts are answered every --eval_steps rollouts"),
        "per_device_train_batch_size": (None, _BY_MINI_BATCH),
        "gradient_accumulation_steps": (None, _BY_MINI_BATCH),
        "per_device_eval_batch_size": (None, "held-out prompts are answered as those of training are"),
        "logging_strategy": (None, _BY_STEPS),
        "eval_strategy": (None, _BY_STEPS),
        "save_strategy": (None, _BY_STEPS),
        "logging_first_step": (None, "the first rollout is always logged"),
        "eval_batch_size": (None, "held-out prompts are answered as those of training are"),
        "reward_model_device": (None, "models are placed by themselves"),
    },
    "inference": {"resize_emb": (None, "embeddings get room for the tokenizer's ids by themselves")},
}

# Words of RENAMED that lead nowhere and are said of a model, not of training: any command that loads one takes them.
ABOUT_MODELS = {"model_type", "device_map", "use_fast_tokenizer"}

_OWN_LOSS = "the loss here is a sum over target log-probs divided once by the step's weight"
_EVAL_TYPE = "evaluation computes in the types of training: see --bf16 and --dtype"
_LIGER = (
    "--fused uses its kernels for norms, MLPs and rotary positions where the package is installed, and the fused loss is built in"
)
_COMPILE = "every batch has a length and segments of its own, and the compiler would compile for each of them"
REFUSED: dict[str, str] = {
    "label_smoothing_factor": _OWN_LOSS,
    "average_tokens_across_devices": "always so here: the step is divided by the weight of all ranks",
    "logging_nan_inf_filter": "a non-finite loss is an error here, never filtered",
    "include_num_input_tokens_seen": "always counted: see tokens in metrics.jsonl",
    "prediction_loss_only": "evaluation here returns sums, not predictions",
    "eval_do_concat_batches": "evaluation here returns sums, not predictions",
    "eval_use_gather_object": "evaluation here returns sums, not predictions",
    "eval_accumulation_steps": "evaluation here returns sums, not predictions",
    "include_for_metrics": "evaluation here returns sums, not predictions",
    "batch_eval_metrics": "evaluation here returns sums, not predictions",
    "bf16_full_eval": _EVAL_TYPE,
    "fp16_full_eval": _EVAL_TYPE,
    "do_predict": "use `posttrain generate`",
    "label_names": "the columns of a batch are ours",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "auto_find_batch_size": "it would change the update without a word; lower --per_device_train_batch_size",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_cache": "training never uses the KV cache",
    "parallelism_config": "not supported",
    "local_rank": "read from the environment that torchrun sets",
    "ignore_data_skip": "resume is exact here",
    "restore_callback_states_from_checkpoint": "resume is exact here, and no callback has a state of its own",
    "accelerator_config": "how rows reach the processes is ours, and the rest has flags of its own",
}

_STRETCHED = "the folders of the model and of its adapter say how its positions are stretched: set it in the stages before"
_NO_SHIFT = "the policy would be trained under another attention than its reference"
REFUSED_BY: dict[str, dict[str, str]] = {
    "dpo": {"shift_attn": _NO_SHIFT, "shift_group_tokens": _NO_SHIFT},
    "ppo": {
        "rope_scaling": _STRETCHED,
        "rope_factor": _STRETCHED,
        "neft_alpha": "PPO compares log-probs of two passes, which noise would make differ",
        "router_aux_loss_coef": "the objective of PPO has no term for the router",
        "shift_attn": _NO_SHIFT,
        "shift_group_tokens": _NO_SHIFT,
        "flash_attn": "the kernel is chosen by itself",
        "fsdp_config": "--fsdp True shards every decoder layer by FSDP2, and nothing of it is to be set",
        "fp16": "PPO computes in bfloat16 or float32: --bf16 True or False; --torch_dtype says how weights are stored",
        "total_episodes": "say --max_steps (rollouts) or --num_train_epochs (times every prompt is used)",
    },
}

# Our defaults where the library's do not suit; a flag wins over them.
DEFAULTS: dict[str, Any] = {
    "report_to": ["tensorboard"],
    "logging_steps": 10,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 1.0,
    "dataloader_pin_memory": False,
    "save_strategy": "epoch",
    "do_train": True,
    "do_eval": True,
}

_KINDS = {"bool": "bool", "int": "int", "float": "float", "dict": "dict", "list": "list"}


def _kind(annotation: str) -> str:
    words = annotation.replace("|", " ").replace("[", " ").replace("]", " ").replace(",", " ").split()
    for name in ("dict", "list"):
        if name in words:
            return name
    return next((_KINDS[word] for word in words if word in _KINDS), "str")


def _field(node: ast.AnnAssign) -> LibraryFlag:
    name = node.target.id if isinstance(node.target, ast.Name) else ""
    default: Any = None
    help_text = ""
    if isinstance(node.value, ast.Call):
        for keyword in node.value.keywords:
            if keyword.arg == "default" and isinstance(keyword.value, ast.Constant | ast.UnaryOp):
                default = ast.literal_eval(keyword.value)
            if keyword.arg == "metadata":
                help_text = _metadata_help(keyword.value)
    return LibraryFlag(name, _kind(ast.unparse(node.annotation)), default, help_text)


def _metadata_help(node: ast.expr) -> str:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
                return " ".join(str(value.value).replace("%%", "%").split())
    return ""


@cache
def library_flags() -> dict[str, LibraryFlag]:
    """Every field of the installed TrainingArguments by name, refused ones included. UserError when transformers is missing."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformers is not installed: pip install posttrain installs it")
    source = Path(next(iter(spec.submodule_search_locations)), "training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            fields = [_field(n) for n in node.body if isinstance(n, ast.AnnAssign)]
            return {f.name: f for f in fields if not f.name.startswith("_")}
    raise UserError("this transformers has no TrainingArguments: posttrain needs transformers >= 5.17 and < 6")


def renamed(command: str) -> dict[str, tuple[str | None, str]]:
    """RENAMED as a command has it."""
    return {**RENAMED, **OF_COMMAND.get(command, {})}
