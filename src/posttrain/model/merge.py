"""Adapter + base → one plain model folder, with a certificate that it answers like the two together (certificate.py).

The sum is computed in float32 and rounded once, to the type that is written: tensor by tensor (merge_stream.py) where the adapter is a LoRA
or DoRA of linear layers, else with the whole model in memory.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from posttrain.model.adapter import adapter_rope, is_reward_adapter, load_adapter, read_adapter_config
from posttrain.model.certificate import PROMPTS, Certificate, References, certify, compare, logits
from posttrain.model.embedded import resolve_model
from posttrain.model.load import DType, load_model, read_config, resize_embeddings
from posttrain.model.merge_plan import Stream, open_stream
from posttrain.model.merge_stream import padded, read_back, read_scores, references, write_stream
from posttrain.model.reward import has_score_head, load_reward_model, score_head, set_padding
from posttrain.model.rope import scale_rope
from posttrain.model.score_certificate import ScoreCertificate, certify_scores, compare_scores, token_scores
from posttrain.types import UserError

logger = logging.getLogger(__name__)

CERTIFICATE = "merge_certificate.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def merge_tokenizer_folder(base: str, adapter: str, tokenizer_path: str | None = None) -> str:
    """Whose tokenizer the merged model gets: the named one, else the one trained with (the adapter's), else the base's."""
    if tokenizer_path:
        return tokenizer_path
    return adapter if any((Path(adapter) / file).is_file() for file in TOKENIZER_FILES) else base


def merge_adapter(
    base: str,
    adapter: str,
    output: Path,
    tokenizer: Any,
    *,
    resize_emb: bool = False,
    dtype: DType = "auto",
    write: WriteOptions | None = None,
) -> Certificate | ScoreCertificate:
    """Write `output`: weights, config, stop tokens, tokenizer with its template, certificate. Nothing is left there on failure.

    The adapter of a reward model makes a reward model. `dtype` "auto" is the base's own. Raises UserError for a quantised base, an adapter of another base or kind, a vocabulary
    that needs `resize_emb`; RuntimeError when the certificate fails.
    """
    write = write or WriteOptions()
    check_output(output, base, adapter, write.overwrite)
    settings = read_adapter_config(adapter)
    config = read_config(base, write.trust_remote_code, score_head=is_reward_adapter(settings))
    check_mergeable(base, config, settings, adapter)
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    names = (base, adapter, stored if dtype == "auto" else dtype)
    if (rope := adapter_rope(adapter)) is not None:
        scale_rope(config, rope)
    stream = open_stream(base, adapter, settings, config, len(tokenizer))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        if isinstance(stream, str):
            logger.info("merge: the whole model is loaded, because %s", stream)
            certificate = _merge_whole(Path(work), names, tokenizer, resize_emb, write)
        else:
            check_rows(stream.base_rows, tokenizer, adapter, resize_emb)
            certificate = _merge_stream(Path(work), names, tokenizer, stream, write)
        if not certificate.ok:
            raise RuntimeError(f"the merged model is not base + adapter; nothing was written\n{certificate}")
        content = {**asdict(certificate), "adapter_kept": certificate.kept, "ok": certificate.ok}
        (Path(work) / CERTIFICATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _move(Path(work), output)
    return certificate


Names = tuple[str, str, str]  # base, adapter and the type that is written


def _merge_stream(
    work: Path, names: Names, tokenizer: Any, stream: Stream, write: WriteOptions
) -> Certificate | ScoreCertificate:
    """Tensor by tensor; the certificate layer by layer, on the texts as one padded batch."""
    batch = padded(prompt_ids(tokenizer), tokenizer.pad_token_id or 0)
    found = references(stream, batch)
    model = stream.model
    if not stream.scores:
        model.config.tie_word_embeddings = stream.tied
        if Path(stream.folder, GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(stream.folder)
    _set_stops(model, tokenizer, write.stop_token_ids)
    write_stream(stream, work, getattr(torch, names[2]), write.max_shard_size)
    tokenizer.save_pretrained(work)
    again = AutoTokenizer.from_pretrained(work)
    if stream.scores:
        scores, written, theirs = read_scores(work, batch)
        return compare_scores(names, (tokenizer, again), found, scores, written, theirs)
    actual, written = read_back(work, batch)
    return compare(names, (tokenizer, again), found, actual, written)


def _merge_whole(
    work: Path, names: Names, tokenizer: Any, resize_emb: bool, write: WriteOptions
) -> Certificate | ScoreCertificate:
    """All in memory, in float32."""
    base, adapter, written = names
    reward = is_reward_adapter(read_adapter_config(adapter))
    load = load_reward_model if reward else load_model
    model = load(base, "float32", trust_remote_code=write.trust_remote_code, rope=adapter_rope(adapter))
    check_rows(model.get_input_embeddings().weight.shape[0], tokenizer, adapter, resize_emb)
    resize_embeddings(model, tokenizer)
    adapted = load_adapter(model, adapter, trainable=False).eval()
    ids = prompt_ids(tokenizer)
    merged, found = _sum(adapted, adapter, ids)
    _set_stops(merged, tokenizer, write.stop_token_ids)
    _round(merged, getattr(torch, written)).save_pretrained(work, max_shard_size=write.max_shard_size)
    tokenizer.save_pretrained(work)
    del model, adapted, merged  # the reading back needs the memory
    gc.collect()
    return (certify_scores if reward else certify)(work, names, tokenizer, ids, found, write.trust_remote_code)


def prompt_ids(tokenizer: Any) -> list[torch.Tensor]:
    """Ids of the texts that certificates are made of, each (1, T)."""
    return [ids for prompt in PROMPTS if (ids := tokenizer(prompt, return_tensors="pt")["input_ids"]).numel()]


@dataclass(frozen=True)
class WriteOptions:
    """How the folder is written. `stop_token_ids`: where generation ends (None: at the tokenizer's end token)."""

    max_shard_size: str = "5GB"
    overwrite: bool = False  # into a folder that is not empty
    trust_remote_code: bool = False
    stop_token_ids: tuple[int, ...] | None = None


def check_output(output: Path, base: str, adapter: str, overwrite: bool) -> None:
    """Raises UserError where the merged model would destroy what it is made from, or something else."""
    for flag, source in (("--base_model", resolve_model(base)), ("--lora_model", adapter)):
        if Path(source).exists() and output.resolve() == Path(source).resolve():
            raise UserError(f"--output_dir {output}: is {flag} itself; name another folder")
    if output.is_file():
        raise UserError(f"--output_dir {output}: is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"--output_dir {output}: is not empty; name another folder or use --overwrite_output_dir True")


def check_mergeable(base: str, config: Any, settings: dict[str, Any], adapter: str) -> None:
    """Raises UserError where a sum of weights is not defined or would be rounded away."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        raise UserError(
            f"--base_model {base}: its weights are stored quantised ({getattr(method, 'value', method)}); rounding the sum to that"
            " grid would lose the adapter: name the full-precision model it was made from"
        )
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"--lora_model {adapter}: is a {settings.get('peft_type')} adapter; only LoRA can be added to the weights"
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise UserError(
            f"--lora_model {adapter}: is an adapter for {settings['task_type']}, not for a causal language model or a reward model"
        )


def check_rows(rows: int, tokenizer: Any, adapter: str, resize_emb: bool) -> None:
    """Raises UserError where the base has fewer rows than the tokenizer has ids, and may not get more."""
    if len(tokenizer) > rows and not resize_emb:
        raise UserError(
            f"--lora_model {adapter}: was trained with a vocabulary of {len(tokenizer)} tokens, the base has {rows} rows;"
            " use --resize_emb True"
        )


def _sum(adapted: PeftModel, adapter: str, ids: list[torch.Tensor]) -> tuple[PreTrainedModel, References]:
    """The merged model, and what it is held to: logits, or a reward model's scores under its trained head."""
    measure: Callable[..., torch.Tensor] = logits
    if has_score_head(adapted):
        measure = functools.partial(token_scores, weight=score_head(adapted).weight.detach().clone())
    expected = measure(adapted, ids)
    with adapted.disable_adapter():
        base_alone = measure(adapted, ids)
    merged = _merge(adapted, adapter).eval()
    return merged, References(expected, base_alone, (token_scores if has_score_head(merged) else logits)(merged, ids))


def _merge(adapted: PeftModel, adapter: str) -> PreTrainedModel:
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # what peft raises over a NaN
        raise UserError(f"--lora_model {adapter}: holds weights that are not numbers ({error})") from error
    if has_score_head(merged):
        return merged
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    # An adapter that trained only one of a tied pair leaves two different tensors; saying so keeps both in the file.
    merged.config.tie_word_embeddings = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    return merged


def _round(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in the type it is written in. A score head stays in float32: it is small, and scores are told apart by it."""
    kept = score_head(model).weight.detach().clone() if has_score_head(model) else None
    model.to(dtype)
    if kept is not None:
        score_head(model).weight.data = kept
    return model


def _set_stops(model: PreTrainedModel, tokenizer: Any, stop_token_ids: tuple[int, ...] | None) -> None:
    """End and padding tokens, where servers look for them."""
    ids = list(stop_token_ids) if stop_token_ids else [tokenizer.eos_token_id]
    if has_score_head(model):
        set_padding(model, tokenizer, ids)
        return
    settings = model.generation_config
    settings.eos_token_id = ids if len(ids) > 1 else ids[0]
    settings.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = settings.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if settings.temperature is not None or settings.top_p is not None or settings.top_k is not None:
        settings.do_sample = True  # older folders say how to sample but not that, and transformers refuses to save them


def _move(work: Path, output: Path) -> None:
    """Put the finished files in place; weights of an earlier merge go first, or a loader might pick up an old shard."""
    output.mkdir(exist_ok=True)
    for stale in [*output.glob("*.safetensors*"), *output.glob("pytorch_model*")]:
        stale.unlink()
    for file in work.glob("*.safetensors"):
        shutil.copymode(work / "config.json", file)  # safetensors writes for the owner only; a server runs as somebody else
    for file in sorted(work.iterdir()):
        if file.is_dir() and (output / file.name).is_dir():
            shutil.rmtree(output / file.name)
        os.replace(file, output / file.name)
