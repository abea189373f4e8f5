"""What `generate` and `chat` share: a model ready to answer, and an answer from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from posttrain import flags
from posttrain.commands.forward import chosen_rope, say_rope
from posttrain.commands.report import say
from posttrain.data.template import apply_template, stop_token_ids
from posttrain.model.adapter import load_adapter
from posttrain.model.load import DType, check_tokenizer, check_vocabulary, load_model, load_tokenizer, resize_embeddings
from posttrain.model.merge import merge_tokenizer_folder
from posttrain.model.own_generation import keeps_cache, pads_left, settle_generation
from posttrain.model.quantize import Quantization, quantization_of
from posttrain.model.rope import RopeScaling, context_tokens
from posttrain.training.resolve_context import check_factor
from posttrain.types import Message, UserError

StopReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answerer:
    """A model in evaluation mode on its device, and the tokenizer it was trained with. `context_tokens`: prompt and answer."""

    model: Any
    tokenizer: Any
    context_tokens: int


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token. "length": the limit of new tokens or the context ended it."""

    ids: list[int]
    text: str
    stop_reason: StopReason


@dataclass(frozen=True)
class Loading:
    """How a base is read. `rope`: how its positions are to be stretched, else as its adapter says."""

    trust_remote_code: bool = False
    quantization: Quantization | None = None
    rope: RopeScaling | None = None


def loading_of(chosen: flags.InferenceFlags) -> Loading:
    """What the flags say. Raises UserError for what would do nothing or lacks its other half."""
    check_factor(chosen.rope_scaling, chosen.rope_factor)
    if chosen.rope_scaling and chosen.rope_factor is None:
        raise UserError(f"--rope_scaling {chosen.rope_scaling}: say by how much with --rope_factor")
    rope = RopeScaling(chosen.rope_scaling, chosen.rope_factor) if chosen.rope_scaling else None
    return Loading(chosen.trust_remote_code, quantization_of(chosen.load_in_4bit, chosen.load_in_8bit, double=True), rope)


def answerer_of(chosen: flags.InferenceFlags) -> Answerer:
    """The model that the flags name."""
    answerer = load_answerer(
        chosen.base_model, chosen.lora_model, tokenizer_path=chosen.tokenizer_path, template_name=chosen.template_name,
        dtype=chosen.dtype, how=loading_of(chosen),
    )  # fmt: skip
    say_rope(answerer.model)
    return answerer


def load_answerer(
    base_model: str,
    lora_model: str | None = None,
    *,
    tokenizer_path: str | None = None,
    template_name: str | None = None,
    dtype: DType = "auto",
    how: Loading = Loading(),
) -> Answerer:
    """The model, with its adapter unmerged where one is named, spread over the GPUs where there are any.

    The tokenizer is the named one, else the adapter's, else the model's; padding is on the left.
    """
    trust_remote_code = how.trust_remote_code
    folder = merge_tokenizer_folder(base_model, lora_model, tokenizer_path) if lora_model else tokenizer_path or base_model
    tokenizer = load_tokenizer(folder, padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer_path:
        check_tokenizer(tokenizer, tokenizer_path, "--tokenizer_path", base_model, trust_remote_code=trust_remote_code)
    apply_template(tokenizer, template_name)
    device_map = "auto" if torch.cuda.is_available() else None
    model: Any = load_model(
        base_model, dtype, quantization=how.quantization, trust_remote_code=trust_remote_code, device_map=device_map,
        rope=chosen_rope(how.rope, lora_model, "--lora_model"),
    )  # fmt: skip
    if lora_model:
        resize_embeddings(model, tokenizer)
    check_vocabulary(model, tokenizer)
    model.generation_config = GenerationConfig()  # a folder's own sampling settings would mix with the flags
    for found in settle_generation(model):
        say(f"generation: {found}")
    if lora_model:
        model = load_adapter(model, lora_model, trainable=False)
    return Answerer(model.eval(), tokenizer, context_tokens(model.config) or tokenizer.model_max_length)


def check_sampling(sampling: flags.SamplingFlags) -> None:
    """Raises UserError for settings outside their range."""
    ranges = {
        "max_new_tokens": sampling.max_new_tokens >= 1,
        "temperature": sampling.temperature >= 0,
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= 0,
        "repetition_penalty": sampling.repetition_penalty > 0,
    }
    for name, fits in ranges.items():
        if not fits:
            raise UserError(f"--{name} {getattr(sampling, name)}: outside its range")


def with_system(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The conversation, begun by the system prompt unless it has a system turn of its own."""
    has_own = bool(messages) and messages[0].role == "system"
    return tuple(messages) if has_own or not system_prompt else (Message("system", system_prompt), *messages)


def answer(answerer: Answerer, prompts: Sequence[list[int]], sampling: flags.SamplingFlags, streamer: Any = None) -> list[Answer]:
    """One answer per prompt, generated as one batch. The caller seeds; `temperature` 0 is greedy and needs no seed.

    A prompt must leave room for at least one token of the context.
    """
    if len(prompts) > 1 and not pads_left(answerer.model):
        return [found for prompt in prompts for found in answer(answerer, [prompt], sampling, streamer)]
    tokenizer, longest = answerer.tokenizer, max(map(len, prompts))
    stops = stop_token_ids(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, answerer.context_tokens - longest),
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p if sampling.temperature > 0 else None,
        top_k=sampling.top_k if sampling.temperature > 0 else None,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=keeps_cache(answerer.model),
    )
    device = answerer.model.device
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        out = answerer.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings, streamer=streamer
        )
    return [finished(tokenizer, row, stops) for row in out[:, longest:].tolist()]


def finished(tokenizer: Any, new_ids: list[int], stops: Sequence[int]) -> Answer:
    """The ids up to the first stop token. Padding behind it is never looked at, so it may be any token."""
    end = next((i for i, token in enumerate(new_ids) if token in stops), None)
    kept = new_ids[:end]
    # Special tokens inside an answer (a call's marks, say) are part of what was said.
    return Answer(kept, tokenizer.decode(kept, skip_special_tokens=False), "length" if end is None else "stop")
