"""Responses to prompts for PPO: batches sorted by length, prompts computed once, samples that do not depend on the batching."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from posttrain.model.attention import evaluation, unwrap
from posttrain.model.own_generation import keeps_cache, pads_left
from posttrain.training.decode import Continuation, can_continue, chooser, decode, left_pad, prefilled
from posttrain.training.decode_graph import Recorder
from posttrain.types import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. PPO's ratio compares like with like only at top_p 1 and top_k 0; the temperature is in its log-probs."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]  # any of them ends a response
    pad_id: int  # fills up rows; may be any token, masks decide what is padding
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    num_generations: int = 1  # responses per prompt
    batch_rows: int = 64  # responses decoded at once; those of one prompt stay together

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        ranges = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "num_generations": self.num_generations >= 1,
            "batch_rows": self.batch_rows >= 1,
        }
        for name, fits in ranges.items():
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: outside its range")


@dataclass(frozen=True)
class Response:
    """Token ids with the stop token, if one came (`stopped`); else it was cut at the limit of new tokens."""

    ids: list[int]
    stopped: bool


@dataclass
class RolloutFigures:
    """What generation did; `generate` adds to it."""

    responses: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0  # computed once for all generations of a prompt; padding not counted
    forward_passes: int = 0
    forward_tokens: int = 0  # computed in all, with padding and with rows that had stopped and not yet left
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of generation."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    settings: Sampling,
    seed: int,
    *,
    numbers: Sequence[int] | None = None,
    figures: RolloutFigures | None = None,
    after_batch: Callable[[int], Any] = lambda _: None,
) -> list[Response]:
    """Responses in the prompts' order, `num_generations` after one another for each. The adapter that is active is used.

    A response depends on (`seed`, the number of its prompt, its generation, the model) alone, up to rounding: not on the batch that
    it is decoded in. `numbers` are the prompts' numbers in the whole run, over ranks and steps (default: 0, 1, …), so that `seed` and
    a count are all that a resumed run needs. `after_batch` is told how many responses there are now more. Raises UserError when the
    logits are no numbers.
    """
    started = time.perf_counter()
    figures = RolloutFigures() if figures is None else figures
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {empty[0]} has no tokens")
    numbers = range(len(prompts)) if numbers is None else numbers
    continues = can_continue(model)
    if not continues:
        logger.warning(
            "%s keeps no keys and values that rows can leave: transformers generates, slower", type(unwrap(model)).__name__
        )
    order = sorted(
        range(len(prompts)), key=lambda i: -len(prompts[i])
    )  # the longest first: memory that does not suffice shows early
    batch_prompts = max(1, settings.batch_rows // settings.num_generations) if pads_left(model) else 1
    answers: dict[int, list[list[int]]] = {}
    choose = chooser(settings.temperature, settings.top_k, settings.top_p)
    recorder = Recorder(model, choose, settings.stop_ids)
    with evaluation(model):
        for start in range(0, len(order), batch_prompts):
            batch = order[start : start + batch_prompts]
            texts, streams = [prompts[i] for i in batch], [numbers[i] for i in batch]
            if continues:
                rows = _decode(model, texts, settings, uniform(seed, streams, settings), recorder, figures)
            else:
                rows = _library(model, texts, settings, seed + streams[0])
            k = settings.num_generations
            answers |= {i: rows[k * b : k * (b + 1)] for b, i in enumerate(batch)}
            after_batch(len(rows))
    responses = [Response(ids, bool(ids) and ids[-1] in settings.stop_ids) for i in range(len(prompts)) for ids in answers[i]]
    figures.responses += len(responses)
    figures.new_tokens += sum(len(response.ids) for response in responses)
    figures.prompt_tokens += sum(map(len, prompts))
    figures.seconds += time.perf_counter() - started
    return responses


def uniform(seed: int, numbers: Sequence[int], settings: Sampling) -> Tensor:
    """Random numbers in [0, 1), (prompts · generations, new tokens), in float64. Each row has a stream of its own."""
    shape = range(settings.num_generations)
    rows = [np.random.default_rng((seed, n, g)).random(settings.max_new_tokens) for n in numbers for g in shape]
    return torch.from_numpy(np.stack(rows))


def _decode(
    model: nn.Module, prompts: list[list[int]], settings: Sampling, uniform_BR: Tensor, recorder: Recorder, figures: RolloutFigures
) -> list[list[int]]:  # fmt: skip
    batch = Continuation(model, prompts, settings.pad_id, settings.max_new_tokens)
    uniform_BR = uniform_BR.to(unwrap(model).device)
    logits_BV = prefilled(batch, len(uniform_BR))
    step = recorder.step(batch, logits_BV.shape[-1], settings.max_new_tokens)
    if step is not None:
        rows = step.run(batch, logits_BV, uniform_BR)
    else:
        rows = decode(batch, logits_BV, uniform_BR, settings.stop_ids, recorder.choose)
    figures.forward_passes += batch.forward_passes
    figures.forward_tokens += batch.forward_tokens
    return rows


def _library(model: nn.Module, prompts: list[list[int]], settings: Sampling, seed: int) -> list[list[int]]:
    """The same by transformers; the samples of a batch hang together. The global random state is left as it was."""
    core = unwrap(model)
    ids_BT, mask_BT = left_pad(prompts, settings.pad_id, core.device)
    sampled = settings.temperature > 0
    how = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampled,
        temperature=float(settings.temperature) if sampled else None,
        top_p=settings.top_p if sampled else None,
        top_k=settings.top_k if sampled else None,
        num_return_sequences=settings.num_generations if sampled else 1,
        eos_token_id=list(settings.stop_ids) or None,
        pad_token_id=settings.pad_id,
        use_cache=keeps_cache(model),
    )
    with torch.random.fork_rng(devices=[core.device] if core.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = core.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=how)
    rows = [through_stop(row, settings.stop_ids) for row in out[:, ids_BT.shape[1] :].tolist()]
    return rows if sampled else [row for row in rows for _ in range(settings.num_generations)]


def through_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids through the first stop token. What stands behind it is never looked at, so it may be any token."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]
