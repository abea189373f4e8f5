"""Stretched positions from training to use: the adapter's folder carries them to merge, generate, chat, score, dpo and further training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.cli import main
from posttrain.commands.inference import answerer_of, load_answerer
from posttrain.commands.score import load_rater
from posttrain.flags import InferenceFlags
from posttrain.model.adapter import load_adapter
from posttrain.model.load import load_model, load_tokenizer
from posttrain.model.reward import load_reward_model
from posttrain.model.rope import RopeScaling
from posttrain.training.reward_sources import check_lineage
from posttrain.types import UserError
from preference_runs import pairs, run, words, write, young_garbage

pytestmark = pytest.mark.usefixtures(young_garbage.__name__)
LONG = torch.arange(4, 304).repeat(3)[None]  # 900 tokens; the model was trained on 512


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rope") / "corpus.txt"
    file.write_text("".join(f"the quick brown fox number {i} jumps over the lazy dog\n\n" for i in range(12)))
    return file


@pytest.fixture(scope="module", params=["linear", "dynamic", "yarn", "llama3"])
def kind(request: Any) -> Any:
    return request.param


@pytest.fixture(scope="module")
def adapter(kind: str, corpus: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of pt under a scaling."""
    out = tmp_path_factory.mktemp("adapter") / "pt"
    files = {"model_name_or_path": model_folder, "train_file_dir": corpus}
    return run("pt", out, **files, rope_scaling=kind, rope_factor=2, learning_rate=0.05)


@pytest.fixture(scope="module")
def expected(kind: Any, adapter: Path, model_folder: Path) -> torch.Tensor:
    """Logits of a long row from base, scaling and adapter, put together here."""
    model = load_model(str(model_folder), "float32", rope=RopeScaling(kind, factor=2))
    return logits(load_adapter(model, str(adapter), trainable=False))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=LONG, use_cache=False).logits
    return found


def test_the_scaling_matters(expected: torch.Tensor, adapter: Path, model_folder: Path, tmp_path: Path) -> None:
    """The adapter as another tool would put it on the base: other logits, so the tests below can fail."""
    from peft import PeftModel

    assert (logits(PeftModel.from_pretrained(load_model(str(model_folder), "float32"), adapter)) - expected).abs().max() > 1e-2


def test_unmerged_answers_are_under_it(expected: torch.Tensor, adapter: Path, model_folder: Path) -> None:
    answerer = load_answerer(str(model_folder), str(adapter), dtype="float32", template_name="vicuna")
    torch.testing.assert_close(logits(answerer.model), expected)
    assert answerer.context_tokens == 1024


def test_merged_folder_carries_it_to_any_loader(
    expected: torch.Tensor, adapter: Path, model_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    assert main(["merge", "--base_model", str(model_folder), "--lora_model", str(adapter), "--output_dir", str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert load_answerer(str(out), dtype="float32", template_name="vicuna").context_tokens == 1024


def test_flags_in_use(
    kind: Any, expected: torch.Tensor, adapter: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base is stretched as training would; an adapter's own scaling may be named again, and no other."""
    load = ["--base_model", str(model_folder), "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "1"]
    rope = InferenceFlags(base_model=str(model_folder), dtype="float32", rope_scaling=kind, rope_factor=2, template_name="vicuna")
    plain = load_answerer(str(model_folder), dtype="float32", template_name="vicuna").model
    stretched = answerer_of(rope).model
    assert torch.equal(logits(stretched), logits(load_model(str(model_folder), "float32", rope=RopeScaling(kind, factor=2))))
    short = torch.arange(4, 104)[None]
    with torch.no_grad():
        same = torch.equal(stretched(input_ids=short).logits, plain(input_ids=short).logits)
    assert same is (kind == "dynamic")
    torch.testing.assert_close(logits(answerer_of(dataclasses.replace(rope, lora_model=str(adapter))).model), expected)
    other = "yarn" if kind == "linear" else "linear"
    assert main(["chat", *load, "--lora_model", str(adapter), "--rope_scaling", other, "--rope_factor", "2"]) == 2
    assert f"--lora_model {adapter} was trained with {kind}, factor 2" in capsys.readouterr().err


def test_training_goes_on_under_it(kind: str, adapter: Path, corpus: Path, model_folder: Path, tmp_path: Path) -> None:
    files = {"model_name_or_path": model_folder, "train_file_dir": corpus, "peft_path": adapter}
    again = run("pt", tmp_path / "again", **files)
    settings = [json.loads((folder / "adapter_config.json").read_text())["auto_mapping"] for folder in (adapter, again)]
    assert settings[0]["rope_scaling"] == settings[1]["rope_scaling"] == {"rope_type": kind, "factor": 2.0}
    other = "yarn" if kind == "linear" else "linear"
    assert main(words("pt", tmp_path / "other", **files, rope_scaling=other)) == 2


def test_an_adapter_from_before_goes_on_under_a_scaling(kind: str, corpus: Path, model_folder: Path, tmp_path: Path) -> None:
    files = {"model_name_or_path": model_folder, "train_file_dir": corpus}
    plain = run("pt", tmp_path / "plain", **files, max_steps=1)
    stretched = run("pt", tmp_path / "stretched", **files, max_steps=1, peft_path=plain, rope_scaling=kind, rope_factor=3)
    mapping = json.loads((stretched / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["rope_scaling"] == {"rope_type": kind, "factor": 3.0}


def test_a_base_without_the_scaling_is_refused(kind: str, adapter: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match=rf"--rope_scaling {kind} --rope_factor 2\) than the model has \(none\)"):
        load_adapter(load_model(str(model_folder), "float32"), str(adapter))


def test_all_weights_keep_it_in_the_config(kind: Any, corpus: Path, model_folder: Path, tmp_path: Path) -> None:
    files = {"model_name_or_path": model_folder, "train_file_dir": corpus}
    out = run("pt", tmp_path / "full", **files, rope_scaling=kind, rope_factor=2, use_peft=False, max_steps=1)
    assert load_model(str(out), "float32").config.rope_parameters["rope_type"] == kind


def test_reward_models(kind: Any, model_folder: Path, tmp_path: Path) -> None:
    files = {"model_name_or_path": model_folder, "train_file_dir": write(tmp_path / "pairs.jsonl", pairs())}
    out = run("rm", tmp_path / "rm", **files, rope_scaling=kind, rope_factor=2)
    model = load_reward_model(str(model_folder), "float32", rope=RopeScaling(kind, factor=2))
    model.config.pad_token_id = load_tokenizer(str(out)).pad_token_id
    by_hand = logits(load_adapter(model, str(out), trainable=False))
    rater = load_rater(InferenceFlags(base_model=str(model_folder), lora_model=str(out), dtype="float32"))
    torch.testing.assert_close(logits(rater.model), by_hand)
    assert rater.context_tokens == 1024
    check_lineage(str(out), load_model(str(model_folder), "float32", rope=RopeScaling(kind, factor=2)))
    with pytest.raises(UserError, match="another RoPE scaling"):
        check_lineage(str(out), load_model(str(model_folder), "float32"))
    merged = tmp_path / "merged"
    assert main(["merge", "--base_model", str(model_folder), "--lora_model", str(out), "--output_dir", str(merged)]) == 0
    assert json.loads((merged / "config.json").read_text())["rope_parameters"]["rope_type"] == kind
