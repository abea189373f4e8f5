"""LoRA: what is trained, in which type, resumed exactly, refused on the wrong base; and its forward against the formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import tiny_llama
from posttrain.model.adapter import Lora, attach_lora, load_adapter, trainable_summary
from posttrain.model.load import load_model
from posttrain.types import UserError

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def stir(model: nn.Module, seed: int = 7) -> None:
    """Give every trainable tensor values of its own, so that B = 0 hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 30)[None]).logits.float()


def test_all_means_every_linear_but_the_head() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    adapted = attach_lora(model, Lora(rank=3))
    assert adapted.peft_config["default"].target_modules == ATTENTION | MLP
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32),
             "gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}  # fmt: skip
    expected = 2 * sum(3 * (n_in + n_out) for n_in, n_out in sizes.values())
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected
    total = sum(p.numel() for p in adapted.parameters())
    assert trainable_summary(adapted) == f"trainable {expected:,} of {total:,} parameters ({100 * expected / total:.3f} %)"


def test_a_head_named_like_a_layer_is_still_left_alone() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.model.layers[0].mlp.lm_head = nn.Linear(32, 32)  # shares its leaf name with the output head
    model.model.layers[0].mlp.score = nn.Linear(32, 32)
    adapted = attach_lora(model, Lora())
    wrapped = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name.rsplit(".", 1)[-1] for name in wrapped} == ATTENTION | MLP


def test_named_targets_and_their_refusal() -> None:
    adapted = attach_lora(tiny_llama(), Lora(target_modules="q_proj, v_proj"))
    assert {n.split(".")[-4] for n in trained(adapted)} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"--target_modules kproj: .*did you mean 'k_proj'\? it has down_proj, gate_proj, k_proj"):
        attach_lora(tiny_llama(), Lora(target_modules="q_proj,kproj"))
    with pytest.raises(UserError, match=r"--modules_to_save embed_token: .*did you mean 'embed_tokens'"):
        attach_lora(tiny_llama(), Lora(modules_to_save="embed_token"))


def test_gpt2_convolutions_are_linear_layers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50))
    adapted = attach_lora(model, Lora())
    assert {n.split(".")[-4] for n in trained(adapted)} == {"c_attn", "c_proj", "c_fc"}


def tiny_mixtral() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, decoder_sparse_step=1,
    ))  # fmt: skip


def test_experts_and_router_stay_frozen_unless_named() -> None:
    adapted = attach_lora(tiny_mixtral(), Lora())
    assert {n.split(".")[-4] for n in trained(adapted)} == ATTENTION | MLP  # the MLP names are the shared expert's
    assert not any("shared_expert_gate" in n or ".experts." in n for n in trained(adapted))
    adapted = attach_lora(tiny_mixtral(), Lora(target_modules="q_proj,experts.down_proj"))
    assert any(".experts." in n for n in trained(adapted))
    assert any(".q_proj." in n for n in trained(adapted))
    stir(adapted)
    assert not torch.equal(logits(adapted), logits(tiny_mixtral()))
    with pytest.raises(UserError, match="fused experts take no dropout"):
        attach_lora(tiny_mixtral(), Lora(target_modules="experts.down_proj", dropout=0.1))


