"""Rows beyond the positions of a model: a line with the remedy, and a refusal where the model has nothing to look up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from posttrain.cli import main
from posttrain.commands import ppo
from posttrain.commands.lengths import has_table
from posttrain.training.engines import TorchEngine
from preference_runs import words, young_garbage

pytestmark = pytest.mark.usefixtures(young_garbage.__name__)
LONG = "the fox rests and rests " * 60  # 480 tokens and more
STAGES = ("pt", "sft", "rm", "dpo", "ppo")
SHORTER = {"pt": "--block_size 512", "sft": "--model_max_length 512"}
OF_PAIRS = "--max_source_length and --max_target_length of 512 together"


def rows(stage: str, long: bool) -> list[dict[str, Any]]:
    """Three rows, of which the second may be long: with its answer, or (ppo) as a prompt."""
    found: list[dict[str, Any]] = []
    for text in ("a dog", LONG * 2 if long else "a fox", "a tree"):
        asked = [{"from": "human", "value": f"what is {text}?"}]
        if stage == "pt":
            found.append({"text": f"the quick brown {text}"})
        elif stage in ("rm", "dpo"):
            found.append({"conversations": asked, "chosen": "the fox rests", "rejected": "a lazy dog"})
        else:
            found.append({"conversations": [*asked, {"from": "gpt", "value": "the fox rests"}]})
    return found


def flags(stage: str, root: Path, model: Path, long: bool = True) -> dict[str, Any]:
    """A short run; the model has 512 positions, the flags allow more."""
    file = root / f"{stage}-{long}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(stage, long)))
    lengths = {"pt": {"block_size": 2000}, "sft": {"model_max_length": 2000}}.get(
        stage, {"max_source_length": 1000, "max_target_length": 24}
    )
    of_ppo = {
        "rollout_batch_size": 3, "mini_batch_size": 3, "logging_steps": None, "per_device_train_batch_size": None, "save_strategy": None,
        "reward_func": f"{Path(__file__).parent.parent / 'ppo_rewards.py'}:vowels",
    }  # fmt: skip
    return {
        "model_name_or_path": model, "train_file_dir": file, "max_steps": 1, "learning_rate": 1e-3, **lengths,
        **(of_ppo if stage == "ppo" else {}),
    }  # fmt: skip


def said(stage: str, out: Path, capsys: pytest.CaptureFixture[str], code: int = 0, **given: Any) -> list[str]:
    """The lines about positions, and the last line of a run that must fail."""
    capsys.readouterr()
    assert main(words(stage, out, **given)) == code
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1:] if code else [line for line in lines if line.startswith("positions: ")]


@pytest.mark.parametrize("stage", STAGES)
def test_long_rows_are_told_with_the_remedy(
    stage: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = said(stage, tmp_path / "long", capsys, **flags(stage, tmp_path, model_folder))
    whose = "prompts with --max_target_length" if stage == "ppo" else "rows"
    assert line.startswith(f"positions: 1 of 3 {whose} are longer than the 512 positions of the model (up to ")
    assert line.endswith(f"or use {SHORTER.get(stage, OF_PAIRS)}")
    assert "--rope_scaling" in line
    assert said(stage, tmp_path / "short", capsys, **flags(stage, tmp_path, model_folder, long=False)) == []
    if stage != "ppo":
        stretched = flags(stage, tmp_path, model_folder) | {"rope_scaling": "yarn", "rope_factor": 4}
        assert said(stage, tmp_path / "stretched", capsys, **stretched) == []
        (line,) = said(stage, tmp_path / "little", capsys, **stretched | {"rope_factor": 1.1})
        assert "the 563 positions" in line
        assert "a larger --rope_factor" in line


def test_answers_count_with_their_prompts(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short prompts, and answers that may be as long as the model reads."""
    given = flags("ppo", tmp_path, model_folder, long=False)
    (line,) = said("ppo", tmp_path / "out", capsys, **given | {"max_source_length": 64, "max_target_length": 512})
    assert line.startswith("positions: 3 of 3 prompts with --max_target_length are longer than the 512 positions")
    assert said("ppo", tmp_path / "fits", capsys, **given | {"max_source_length": 64, "max_target_length": 470}) == []


def test_vllm_is_asked_for_no_more_than_the_model_has(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse to start; rows that need more are refused before."""
    asked: list[int] = []

    def engine(model: Any, adapter: str, base: str, context_tokens: int, **_: Any) -> Any:
        asked.append(context_tokens)
        return TorchEngine(model)

    monkeypatch.setattr(ppo, "VllmEngine", engine)
    given = flags("ppo", tmp_path, model_folder, long=False) | {"rollout_engine": "vllm"}
    assert said("ppo", tmp_path / "short", capsys, **given) == []
    assert said("ppo", tmp_path / "less", capsys, **given | {"max_source_length": 64}) == []
    assert asked == [512, 88]
    (line,) = said("ppo", tmp_path / "long", capsys, code=2, **given | {"max_target_length": 512})
    assert line.endswith(f"and vLLM computes no more: use {OF_PAIRS}")


def test_a_stream_is_taken_by_its_flag(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags("pt", tmp_path, model_folder, long=False) | {"streaming": True}
    (line,) = said("pt", tmp_path / "out", capsys, **given)
    assert "1 of 1 rows are longer than the 512 positions of the model (up to 2,000 tokens)" in line


def test_held_out_rows_count(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags("sft", tmp_path, model_folder, long=False)
    given["validation_file_dir"] = flags("sft", tmp_path, model_folder)["train_file_dir"]
    (line,) = said("sft", tmp_path / "out", capsys, **given)
    assert line.startswith("positions: 1 of 6 rows")


def learned(folder: Path, tokenizer: Any) -> Path:
    """A model whose positions are a table of 512 rows."""
    config: PreTrainedConfig = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_positions_that_are_a_table_end_there(
    stage: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = learned(tmp_path / "gpt2", tokenizer)
    (line,) = said(stage, tmp_path / "long", capsys, code=2, **flags(stage, tmp_path, model))
    assert f"gpt2: 1 of 3 {'prompts with --max_target_length' if stage == 'ppo' else 'rows'} are longer than the 512" in line
    assert line.endswith(f"and it has a table of them and no more: use {SHORTER.get(stage, OF_PAIRS)}")
    assert said(stage, tmp_path / "short", capsys, **flags(stage, tmp_path, model, long=False)) == []


@pytest.mark.parametrize(
    ("family", "expected"), [("gpt2", True), ("opt", True), ("gpt_neox", False), ("bloom", False), ("llama", False)]
)
def test_tables_of_families(family: str, expected: bool) -> None:
    with torch.device("meta"):
        assert has_table(AutoModelForCausalLM.from_config(AutoConfig.for_model(family))) is expected
