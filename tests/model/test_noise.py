"""NEFTune: how much noise each example gets, and that there is none where there must be none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from conftest import tiny_llama
from posttrain.model.attention import enable_segments
from posttrain.model.noise import example_lengths, install_noise
from posttrain.model.shifted import install_shift
from posttrain.types import Segment, SegmentTable

ALPHA, WIDTH = 5.0, 32


def captured(model: Any, **inputs: Any) -> Tensor:
    """What the first layer is given, minus what it is given without noise: (B, T, D)."""
    seen: list[Tensor] = []
    layers = model.get_base_model().model.layers if hasattr(model, "get_base_model") else model.model.layers
    hook = layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    model(**inputs, use_cache=False)
    training = model.training
    with torch.no_grad():
        model.eval()(**inputs, use_cache=False)
    model.train(training)
    hook.remove()
    return seen[0] - seen[-1]


def noisy(alpha: float = ALPHA) -> Any:
    """A model in training mode with the noise installed."""
    model = tiny_llama()
    assert enable_segments(model).packed
    install_noise(model, alpha)
    return model.train()


def table(*lengths: int) -> SegmentTable:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return SegmentTable(tuple(Segment(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)))


def is_uniform(noise: Tensor, bound: float) -> None:
    """U(−bound, bound): mean 0, variance bound²/3, fourth moment bound⁴/5, nothing outside."""
    assert noise.abs().max() <= bound * 1.001
    assert noise.abs().max() > 0.98 * bound
    scaled = noise / bound
    n = scaled.numel()
    assert abs(scaled.mean()) < 4 / (3 * n) ** 0.5
    assert scaled.square().mean() == pytest.approx(1 / 3, abs=4 * (4 / 45 / n) ** 0.5)
    assert scaled.pow(4).mean() == pytest.approx(1 / 5, abs=4 * (16 / 225 / n) ** 0.5)


def test_each_packed_example_has_noise_of_its_own_length() -> None:
    torch.manual_seed(0)
    lengths = (25, 400, 75)
    ids = torch.randint(4, 400, (1, 500))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    noise = captured(noisy(), input_ids=ids, position_ids=positions, segments=table(*lengths))
    for part, length in zip(noise[0].split(lengths), lengths, strict=True):
        is_uniform(part, ALPHA / (length * WIDTH) ** 0.5)


def test_shifted_groups_do_not_shorten_an_example() -> None:
    """α/√(L·d) with the L of the whole example, which is cut into groups of 8 and of 4 and 8; and the groups are there."""
    model = tiny_llama()
    assert install_shift(model, 8, enable_segments(model)) == ""
    install_noise(model, ALPHA)
    torch.manual_seed(0)
    lengths = (25, 400, 75)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    row = {"input_ids": torch.randint(4, 400, (1, 500)), "position_ids": positions, "segments": table(*lengths)}
    noise = captured(model.train(), **row)
    for part, length in zip(noise[0].split(lengths), lengths, strict=True):
        is_uniform(part, ALPHA / (length * WIDTH) ** 0.5)


def test_each_padded_row_has_noise_of_its_tokens() -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, 50:] = 0
    noise = captured(noisy(), input_ids=torch.randint(4, 400, (2, 200)), attention_mask=mask)
    is_uniform(noise[0], ALPHA / (200 * WIDTH) ** 0.5)
    is_uniform(noise[1, :50], ALPHA / (50 * WIDTH) ** 0.5)


def test_a_row_alone() -> None:
    torch.manual_seed(0)
    is_uniform(captured(noisy(), input_ids=torch.randint(4, 400, (1, 100)))[0], ALPHA / (100 * WIDTH) ** 0.5)


def test_a_shared_prompt_counts_with_the_longer_answer() -> None:
    shared = SegmentTable((Segment(0, 10), Segment(10, 14, 0), Segment(14, 20, 0), Segment(20, 23), Segment(23, 24, 3)))
    expected = [16] * 10 + [14] * 4 + [16] * 6 + [4] * 4
    assert example_lengths(shared, torch.device("cpu")).tolist() == [expected]


def test_none_in_evaluation_and_the_random_state_stays() -> None:
    model = noisy()
    ids = torch.randint(4, 400, (1, 30))
    plain = tiny_llama().eval()(ids).logits
    state = torch.get_rng_state()
    torch.testing.assert_close(model.eval()(ids).logits, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(model.train()(ids).logits, plain, atol=1e-4)


def test_it_follows_torchs_random_state() -> None:
    model, ids = noisy(), torch.randint(4, 400, (1, 30))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("trained_embedding", [False, True])
def test_inside_an_adapter_with_checkpointing_the_gradient_is_that_of_the_noisy_row(trained_embedding: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        saved = ["embed_tokens"] if trained_embedding else None
        model = get_peft_model(
            tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
        )
        install_noise(model, ALPHA)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(1)
        ids = torch.randint(4, 400, (1, 40))
        is_uniform(captured(model, input_ids=ids), ALPHA / (40 * WIDTH) ** 0.5)
        model.zero_grad()
        torch.manual_seed(2)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_bfloat16_keeps_its_type() -> None:
    model = tiny_llama().bfloat16().train()
    install_noise(model, ALPHA)
    noise = captured(model, input_ids=torch.randint(4, 400, (1, 100)))
    assert noise.dtype == torch.bfloat16
    assert noise.abs().max() > 0.9 * ALPHA / (100 * WIDTH) ** 0.5
