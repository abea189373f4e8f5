"""The reference of dpo: computed once by the policy as it starts, known again by its content, and never a second model."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaModel, PreTrainedModel

from conftest import tiny_llama
from posttrain.training.reference import ReferencePass
from posttrain.training.trainer import ObjectiveTrainer
from preference_runs import logged, pairs, run, weights, write, young_garbage

pytestmark = pytest.mark.usefixtures(young_garbage.__name__)


@pytest.fixture
def data(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The flags that name model and rows."""
    return {"model_name_or_path": model_folder, "train_file_dir": write(tmp_path / "pairs.jsonl", pairs())}


@pytest.fixture
def adapter(data: dict[str, Any], tmp_path: Path) -> Path:
    """An adapter of an SFT run on the chosen answers, trained hard enough to matter."""
    rows = [
        {"conversations": [*row["conversations"], {"from": "gpt", "value": row["chosen"]}]}
        for row in pairs()
    ]  # fmt: skip
    chats = write(tmp_path / "chats.jsonl", rows)
    return run("sft", tmp_path / "sft", **{**data, "train_file_dir": chats}, max_steps=12, learning_rate=0.05)


def said(capsys: pytest.CaptureFixture[str], out: Path, **flags: Any) -> list[str]:
    """Where the reference log-probs of a run came from: a word for the training rows and one for the held-out ones."""
    capsys.readouterr()
    run("dpo", out, **{"max_steps": 1, **flags})
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reference log-probs: ")]
    return [("cache" if "from the cache" in line else "computed") for line in found]


def test_the_reference_is_known_by_its_content(
    data: dict[str, Any], tmp_path: Path, tokenizer: Any, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, tmp_path / "0", **data) == ["computed"]
    assert said(capsys, tmp_path / "1", **data) == ["cache"]
    # What does not change the numbers: how a step is cut, the loss, the adapter that is about to be trained, where the base lies.
    same = {"learning_rate": 1e-3, "loss_type": "ipo", "beta": 1, "lora_rank": 2, "per_device_train_batch_size": 1, "seed": 7}
    assert said(capsys, tmp_path / "2", **data, **same) == ["cache"]
    moved = tmp_path / "moved"
    tiny_llama(vocab=len(tokenizer)).save_pretrained(moved)
    tokenizer.save_pretrained(moved)
    assert said(capsys, tmp_path / "3", **{**data, "model_name_or_path": moved}) == ["cache"]
    # What does: base, adapter, template, rows, lengths, types.
    other = tmp_path / "other"
    tiny_llama(vocab=len(tokenizer), seed=1).save_pretrained(other)
    AutoTokenizer.from_pretrained(data["model_name_or_path"]).save_pretrained(other)
    changes: list[dict[str, Any]] = [
        {"model_name_or_path": other}, {"peft_path": adapter}, {"template_name": "alpaca"}, {"max_target_length": 5},
        {"bf16": True, "dtype": "bfloat16"}, {"train_file_dir": write(tmp_path / "more.jsonl", pairs(18))},
    ]  # fmt: skip
    for index, change in enumerate(changes):
        assert said(capsys, tmp_path / f"a{index}", **{**data, **change}) == ["computed"], change
        assert said(capsys, tmp_path / f"b{index}", **{**data, **change}) == ["cache"], change
    # Held-out rows have their own; these are the training rows again.
    assert said(capsys, tmp_path / "4", **data, validation_file_dir=data["train_file_dir"]) == ["cache", "cache"]


def test_what_is_read_is_what_was_computed(data: dict[str, Any], tmp_path: Path) -> None:
    first, second = (run("dpo", tmp_path / str(n), **data) for n in range(2))
    assert torch.equal(weights(first), weights(second))
    assert logged(first, "loss") == logged(second, "loss")


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_no_second_model_is_ever_there(
    use_peft: bool, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [thing for thing in gc.get_objects() if type(thing) is LlamaModel]
    loads: list[str] = []
    alive: dict[str, list[int]] = {"reference": [], "step": []}
    load, compute, step = PreTrainedModel.from_pretrained.__func__, ReferencePass._compute, ObjectiveTrainer.training_step  # type: ignore[attr-defined]

    def count(where: str) -> None:
        known = {id(thing) for thing in before}
        alive[where].append(sum(type(thing) is LlamaModel and id(thing) not in known for thing in gc.get_objects()))

    def loading(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append(cls.__name__)
        return load(cls, *args, **kwargs)

    def computing(self: Any, *args: Any) -> Any:
        found = compute(self, *args)
        count("reference")
        return found

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        count("step")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
    monkeypatch.setattr(ReferencePass, "_compute", computing)
    monkeypatch.setattr(ObjectiveTrainer, "training_step", stepping)
    run("dpo", tmp_path / "run", **data, use_peft=use_peft)
    assert loads == ["LlamaForCausalLM"]
    assert alive == {"reference": [1], "step": [1, 1, 1]}


def test_an_adapter_to_start_from_is_the_reference(data: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    plain = run("dpo", tmp_path / "plain", **data, max_steps=1)
    out = run("dpo", tmp_path / "run", **data, peft_path=adapter, max_steps=4, warmup_steps=0)
    assert logged(out, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(out, "kl_nats")[0] == pytest.approx(0, abs=1e-7)
    assert logged(out, "logprob_chosen_nats")[0] > logged(plain, "logprob_chosen_nats")[0] + 1  # it learned these answers
    assert logged(out, "loss")[-1] < math.log(2) - 0.03
    assert logged(out, "kl_nats")[-1] > 1e-5
    assert not torch.equal(weights(out), weights(adapter))
    parents = json.loads((out / "run.json").read_text())["parents"]
    assert parents["adapter"]["name"] == str(adapter)


def test_the_reference_has_no_dropout(data: dict[str, Any], tmp_path: Path) -> None:
    """An adapter brings its dropout along; a new one is zero at first and could not show it."""
    adapter = run("dpo", tmp_path / "first", **data, lora_dropout=0.5, learning_rate=0.1)
    held_out = {"validation_file_dir": data["train_file_dir"], "eval_strategy": "steps", "eval_on_start": True}
    out = run("dpo", tmp_path / "second", **data, **held_out, peft_path=adapter)
    assert logged(out, "eval_loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(logged(out, "loss")[0] - math.log(2)) > 1e-4  # in training there is dropout


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_no_reference_where_none_is_needed(
    loss_type: str, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    assert said(capsys, tmp_path / "run", **data, loss_type=loss_type, max_steps=6, warmup_steps=0) == []
    assert not (tmp_path / "cache" / "reference").exists()
    assert not logged(tmp_path / "run", "kl_nats")
    assert logged(tmp_path / "run", "loss")[-1] < logged(tmp_path / "run", "loss")[0] - 0.05
