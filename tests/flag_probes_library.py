"""The fields of transformers.TrainingArguments that we accept: which part of the library acts on each, and a value to try.

What a field does is probed in flag_probes_behaviour.py where it can be seen on a CPU without network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Field:
    """`owner`: what acts on the field. `value`: a valid value that is not the default, as typed; `becomes`: as the library has it,
    where that differs. `beside`: flags that the value needs. `unbuilt`: why it cannot be tried on a CPU without network."""

    owner: str
    value: Any = None
    becomes: Any = None
    beside: dict[str, Any] = field(default_factory=dict)
    unbuilt: str = ""


LOOP = "Trainer's training loop"
FLOW = "DefaultFlowCallback (when to log, evaluate, save, stop)"
OPTIMIZER = "Trainer.create_optimizer"
SCHEDULE = "get_scheduler"
LOADER = "our loader (training/batches.py), for torch's DataLoader"
SAVE = "Trainer._save_checkpoint"
BEST = "Trainer._determine_best_metric and _load_best_model"
HUB = "Trainer.init_hf_repo, push_to_hub and _push_from_checkpoint"
LOG = "transformers' loggers (TrainingArguments.get_process_log_level)"
DDP = "accelerate's DistributedDataParallelKwargs"
TRACKIO = "TrackioCallback (--report_to trackio)"
PROCESSES = "needs several processes"

WORKER = {"dataloader_num_workers": 1}
HELD_OUT = {"validation_file_dir": "held_out.jsonl"}

LIBRARY: dict[str, Field] = {
    # How much and how.
    "output_dir": Field("ours (training/artifacts.py) and the checkpoints of " + SAVE, "somewhere"),
    "per_device_train_batch_size": Field(LOADER, 3),
    "num_train_epochs": Field(LOOP, 2.5),
    "max_steps": Field(LOOP + " and " + FLOW, 7),
    "gradient_accumulation_steps": Field(LOOP, 3),
    "do_train": Field("ours (commands/train.py)", False),
    "do_eval": Field("ours (commands/train.py)", False),
    "resume_from_checkpoint": Field(
        "ours (artifacts.find_checkpoint), then Trainer.train", unbuilt="handed to train(), not kept"
    ),
    # Optimizer and schedule.
    "learning_rate": Field(OPTIMIZER, 3e-3),
    "lr_scheduler_type": Field(SCHEDULE, "linear"),
    "lr_scheduler_kwargs": Field(SCHEDULE, '{"num_cycles": 2}', {"num_cycles": 2}),
    "warmup_steps": Field(SCHEDULE, 3),
    "optim": Field(OPTIMIZER, "sgd"),
    "optim_args": Field(OPTIMIZER, "momentum=0.9"),
    "optim_target_modules": Field(OPTIMIZER + ", for GaLore, APOLLO and layer-wise ones", ["q_proj", "v_proj"]),
    "weight_decay": Field(OPTIMIZER, 0.1),
    "adam_beta1": Field(OPTIMIZER, 0.8),
    "adam_beta2": Field(OPTIMIZER, 0.9),
    "adam_epsilon": Field(OPTIMIZER, 1e-6),
    "max_grad_norm": Field("accelerate's clip_grad_norm_", 0.5),
    # Precision and memory.
    "bf16": Field("accelerate's autocast", True),
    "fp16": Field("accelerate's autocast and gradient scaler", unbuilt="refused on a CPU, where the library would ignore it"),
    "tf32": Field("torch's matrix products on CUDA", False),
    "gradient_checkpointing": Field("PreTrainedModel.gradient_checkpointing_enable", True),
    "gradient_checkpointing_kwargs": Field(
        "torch.utils.checkpoint", '{"use_reentrant": false}', {"use_reentrant": False}, {"gradient_checkpointing": True}
    ),
    "torch_empty_cache_steps": Field("Trainer.training_step", 5),
    "use_cpu": Field("TrainingArguments.device", True),
    "full_determinism": Field("enable_full_determinism, when the Trainer is made", True),
    "seed": Field("ours (adapter, split, order) and the Trainer's set_seed", 7),
    "data_seed": Field("ours (the order of rows: training/batches.py, data/stream.py)", 7),
    # Loading.
    "dataloader_drop_last": Field(LOADER, True),
    "dataloader_num_workers": Field(LOADER, 2),
    "dataloader_pin_memory": Field(LOADER, unbuilt="the library turns it off on a CPU"),
    "dataloader_persistent_workers": Field(LOADER, True, beside=WORKER),
    "dataloader_prefetch_factor": Field(LOADER, 3, beside=WORKER),
    "dataloader_multiprocessing_context": Field(LOADER, "spawn", beside=WORKER),
    "dataloader_in_order": Field(LOADER, False),
    # Logging.
    "logging_strategy": Field(FLOW, "epoch"),
    "logging_steps": Field(FLOW, 3),
    "logging_first_step": Field(FLOW, True),
    "log_level": Field(LOG, "info"),
    "log_level_replica": Field(LOG + " of other ranks", "error"),
    "log_on_each_node": Field(LOG + " of other nodes", False),
    "disable_tqdm": Field("ours (training/callbacks.py)", False),
    "skip_memory_metrics": Field("TrainerMemoryTracker", False),
    "debug": Field("DebugUnderflowOverflow", "underflow_overflow", ["underflow_overflow"]),
    "report_to": Field("the integrations' callbacks", "none", []),
    "run_name": Field("callbacks of wandb, mlflow, comet, swanlab, trackio", "first"),
    "project": Field(TRACKIO, "foxes"),
    "trackio_space_id": Field(TRACKIO, "a/b"),
    "trackio_bucket_id": Field(TRACKIO, "a/b"),
    "trackio_static_space_id": Field(TRACKIO, "a/b"),
    # Evaluation.
    "eval_strategy": Field(FLOW, "epoch", beside=HELD_OUT),
    "eval_steps": Field(FLOW, 7, beside=HELD_OUT),
    "eval_delay": Field(FLOW, 2, beside={**HELD_OUT, "eval_strategy": "epoch"}),
    "eval_on_start": Field(LOOP, True, beside={**HELD_OUT, "eval_strategy": "epoch"}),
    "per_device_eval_batch_size": Field(LOADER, 3, beside=HELD_OUT),
    # Saving.
    "save_strategy": Field(FLOW, "steps"),
    "save_steps": Field(FLOW, 7),
    "save_total_limit": Field(SAVE, 2),
    "save_only_model": Field(SAVE, True),
    "save_on_each_node": Field("TrainingArguments.should_save, on other nodes", True),
    "enable_jit_checkpoint": Field("JITCheckpointCallback", True),
    "load_best_model_at_end": Field(BEST, True, beside={**HELD_OUT, "eval_strategy": "epoch"}),
    "metric_for_best_model": Field(BEST, "perplexity", beside=HELD_OUT),
    "greater_is_better": Field(BEST, True, beside={**HELD_OUT, "metric_for_best_model": "loss"}),
    # The hub.
    "push_to_hub": Field(HUB, True),
    "hub_token": Field(HUB, "secret"),
    "hub_private_repo": Field(HUB, True),
    "hub_model_id": Field(HUB, "a/b"),
    "hub_strategy": Field(HUB, "end"),
    "hub_always_push": Field(HUB, True),
    "hub_revision": Field(HUB, "next"),
    # Several processes.
    "ddp_bucket_cap_mb": Field(DDP, 50),
    "ddp_broadcast_buffers": Field(DDP, False),
    "ddp_static_graph": Field(DDP, True),
    "ddp_backend": Field("torch.distributed's process group", unbuilt=PROCESSES),
    "ddp_timeout": Field("torch.distributed's process group", 60),
    "fsdp": Field("accelerate's FullyShardedDataParallelPlugin", unbuilt=PROCESSES),
    "fsdp_config": Field("accelerate's FullyShardedDataParallelPlugin", unbuilt=PROCESSES),
    "deepspeed": Field("accelerate's DeepSpeedPlugin", unbuilt="needs the package deepspeed and a GPU"),
}
