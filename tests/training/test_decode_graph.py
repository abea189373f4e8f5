"""The step over fixed buffers, as it is recorded on CUDA: the same answers as the step that grows. Here it runs unrecorded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from model.families import tiny
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.attention import enable_segments
from posttrain.model.logprobs import install_logprobs
from posttrain.training import decode_graph
from posttrain.training.decode_graph import FixedStep
from posttrain.training.rollout import RolloutFigures, generate
from posttrain.types import UserError
from training.test_rollout import GREEDY, SAMPLED, lively, random_prompts

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[FixedStep]:
    """Fixed buffers on the CPU; every step that is made is noted."""
    made: list[FixedStep] = []
    build = FixedStep.__init__

    def noted(self: FixedStep, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(FixedStep, "__init__", noted)
    return made


def ready(model: Any) -> Any:
    assert enable_segments(model).packed
    install_logprobs(model)
    return model


def growing(model: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
    """What the step says that grows its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_graph, "DEVICES", ())
        return [response.ids for response in generate(model, *args, **kwargs)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_of_the_growing_step(family: str, settings: Any, steps: list[FixedStep]) -> None:
    model, prompts = ready(tiny(family)), random_prompts()
    expected = growing(model, prompts, settings, seed=3)
    assert [response.ids for response in generate(model, prompts, settings, seed=3)] == expected
    assert len(steps) == 1
    assert len({len(ids) for ids in expected}) > 1, "all rows stop together: nothing is shown about those that stop early"


def test_later_batches_use_the_same_buffers(steps: list[FixedStep]) -> None:
    """Five prompts, two at a time: shorter ones, and a last batch of one row beside stale ones."""
    model, prompts = ready(lively()), random_prompts()
    settings = dataclasses.replace(SAMPLED, batch_rows=6)
    expected = growing(model, prompts, settings, seed=5)
    assert [response.ids for response in generate(model, prompts, settings, seed=5)] == expected
    assert len(steps) == 1


def test_the_adapter_counts(steps: list[FixedStep]) -> None:
    model = lively()
    plain = growing(ready(model), random_prompts(), GREEDY, seed=0)
    model = attach_lora(model, Lora())
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = growing(model, random_prompts(), GREEDY, seed=0)
    assert [response.ids for response in generate(model, random_prompts(), GREEDY, seed=0)] == expected != plain
    assert steps


def test_decoding_ends_soon_after_all_have_stopped(steps: list[FixedStep]) -> None:
    """Every token stops: one look after LOOK_EVERY tokens sees it."""
    figures = RolloutFigures()
    settings = dataclasses.replace(GREEDY, stop_ids=tuple(range(96)), max_new_tokens=64)
    rows = generate(ready(lively()), random_prompts(), settings, seed=0, figures=figures)
    assert [len(row.ids) for row in rows] == [1] * 5
    assert figures.forward_passes == 1 + decode_graph.LOOK_EVERY


@pytest.mark.parametrize("family", ["mistral", "bloom", "gemma3_text"])
def test_a_window_or_positions_of_its_own_keep_the_growing_step(family: str, steps: list[FixedStep]) -> None:
    model = tiny(family)
    enable_segments(model)
    install_logprobs(model)
    generate(model, random_prompts(), GREEDY, seed=0)
    assert not steps


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_recorded_is_told_and_decoded_otherwise(
    kind: type[Exception], steps: list[FixedStep], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompts = ready(lively()), random_prompts()
    expected = growing(model, prompts, GREEDY, seed=0)

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise kind("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(FixedStep, "__init__", fail)
    settings = dataclasses.replace(GREEDY, batch_rows=2)
    assert [response.ids for response in generate(model, prompts, settings, seed=0)] == expected
    told = [record.message for record in caplog.records if "recorded" in record.message]
    assert len(told) == 1
    assert told[0].endswith("(operation not permitted when stream is capturing)")


def test_logits_that_are_no_numbers_are_refused(steps: list[FixedStep]) -> None:
    model = ready(lively())
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="training has diverged"):
        generate(model, random_prompts(), GREEDY, seed=0)
    assert steps


@CUDA
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_recorded_step_gives_the_same_answers(family: str) -> None:
    model, prompts = ready(tiny(family).cuda()), random_prompts()
    settings = dataclasses.replace(SAMPLED, batch_rows=6)
    expected = growing(model, prompts, settings, seed=3)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        run = FixedStep.run
        patch.setattr(FixedStep, "run", lambda self, *args: seen.append(self._graph) or run(self, *args))  # type: ignore[func-returns-value]
        got = [response.ids for response in generate(model, prompts, settings, seed=3)]
    assert got == expected
    assert seen
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in seen)
