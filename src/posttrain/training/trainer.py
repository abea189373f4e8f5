"""The one trainer of all stages but PPO: transformers' loop with our sums in place of its means."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from posttrain.data.pack import split
from posttrain.data.pack_stream import PackedStream
from posttrain.training.batches import Batches, EpochLoader, Groups, loader, stream_loader
from posttrain.training.engine_setup import fsdp_on_cpu, unfinished, without_tied, write_layout
from posttrain.training.resolve import HELD_OUT_FLAGS
from posttrain.training.resume import follow_schedule
from posttrain.training.sums import Sums, averages
from posttrain.types import Objective, PackedBatch, UserError

SUMS_FILE = "metric_sums.json"
STREAM_FILE = "stream_{}.json"  # by rank


@dataclass(frozen=True)
class TrainingData:
    """The rows to train on and to hold out, and how a list of rows becomes a micro-batch."""

    train: Groups | PackedStream
    held_out: Groups | None
    collate: Callable[[list[dict[str, Any]]], PackedBatch]
    forward_tokens: int = 0  # most tokens of a packed micro-batch that are computed at once; 0: all


def use_callbacks(trainer: Trainer, callbacks: list[TrainerCallback]) -> None:
    """Our callbacks in place of the library's progress bar and printer."""
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    for callback in callbacks:
        trainer.add_callback(callback)


