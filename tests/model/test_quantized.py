"""Bases in 4 and 8 bits: what they take, that they stay what they were read as, and the fused experts of mixtures."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from flag_probes_models import other_model
from posttrain.commands.merge import merge
from posttrain.model.adapter import Lora, attach_lora, base_fingerprint, load_adapter, trainable_summary
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.load import load_model
from posttrain.model.logprobs import install_logprobs
from posttrain.model.quantize import bytes_by_dtype, quantization_of, quantizing
from posttrain.model.reward import load_reward_model, score_head
from posttrain.types import UserError

bitsandbytes = pytest.importorskip("bitsandbytes")

SHARED: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.05,
}  # fmt: skip
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
ATTENTION = Lora(rank=4, target_modules="q_proj,k_proj,v_proj,o_proj")


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random mixture of experts in bfloat16."""
    torch.manual_seed(0)
    model: Any
    if request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SHARED, intermediate_size=256, num_local_experts=8, sliding_window=None))
    else:
        sizes = {
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHARED, **sizes))
    folder = tmp_path_factory.mktemp(request.param)
    model.bfloat16().save_pretrained(folder)
    return folder


def loss(model: Any) -> torch.Tensor:
    """Mean negative log-likelihood of fixed tokens."""
    found: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return found


def experts_error(model: Any, full: Any) -> float:
    """The largest relative difference of a fused parameter."""
    errors = []
    for ours, theirs in zip(model.model.layers, full.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            got, expected = getattr(ours.mlp.experts, name), getattr(theirs.mlp.experts, name)
            assert got.dtype == expected.dtype
            errors.append(float((got.float() - expected.float()).norm() / expected.float().norm()))
    return max(errors)


def counted(model: Any) -> str:
    """The number of parameters that a run says."""
    return trainable_summary(model).partition(" of ")[2].partition(" ")[0]


def floats_alive() -> int:
    """Bytes of the floating tensors larger than a vector that were made since `young`."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_floating_point() and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() if storage.nbytes() > 4096 else 0
    return sum(found.values())


@pytest.fixture
def young() -> Iterator[None]:
    """What is alive by now is left out of what is counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# --- mixtures of experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["4bit", "4bit-double"])
def test_a_mixture_is_really_in_4_bits(mixture: Path, how: Any, caplog: pytest.LogCaptureFixture) -> None:
    full = load_model(str(mixture), "bfloat16")
    with caplog.at_level(logging.INFO, logger="posttrain"):
        small = load_model(str(mixture), "bfloat16", quantization=how)
    sizes = bytes_by_dtype(small)
    assert sum(sizes.values()) <= 0.35 * sum(bytes_by_dtype(full).values())
    said = ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items())
    assert f"in {how}: {said}" in caplog.text
    assert {"uint8", "bfloat16", "float32"} == sizes.keys()
    assert "stay in" not in caplog.text
    with torch.no_grad():
        assert float(loss(small)) == pytest.approx(float(loss(full)), rel=0.02)
        expected, got = (model(input_ids=IDS).logits.float() for model in (full, small))
    # Random experts are routed to at random: where rounding tips a token over to another, its logits are others.
    assert 0.01 < float((got - expected).norm() / expected.norm()) < 0.5
    assert experts_error(small, full) == pytest.approx(0.09, abs=0.02)  # that of NF4 on normal weights
    assert counted(small) == counted(full)


def test_what_transformers_does_alone(mixture: Path) -> None:
    """The reason for all this: its own 4-bit load leaves the experts in 16 bits. Ours does not change what it does elsewhere."""
    theirs = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    with quantizing("4bit", torch.bfloat16):
        assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is not theirs
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is theirs
    alone = AutoModelForCausalLM.from_pretrained(
        mixture, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16
    )
    sizes = bytes_by_dtype(alone)
    assert sizes["bfloat16"] > 0.9 * sum(sizes.values())


@pytest.mark.usefixtures("young")
def test_the_full_model_is_never_in_memory(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = bitsandbytes.functional.quantize_4bit
    full_bytes = sum(bytes_by_dtype(load_model(str(mixture), "bfloat16")).values())
    before, seen = floats_alive(), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(floats_alive() - before)
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", spy)
    load_model(str(mixture), "bfloat16", quantization="4bit-double")
    assert len(seen) == 4 * (4 + 2)  # layers x (attention + experts), each by itself
    assert 0 < max(seen) < 0.45 * full_bytes


def test_8_bits_say_what_they_leave(mixture: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        model = load_model(str(mixture), "bfloat16", quantization="8bit")
    experts = sum(2 * p.numel() for name, p in model.named_parameters() if p.ndim == 3)
    assert f"its experts stay in bfloat16 ({experts:,} bytes)" in caplog.text
    assert "--load_in_4bit True takes them too" in caplog.text
    assert bytes_by_dtype(model)["int8"] > 0


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.usefixtures("young")
def test_the_backward_pass_makes_the_weights_again(mixture: Path) -> None:
    """Same gradients as with dequantised weights kept from the forward pass, which none is here; checkpointed layers agree too."""
    model = attach_lora(load_model(str(mixture), "bfloat16", quantization="4bit"), ATTENTION)
    experts = [module for module in model.modules() if "Experts" in type(module).__name__]
    one_layer = sum(2 * getattr(experts[0], name).numel() for name in ("gate_up_proj", "down_proj"))
    gradients(model)

    def kept() -> int:
        before = floats_alive()
        held = loss(model)
        after = floats_alive()
        assert held.requires_grad
        return after - before

    again, ours = gradients(model), kept()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    checkpointed = gradients(model)
    model.gradient_checkpointing_disable()
    for module in experts:
        del module.forward
    usual, theirs = gradients(model), kept()
    assert theirs - ours >= 3 * one_layer
    for gradient, expected, third in zip(again, usual, checkpointed, strict=True):
        assert torch.equal(gradient, expected)
        assert torch.equal(gradient, third)


def test_experts_in_4_bits_take_no_adapter(mixture: Path) -> None:
    model = load_model(str(mixture), "bfloat16", quantization="4bit")
    with pytest.raises(UserError, match=r"experts\.down_proj: .*4 bits"):
        attach_lora(model, Lora(target_modules="experts.down_proj"))


def test_layers_beside_experts_in_4_bits_are_adapted(tmp_path: Path) -> None:
    """A shared expert's layers have the names of the fused experts' tensors: 'all' takes the ones and leaves the others."""
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHARED, **sizes)).bfloat16().save_pretrained(tmp_path / "base")
    found = []
    for how in (None, "4bit"):
        model = load_model(str(tmp_path / "base"), "bfloat16", quantization=how)  # type: ignore[arg-type]
        adapted = attach_lora(model, Lora(rank=2))
        found.append({name for name, p in adapted.named_parameters() if p.requires_grad})
        assert not any(".experts." in name for name in found[-1])
        assert any(".shared_expert.down_proj." in name for name in found[-1])
        adapted.save_pretrained(tmp_path / f"{how}")
        assert adapted.peft_config["default"].exclude_modules is None
    assert found[0] == found[1]
    for adapter, how in (("None", "4bit"), ("4bit", None)):
        load_adapter(load_model(str(tmp_path / "base"), "bfloat16", quantization=how), str(tmp_path / adapter))  # type: ignore[arg-type]


