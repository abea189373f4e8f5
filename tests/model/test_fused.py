"""Fused modules compute what the modules they replace compute, in value and gradient, and step aside where they do not apply."""

import copy

import pytest
import torch
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from posttrain.model import fused_functions
from posttrain.model.fused import FEW_ROWS, fuse
from posttrain.model.fused_functions import GatedMlpFunction, LoraLinearFunction, RmsNormFunction

IDS = torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(fused_functions, "BLOCK_ROWS", 8)  # 22 rows: two whole blocks and a rest


def adapted(family: str = "llama", **changes: object) -> PeftModel:
    """A tiny model with a random adapter on all linears, float32 masters."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    return get_peft_model(tiny(family), LoraConfig(**settings))


def run(model: nn.Module, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of everything trainable."""
    weights = torch.randn(2, 11, 96, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS, use_cache=False).logits.float()
    (logits * weights).sum().backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def assert_same(model: nn.Module, before: tuple[Tensor, dict[str, Tensor]], tolerance: float, autocast: bool = False) -> None:
    logits, gradients = run(model, autocast)
    assert float((logits - before[0]).norm() / before[0].norm()) <= tolerance
    assert gradients.keys() == before[1].keys()
    for name, expected in before[1].items():
        assert float((gradients[name] - expected).norm()) <= tolerance * float(expected.norm()) + 1e-6, name


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "smollm3", "granite", "phi3", "olmo2", "gemma3_text", "gpt_neox"]
)
def test_values_and_gradients(family: str) -> None:
    model = adapted(family).train()
    before = run(model)
    assert "LoRA linear" in fuse(model)
    assert_same(model, before, 1e-5)


def test_all_weights_trained() -> None:
    """Full fine-tuning, biases among them: weights, biases and norms get their gradients."""
    model = tiny("llama", attention_bias=True, mlp_bias=True).train()
    before = run(model)
    assert "2 × gated MLP" in fuse(model)
    assert_same(model, before, 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the second has biases
@pytest.mark.parametrize("autocast", [False, True])
def test_few_rows_without_gradients_take_the_short_way(family: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of each sequence: the same numbers, and no autograd function."""
    model = adapted(family).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(input_ids=IDS[:, :1]).logits.float()
        fuse(model)
        for function in (LoraLinearFunction, GatedMlpFunction, RmsNormFunction):
            monkeypatch.setattr(function, "apply", None)
        got = model(input_ids=IDS[:, :1]).logits.float()
    assert float((got - expected).norm() / expected.norm()) <= (2e-2 if autocast else 1e-5)
    many = torch.zeros(1, FEW_ROWS + 1, dtype=torch.long)
    with torch.no_grad(), pytest.raises(TypeError):
        model(input_ids=many)


def test_what_is_replaced() -> None:
    model = adapted()
    assert {part.split(" × ")[1]: int(part.split(" × ")[0]) for part in fuse(model).split(", ")} == {
        "RMS norm": 5,
        "gated MLP": 2,
        "LoRA linear": 8,
    }
    assert fuse(model) == "nothing"  # again: already done
    assert "gated MLP" not in fuse(adapted("gemma3_text"))  # its activation is another
    assert fuse(tiny("gpt_neox")) == "nothing"


def test_bfloat16_with_float32_masters() -> None:
    """As in training, a bfloat16 base under autocast: no further from float32 than the modules replaced."""
    model = adapted().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    exact = run(model)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()

    def errors(got: tuple[Tensor, dict[str, Tensor]]) -> list[float]:
        pairs = [(got[0], exact[0]), *((got[1][name], exact[1][name]) for name in exact[1])]
        return [float((a - b).norm() / b.norm()) for a, b in pairs]

    plain = errors(run(model, autocast=True))
    assert "gated MLP" in fuse(model)
    ours = errors(run(model, autocast=True))
    assert sum(ours) <= 1.1 * sum(plain)
    assert max(ours) <= 2 * max(plain)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


def test_with_checkpointing() -> None:
    model = adapted().train()
    before = run(model)
    fuse(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model, before, 1e-5)


def test_steps_aside() -> None:
    """Adapters off, another adapter, two at once, merged: what PEFT computes then is computed."""
    model, plain = adapted().eval(), None
    plain = copy.deepcopy(model)
    fuse(model)
    for each in (model, plain):
        torch.manual_seed(3)
        each.add_adapter("second", LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False))
    for change in ("default", "second", ["default", "second"]):
        for each in (model, plain):
            each.base_model.set_adapter(change)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits)
    assert merged.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 14)


def test_dropout_is_kept_in_training() -> None:
    model = adapted(lora_dropout=0.5)
    fuse(model)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_copy_uses_its_own_weights() -> None:
    model = adapted().eval()
    fuse(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(3)
    assert not torch.allclose(other(IDS).logits, model(IDS).logits)


def test_weights_that_lie_the_other_way_round_are_left_alone() -> None:
    """GPT-2's linears, which are no nn.Linear: their MLP has other widths than its input."""
    model = adapted("gpt2", target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    before = run(model)
    assert fuse(model) == "nothing"
    assert_same(model, before, 1e-6)


def test_a_lookalike_is_left_alone() -> None:
    """The code of the forward is Llama's, a parameter's meaning is not: the comparison on random input finds it."""
    model = tiny("llama")
    norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]

    class Scaled(type(norms[0])):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    for norm in norms:
        norm.__class__ = Scaled
    assert "RMS norm" not in fuse(model)