class ObjectiveTrainer(Trainer):
    """transformers' Trainer with an objective as its only stage-specific part: sums in, one exact division per step.

    The gradient of a step is ∇(Σ loss over all its micro-batches and ranks) / Σ weight, so the update does not depend on how
    the step is cut. Logged and evaluated metrics are sums divided once.
    """

    control: Any
    loss_is_scaled_for_ga = True  # we divide by the weight of the whole optimizer step ourselves

    def __init__(self, model: nn.Module, args: TrainingArguments, data: TrainingData, objective: Objective, tokenizer: Any):
        if data.held_out is None and args.eval_strategy != "no":
            raise UserError(f"--eval_strategy {args.eval_strategy.value} needs held-out rows: {HELD_OUT_FLAGS}")
        super().__init__(model=model, args=args, processing_class=tokenizer, train_dataset=data.train, eval_dataset=data.held_out)
        if args.n_gpu > 1:
            raise UserError(f"one process sees {args.n_gpu} GPUs: start one per GPU with torchrun --nproc_per_node {args.n_gpu}")
        self.data, self.objective = data, objective
        # A stream goes on at its own saved place: the library must not read and throw away what came before.
        args.ignore_data_skip = isinstance(data.train, PackedStream)
        self.window = Sums(self._sum_over_ranks)  # since the last log
        self.run = Sums(self._sum_over_ranks)  # since step 0
        self._log_clock = (time.monotonic(), 0.0)

    def create_accelerator_and_postprocess(self) -> None:
        """The library's, which learns of FSDP on a CPU."""
        with fsdp_on_cpu(self.args):
            super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The library's; a package that is missing or a value out of range is told in one line."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"--optim {self.args.optim.value}: {' '.join(str(error).split())}") from error

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The library's; settings that the schedule does not have are told in one line."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except (ValueError, TypeError) as error:
            name, settings = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
            raise UserError(f"--lr_scheduler_type {name} with {settings or {}}: {' '.join(str(error).split())}") from error

    # --- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Shuffled by (data_seed, epoch); the same rows per step for every world size. A stream comes in its own order."""
        if isinstance(self.data.train, PackedStream):
            return stream_loader(self.data.train, self._train_batch_size, self.data.collate, self._pin_memory)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        batches = self._loader(self.data.train, self._train_batch_size, seed, drop_last=self.args.dataloader_drop_last)
        if not len(batches):
            raise UserError(f"--dataloader_drop_last True: {len(self.data.train)} rows do not fill a batch of all processes")
        return batches

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        """In order, every row once."""
        rows = eval_dataset if eval_dataset is not None else self.data.held_out
        if rows is None:
            raise UserError(f"evaluation needs held-out rows: {HELD_OUT_FLAGS}")
        return self._loader(rows, self.args.eval_batch_size, None, drop_last=False)

    def _loader(self, rows: Groups, batch_rows: int, seed: int | None, drop_last: bool) -> EpochLoader:
        args = self.args
        batches = Batches(len(rows), batch_rows, seed=seed, rank=args.process_index, world=args.world_size, drop_last=drop_last)
        return loader(
            rows, batches, self.data.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=self._pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )  # fmt: skip

    @property
    def _pin_memory(self) -> bool:
        return self.args.dataloader_pin_memory and self.args.device.type != "cpu"

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], Tensor]:
        """The micro-batches of one optimizer step and their weight over all ranks."""
        if self.state.global_step >= self.state.max_steps:
            num_batches = 0  # a finished run that is resumed; the library would take a step more
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        weights = [self.objective.weight(batch).to(device) for batch in batches]
        return batches, self._sum_over_ranks(torch.stack(weights).sum() if weights else torch.zeros((), device=device))

    def _prepare_inputs(self, inputs: Any) -> PackedBatch:
        return inputs.to(self.args.device, non_blocking=True)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, in parts of at most `forward_tokens`; gradients are exchanged with the last."""
        parts = self._parts(inputs)
        total = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            alone = index < len(parts) - 1
            with unfinished(self.accelerator, model) if alone else contextlib.nullcontext():
                total += super().training_step(model, part, num_items_in_batch)
        return total

    def _parts(self, batch: PackedBatch) -> list[PackedBatch]:
        return split(batch, self.data.forward_tokens) if self.data.forward_tokens else [batch]

    # --- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """This micro-batch's share of the step's loss."""
        loss = self.objective(model, inputs)
        weight = self.objective.weight(inputs)
        for sums in (self.window, self.run):
            sums.add("loss", loss.total.detach(), weight)
            sums.add("tokens", float(inputs.n_tokens), 0.0)
        for name, (total, count) in loss.metrics.items():
            self.window.add(name, total, count)
        # DDP, FSDP and DeepSpeed average gradients over ranks; multiply that away so the result is sum / step weight.
        return loss.total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor.to(self.args.device), "sum") if self.accelerator.num_processes > 1 else tensor

    # --- log and evaluation -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the window's exact averages in place of the loop's mean of means."""
        if isinstance(self.data.train, PackedStream):
            self.state.epoch = self.state.global_step / self.state.max_steps  # a stream has no epochs: the share of the run
        if "loss" in logs:
            logs = self._train_logs(logs)
        elif "train_loss" in logs:
            logs = self._final_logs(logs)
        super().log(logs, start_time)

    def _train_logs(self, logs: dict[str, float]) -> dict[str, float]:
        totals = self.window.totals()
        self.window.clear()
        tokens = totals.pop("tokens")[0]
        logs = {**logs, **averages(totals)}
        self._check_finite(logs, "loss", "grad_norm")
        now = time.monotonic()
        # Evaluation and saving between two logs are not training time.
        seconds = now - self._log_clock[0] - self._log_clock[1]
        self._log_clock = (now, 0.0)
        logs["tokens"] = self.run.totals()["tokens"][0]
        logs["tokens_per_second"] = tokens / max(seconds, 1e-9)
        return logs

    def _final_logs(self, logs: dict[str, float]) -> dict[str, float]:
        totals = self.run.totals()
        tokens = totals.pop("tokens")[0]
        logs = {name: value for name, value in logs.items() if name != "total_flos"}
        logs = {**logs, "train_loss": averages(totals)["loss"], "train_tokens": tokens}
        self._check_finite(logs, "train_loss")  # the steps behind the last log too, before the weights are saved
        return logs

    def _check_finite(self, logs: dict[str, float], *names: str) -> None:
        if not all(math.isfinite(logs[name]) for name in names if name in logs):
            raise UserError(
                f"the loss or gradient is not finite at step {self.state.global_step} (loss {logs[names[0]]}): lower"
                " --learning_rate, raise --warmup_steps, or use --dtype float32"
            )

    def _off_the_clock(self, since: float) -> None:
        self._log_clock = (self._log_clock[0], self._log_clock[1] + time.monotonic() - since)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Exact averages over the held-out rows, whatever the batch size and the number of ranks, and what the objective derives."""
        began = time.monotonic()
        sums = Sums(self._sum_over_ranks)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        for part in (part for batch in self.get_eval_dataloader(eval_dataset) for part in self._parts(batch)):
            inputs = self._prepare_inputs(part)
            with self.compute_loss_context_manager():
                loss = self.objective(model, inputs)
            sums.add("loss", loss.total, self.objective.weight(inputs))
            for name, (total, count) in loss.metrics.items():
                sums.add(name, total, count)
        model.train(was_training)
        totals = sums.totals()
        metrics = averages(totals) | self.objective.derived(totals)
        metrics["runtime_seconds"] = time.monotonic() - began
        best = self.args.metric_for_best_model
        if best and best.removeprefix("eval_") not in metrics:
            raise UserError(f"--metric_for_best_model {best}: expected one of {', '.join(metrics)}")
        logs = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._off_the_clock(began)
        return logs

    def evaluated_now(self) -> dict[str, float] | None:
        """The metrics of these very weights, where the last evaluation was after the last step."""
        if not self.state.global_step or self.args.load_best_model_at_end:
            return None
        found = [log for log in self.state.log_history if "eval_loss" in log and log["step"] == self.state.global_step]
        return found[-1] if found else None

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began = time.monotonic()
        saved = {"window": self.window.totals(), "run": self.run.totals()}
        if not all(math.isfinite(total) for total, _ in saved["run"].values()):
            raise UserError(f"the loss is not finite by step {self.state.global_step}; no checkpoint is written over a good one")
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.data.train, PackedStream):
            place = json.dumps(self.data.train.state_dict())
            (folder / STREAM_FILE.format(self.args.process_index)).write_text(place, encoding="utf-8")
        if self.args.should_save:
            (folder / SUMS_FILE).write_text(json.dumps(saved), encoding="utf-8")
        write_layout(folder, self.args)
        super()._save_checkpoint(model, trial)  # writes trainer_state.json last: what marks a checkpoint as whole
        self._off_the_clock(began)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, without_tied(self.model, state_dict))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        follow_schedule(self.lr_scheduler, checkpoint, self.state.max_steps)
        sums = Path(checkpoint, SUMS_FILE)
        if sums.is_file() and self.args.process_index == 0:
            saved = json.loads(sums.read_text(encoding="utf-8"))
            self.window.load(saved["window"])
            self.run.load(saved["run"])
        if isinstance(self.data.train, PackedStream):
            place = Path(checkpoint, STREAM_FILE.format(self.args.process_index))
            if not place.is_file():
                raise UserError(
                    f"{checkpoint}: {place.name} is missing: it was saved with fewer processes, or without --streaming"
                )
            self.data.train.load_state_dict(json.loads(place.read_text(encoding="utf-8")))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted per step (the library's formula knows neither LoRA nor packing); the benchmarks count."""
        return 0
