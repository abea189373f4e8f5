"""rm and dpo through the command line: figures against plain transformers, exact resume, one update however it is cut, mistakes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import ROOT
from posttrain.cli import main
from preference_runs import WEIGHTS, digest, lines, logged, pairs, run, tiny_mixtral, weights, words, write, young_garbage

pytestmark = pytest.mark.usefixtures(young_garbage.__name__)
HELD_OUT = pairs(7, "dog")


@pytest.fixture
def data(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The flags that name model and rows."""
    files = {"train_file_dir": write(tmp_path / "pairs.jsonl", pairs()), "validation_file_dir": tmp_path / "held_out.jsonl"}
    write(tmp_path / "held_out.jsonl", HELD_OUT)
    return {"model_name_or_path": model_folder, **files}


def sequences(tokenizer: Any, answer: str) -> list[tuple[Tensor, int]]:
    """(ids, tokens of the prompt) of the held-out pairs with one of their answers, by the tokenizer's own chat template."""
    found = []
    for row in HELD_OUT:
        asked = [{"role": "user", "content": row["conversations"][0]["value"]}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text)["input_ids"]
        ids = prompt + tokenizer(row[answer])["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        found.append((torch.tensor([ids]), len(prompt)))
    return found


@torch.no_grad()
def scores(model: Any, tokenizer: Any, answer: str) -> Tensor:
    """What transformers' own classifier says of the held-out pairs' answers, one at a time."""
    return torch.stack([model.eval()(input_ids=ids).logits[0, 0] for ids, _ in sequences(tokenizer, answer)])


@torch.no_grad()
def logprobs(model: Any, tokenizer: Any, answer: str) -> list[Tensor]:
    """Log-probs of the tokens of the held-out pairs' answers."""
    found = []
    for ids, start in sequences(tokenizer, answer):
        all_logprobs = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
        found.append(all_logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return found


def in_the_guide(logged: dict[str, Any]) -> bool:
    """Whether docs/preferences.md explains every figure of an evaluation."""
    guide = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    return all(f"`{name.removeprefix('eval_')}`" in guide for name in logged if name.startswith("eval_"))


# --- what a run says, against plain transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_reward_model_figures(use_peft: bool, data: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    out = run("rm", tmp_path / "run", **data, use_peft=use_peft, max_steps=8, per_device_eval_batch_size=2, seed=5)
    # A full run's folder is a model of transformers' own class; an adapter goes on the base with a head, which it brings along.
    model = AutoModelForSequenceClassification.from_pretrained(data["model_name_or_path"] if use_peft else out, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    if use_peft:
        model = PeftModel.from_pretrained(model, out)
    chosen, rejected = scores(model, tokenizer, "chosen"), scores(model, tokenizer, "rejected")
    margin = chosen - rejected
    right = (margin > 0).float()
    longer = torch.tensor([len(c[0][0]) > len(r[0][0]) for c, r in zip(sequences(tokenizer, "chosen"), sequences(tokenizer, "rejected"), strict=True)])  # fmt: skip
    confidence = torch.where(margin > 0, margin, -margin).sigmoid()
    bins = [(confidence >= low / 20) & (confidence < (low + 1) / 20) for low in range(10, 20)]
    error = sum(abs(float((right[b] - confidence[b]).sum())) for b in bins) / len(margin)
    expected = {
        "loss": float(-margin.sigmoid().log().mean()), "accuracy": float(right.mean()), "margin": float(margin.mean()),
        "score_chosen": float(chosen.mean()), "score_rejected": float(rejected.mean()),
        "accuracy_chosen_longer": float(right[longer].mean()), "calibration_error": error,
    }  # fmt: skip
    assert 0 < int(longer.sum()) < len(longer)
    got = lines(out)[-1]
    assert {f"eval_{name}" for name in expected} | {"eval_accuracy_chosen_shorter", "step", "epoch"} == got.keys()
    assert {name: got[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=2e-6)
    assert in_the_guide(got)
    assert (out / "eval_results.txt").read_text().count("eval_calibration_error = ") == 1


def test_dpo_figures(data: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    out = run("dpo", tmp_path / "run", **data, max_steps=8, beta=0.3, per_device_eval_batch_size=2)
    base = AutoModelForCausalLM.from_pretrained(data["model_name_or_path"])
    before = {answer: logprobs(base, tokenizer, answer) for answer in ("chosen", "rejected")}
    after = {answer: logprobs(PeftModel.from_pretrained(base, out), tokenizer, answer) for answer in before}
    reward = {a: torch.stack([0.3 * (p.sum() - q.sum()) for p, q in zip(after[a], before[a], strict=True)]) for a in before}
    margin = reward["chosen"] - reward["rejected"]
    log_ratio = torch.cat([p - q for a in before for p, q in zip(after[a], before[a], strict=True)])
    expected = {
        "loss": float(-margin.sigmoid().log().mean()), "accuracy": float((margin > 0).float().mean()),
        "reward_margin": float(margin.mean()), "kl_nats": float((log_ratio.exp() - 1 - log_ratio).mean()),
        "nll_chosen_nats": float(torch.stack([-p.mean() for p in after["chosen"]]).mean()),
        "policy_accuracy": sum(
            float(c.mean() > r.mean()) for c, r in zip(after["chosen"], after["rejected"], strict=True)
        ) / len(after["chosen"]),
    }  # fmt: skip
    for answer in before:
        expected[f"reward_{answer}"] = float(reward[answer].mean())
        expected[f"logprob_{answer}_nats"] = float(torch.stack([p.sum() for p in after[answer]]).mean())
    got = lines(out)[-1]
    assert {f"eval_{name}" for name in expected} | {"step", "epoch"} == got.keys()
    assert {name: got[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=2e-5)
    assert abs(expected["reward_margin"]) > 0.05
    assert in_the_guide(got)


@pytest.mark.parametrize(
    ("loss_type", "first"), [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)]
)
def test_first_loss_is_that_of_equal_policies(loss_type: str, first: float, data: dict[str, Any], tmp_path: Path) -> None:
    flags = {"loss_type": loss_type, "label_smoothing": 0.1} if loss_type == "robust" else {"loss_type": loss_type}
    out = run("dpo", tmp_path / "run", **data, max_steps=2, **flags)
    assert logged(out, "loss")[0] == pytest.approx(first, abs=1e-6)
    assert (logged(out, "reward_margin")[0], logged(out, "kl_nats")[0]) == pytest.approx((0, 0), abs=1e-7)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_router_loss_of_experts(stage: str, data: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    runs = {}
    for routed in (True, False):
        folder = tiny_mixtral(tmp_path / f"mixtral-{routed}", tokenizer)
        flags = {**data, "model_name_or_path": folder, "router_aux_loss_coef": None if routed else 0}
        runs[routed] = run(stage, tmp_path / f"run-{routed}", **flags, max_steps=1)
    assert not logged(runs[False], "router_loss")
    for name in ("router_loss", "eval_router_loss"):
        assert logged(runs[True], name)[0] > 0
    gap = logged(runs[True], "loss")[0] - logged(runs[False], "loss")[0]
    assert gap == pytest.approx(logged(runs[True], "router_loss")[0], abs=1e-6)


# --- exact resume, one update ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["rm-lora", "rm-full", "dpo-lora", "dpo-full", "dpo-lora-cache_gone"])
def test_resume_equals_an_uninterrupted_run(
    case: str, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, kind, *gone = case.split("-")
    cache = tmp_path / "cache"
    monkeypatch.setenv("POSTTRAIN_CACHE", str(cache))
    flags = {
        **data, "use_peft": kind == "lora", "lora_dropout": 0.1 if kind == "lora" else None, "max_steps": 7, "logging_steps": 2,
        "save_strategy": None, "save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "eval_steps": 4,
    }  # fmt: skip
    whole = run(stage, tmp_path / "whole", **flags)
    # The interrupted run is one whose later checkpoints are gone; its metrics still hold what came after.
    cut = run(stage, tmp_path / "cut", **flags)
    for step in (6, 7):
        shutil.rmtree(cut / f"checkpoint-{step}")
    if gone:
        shutil.rmtree(cache / "reference")
    capsys.readouterr()
    run(stage, cut, **flags, resume_from_checkpoint="auto")
    assert json.loads((cut / "run.json").read_text())["resumed_from"].endswith("checkpoint-3")
    if stage == "dpo":
        assert ("17 pairs, computed" if gone else "17 pairs, from the cache") in capsys.readouterr().err
    name = WEIGHTS[kind == "full"]
    files = [name, *(f"checkpoint-7/{file}" for file in (name, "optimizer.pt", "scheduler.pt"))]
    assert [digest(whole / file) for file in files] == [digest(cut / file) for file in files]
    assert lines(whole) == lines(cut)
    assert len(logged(cut, "eval_loss")) == 2


@pytest.mark.parametrize("stage", ["rm", "dpo"])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_update_does_not_depend_on_the_cut(stage: str, use_peft: bool, data: dict[str, Any], tmp_path: Path) -> None:
    """17 pairs in steps of 8, so that the third holds one pair. SGD: a gradient of rounding size would flip Adam's first steps."""
    cuts: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8, "forward_tokens": 90},
        {"per_device_train_batch_size": 8, "prefix_sharing": False},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "prefix_sharing": False, "forward_tokens": 90},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": False},
        {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    ]
    flags = {**data, "use_peft": use_peft, "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    runs = [run(stage, tmp_path / str(index), **flags, **cut, audit=False) for index, cut in enumerate(cuts)]
    start = run(stage, tmp_path / "start", **{**flags, "learning_rate": 0}, audit=False)
    first = weights(runs[0])
    assert float((first - weights(start)).abs().max()) > 1e-3
    for other in runs[1:]:
        assert float((weights(other) - first).abs().max()) <= 1e-6
        for name in ("loss", "eval_loss", "eval_accuracy"):
            assert logged(other, name) == pytest.approx(logged(runs[0], name), abs=1e-5)
        # At the first step of dpo the policies are equal, and which answer is ahead is a matter of rounding.
        assert logged(other, "accuracy")[stage == "dpo" :] == logged(runs[0], "accuracy")[stage == "dpo" :]


# --- mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": "the fox"}, "chosen and rejected are equal"),
        ({"rejected": " "}, "empty answer"),
        ({"rejected": None}, "missing: a pair has a chosen and a rejected answer"),
        ({"conversations": []}, "no turns"),
        ({"margin": -1}, "expected a number of at least 0"),
        (
            {"chosen": "the fox rests and rests and rests", "rejected": "the fox rests and rests and sits"},
            "raise --max_target_length",
        ),
        ({"conversations": [{"from": "human", "value": "what " * 60}]}, "more than --max_source_length"),
    ],
)
def test_a_pair_that_cannot_be_used(
    change: dict[str, Any], said: str, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"conversations": [{"from": "human", "value": "what is it?"}], "chosen": "the fox", "rejected": "a dog"}
    write(data["train_file_dir"], [good, {**good, **change}, good])
    for stage in ("rm", "dpo"):
        flags = {**data, "max_target_length": 6, "max_source_length": 60}
        assert main(words(stage, tmp_path / stage, **flags)) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("posttrain: ")
        assert "pairs.jsonl:2:" in line
        assert said in line
        out = run(stage, tmp_path / stage, **flags, bad_rows="skip", max_steps=1)
        ledger = json.loads((out / "ledger.json").read_text())["train"]
        assert (ledger["rows_in"], ledger["trained"], ledger["dropped"]) == (3, 2, 1)
        assert ledger["drops"][0]["source"].endswith("pairs.jsonl:2")


@pytest.mark.parametrize(
    ("stage", "flags", "said"),
    [
        ("dpo", {"label_smoothing": 0.1, "loss_type": "hinge"}, "--label_smoothing does nothing with --loss_type hinge"),
        ("dpo", {"label_smoothing": 0.1, "loss_type": "ipo"}, "--label_smoothing does nothing with --loss_type ipo"),
        ("dpo", {"label_smoothing": 0.1, "loss_type": "orpo"}, "it is for sigmoid, robust, simpo"),
        ("dpo", {"label_smoothing": 0.5}, "--label_smoothing 0.5: must be in [0, 0.5)"),
        ("dpo", {"simpo_gamma": 0.5}, "--simpo_gamma does nothing without --loss_type simpo"),
        ("dpo", {"beta": 0}, "--beta 0.0: must be greater than 0"),
        ("dpo", {"sft_weight": -1}, "--sft_weight -1.0: must be at least 0"),
        ("dpo", {"loss_type": "sigmod"}, "sigmoid"),
        ("rm", {"loss_type": "sigmoid"}, "--loss_type is unknown"),
        ("rm", {"center_rewards_coefficient": -0.1}, "--center_rewards_coefficient -0.1: must be at least 0"),
        ("rm", {"max_source_length": 1}, "--max_source_length 1: must be at least 2 tokens"),
        ("rm", {"max_target_length": 0}, "--max_target_length 0: must be at least 2 tokens"),
        ("rm", {"prefix_sharing": True, "padding_free": False}, "--prefix_sharing does nothing without --padding_free True"),
        ("rm", {"model_max_length": 100}, "--model_max_length"),
        ("dpo", {"metric_for_best_model": "bleu", "eval_steps": 1}, "expected one of"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_act(
    stage: str, flags: dict[str, Any], said: str, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(stage, tmp_path / "run", **data, **flags)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("posttrain: ")
    assert said in line


def test_adapters_of_the_other_kind_are_refused(data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {stage: run(stage, tmp_path / stage, **data, max_steps=1) for stage in ("rm", "dpo")}
    for stage, other, said in (("dpo", "rm", "is the adapter of a reward model"), ("rm", "dpo", "has no score head")):
        assert main(words(stage, tmp_path / "out", **data, peft_path=runs[other])) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_best_reward_model_is_the_most_accurate(data: dict[str, Any], tmp_path: Path) -> None:
    out = run("rm", tmp_path / "run", **data, max_steps=4, eval_steps=1, save_strategy=None, save_steps=1,
              load_best_model_at_end=True, metric_for_best_model="accuracy")  # fmt: skip
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == max(logged(out, "eval_accuracy"))
