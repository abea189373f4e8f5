"""Base model and tokenizer from a name or folder: precision, 4/8-bit, tokenizer repair, vocabulary growth."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from posttrain.model.embedded import resolve_model
from posttrain.model.own_code import is_own_code, own_code
from posttrain.model.own_tables import fill_tables, settle_ties
from posttrain.model.quantize import Quantization, quantizing, report
from posttrain.model.rope import RopeScaling, forget_lengths, scale_rope
from posttrain.types import UserError

logger = logging.getLogger(__name__)

DType = Literal["auto", "bfloat16", "float16", "float32"]

# Tokens that a vocabulary already holds and that no conversation contains, best first.
PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>", "<unk>", "<s>")
OTHER_TOKENS = 0.1  # share of a model's tokens that another tokenizer may name differently and still be its own
CHAT_MARK = re.compile(r"<\|\w+\|>")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "spiece*")


def hardware_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 otherwise."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(
    name_or_path: str,
    *,
    padding_side: Literal["left", "right"] = "right",
    trust_remote_code: bool = False,
    revision: str = "main",
) -> Any:
    """The tokenizer, with missing end and padding tokens filled in; each repair is logged.

    `padding_side` is "right" for training and "left" for generation. Masks are explicit everywhere, so a padding token that
    equals the end token is never taken for padding.
    """
    folder = resolve_model(name_or_path)
    try:
        with own_code(name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, revision=revision)
            tokenizer("a")  # code for an older library loads and then cannot be called
    except (OSError, ValueError) as error:
        nothing = Path(folder).is_dir() and not any(file for name in TOKENIZER_FILES for file in Path(folder).glob(name))
        why = "there is none in this folder" if nothing else _first_line(error)
        raise UserError(f"{name_or_path}: cannot load a tokenizer ({why})") from error
    tokenizer.padding_side = padding_side
    if tokenizer.eos_token_id is None:
        _repair_eos(tokenizer, name_or_path, _declared_eos(folder))
    if tokenizer.pad_token_id is None:
        _repair_pad(tokenizer, name_or_path)
    if is_own_code(tokenizer):
        _repair_marks(tokenizer, name_or_path)
    return tokenizer


def _declared_eos(folder: str) -> int | None:
    """The end token that config.json or generation_config.json of a local folder names."""
    for file in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        if file.is_file():
            eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            eos = eos[0] if isinstance(eos, list) and eos else eos
            if isinstance(eos, int):
                return eos
    return None


def _repair_eos(tokenizer: Any, name: str, declared: int | None) -> None:
    token = tokenizer.convert_ids_to_tokens(declared) if declared is not None else None
    if token is None:
        raise UserError(f"{name}: the tokenizer names no end token and neither does the model's config; add eos_token to it")
    tokenizer.eos_token = token
    logger.warning("%s: the tokenizer has no end token; took %r from the model's config", name, token)


def _repair_pad(tokenizer: Any, name: str) -> None:
    unused = unused_tokens(tokenizer)
    tokenizer.pad_token = unused[0] if unused else tokenizer.eos_token
    logger.warning("%s: the tokenizer has no padding token; took %r", name, tokenizer.pad_token)


def _repair_marks(tokenizer: Any, name: str) -> None:
    """Let marks such as <|user|> be one token in a text: some own code (ChatGLM) puts them in only as ids."""
    marks = [(token, number) for token, number in tokenizer.get_vocab().items() if CHAT_MARK.fullmatch(token)]
    apart = [mark for mark, number in marks if tokenizer(f"a{mark}", add_special_tokens=False)["input_ids"][-1] != number]
    if apart:
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in apart], special_tokens=True)
        logger.info("%s: its tokenizer takes marks apart in a text; %s are one token now", name, ", ".join(apart))


def unused_tokens(tokenizer: Any) -> list[str]:
    """Tokens of the vocabulary that are good for padding, best first."""
    vocabulary = tokenizer.get_vocab()
    return [t for t in PAD_CANDIDATES if t in vocabulary and t not in (tokenizer.eos_token, tokenizer.bos_token)]


def load_model(
    name_or_path: str,
    dtype: DType = "auto",
    *,
    quantization: Quantization | None = None,
    rope: RopeScaling | None = None,
    trust_remote_code: bool = False,
    revision: str = "main",
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model, read shard by shard straight into `dtype` (peak memory: the model and one tensor).

    Raises UserError for a folder that is none, an architecture that is not a causal language model, weights that are missing.
    """
    config = read_config(name_or_path, trust_remote_code, revision)
    if rope is not None:
        scale_rope(config, rope)
    chosen = hardware_dtype() if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "device_map": device_map}
    with quantizing(quantization, chosen) as quantised:
        if quantised:
            options["device_map"] = own_device(device_map)
        model = read_weights(AutoModelForCausalLM, name_or_path, config=config, dtype=chosen, **options, **quantised)
    if quantization is not None:
        report(model, name_or_path, quantization)
    return model


