"""`posttrain plan` end to end: from a config alone, with a stage's own flags, for every stage, method and engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from conftest import ROOT
from posttrain.cli import main

QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and nothing else: no weights, no tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN))
    return folder


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["plan", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def gib(text: str) -> float:
    found = re.search(r"^total: ([\d,]+) bytes", text, re.MULTILINE)
    assert found
    return float(found[1].replace(",", "")) / 2**30


def item(text: str, name: str) -> int:
    """Bytes of a line."""
    found = re.search(rf"^{re.escape(name)}  .*?([\d,]+)  +[\d.]+(  .*)?$", text, re.MULTILINE)
    assert found, text
    return int(found[1].replace(",", ""))


def test_all_weights_by_hand(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5-1.5B has 1,543,714,304 weights: float32 weights, gradients and two states of AdamW each."""
    text = planned(capsys, "sft", "--model_name_or_path", qwen, "--use_peft", "False", "--device", "cuda")
    n = 1_543_714_304
    assert [item(text, name) for name in ("weights", "gradients", "optimizer states")] == [4 * n, 4 * n, 8 * n]


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])
def test_every_stage(stage: str, qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QLoRA < LoRA < all weights, and checkpointing saves."""
    base = (stage, "--model_name_or_path", qwen, "--device", "cuda")
    sizes = [gib(planned(capsys, *base, *more)) for more in (("--qlora", "True"), (), ("--use_peft", "False"))]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]
    assert gib(planned(capsys, *base, "--gradient_checkpointing", "True")) < sizes[1]


def test_engines(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files that ship: what is sharded costs less; offloaded states are the host's."""
    base = ("sft", "--model_name_or_path", qwen, "--device", "cuda", "--use_peft", "False", "--num_processes", 8)
    scripts = [ROOT / "scripts" / f"deepspeed_zero_stage{n}_config.json" for n in (2, 3)]
    ddp, zero2, zero3 = (gib(planned(capsys, *base, *more)) for more in ((), *(("--deepspeed", file) for file in scripts)))
    fsdp = gib(planned(capsys, *base, "--fsdp", "True"))
    assert ddp > zero2 > zero3
    assert fsdp < ddp
    file = tmp_path / "offload.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    text = planned(capsys, *base, "--deepspeed", file)
    assert gib(text) < zero3
    assert "in the host's memory: " in text


def test_no_memory_is_taken_for_weights(qwen: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the model stays on the meta device."""
    from posttrain.commands import plan

    made = []
    skeleton = plan.skeleton

    def spy(*args: object) -> object:
        made.append(skeleton(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(plan, "skeleton", spy)
    planned(capsys, "dpo", "--model_name_or_path", qwen)
    assert made
    assert all(parameter.is_meta for model in made for parameter in model.parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge",), "expected one of pt, sft, rm, ppo, dpo"),
        (("sft", "--deepspeed", "nowhere.json"), "--deepspeed nowhere.json: no such file"),
        (("sft", "--max_target_length", "3"), "--max_target_length is unknown"),
        (("rm", "--example_tokens", "3"), "say --max_source_length"),
        (("sft", "--use_peft", "False", "--qlora", "True"), "quantised weights cannot be trained"),
        (("sft", "--num_processes", "0"), "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str, qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage, *rest = words
    assert main(["plan", stage, "--model_name_or_path", str(qwen), *rest]) == 2
    assert said in capsys.readouterr().err


def test_it_needs_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "--stage" in capsys.readouterr().err
