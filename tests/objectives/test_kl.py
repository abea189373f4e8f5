"""Estimates of the divergence and the controllers of its weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.objectives.kl import AdaptiveKl, Estimator, FixedKl, KlController, kl_estimate


def two_policies() -> tuple[Tensor, Tensor]:
    log_p_V, log_q_V = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    return log_p_V, log_q_V


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased(kind: Estimator) -> None:
    """The mean over all words, weighted by p, is the divergence of p from q, not of q from p."""
    log_p_V, log_q_V = two_policies()
    exact = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    torch.testing.assert_close((log_p_V.exp() * kl_estimate(log_p_V, log_q_V, kind)).sum(), exact)


def test_values_by_hand() -> None:
    p, q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert float(kl_estimate(p, q, "k1")) == pytest.approx(math.log(2))
    assert float(kl_estimate(p, q, "k2")) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(kl_estimate(p, q, "k3")) == pytest.approx(0.5 - 1 + math.log(2))


def test_small_differences_keep_their_digits() -> None:
    """k3 ≈ d²/2: in single precision exp(d) − 1 would lose it."""
    d = 1e-3
    assert float(kl_estimate(torch.zeros(1), torch.tensor([d]), "k3")) == pytest.approx(d * d / 2, rel=1e-3)


def test_the_gradient_of_k3_as_a_loss_is_that_of_the_reversed_divergence() -> None:
    """What the docstring says: E_p[∇k3] = ∇KL(q‖p)."""
    _, log_q_V = two_policies()
    logits_V = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    log_p_V = logits_V.log_softmax(-1)
    (log_p_V.detach().exp() * kl_estimate(log_p_V, log_q_V, "k3")).sum().backward()
    got_V = logits_V.grad
    again_V = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    (log_q_V.exp() * (log_q_V - again_V.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(got_V, again_V.grad)


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2), (math.inf, 0.0), (math.nan, 0.0)],
)
def test_adaptive_controller(kl: float, error: float) -> None:
    """Proportional to the relative error, clipped to ±0.2; not moved by what is not a number."""
    controller = AdaptiveKl(0.2, target=6.0, horizon=1000)
    controller.update(kl, 100)
    assert controller.coef == pytest.approx(0.2 * (1 + error * 0.1))


def test_adaptive_controller_reaches_its_target() -> None:
    """A system whose KL is inverse to the weight settles where the KL is the target."""
    controller = AdaptiveKl(1.0, target=6.0, horizon=500)
    for _ in range(300):
        controller.update(1.2 / controller.coef, 64)
    assert 1.2 / controller.coef == pytest.approx(6.0, rel=0.01)


def test_a_weight_never_turns_negative() -> None:
    controller = AdaptiveKl(0.2, target=6.0, horizon=10)
    controller.update(0.0, 100_000)
    assert controller.coef == pytest.approx(0.2 * 0.8)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10.0), (-1.0, 10.0), (6.0, 0.0)])
def test_impossible_settings(target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKl(0.2, target, horizon)


def test_fixed_controller() -> None:
    controller = FixedKl(0.05)
    controller.update(1000.0, 1000)
    assert controller.coef == 0.05


@pytest.mark.parametrize("make", [lambda: FixedKl(0.3), lambda: AdaptiveKl(0.3, 6.0, 100)])
def test_state_goes_on(make: type) -> None:
    """Saved, loaded into a fresh one, both go the same way."""
    first: KlController = make()
    first.update(20.0, 30)
    second: KlController = make()
    second.coef = 99.0
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(1.0, 10)
    assert first.coef == second.coef