def own_device(device_map: str | dict[str, Any] | None) -> str | dict[str, Any]:
    """Where a quantised model goes: each rank of a distributed run holds all of it on its own device."""
    return device_map or {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}


def read_weights(kind: Any, name_or_path: str, *, drawn: frozenset[str] = frozenset(), **options: Any) -> PreTrainedModel:
    """A model of a class (or an Auto class) from its folder. Raises UserError for weights that are missing, those of `drawn` apart."""
    try:
        with own_code(name_or_path):
            model, info = kind.from_pretrained(resolve_model(name_or_path), output_loading_info=True, **options)
            fill_tables(model, set(info["missing_keys"]))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{name_or_path}: cannot load the model ({_first_line(error)})") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"{name_or_path}: its weights do not have the shapes that its config.json says") from error
    parameters = {name for name, _ in model.named_parameters()} - drawn
    if missing := sorted(parameters & set(info["missing_keys"])):
        raise UserError(f"{name_or_path}: {len(missing)} weights are not in the folder, the first is {missing[0]}")
    loaded: PreTrainedModel = model
    settle_ties(loaded)
    forget_lengths(loaded)
    return loaded


def read_config(name: str, trust_remote_code: bool = False, revision: str = "main", *, score_head: bool = False) -> Any:
    """A model's config. Raises UserError for a folder that is none and for what is not a causal language model.

    With `score_head` such a model may have a score head in place of its language-model head.
    """
    folder = resolve_model(name)
    path = Path(folder)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{name}: holds an adapter, not a model; name its base model, and this folder as the adapter")
        raise UserError(f"{name}: no config.json in it, so it is not a model folder")
    try:
        with own_code(name):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: cannot read its config ({_first_line(error)}); name a local folder, a model of a reachable hub, or"
            " smollm2-135m-instruct, which needs no hub"
        ) from error
    if not (score_head and stores_score_head(config)):
        _check_causal(name, config)
    return config


def stores_score_head(config: Any) -> bool:
    """Whether the folder of a config is that of a reward model (or another classifier)."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _check_causal(name: str, config: Any) -> None:
    """A model with another head would load, with a random language-model head, and train on nonsense."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    classes = mapped if isinstance(mapped, tuple) else (mapped,)
    expected = {cls.__name__ for cls in classes if cls is not None}
    actual = set(config.architectures or expected)
    if not expected & actual:
        found = ", ".join(sorted(actual)) or config.model_type
        wanted = f"expected {' or '.join(sorted(expected))}" if expected else f"{config.model_type} has none"
        raise UserError(f"{name}: is a {found}, not a causal language model ({wanted})")


def resize_embeddings(model: PreTrainedModel, tokenizer: Any) -> int:
    """Grow the embedding and output head to hold every id of the tokenizer; returns the number of new rows.

    A new row is the mean of the old ones, so that a new token starts about as likely as an average one. Never shrinks: models
    pad their vocabulary for speed.
    """
    old = model.get_input_embeddings().weight.shape[0]
    added = len(tokenizer) - old
    if added <= 0:
        return 0
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(head.weight): head.weight for head in heads if head is not None}.values():
            weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
    logger.info("vocabulary grown from %d to %d rows; new rows start as the mean of the old", old, len(tokenizer))
    return added


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raises UserError when the tokenizer has ids that the embedding lacks."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding {rows} rows: they do not belong together"
        )


def check_tokenizer(tokenizer: Any, named: str, flag: str, model: str, **source: Any) -> None:
    """Raises UserError where a tokenizer that was named beside a model gives other ids than the model's own.

    A few that differ are special tokens renamed; a model without a tokenizer of its own cannot say.
    """
    try:
        own = load_tokenizer(model, **source).get_vocab()
    except UserError:
        return
    ids = tokenizer.get_vocab()
    other = [token for token, number in own.items() if ids.get(token) != number]
    if len(other) > OTHER_TOKENS * len(own):
        there = ids.get(other[0])
        raise UserError(
            f"{flag} {named}: does not fit {model}: {len(other):,} of the model's {len(own):,} tokens have another id in it, the first is"
            f" {other[0]!r}, {own[other[0]]} for the model, {there if there is not None else 'unknown'} there"
        )


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own, which --trust_remote_code True runs; only if you trust it"
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
