"""The trainer's promises: one update for every cut, exact evaluation, exact resume, an audit that catches faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from conftest import random_rows, tiny_llama
from posttrain.data.pack import best_fit, collate, collate_padded
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.attention import enable_segments
from posttrain.model.logprobs import install_logprobs
from posttrain.objectives.lm import LanguageModel
from posttrain.training.audit import GradientAudit
from posttrain.training.batches import Groups
from posttrain.training.callbacks import MetricsFile
from posttrain.training.trainer import ObjectiveTrainer, TrainingData
from posttrain.types import UserError

ROWS = random_rows(24)


def make_trainer(
    folder: Path, lora: bool = True, padded: bool = False, groups: Any = None, forward: int = 0, **changes: Any
) -> ObjectiveTrainer:
    model = tiny_llama()
    if lora:
        torch.manual_seed(1)
        model = attach_lora(model, Lora(rank=4, alpha=8, dropout=changes.pop("dropout", 0.0)))
    if not padded:
        assert enable_segments(model).packed
    install_logprobs(model)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "report_to": "none", "remove_unused_columns": False, "logging_nan_inf_filter": False,
        "lr_scheduler_type": "constant", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**settings, **changes})
    data = TrainingData(Groups(ROWS, groups), Groups(random_rows(7, seed=9)), collate_padded if padded else collate, forward)
    trainer = ObjectiveTrainer(model, args, data, LanguageModel(), None)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def weights(trainer: ObjectiveTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("lora", [True, False])
def test_update_does_not_depend_on_the_cut(tmp_path: Path, lora: bool) -> None:
    cuts = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padded": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 8, "forward": 50},
    ]
    # SGD, not Adam: Adam's first steps are signs, and a gradient of rounding size would flip them.
    results, losses = [], []
    for index, cut in enumerate(cuts):
        trainer = make_trainer(tmp_path / str(index), lora, optim="sgd", learning_rate=0.5, **cut)
        before = weights(trainer)
        trainer.train()
        results.append(weights(trainer))
        assert float((results[-1] - before).abs().max()) > 1e-4
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    for result, loss in zip(results[1:], losses[1:], strict=True):
        assert float((result - results[0]).abs().max()) <= 1e-6
        assert loss == pytest.approx(losses[0], abs=1e-6)


def test_update_with_packing_is_that_of_the_same_rows(tmp_path: Path) -> None:
    """A packed row is its examples: one step over all groups equals one step over all examples."""
    groups = best_fit([len(r["input_ids"]) for r in ROWS], 128)
    assert len(groups) < len(ROWS) / 3
    packed = make_trainer(tmp_path / "a", groups=groups, optim="sgd", max_steps=1, per_device_train_batch_size=len(groups))
    apart = make_trainer(tmp_path / "b", optim="sgd", max_steps=1, per_device_train_batch_size=len(ROWS))
    packed.train()
    apart.train()
    assert float((weights(packed) - weights(apart)).abs().max()) <= 1e-6


def test_loss_is_the_mean_over_trained_tokens(tmp_path: Path) -> None:
    """Against transformers' own forward, row by row, with labels."""
    trainer = make_trainer(tmp_path, lora=False)
    total, count = 0.0, 0
    reference = tiny_llama().requires_grad_(False)
    for row in random_rows(7, seed=9):
        ids = torch.tensor([row["input_ids"]])
        logits = reference(input_ids=ids).logits[0, :-1].log_softmax(-1)
        chosen = torch.tensor(row["trained"][1:], dtype=torch.bool)
        total -= float(logits[torch.arange(len(chosen)), ids[0, 1:]][chosen].sum())
        count += int(chosen.sum())
    for batch_rows in (1, 3, 7):
        trainer.args.per_device_eval_batch_size = batch_rows
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / count, abs=1e-6)
        assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_resume_is_exact(tmp_path: Path, lora: bool) -> None:
    """Dropout on, a checkpoint inside an epoch and off the logging grid: weights, optimizer and metrics equal."""
    changes: dict[str, Any] = {"max_steps": 9, "save_steps": 4, "save_strategy": "steps", "logging_steps": 3, "lora": lora}
    changes |= {"dropout": 0.2} if lora else {}
    changes |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.add_callback(MetricsFile(tmp_path / "whole"))
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **changes)
    # What an interrupted run leaves behind: lines beyond its checkpoint.
    (tmp_path / "resumed" / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    resumed.add_callback(MetricsFile(tmp_path / "resumed"))
    torch.manual_seed(12345)  # the generator's state must come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(weights(whole), weights(resumed))
    first, second = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert first.keys() == second.keys()
    for index in first:
        assert all(torch.equal(torch.as_tensor(first[index][k]), torch.as_tensor(second[index][k])) for k in first[index])

    def metrics(folder: str) -> list[dict]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        clock = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
        return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]

    assert metrics("whole") == metrics("resumed")
    assert [line["step"] for line in metrics("whole")] == [3, 6, 9, 9]


def test_not_finite_loss_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite at step 1"):
        trainer.train()


def test_audit_passes_a_sound_run(tmp_path: Path) -> None:
    audit = GradientAudit()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(audit)
    trainer.train()
    assert audit.summary == "gradient audit: 28 of 28 trainable tensors moved, 20 frozen ones did not"


def test_audit_finds_a_tensor_outside_the_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.base_model.model.stray = torch.nn.Parameter(torch.ones(3))
    trainer.add_callback(GradientAudit())
    with pytest.raises(UserError, match=r"1 trainable tensors got no gradient, the first is base_model.model.stray"):
        trainer.train()


def test_audit_finds_a_frozen_tensor_that_moves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    frozen = trainer.model.base_model.model.model.norm.weight

    class Nudge(GradientAudit):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                frozen[5] += 1e-3
            super().on_step_end(*args, **kwargs)

    trainer.add_callback(Nudge())
    with pytest.raises(UserError, match=r"1 frozen tensors moved, the first is base_model.model.model.norm.weight"):
        trainer.train()
