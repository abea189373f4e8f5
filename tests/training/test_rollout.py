"""Generation for PPO: greedy is transformers' greedy, samples follow the model's distribution and hang on nothing but their own numbers."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from adapters import stir
from conftest import tiny_llama
from model.families import tiny
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.logprobs import install_logprobs
from posttrain.training import decode
from posttrain.training.rollout import Response, RolloutFigures, Sampling, generate, through_stop
from posttrain.types import UserError

STOPS = (7, 8, 9, 10, 11, 12)
GREEDY = Sampling(max_new_tokens=20, stop_ids=STOPS, pad_id=0, temperature=0)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, num_generations=3)


def random_prompts(lengths: tuple[int, ...] = (3, 17, 9, 12, 5), vocab: int = 96) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def library_greedy(model: Any, prompt: list[int], settings: Sampling) -> list[int]:
    """transformers' own answer to one prompt alone: no padding at all."""
    how = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=list(settings.stop_ids), pad_token_id=0
    )
    ids = torch.tensor([prompt])
    out: list[int] = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)[0].tolist()
    return out[len(prompt) :]


def lively(**changes: Any) -> Any:
    """A llama whose logits are far from uniform."""
    model = tiny_llama(vocab=96, **changes)
    stir(model, 0.2)
    return model


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixtral", "gemma3_text", "bloom"])
@pytest.mark.parametrize("packed", [False, True])
def test_greedy_is_the_librarys(family: str, packed: bool) -> None:
    model = tiny(family)
    prompts = random_prompts()
    expected = [library_greedy(model, prompt, GREEDY) for prompt in prompts]
    if packed:
        enable_segments(model)
        install_logprobs(model)
    figures = RolloutFigures()
    got = generate(model, prompts, GREEDY, seed=0, figures=figures)
    assert [response.ids for response in got] == expected
    assert [response.stopped for response in got] == [ids[-1] in STOPS for ids in expected]
    assert {len(ids) for ids in expected} != {1}, "nothing was decoded with the cache"
    assert figures.new_tokens == sum(map(len, expected))
    assert figures.responses == len(prompts)


def test_a_sliding_window_is_shorter_than_what_is_decoded() -> None:
    """Or the test above would not see one."""
    lengths = [len(p) + len(library_greedy(tiny("mistral"), p, GREEDY)) for p in random_prompts()]
    assert max(lengths) > 2 * tiny("mistral").config.sliding_window