# --- what is shared with dense models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["4bit", "4bit-double", "8bit"])
def test_quantised_layers_are_left_alone(model_folder: Path, how: Any) -> None:
    """Packing, log-probs and fused passes work around them and change no weight, in evaluation and in training."""
    model = attach_lora(load_model(str(model_folder), "float32", quantization=how), Lora())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert enable_segments(model).packed
    assert install_logprobs(model).projection is not None
    assert fuse(model) == "5 × RMS norm"
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(training):
            model(input_ids=IDS)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == (".lora_" in name)
        assert not parameter.requires_grad or parameter.dtype == torch.float32


@pytest.mark.parametrize(("how", "bound"), [("4bit", 0.35), ("8bit", 0.1)])
def test_a_dense_model_answers_nearly_the_same(model_folder: Path, how: Any, bound: float) -> None:
    full = load_model(str(model_folder), "float32")
    small = load_model(str(model_folder), "float32", quantization=how)
    with torch.no_grad():
        expected, got = (model(input_ids=IDS).logits for model in (full, small))
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < bound
    assert counted(small) == counted(full)


def test_the_score_head_stays_in_float32(model_folder: Path) -> None:
    torch.manual_seed(0)
    model = load_reward_model(str(model_folder), "bfloat16", quantization="4bit")
    torch.manual_seed(0)
    full = load_reward_model(str(model_folder), "bfloat16")
    assert torch.equal(score_head(model).weight, score_head(full).weight)
    assert score_head(model).weight.dtype == torch.float32
    assert bytes_by_dtype(model)["uint8"] > 0
    assert base_fingerprint(model) == base_fingerprint(full) is not None


def test_an_adapter_of_a_4_bit_base_fits_the_full_one(model_folder: Path, tmp_path: Path) -> None:
    adapted = attach_lora(load_model(str(model_folder), "bfloat16", quantization="4bit-double"), Lora())
    adapted.save_pretrained(tmp_path)
    for how in (None, "4bit-double"):
        loaded: Any = load_adapter(load_model(str(model_folder), "bfloat16", quantization=how), str(tmp_path))  # type: ignore[arg-type]
        saved = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
        assert saved.keys() == {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert all(torch.equal(p, saved[name]) for name, p in loaded.named_parameters() if name in saved)


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_an_adapter_of_a_quantised_base_knows_it(model_folder: Path, tmp_path: Path, how: Any) -> None:
    """By the full weights in the base's files: another base of the same shape is refused, quantised or not, by merge too."""
    attach_lora(load_model(str(model_folder), "bfloat16", quantization=how), Lora()).save_pretrained(tmp_path / "adapter")
    other = str(other_model(model_folder, tmp_path / "other"))
    for quantization in (None, how):
        load_adapter(load_model(str(model_folder), "bfloat16", quantization=quantization), str(tmp_path / "adapter"))
        with pytest.raises(UserError, match="was trained on another base"):
            load_adapter(load_model(other, "bfloat16", quantization=quantization), str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="was trained on another base"):
        merge(other, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merge(str(model_folder), str(tmp_path / "adapter"), str(tmp_path / "merged"))


def test_an_adapter_of_a_mixture_in_4_bits_knows_its_base(mixture: Path) -> None:
    """Whose experts the files have one by one."""
    full, small = (load_model(str(mixture), "bfloat16", quantization=how) for how in (None, "4bit"))  # type: ignore[arg-type]
    assert base_fingerprint(small) == base_fingerprint(full) is not None


def test_modules_to_save_are_not_quantised(model_folder: Path) -> None:
    model = load_model(str(model_folder), "bfloat16", quantization="4bit")
    with pytest.raises(UserError, match=r"--modules_to_save q_proj: .*quantised"):
        attach_lora(model, Lora(modules_to_save="q_proj"))


def test_the_words_for_it() -> None:
    assert quantization_of(False, False, double=True) is None
    assert [quantization_of(True, False, double=double) for double in (False, True)] == ["4bit", "4bit-double"]
    assert quantization_of(False, True, double=False) == "8bit"
    with pytest.raises(UserError, match="exclude each other"):
        quantization_of(True, True, double=False)
