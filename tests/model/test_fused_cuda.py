"""The replacements for CUDA compute what the modules they replace compute. Without a device: the autograd function and the wiring."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from model.families import tiny
from posttrain.data.pack import collate
from posttrain.model import fused, fused_cuda, lora_forward
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.fused_cuda import LoraFunction
from posttrain.model.logprobs import install_logprobs

ON_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None, reason="needs CUDA and liger-kernel"
)


def adapted(family: str, **changes: Any) -> Any:
    """A tiny model with a random adapter on all linears, float32 masters."""
    torch.manual_seed(0)
    return get_peft_model(
        tiny(family, **changes), LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    )


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((got.double() - expected.double()).norm() <= tolerance * expected.double().norm())


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_with_its_low_rank_term(dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    """Beside autograd in float64 of the formula."""
    torch.manual_seed(0)
    x, weight, down, up = (torch.randn(shape) for shape in ((11, 8), (6, 8), (3, 8), (6, 3)))
    bias, ahead = torch.randn(6) if biased else None, torch.randn(11, 6)
    wanted = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
    y = LoraFunction.apply(wanted[0], dtype, 1.7, weight, bias, wanted[1], wanted[2])
    (y.float() * ahead).sum().backward()
    exact = [tensor.double().requires_grad_() for tensor in (x, down, up)]
    expected = exact[0] @ weight.double().t() + 1.7 * (exact[0] @ exact[1].t()) @ exact[2].t()
    expected = expected if bias is None else expected + bias.double()
    (expected * ahead.double()).sum().backward()
    assert y.dtype == dtype
    assert close(y.detach(), expected.detach(), tolerance)
    for got, right in zip(wanted, exact, strict=True):
        assert got.grad is not None
        assert right.grad is not None
        assert got.grad.dtype == torch.float32
        assert close(got.grad, right.grad, tolerance)


def test_an_input_without_gradient_gets_none() -> None:
    """The first layer's input under a frozen embedding."""
    down, up = (torch.randn(shape).requires_grad_() for shape in ((3, 8), (6, 3)))
    LoraFunction.apply(torch.randn(4, 8), torch.float32, 1.0, torch.randn(6, 8), None, down, up).sum().backward()
    assert down.grad is not None
    assert up.grad is not None


# ---------------------------------------------------------------- the wiring


def test_off_cuda_a_model_made_for_it_computes_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was made ready for CUDA and then kept on the host, for a merge say."""
    monkeypatch.setattr(fused, "_agrees", lambda *_: True)
    monkeypatch.setattr(fused_cuda, "has_liger", lambda: True)
    model, ids = adapted("llama"), torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    lora_forward.install(model)
    expected = model(input_ids=ids).logits
    said = fuse(model, "cuda")
    assert {part.split(" × ")[-1] for part in said.split(", ")} == {"gated MLP", "RMS norm", "LoRA linear", "rotary positions"}
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_without_liger_only_adapters_are_replaced_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_agrees", lambda *_: True)
    monkeypatch.setattr(fused_cuda, "has_liger", lambda: False)
    said = fuse(adapted("llama"), "cuda")
    assert said == "14 × LoRA linear, norms, MLPs and rotary positions as they are (liger-kernel is not installed)"


def test_rotary_positions_of_another_kind_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX rotates a part of each head, by another function."""
    assert not fused_cuda.install_rotary(tiny("gpt_neox"), fused._same_code)
    assert fused_cuda.install_rotary(tiny("llama"), fused._same_code)
    assert fused_cuda.install_rotary(tiny("llama"), fused._same_code)  # again


def test_other_devices_are_told() -> None:
    assert fuse(adapted("llama"), "mps") == "nothing on mps"


# ---------------------------------------------------------------- on the device


def run(model: nn.Module, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of a packed row and the gradients of everything trainable."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(1, 96, (n,), generator=generator).tolist(), "trained": [0] + [1] * (n - 1)}
        for n in (9, 17, 5)
    ]
    batch = collate(rows).to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logprobs_N = model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N).logprobs_N
    logprobs_N.sum().backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logprobs_N.detach(), gradients


def ready(family: str) -> Any:
    model = adapted(family).cuda().train()
    assert enable_segments(model).packed
    install_logprobs(model)
    return model


@ON_CUDA
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_on_cuda_values_and_gradients(family: str) -> None:
    model = ready(family)
    expected = run(copy.deepcopy(model), autocast=False)
    said = fuse(model, "cuda")
    assert "LoRA linear" in said
    if family != "gemma3_text":  # its norms and activation are others
        assert "gated MLP" in said
        assert "RMS norm" in said
        assert "rotary positions" in said
    got = run(model, autocast=False)
    assert close(got[0], expected[0], 1e-4)
    assert got[1].keys() == expected[1].keys()
    for name, right in expected[1].items():
        assert close(got[1][name], right, 1e-4), name


@ON_CUDA
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_on_cuda_bfloat16_is_as_near_to_float32_as_the_modules_own(family: str) -> None:
    model = ready(family)
    exact, plain = run(copy.deepcopy(model), autocast=False), run(copy.deepcopy(model), autocast=True)
    fuse(model, "cuda")
    got = run(model, autocast=True)
    ends = [torch.cat([logprobs_N, *(g.flatten() for g in of.values())]) for logprobs_N, of in (exact, plain, got)]
    errors = [float((end - ends[0]).norm() / ends[0].norm()) for end in ends[1:]]
    assert 0 < errors[1] <= 1.5 * errors[0]
