"""Noise and shifted attention through the command line: exact resume, a clean reference, refusals in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from posttrain.cli import main
from posttrain.model import noise
from posttrain.model.noise import example_lengths
from preference_runs import WEIGHTS, digest, logged, pairs, run, words, write, young_garbage

pytestmark = pytest.mark.usefixtures(young_garbage.__name__)


@pytest.fixture
def chats(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    turns = [
        [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"the fox {i}" + " rests" * (i % 5)}]
        for i in range(17)
    ]
    return {
        "model_name_or_path": model_folder,
        "train_file_dir": write(tmp_path / "chats.jsonl", [{"conversations": t} for t in turns]),
    }


@pytest.fixture
def two_answers(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model_name_or_path": model_folder, "train_file_dir": write(tmp_path / "pairs.jsonl", pairs())}


@pytest.mark.parametrize(
    "flags", [{}, {"gradient_checkpointing": True}, {"padding_free": False}], ids=["packed", "checkpointing", "padded"]
)
def test_noise_is_the_same_after_a_resume(chats: dict[str, Any], tmp_path: Path, flags: dict[str, Any]) -> None:
    common = {**chats, **flags, "neft_alpha": 5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = run("sft", tmp_path / "whole", **common)
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "set-aside")
    before = digest(whole / WEIGHTS[0])
    run("sft", whole, **common, resume_from_checkpoint="True")
    assert digest(whole / WEIGHTS[0]) == before
    assert digest(run("sft", tmp_path / "silent", **{**common, "neft_alpha": 0}) / WEIGHTS[0]) != before


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_noise_with_shifted_attention(
    stage: str, chats: dict[str, Any], two_answers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is scaled by the lengths of whole examples, not by those of the groups."""
    lengths: list[int] = []

    def measured(table: Any, device: Any) -> Any:
        found = example_lengths(table, device)
        lengths.extend(found[0].tolist())
        return found

    monkeypatch.setattr(noise, "example_lengths", measured)
    flags = {**(chats if stage == "sft" else two_answers), "shift_attn": True, "shift_group_tokens": 8}
    silent = run(stage, tmp_path / "silent", **flags, max_steps=1)
    assert not lengths
    noisy = run(stage, tmp_path / "noisy", **flags, max_steps=1, neft_alpha=5)
    assert max(lengths) > 16
    assert logged(noisy, "loss") != logged(silent, "loss")


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_noise_on_pairs(stage: str, two_answers: dict[str, Any], tmp_path: Path) -> None:
    plain, noisy = (run(stage, tmp_path / f"{alpha}", **two_answers, neft_alpha=alpha) for alpha in (0, 5))
    assert logged(plain, "loss")[0] != logged(noisy, "loss")[0]


def test_the_reference_of_dpo_has_no_noise(two_answers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for alpha in (0, 5):
        monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / f"cache-{alpha}"))
        run("dpo", tmp_path / f"dpo-{alpha}", **two_answers, neft_alpha=alpha, max_steps=1)
        (file,) = (tmp_path / f"cache-{alpha}" / "reference").glob("*.safetensors")
        found.append(load_file(file)["logprobs_nats"])
    assert found[0].equal(found[1])


def test_the_reference_of_dpo_is_computed_anew_under_another_scaling(two_answers: dict[str, Any], tmp_path: Path) -> None:
    """Else log-probs of unstretched positions would come from the cache, and the loss would not begin at ln 2."""
    common = {**two_answers, "cache_dir": tmp_path / "cache", "max_steps": 1}
    for kind in (None, "linear", "yarn"):
        out = run("dpo", tmp_path / f"{kind}", **common, rope_scaling=kind, rope_factor=kind and 2)
        assert logged(out, "loss")[0] == pytest.approx(0.693147, abs=1e-5)


def test_shifted_reward_model(two_answers: dict[str, Any], tmp_path: Path) -> None:
    """Shared prompts and prompts of their own give the same groups, so the same loss; groups of another size another."""
    loss = {}
    for group, shared in ((8, True), (8, False), (1000, True)):
        flags = {"shift_attn": True, "shift_group_tokens": group, "prefix_sharing": shared, "max_steps": 1}
        loss[group, shared] = logged(run("rm", tmp_path / f"{group}-{shared}", **two_answers, **flags), "loss")[0]
    plain = logged(run("rm", tmp_path / "plain", **two_answers, max_steps=1), "loss")[0]
    assert loss[8, True] == pytest.approx(loss[8, False], abs=1e-6)
    assert loss[8, True] != loss[1000, True] == plain


def test_a_model_that_cannot_shift_is_refused(
    chats: dict[str, Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = {**chats, "model_name_or_path": tmp_path / "model", "shift_attn": True}
    assert main(words("sft", tmp_path / "out", **flags)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--shift_attn True: cannot be used with this model: Gemma2" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rope_factor": 2}, "--rope_factor does nothing without --rope_scaling"),
        ({"rope_scaling": "linear", "rope_factor": 1}, "--rope_factor 1.0: must be above 1"),
        ({"rope_scaling": "linear"}, "already reads 512 tokens"),
        ({"neft_alpha": -1}, "--neft_alpha -1.0: must be at least 0"),
        ({"shift_group_tokens": 8}, "--shift_group_tokens does nothing without --shift_attn True"),
        ({"shift_attn": True, "shift_group_tokens": 400}, "less than the longest row, 400 tokens"),
        ({"shift_attn": True, "padding_free": False}, "it needs --padding_free True"),
    ],
)
def test_mistakes(
    chats: dict[str, Any], tmp_path: Path, flags: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("sft", tmp_path / "out", **chats, model_max_length=400, **flags)) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