GLM: dict[str, Any] = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
DEEPSEEK = GLM | {
    "num_key_value_heads": 4, "head_dim": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16,
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), [("glm4_moe", GLM), ("deepseek_v3", DEEPSEEK), ("ernie4_5_moe", {})])
def test_layers_named_like_old_experts_are_the_layers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """peft takes these names for experts that are layers no more: it would adapt the fused ones, and not the dense layers and the
    shared experts that have the names."""
    for targets in (
        "all",
        "q_b_proj,gate_proj,up_proj,down_proj" if family == "deepseek_v3" else "q_proj,gate_proj,up_proj,down_proj",
    ):
        model = tiny(family, **changes)
        dense = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name.rpartition(".")[2] in MLP}
        assert any("shared_expert" in name for name in dense)
        adapted = attach_lora(model, Lora(target_modules=targets))
        named = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained(adapted)}
        assert {name for name in named if name.rpartition(".")[2] in MLP} == dense
        assert not any(".experts" in name for name in named)
    stir(adapted)
    adapted.save_pretrained(tmp_path)
    again = load_adapter(tiny(family, **changes), str(tmp_path))
    assert trained(again).keys() == trained(adapted).keys()
    assert torch.equal(logits(again), logits(adapted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_master_weights_are_float32(dtype: torch.dtype) -> None:
    adapted = attach_lora(tiny_llama().to(dtype), Lora(modules_to_save="embed_tokens"))
    assert {p.dtype for p in trained(adapted).values()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {dtype}
    loss = adapted(input_ids=torch.arange(4, 20)[None], labels=torch.arange(4, 20)[None]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    assert adapted(input_ids=torch.arange(4, 20)[None]).logits.dtype == dtype


@pytest.mark.parametrize("which", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
def test_tied_pair_stays_one_tensor_when_trained(which: str) -> None:
    adapted = attach_lora(tiny_llama(), Lora(modules_to_save=which))
    extra = [p for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n]
    assert [tuple(p.shape) for p in extra] == [(400, 32)]
    before = logits(adapted)
    with torch.no_grad():
        extra[0].mul_(1.5)
    after = logits(adapted)
    assert not torch.allclose(before, after)
    # The same tensor read and predicts: scaling the whole base's tied pair does the same.
    reference = tiny_llama()
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.5)
    torch.testing.assert_close(after, logits(reference))


def test_untied_head_may_be_trained_alone() -> None:
    adapted = attach_lora(tiny_llama(tie_word_embeddings=False), Lora(modules_to_save="lm_head"))
    assert [n for n in trained(adapted) if "lora_" not in n] == ["base_model.model.lm_head.modules_to_save.default.weight"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_scale_and_variants(dora: bool, rslora: bool) -> None:
    adapted = attach_lora(tiny_llama(), Lora(rank=4, alpha=16, dora=dora, rslora=rslora))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == (8.0 if rslora else 4.0)
    assert any("magnitude" in n for n in trained(adapted)) == dora
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()))  # B = 0: an untrained adapter changes nothing
    stir(adapted)
    assert not torch.allclose(logits(adapted), logits(tiny_llama()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_survive_checkpointing(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        adapted = attach_lora(tiny_llama(), Lora())
        stir(adapted)
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ids = torch.arange(4, 40)[None]
        adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_resumed_adapter_is_the_saved_one(model_folder: Path, tmp_path: Path, file: str) -> None:
    adapted = attach_lora(load_model(str(model_folder), "float32"), Lora(modules_to_save="lm_head"))
    stir(adapted)
    adapted.save_pretrained(tmp_path, safe_serialization=file.endswith("safetensors"))
    assert (tmp_path / file).is_file()
    again = load_adapter(load_model(str(model_folder), "float32"), str(tmp_path))
    saved, loaded = trained(adapted), trained(again)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[n], loaded[n]) for n in saved)
    assert torch.equal(logits(adapted), logits(again))
    frozen = load_adapter(load_model(str(model_folder), "float32"), str(tmp_path), trainable=False)
    assert not trained(frozen)


def test_adapter_of_bfloat16_training_fits_the_float32_base(model_folder: Path, tmp_path: Path) -> None:
    attach_lora(load_model(str(model_folder), "bfloat16"), Lora()).save_pretrained(tmp_path)
    load_adapter(load_model(str(model_folder), "float32"), str(tmp_path))


def test_adapter_of_another_base_is_refused(model_folder: Path, tmp_path: Path) -> None:
    attach_lora(load_model(str(model_folder), "float32"), Lora()).save_pretrained(tmp_path)
    other = tiny_llama(vocab=311, seed=1)
    other.name_or_path = "other"
    with pytest.raises(
        UserError, match=r"was trained on another base .*tiny-model.*than other .weights [0-9a-f]{8}, here [0-9a-f]{8}"
    ):
        load_adapter(other, str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["auto_mapping"] = None  # as another tool would have saved it
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    load_adapter(tiny_llama(vocab=311, seed=1), str(tmp_path))
    with pytest.raises(UserError, match=r"does not fit .*size mismatch"):
        load_adapter(tiny_llama(vocab=311, intermediate_size=48), str(tmp_path))


def test_folders_that_hold_no_adapter(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_adapter(tiny_llama(), str(model_folder))
    attach_lora(tiny_llama(), Lora()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_adapter(tiny_llama(), str(tmp_path))


def test_pickled_code_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    adapted = attach_lora(load_model(str(model_folder), "float32"), Lora())
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"does not fit|holds more than weights"):
        load_adapter(load_model(str(model_folder), "float32"), str(tmp_path / "adapter"))
    assert not (tmp_path / "ran").exists()


# The forward of lora_forward.py


def test_forward_equals_the_formula() -> None:
    adapted = attach_lora(tiny_llama(attention_bias=True), Lora(rank=4, alpha=12))
    stir(adapted)
    layer = adapted.base_model.model.model.layers[1].self_attn.k_proj
    x = torch.randn(2, 5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ (layer.base_layer.weight + 3 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_forward_and_gradients_equal_those_of_peft() -> None:
    def run(ours: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(ATTENTION | MLP), task_type="CAUSAL_LM")
        adapted = attach_lora(tiny_llama(), Lora(rank=4, alpha=8)) if ours else get_peft_model(tiny_llama(), config)
        stir(adapted)
        ids = torch.arange(4, 40)[None]
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss, [p.grad for _, p in sorted(adapted.named_parameters()) if p.requires_grad]

    (loss, gradients), (expected_loss, expected_gradients) = run(True), run(False)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_bfloat16_forward_is_no_less_exact_than_peft_under_autocast() -> None:
    adapted = attach_lora(tiny_llama().bfloat16(), Lora(rank=4, alpha=16))
    stir(adapted)
    layer = adapted.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(64, 64).bfloat16()
    weights = layer.base_layer.weight.double() + 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    exact = x.double() @ weights.T
    with torch.autocast("cpu", torch.bfloat16):
        theirs = type(layer).forward(layer, x)
    assert layer(x).dtype == torch.bfloat16
    assert (layer(x) - exact).abs().mean() <= (theirs - exact).abs().mean()


def test_dropout_acts_in_training_only() -> None:
    adapted = attach_lora(tiny_llama(), Lora(dropout=0.5))
    stir(adapted)
    ids = torch.arange(4, 30)[None]
    assert not torch.equal(adapted.train()(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert torch.equal(logits(adapted), logits(adapted))


def test_switched_off_merged_and_second_adapters() -> None:
    adapted = attach_lora(tiny_llama(), Lora())
    stir(adapted)
    first = logits(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(tiny_llama()))
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), first)
    adapted.unmerge_adapter()
    adapted.add_adapter("other", adapted.peft_config["default"])
    torch.testing.assert_close(logits(adapted), first)
    adapted.set_adapter("other")
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()))


def test_a_copy_of_the_folder_is_the_same_base(model_folder: Path, tmp_path: Path) -> None:
    attach_lora(load_model(str(model_folder), "float32"), Lora()).save_pretrained(tmp_path / "adapter")
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    load_adapter(load_model(str(moved), "float32"), str(tmp_path / "adapter"))
