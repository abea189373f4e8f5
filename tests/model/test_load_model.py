"""Loading: precision, refusals in one line, tokenizer repairs, RoPE scaling against its formulas, vocabulary growth."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from posttrain.model.load import (
    check_vocabulary,
    hardware_dtype,
    load_model,
    load_tokenizer,
    resize_embeddings,
)
from posttrain.model.quantize import bytes_by_dtype
from posttrain.model.rope import RopeScaling, context_tokens
from posttrain.types import UserError


@pytest.fixture
def own_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v != "DELETE"}))


def test_weights_and_dtype(model_folder: Path) -> None:
    stored = tiny_llama(vocab=load_model(str(model_folder), "float32").config.vocab_size).state_dict()
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(model_folder), dtype)
        for name, value in model.state_dict().items():
            assert torch.equal(value, stored[name].to(getattr(torch, dtype))), name
    assert load_model(str(model_folder)).dtype == hardware_dtype()
    assert bytes_by_dtype(model) == {"bfloat16": 2 * sum(p.numel() for p in model.parameters())}


def test_hardware_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert hardware_dtype() == expected


def test_folder_without_config(own_folder: Path) -> None:
    (own_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(own_folder))
    (own_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        load_model(str(own_folder))


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaModel"])
def test_other_heads_are_refused(own_folder: Path, architecture: str) -> None:
    edit_json(own_folder / "config.json", architectures=[architecture])
    with pytest.raises(UserError, match=f"is a {architecture}, not a causal language model .expected LlamaForCausalLM"):
        load_model(str(own_folder))


def test_encoder_only_model_is_refused(own_folder: Path) -> None:
    (own_folder / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))
    with pytest.raises(UserError, match="T5ForConditionalGeneration, not a causal language model"):
        load_model(str(own_folder))


def test_broken_folders_end_in_one_line(own_folder: Path) -> None:
    (own_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(own_folder))
    (own_folder / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match=r"cannot read its config .*smollm2-135m-instruct") as error:
        load_model(str(own_folder))
    assert "\n" not in str(error.value)
    (own_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(str(own_folder))


def test_missing_weights_are_never_made_up(own_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(own_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, own_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are not in the folder, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(own_folder))


def test_tokenizer_that_needs_no_repair_stays(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|pad|>", "right")
    assert load_tokenizer(str(model_folder), padding_side="left").padding_side == "left"
    assert not caplog.records


def test_missing_tokens_are_filled_in_and_told(
    own_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command that an earlier test ran has given our logger a handler of its own.
    monkeypatch.setattr(logging.getLogger("posttrain"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("posttrain"), "propagate", False)
    edit_json(own_folder / "tokenizer_config.json", eos_token="DELETE", pad_token="DELETE")
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        tokenizer = load_tokenizer(str(own_folder))
    assert tokenizer.eos_token == "<|im_end|>"  # id 2, as generation_config.json and config.json say
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(load_tokenizer(str(own_folder)))
    messages = [record.message for record in caplog.records][:2]
    assert "no end token; took '<|im_end|>'" in messages[0]
    assert "no padding token; took '<|pad|>'" in messages[1]


def test_no_end_token_anywhere_is_an_error(own_folder: Path) -> None:
    edit_json(own_folder / "tokenizer_config.json", eos_token="DELETE")
    edit_json(own_folder / "config.json", eos_token_id="DELETE")
    (own_folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="names no end token"):
        load_tokenizer(str(own_folder))


def inverse_frequencies(model: Any) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq


def test_rope_linear(model_folder: Path) -> None:
    plain = load_model(str(model_folder), "float32")
    scaled = load_model(str(model_folder), "float32", rope=RopeScaling("linear", factor=4))
    torch.testing.assert_close(inverse_frequencies(scaled), inverse_frequencies(plain) / 4)
    assert scaled.config.max_position_embeddings == 4 * 512


def test_rope_dynamic_leaves_short_texts_alone(model_folder: Path) -> None:
    plain = load_model(str(model_folder), "float32")
    scaled = load_model(str(model_folder), "float32", rope=RopeScaling("dynamic", factor=2))
    ids = torch.arange(4, 260)[None]
    with torch.no_grad():
        torch.testing.assert_close(scaled(ids).logits, plain(ids).logits)
        scaled(torch.arange(4, 304).repeat(3)[None])  # 900 tokens, beyond the 512 trained
    # NTK by parts: base · (s·L/L0 − (s − 1))^(d / (d − 2)), here with d = 8
    base = 10000.0 * (2 * 900 / 512 - 1) ** (8 / 6)
    expected = torch.tensor([base ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(inverse_frequencies(scaled), expected)


def test_dynamic_scaling_of_a_row_does_not_depend_on_the_rows_before(model_folder: Path) -> None:
    rope = RopeScaling("dynamic", factor=2)
    long, longer = torch.arange(4, 304).repeat(2)[None], torch.arange(4, 304).repeat(3)[None]
    with torch.no_grad():
        expected = load_model(str(model_folder), "float32", rope=rope)(long).logits
        scaled = load_model(str(model_folder), "float32", rope=rope)
        scaled(longer)
        torch.testing.assert_close(scaled(long).logits, expected)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_the_context_grows_with_the_factor(model_folder: Path, kind: Any) -> None:
    assert context_tokens(load_model(str(model_folder), "float32").config) == 512
    assert context_tokens(load_model(str(model_folder), "float32", rope=RopeScaling(kind, factor=3)).config) == 1536


def test_the_same_scaling_twice_is_once(model_folder: Path, tmp_path: Path) -> None:
    rope = RopeScaling("yarn", factor=2)
    load_model(str(model_folder), "float32", rope=rope).save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "float32", rope=rope)
    assert again.config.max_position_embeddings == 2 * 512
    with pytest.raises(UserError, match=r"already scaled .yarn, factor 2.0."):
        load_model(str(tmp_path), "float32", rope=RopeScaling("yarn", factor=4))


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_rope_by_parts(model_folder: Path, kind: Any) -> None:
    plain = load_model(str(model_folder), "float32")
    scaled = load_model(str(model_folder), "float32", rope=RopeScaling(kind, context_tokens=1500))
    assert scaled.config.rope_parameters["factor"] == 3  # 1,500 tokens need three times 512
    assert scaled.config.rope_parameters["original_max_position_embeddings"] == 512
    assert scaled.config.max_position_embeddings == 3 * 512
    ratio = inverse_frequencies(plain) / inverse_frequencies(scaled)
    assert ratio[0].item() == pytest.approx(1)  # fast dimensions are left alone
    assert ratio[-1].item() == pytest.approx(3)  # slow ones are stretched in full
    if kind == "yarn":
        assert scaled.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(3) + 1)


def test_rope_scaling_survives_saving(model_folder: Path, tmp_path: Path) -> None:
    scaled = load_model(str(model_folder), "float32", rope=RopeScaling("yarn", factor=2))
    scaled.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "float32")
    torch.testing.assert_close(inverse_frequencies(again), inverse_frequencies(scaled))
    with pytest.raises(UserError, match=r"already scaled .yarn,"):
        load_model(str(tmp_path), rope=RopeScaling("linear", factor=2))


def test_rope_scaling_that_does_nothing_is_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match="already reads 512 tokens"):
        load_model(str(model_folder), rope=RopeScaling("linear", context_tokens=400))


def test_rope_scaling_of_a_model_without_rope(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2 has no rotary position embedding"):
        load_model(str(tmp_path), rope=RopeScaling("linear", factor=2))


def test_rope_scaling_of_layer_kinds_touches_full_attention_only(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=64, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    scaled = load_model(str(tmp_path), "float32", rope=RopeScaling("linear", factor=2)).config.rope_parameters
    assert scaled["full_attention"]["rope_type"] == "linear"
    assert scaled["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old(tokenizer: Any, tied: bool) -> None:
    assert len(tokenizer) == 311
    model = tiny_llama(vocab=311, tie_word_embeddings=tied)
    grown = copy.deepcopy(tokenizer)
    check_vocabulary(model, grown)
    assert resize_embeddings(model, grown) == 0
    grown.add_tokens(["<extra-1>", "<extra-2>"])
    with pytest.raises(UserError, match=r"313 tokens but the model's embedding 311 rows"):
        check_vocabulary(model, grown)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert resize_embeddings(model, grown) == 2
    check_vocabulary(model, grown)
    for module, name in ((model.get_input_embeddings(), "model.embed_tokens"), (model.get_output_embeddings(), "lm_head")):
        old = before["model.embed_tokens.weight" if tied else f"{name}.weight"]
        assert torch.equal(module.weight[:311], old)
        torch.testing.assert_close(module.weight[311:], old.mean(0).expand(2, -1))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 313


def test_padded_vocabulary_is_not_shrunk(tokenizer: Any) -> None:
    model = tiny_llama(vocab=512)
    assert resize_embeddings(model, tokenizer) == 0
    assert model.get_input_embeddings().weight.shape[0] == 512


def test_quantisation_without_bitsandbytes(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes; run: pip install 'posttrain\[quant\]'"):
        load_model(str(model_folder), quantization="4bit")
