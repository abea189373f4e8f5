"""Losses, gradients and metrics beside TRL's own code, called unbound on a tiny llama with what its trainers would hold as `self`.

TRL averages over pairs, we sum: its numbers times the number of pairs are ours. Two differences are its own and stated at their test: its
ORPO takes the negative log-likelihood over the prompt too, and its SFT terms average over the tokens of the batch instead of each pair's.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_llama
from pair_rows import random_pairs
from posttrain.data.pack_pairs import REFERENCES, collate_pairs
from posttrain.model.attention import enable_segments
from posttrain.model.logprobs import install_logprobs
from posttrain.model.reward import install_scores
from posttrain.objectives.dpo import DpoLoss, Preference
from posttrain.objectives.reward import Reward
from posttrain.types import Loss, PackedBatch

trl = pytest.importorskip("trl", reason="TRL is the oracle here: pip install trl==1.16.0")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"written against the methods of TRL 1.16, not {trl.__version__}", allow_module_level=True)

from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer import dpo_trainer, reward_trainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

VOCAB = 96
PAD = 0  # the rows hold no token 0
ALONE = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
ROWS = random_pairs(5, seed=11, vocab=VOCAB, prompt=14, answer=9, reference=False)


def llama(seed: int) -> Any:
    """Far from zero, so that log-probabilities differ much between the answers."""
    model = tiny_llama(VOCAB, seed, pad_token_id=PAD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def differentiated(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], n_pairs: int) -> None:
    """Loss and gradients, theirs a mean over the pairs: relative to the loss, and to the gradient of the whole model."""
    assert ours[0] == pytest.approx(theirs[0] * n_pairs, rel=2e-6, abs=2e-6)
    assert ours[1].keys() == theirs[1].keys()
    whole = torch.stack([gradient.norm() for gradient in theirs[1].values()]).norm() * n_pairs
    assert whole > 0
    for name, gradient in theirs[1].items():
        assert float((ours[1][name] - gradient * n_pairs).norm() / whole) <= 3e-6, name


# ---------------------------------------------------------------- DPO


def preferred(rows: list[dict[str, Any]], policy: nn.Module, reference: nn.Module | None) -> tuple[nn.Module, PackedBatch]:
    """Our model and batch: segments, a prompt shared by its answers, reference log-probabilities as columns (0 without a reference)."""
    model = copy.deepcopy(policy)
    for each in (model, reference):
        if each is not None:
            assert enable_segments(each).packed
            install_logprobs(each)
    batch = collate_pairs(rows)
    known_N = torch.zeros(len(batch.targets_N))
    if reference is not None:
        with torch.no_grad():
            known_N = reference(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N).logprobs_N
    parts = iter(known_N.split(torch.bincount(batch.sequence_N).tolist()))
    return model, collate_pairs([{**row, **{name: next(parts).tolist() for name in REFERENCES}} for row in rows])


def trl_dpo(
    rows: list[dict[str, Any]], policy: nn.Module, reference: nn.Module, objective: Preference
) -> tuple[Tensor, nn.Module, dict[str, float]]:
    """The loss of DPOTrainer, its model and its metrics. `objective` names loss, beta and smoothing; its SFT weight adds TRL's `sft`."""
    model, reference = copy.deepcopy(policy).train(), copy.deepcopy(reference)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_fused_lm_head(reference)
    sft = [("sft", objective.sft_weight)] if objective.sft_weight else []
    names, weights = zip((objective.loss.value, 1.0), *sft, strict=True)
    trainer = SimpleNamespace(
        model=model, ref_model=reference, accelerator=ALONE, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=objective.beta, label_smoothing=objective.label_smoothing, loss_types=names, loss_weights=weights,
        f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = dpo_trainer.DataCollatorForPreference(pad_token_id=PAD)(rows)
    trainer._compute_loss = dpo_trainer.DPOTrainer._compute_loss.__get__(trainer)
    loss = dpo_trainer.DPOTrainer.compute_loss(trainer, model, inputs)
    return loss, model, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(
    "objective",
    [
        Preference(DpoLoss.SIGMOID),
        Preference(DpoLoss.SIGMOID, beta=0.5),
        Preference(DpoLoss.HINGE, beta=0.02),
        Preference(DpoLoss.HINGE, beta=0.5),
        Preference(DpoLoss.IPO, beta=0.1),
        Preference(DpoLoss.IPO, beta=0.6),
        Preference(DpoLoss.ROBUST, beta=0.1, label_smoothing=0.2),
        Preference(DpoLoss.ROBUST, beta=0.3, label_smoothing=0.0),
    ],
    ids=str,
)
def test_dpo(objective: Preference) -> None:
    policy, reference = llama(0), llama(1)
    loss, model, metrics = trl_dpo(ROWS, policy, reference, objective)
    theirs = differentiated(model, loss)
    model, batch = preferred(ROWS, policy, reference)
    result = objective(model, batch)
    assert_same(differentiated(model, result.total), theirs, len(ROWS))
    if not objective.loss.averages_length:  # for IPO TRL reports rewards by sums although its loss compares means
        compare(result, metrics, {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected"})
        compare(result, metrics, {"reward_margin": "rewards/margins", "accuracy": "rewards/accuracies"})
    compare(result, metrics, {"logprob_chosen_nats": "logps/chosen", "logprob_rejected_nats": "logps/rejected"})


def compare(result: Loss, theirs: dict[str, float], names: dict[str, str]) -> None:
    for ours, name in names.items():
        total, count = result.metrics[ours]
        assert float(total / count) == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), ours


@pytest.mark.parametrize("row", ROWS[:2], ids=lambda row: row["source"])
def test_sft_term(row: dict[str, Any]) -> None:
    """Of a single pair, where the mean over the batch's chosen tokens is the mean over the pair's."""
    policy, reference = llama(0), llama(1)
    objective = Preference(DpoLoss.SIGMOID, beta=0.1, sft_weight=0.7)
    loss, model, _ = trl_dpo([row], policy, reference, objective)
    theirs = differentiated(model, loss)
    model, batch = preferred([row], policy, reference)
    assert_same(differentiated(model, objective(model, batch).total), theirs, 1)


# ---------------------------------------------------------------- SimPO and ORPO, which TRL keeps in trainers of their own


def labelled(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The batch that their tokenisation and collation give: whole sequences, labels −100 on prompt and padding."""
    batch: dict[str, Tensor] = {}
    for name in ("chosen", "rejected"):
        ids = [torch.tensor(row["prompt_ids"] + row[f"{name}_ids"]) for row in rows]
        labels = [torch.tensor([-100] * len(row["prompt_ids"]) + row[f"{name}_ids"]) for row in rows]
        padded = [(ids, PAD, "input_ids"), ([torch.ones_like(x) for x in ids], 0, "attention_mask"), (labels, -100, "labels")]
        for tensors, value, key in padded:
            batch[f"{name}_{key}"] = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return batch


def stand_in(trainer: type, **settings: Any) -> Any:
    """A `self` for CPOTrainer's and ORPOTrainer's methods."""
    made = SimpleNamespace(
        accelerator=ALONE, is_encoder_decoder=False, pad_token_id=PAD, padding_value=PAD, aux_loss_enabled=False
    )
    for name in ("concatenated_forward", "get_batch_loss_metrics", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(made, name, getattr(trainer, name).__get__(made))
    made.concatenated_inputs, made.get_batch_logps = trainer.concatenated_inputs, trainer.get_batch_logps  # type: ignore[attr-defined]
    vars(made).update(settings)
    return made


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("simpo", Preference(DpoLoss.SIMPO, beta=2.0, simpo_gamma=1.0)),
        ("simpo", Preference(DpoLoss.SIMPO, beta=0.7, simpo_gamma=0.3, label_smoothing=0.15)),
        ("sigmoid", Preference(DpoLoss.SIGMOID, beta=0.1, label_smoothing=0.25)),
    ],
    ids=str,
)
def test_cpo(loss_type: str, objective: Preference) -> None:
    """SimPO; and label smoothing of sigmoid, which TRL has in this trainer only, so against a reference of log-probability 0."""
    policy = llama(0)
    theirs_model = copy.deepcopy(policy).train()
    trainer = stand_in(
        CPOTrainer, loss_type=loss_type, beta=objective.beta, simpo_gamma=objective.simpo_gamma,
        label_smoothing=objective.label_smoothing, cpo_alpha=0.0, alpha=0.0,
    )  # fmt: skip
    loss, metrics = trainer.get_batch_loss_metrics(theirs_model, labelled(ROWS))
    theirs = differentiated(theirs_model, loss)
    model, batch = preferred(ROWS, policy, None)
    result = objective(model, batch)
    assert_same(differentiated(model, result.total), theirs, len(ROWS))
    compare(
        result, metrics, {"reward_chosen": "rewards/chosen", "reward_margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    )


@pytest.mark.parametrize("beta", [0.1, 0.8])
def test_orpo_odds_ratio(beta: float) -> None:
    """The odds-ratio part alone, for TRL's likelihood part runs over the prompt: ours is taken off with an SFT weight of −1."""
    policy = llama(0)
    theirs_model = copy.deepcopy(policy).train()
    trainer = stand_in(ORPOTrainer, beta=beta)
    chosen, rejected, *_ = trainer.concatenated_forward(theirs_model, labelled(ROWS))
    theirs = differentiated(theirs_model, -trainer.odds_ratio_loss(chosen, rejected)[0].mean())
    model, batch = preferred(ROWS, policy, None)
    result = Preference(DpoLoss.ORPO, beta=beta, sft_weight=-1.0)(model, batch)
    assert_same(differentiated(model, result.total), theirs, len(ROWS))


def test_orpo_whole() -> None:
    """The whole loss where both likelihoods run over the same tokens: one pair, its prompt of one token, which nothing predicts."""
    row = {**ROWS[0], "prompt_ids": [5]}
    policy = llama(0)
    theirs_model = copy.deepcopy(policy).train()
    loss, metrics = stand_in(ORPOTrainer, beta=0.4).get_batch_loss_metrics(theirs_model, labelled([row]))
    theirs = differentiated(theirs_model, loss)
    model, batch = preferred([row], policy, None)
    result = Preference(DpoLoss.ORPO, beta=0.4)(model, batch)
    assert_same(differentiated(model, result.total), theirs, 1)
    compare(
        result, metrics, {"nll_chosen_nats": "nll_loss", "reward_chosen": "rewards/chosen", "reward_margin": "rewards/margins"}
    )


# ---------------------------------------------------------------- reward model


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01, 0.4])
def test_reward_model(center: float | None, with_margin: bool) -> None:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(3)
    policy = LlamaForSequenceClassification(copy.deepcopy(llama(0).config)).float()
    policy.config.num_labels = 1
    policy.score = nn.Linear(policy.config.hidden_size, 1, bias=False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = [{**row, "margin": row["margin"] * with_margin} for row in ROWS]

    theirs_model = copy.deepcopy(policy).train()
    trainer = SimpleNamespace(
        model=theirs_model, accelerator=ALONE, args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    whole = [
        {
            **{k: row["prompt_ids"] + row[k] for k in ("chosen_ids", "rejected_ids")},
            **({"margin": row["margin"]} if with_margin else {}),
        }
        for row in rows
    ]
    inputs = reward_trainer.DataCollatorForPreference(pad_token_id=PAD)(whole)
    assert ("margin" in inputs) == with_margin
    theirs = differentiated(theirs_model, reward_trainer.RewardTrainer.compute_loss(trainer, theirs_model, inputs))

    model = copy.deepcopy(policy)
    assert enable_segments(model).packed
    install_scores(model)
    result = Reward(center or 0.0)(model, collate_pairs(rows))
    assert_same(differentiated(model, result.total), theirs, len(ROWS))
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    compare(result, metrics, {"accuracy": "accuracy", "margin": "margin"})