def test_a_model_without_such_a_cache_is_left_to_the_library(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("minimax")
    prompts = random_prompts()
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        got = generate(model, prompts, dataclasses.replace(GREEDY, num_generations=2), seed=0)
    assert [r.ids for r in got] == [library_greedy(model, p, GREEDY) for p in prompts for _ in range(2)]
    assert [r.message for r in caplog.records if "MiniMax" in r.message]
    sampled = [generate(model, prompts, SAMPLED, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(sampled[0]) == 3 * len(prompts)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- the distribution


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean; counts outside the support make it infinite."""
    if counts[probabilities == 0].sum():
        return math.inf
    kept = probabilities > 0
    expected = probabilities[kept] * counts.sum()
    freedom = int(kept.sum()) - 1
    return float((((counts[kept] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def expected_probabilities(logits: torch.Tensor, settings: Sampling) -> torch.Tensor:
    """Temperature, then the k largest, then the smallest set of them that holds top_p. Written down plainly."""
    probabilities = torch.exp(logits.double() / settings.temperature)
    order = probabilities.argsort(descending=True)
    if settings.top_k:
        probabilities[order[settings.top_k :]] = 0
    probabilities /= probabilities.sum()
    held = 0.0
    for token in order:
        if held >= settings.top_p:
            probabilities[token] = 0
        held += float(probabilities[token])
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.9}, {"temperature": 1.5, "top_k": 8, "top_p": 0.9}]
)
def test_samples_follow_the_models_distribution(changes: dict[str, Any]) -> None:
    """The first token, and the second given the most frequent first: the cache after `take` holds the right rows."""
    model = tiny_llama(vocab=12).eval()
    stir(model, 0.2)
    n = 6000
    settings = Sampling(2, (), 0, num_generations=n, **changes)
    got = torch.tensor([response.ids for response in generate(model, [[3, 5, 1]], settings, seed=11)])
    with torch.no_grad():
        first = expected_probabilities(model(input_ids=torch.tensor([[3, 5, 1]])).logits[0, -1], settings)
        common = int(got[:, 0].mode().values)
        second = expected_probabilities(model(input_ids=torch.tensor([[3, 5, 1, common]])).logits[0, -1], settings)
        other = expected_probabilities(model(input_ids=torch.tensor([[3, 5, 1, common]])).logits[0, -1], Sampling(1, (), 0))
    assert abs(chi_square(got[:, 0].bincount(minlength=12), first)) < 4
    followers = got[got[:, 0] == common, 1].bincount(minlength=12)
    assert abs(chi_square(followers, second)) < 4
    if changes:
        assert chi_square(followers, other) > 8, "the test would not notice a setting that does nothing"


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_chosen(u: float) -> None:
    logits = torch.full((1, 1000), -math.inf)
    logits[0, 400:500] = torch.randn(100, generator=torch.Generator().manual_seed(0))
    token = int(decode.chooser(1.0, 0, 1.0)(logits, torch.tensor([u], dtype=torch.float64)))
    assert 400 <= token < 500
    assert (token == 400) == (u == 0.0)
    assert (token == 499) == (u > 0.9)


# ---------------------------------------------------------------- what a sample depends on


def test_samples_do_not_hang_on_the_batching() -> None:
    model, prompts = lively(), random_prompts()
    base = generate(model, prompts, SAMPLED, seed=5)
    assert len({tuple(r.ids) for r in base}) > len(prompts), "generations of a prompt differ"
    for rows in (1, 2, 6, 7):
        assert generate(model, prompts, dataclasses.replace(SAMPLED, batch_rows=rows), seed=5) == base
    assert generate(model, prompts, SAMPLED, seed=6) != base


def test_samples_do_not_hang_on_the_order_or_the_ranks() -> None:
    model, prompts = lively(), random_prompts()
    base = generate(model, prompts, SAMPLED, seed=5, numbers=range(40, 45))
    ranks = [generate(model, prompts[r::2], SAMPLED, seed=5, numbers=list(range(40, 45))[r::2]) for r in (0, 1)]
    for i in range(len(prompts)):
        assert ranks[i % 2][3 * (i // 2) : 3 * (i // 2) + 3] == base[3 * i : 3 * i + 3]
    fewer = generate(model, prompts, dataclasses.replace(SAMPLED, num_generations=1), seed=5, numbers=range(40, 45))
    assert fewer == base[::3]
    assert generate(model, prompts, SAMPLED, seed=5) != base


def test_the_limit_of_new_tokens_only_cuts() -> None:
    model, prompts = lively(), random_prompts()
    long = generate(model, prompts, SAMPLED, seed=5)
    short = generate(model, prompts, dataclasses.replace(SAMPLED, max_new_tokens=4), seed=5)
    assert short == [Response(r.ids[:4], r.stopped and len(r.ids) <= 4) for r in long]
    assert {r.stopped for r in short} == {True, False}


@pytest.mark.parametrize("pad_id", [1, STOPS[0], 50])
def test_padding_may_be_any_token(pad_id: int) -> None:
    model, prompts = lively(), random_prompts()
    prompts[0] = [pad_id, 50, STOPS[0], pad_id]
    settings = dataclasses.replace(SAMPLED, pad_id=pad_id)
    alone = [r for i, p in enumerate(prompts) for r in generate(model, [p], settings, seed=5, numbers=[i])]
    assert generate(model, prompts, settings, seed=5) == alone


# ---------------------------------------------------------------- what is computed


class Watch:
    """Records what a causal model's decoder is given."""

    def __init__(self, model: Any):
        self.calls: list[dict[str, Any]] = []
        model.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.calls.append({k: v.clone() if torch.is_tensor(v) else v for k, v in kwargs.items()})


def test_generations_share_the_prompts_keys_and_values() -> None:
    model, prompts = lively(), random_prompts()
    watch, figures = Watch(model), RolloutFigures()
    settings = Sampling(6, (), 0, num_generations=4)
    generate(model, prompts, settings, seed=0, figures=figures)
    shapes = [tuple(call["input_ids"].shape) for call in watch.calls]
    assert shapes == [(5, 17)] + [(20, 1)] * 5, "the last token of a response needs no forward"
    assert figures.forward_passes == 6
    assert figures.forward_tokens == 5 * 17 + 5 * 20
    assert figures.prompt_tokens == sum(map(len, prompts))
    assert figures.new_tokens == 20 * 6
    assert figures.tokens_per_second > 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_prompts_cost_no_padding(family: str) -> None:
    model, prompts = tiny(family), random_prompts()
    settings = Sampling(6, (), 0, num_generations=4)
    plain = generate(model, prompts, settings, seed=0)
    enable_segments(model)
    watch, figures = Watch(model), RolloutFigures()
    assert generate(model, prompts, settings, seed=0, figures=figures) == plain
    assert [tuple(call["input_ids"].shape) for call in watch.calls] == [(1, 46)] + [(20, 1)] * 5
    assert figures.forward_tokens == figures.prompt_tokens + 5 * 20


def test_positions_count_real_tokens() -> None:
    model = lively()
    watch = Watch(model)
    generate(model, [[5, 6], [5, 6, 13, 14]], Sampling(3, (), 0), seed=0)
    positions = [call["position_ids"].tolist() for call in watch.calls]
    assert positions == [[[0, 1, 2, 3], [0, 0, 0, 1]], [[4], [2]], [[5], [3]]]
    masks = [call["attention_mask"].tolist() for call in watch.calls]
    assert masks[0] == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert masks[2] == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


def test_a_batch_ends_when_all_rows_have_stopped() -> None:
    model = lively()
    figures = RolloutFigures()
    got = generate(model, random_prompts(), Sampling(50, tuple(range(96)), 0), seed=0, figures=figures)
    assert all(r.stopped and len(r.ids) == 1 for r in got)
    assert figures.forward_passes == 1


def test_rows_that_have_stopped_leave_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SAMPLED, stop_ids=tuple(range(7, 30)))
    shares = (decode.LEAVE_SHARE, 1e-9, 2.0)
    for family, changes in (("llama", {}), ("mistral", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})):
        model, prompts = tiny(family, **changes), random_prompts((3, 17, 9, 12, 5, 8, 8, 4))
        answers, computed = [], []
        for share in shares:
            monkeypatch.setattr(decode, "LEAVE_SHARE", share)
            figures = RolloutFigures()
            answers.append(generate(model, prompts, settings, seed=3, figures=figures))
            computed.append(figures.forward_tokens)
        assert answers[0] == answers[1] == answers[2]
        assert computed[1] <= computed[0] < computed[2]


def test_a_layer_with_room_holds_what_the_librarys_does() -> None:
    roomy, plain = decode.RoomyLayer(), decode.DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    rows = 3
    for step, tokens in enumerate([5, 1, 1, decode.ROOM_TOKENS, 1, 3 * decode.ROOM_TOKENS, 1]):
        states = torch.randn(2, rows, 2, tokens, 4, generator=generator)
        got, expected = roomy.update(*states), plain.update(*states)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        if step == 2:
            chosen = torch.tensor([2, 0, 0, 1, 2])
            for layer in (roomy, plain):
                layer.reorder_cache(chosen)
            rows = len(chosen)
    assert roomy.get_seq_length() == plain.get_seq_length()


# ---------------------------------------------------------------- models as PPO has them


def test_the_active_adapter_speaks_and_nothing_is_left_behind() -> None:
    prompts = random_prompts()
    model = attach_lora(lively(), Lora(rank=4, dropout=0.5))
    stir(model, 0.3)
    model.add_adapter("reward", model.peft_config["default"])
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    answers = {}
    for adapter in ("default", "other", "reward"):
        model.set_adapter(adapter)
        answers[adapter] = generate(model, prompts, GREEDY, seed=0)
    with model.disable_adapter():
        assert generate(model, prompts, GREEDY, seed=0) == answers["reward"], "a new adapter adds nothing"
    assert answers["default"] != answers["other"] != answers["reward"] != answers["default"]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert [r.ids for r in answers["default"]] == [library_greedy(merged, p, GREEDY) for p in prompts]


def test_our_attention_logprobs_and_fused_modules_change_nothing() -> None:
    prompts = random_prompts()
    model = attach_lora(lively(), Lora(rank=4))
    stir(model, 0.3)
    plain = generate(model, prompts, SAMPLED, seed=2)
    assert enable_segments(model).packed
    install_logprobs(model)
    assert "gated MLP" in fuse(model)
    assert generate(model, prompts, SAMPLED, seed=2) == plain


def test_gradient_checkpointing_and_a_config_without_cache_do_not_matter() -> None:
    model, prompts = lively(), random_prompts()
    plain = generate(model, prompts, SAMPLED, seed=2)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    assert generate(model, prompts, SAMPLED, seed=2) == plain


# ---------------------------------------------------------------- faults


def test_logits_that_are_no_numbers_are_told() -> None:
    model = lively()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for settings in (GREEDY, SAMPLED):
        with pytest.raises(UserError, match="not numbers"):
            generate(model, random_prompts(), dataclasses.replace(settings, stop_ids=()), seed=0)


@pytest.mark.parametrize(
    "changes",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"num_generations": 0}, {"batch_rows": 0}],
)
def test_settings_outside_their_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        dataclasses.replace(SAMPLED, **changes)


def test_odd_inputs() -> None:
    assert generate(lively(), [], SAMPLED, seed=0) == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(lively(), [[5], []], SAMPLED, seed=0)
    assert through_stop([1, 2, 3, 2], (2,)) == [1, 2]
    assert through_stop([1, 3], (2,)) == [1, 3]
    assert through_stop([], (2,)) == []
