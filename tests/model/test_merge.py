"""Merging: the folder is what plain transformers loads and answers like base + adapter; what must be refused is; what is wrong is seen."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import logits, save_adapter, save_base, stir
from flag_probes_models import coded_model
from posttrain.commands.merge import merge
from posttrain.model.adapter import Lora, attach_lora, load_adapter
from posttrain.model.load import load_model, resize_embeddings
from posttrain.model.merge import WriteOptions
from posttrain.types import UserError

IDS = torch.arange(4, 60)[None]
VARIANTS = [
    Lora(rank=4, alpha=12),
    Lora(rank=4, rslora=True, target_modules="q_proj,down_proj"),
    Lora(rank=4, dora=True),
    Lora(rank=2, modules_to_save="lm_head"),
    Lora(rank=2, modules_to_save="embed_tokens,lm_head"),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", VARIANTS, ids=["plain", "rslora", "dora", "head", "both"])
def test_plain_from_pretrained_equals_base_and_adapter(tmp_path: Path, tokenizer: Any, lora: Lora, tied: bool) -> None:
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter", lora)
    certificate = merge(base, adapter, str(tmp_path / "merged"))
    expected = logits(load_adapter(load_model(base, "float32"), adapter), IDS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, IDS), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, logits(load_model(base, "float32"), IDS), atol=1e-2)
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert (head is embedding) == tied == certificate.tied_head == merged.config.tie_word_embeddings
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "merged" / "merge_certificate.json").read_text())["ok"] is True


def test_head_trained_apart_from_its_tied_embedding_comes_out_untied(tmp_path: Path, tokenizer: Any) -> None:
    """As adapters of other tools are, which train `lm_head` and leave the embedding it is tied to."""
    from peft import LoraConfig, get_peft_model

    base = save_base(tmp_path / "base", tokenizer)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        adapted = get_peft_model(load_model(base, "float32"), config)
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    certificate = merge(base, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not certificate.tied_head
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, load_model(base, "float32").get_input_embeddings().weight)
    torch.testing.assert_close(logits(merged, IDS), logits(adapted, IDS), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_sum_is_rounded_once_to_the_type_of_the_base(tmp_path: Path, tokenizer: Any, stored: torch.dtype) -> None:
    base = save_base(tmp_path / "base", tokenizer, stored)
    adapter = save_adapter(base, tmp_path / "adapter", Lora(rank=4, alpha=8))
    certificate = merge(base, adapter, str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert certificate.dtype == str(stored).removeprefix("torch.")
    assert merged.dtype == stored
    layer = load_adapter(load_model(base, "float32"), adapter).base_model.model.model.layers[1].mlp.up_proj
    exact = layer.base_layer.weight.double() + 2 * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    weight = merged.model.layers[1].mlp.up_proj.weight
    # At most one unit in the last place where the exact value lies between two.
    assert ((weight.double() - exact).abs() <= 0.51 * torch.finfo(stored).eps * exact.abs() + 1e-8).all()
    chosen = merge(base, adapter, str(tmp_path / "wide"), dtype="float32")
    assert chosen.dtype == "float32"
    assert chosen.mean_kl_nats < 1e-9


def test_trained_tokenizer_and_template_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    trained = copy.deepcopy(tokenizer)
    trained.chat_template = tokenizer.chat_template.replace("<|im_start|>", "## ")
    adapter = save_adapter(base, tmp_path / "adapter", tokenizer=trained)
    merge(base, adapter, str(tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == trained.chat_template
    merge(base, adapter, str(tmp_path / "named"), tokenizer_path=base)
    assert AutoTokenizer.from_pretrained(tmp_path / "named").chat_template == tokenizer.chat_template
    bare = save_adapter(base, tmp_path / "bare")
    merge(base, bare, str(tmp_path / "from-base"))
    assert AutoTokenizer.from_pretrained(tmp_path / "from-base").chat_template == tokenizer.chat_template


def test_stop_tokens_are_where_servers_look(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer, eos_token_id=0)
    trained = copy.deepcopy(tokenizer)
    trained.eos_token = "<|endoftext|>"  # the template ends answers with <|im_end|> all the same
    adapter = save_adapter(base, tmp_path / "adapter", tokenizer=trained)
    merge(base, adapter, str(tmp_path / "merged"))
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 0]
    assert settings["pad_token_id"] == 3
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["eos_token_id"] == [2, 0]


def test_old_sampling_settings_do_not_stop_the_writing(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    merge(base, save_adapter(base, tmp_path / "adapter"), str(tmp_path / "merged"))
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"], settings["do_sample"]) == (0.6, 0.9, True)


@pytest.mark.parametrize("saved_rows", [True, False])
def test_grown_vocabulary(tmp_path: Path, tokenizer: Any, saved_rows: bool) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    trained = copy.deepcopy(tokenizer)
    trained.add_tokens(["<extra-1>", "<extra-2>"])
    model = load_model(base, "float32")
    resize_embeddings(model, trained)
    adapted = attach_lora(model, Lora(modules_to_save="embed_tokens,lm_head") if saved_rows else Lora())
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers="auto" if saved_rows else False)
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"vocabulary of 313 tokens, the base has 311 rows; use --resize_emb True"):
        merge(base, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merge(base, str(tmp_path / "adapter"), str(tmp_path / "merged"), resize_emb=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 313
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 313
    ids = torch.cat([IDS, torch.tensor([[311, 312]])], dim=1)
    torch.testing.assert_close(logits(merged, ids), logits(adapted, ids), atol=2e-5, rtol=1e-4)


def test_fused_experts(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        decoder_sparse_step=1,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_adapter(str(tmp_path / "base"), tmp_path / "adapter", Lora(rank=2, target_modules="q_proj,experts.down_proj"))
    merge(str(tmp_path / "base"), adapter, str(tmp_path / "merged"))
    expected = logits(load_adapter(load_model(str(tmp_path / "base"), "float32"), adapter), IDS)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS), expected, atol=2e-5, rtol=1e-4
    )


def test_shards_and_their_modes(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    merged = tmp_path / "merged"
    merge(base, adapter, str(merged), write=WriteOptions(max_shard_size="30KB"))
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert set(json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"].values()) == {
        s.name for s in shards
    }
    assert stat.S_IMODE(shards[0].stat().st_mode) == stat.S_IMODE((merged / "config.json").stat().st_mode)
    (merged / "notes.txt").write_text("mine")
    merge(base, adapter, str(merged), write=WriteOptions(overwrite=True))
    assert [f.name for f in merged.glob("*.safetensors*")] == ["model.safetensors"]  # no shard of the earlier merge is left
    assert (merged / "notes.txt").read_text() == "mine"


# What is refused


def test_output_that_would_destroy_something(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    overwrite = WriteOptions(overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is --base_model itself"):
        merge(base, adapter, "./base", write=overwrite)
    with pytest.raises(UserError, match="is --lora_model itself"):
        merge(base, adapter, "adapter/../adapter", write=overwrite)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        merge(base, adapter, "full")
    with pytest.raises(UserError, match="is a file"):
        merge(base, adapter, "full/notes.txt", write=overwrite)


def test_quantised_base_is_refused_with_the_reason(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"stored quantised \(bitsandbytes\); .*full-precision model"):
        merge(base, adapter, str(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"peft_type": "IA3"}, "is a IA3 adapter"), ({"task_type": "TOKEN_CLS"}, "is an adapter for TOKEN_CLS")],
)
def test_adapters_of_another_kind(tmp_path: Path, tokenizer: Any, changes: dict[str, str], message: str) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        merge(base, adapter, str(tmp_path / "merged"))


def test_weights_that_are_not_numbers(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter", scale=float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        merge(base, adapter, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_code_of_a_model_goes_with_it(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = str(coded_model(Path(save_base(tmp_path / "plain", tokenizer)), tmp_path / "base"))
    adapted = attach_lora(load_model(base, "float32", trust_remote_code=True), Lora())
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="--trust_remote_code True runs"):
        merge(base, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merge(base, str(tmp_path / "adapter"), str(tmp_path / "merged"), write=WriteOptions(trust_remote_code=True))
    assert (tmp_path / "merged" / "coded.py").read_text() == (tmp_path / "base" / "coded.py").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(merged).__name__ == "CodedForCausalLM"
    torch.testing.assert_close(logits(merged, IDS), logits(adapted, IDS), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    adapter = save_adapter("smollm2-135m-instruct", tmp_path / "adapter", scale=0.02)
    certificate = merge("smollm2-135m-instruct", adapter, str(tmp_path / "merged"))
    assert certificate.dtype == "bfloat16"
    assert certificate.tied_head
    assert certificate.sum_kl_nats < 1e-9
    assert certificate.argmax_agreement > 0.95
