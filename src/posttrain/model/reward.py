"""A reward model: the decoder of any causal language model under a score head with one output.

Where transformers has the family's class for sequence classification, a saved model is one of its; elsewhere the same class is made
from the family's decoder. The head is kept in float32 whatever the decoder's type: a score rounded to bfloat16 ties close answers.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from posttrain.model.attention import find_decoder, unwrap
from posttrain.model.embedded import resolve_model
from posttrain.model.load import DType, hardware_dtype, own_device, read_config, read_weights, stores_score_head, unused_tokens
from posttrain.model.quantize import Quantization, quantizing, report
from posttrain.model.rope import RopeScaling, scale_rope
from posttrain.model.router import balance_function
from posttrain.model.shards import without_weights
from posttrain.types import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

HEAD = "score"  # its name in every decoder's classifier of transformers


class SequenceScores(NamedTuple):
    """What the forward returns when asked for scores. A named tuple, so that DDP, FSDP and DeepSpeed find the tensors in it."""

    scores_S: Tensor  # float32
    router_loss: Tensor | None = None  # mixture of experts with output_router_logits: coefficient × load balancing loss (a mean)


def load_reward_model(
    name_or_path: str,
    dtype: DType = "auto",
    *,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    revision: str = "main",
    device_map: str | dict[str, Any] | None = None,
    rope: RopeScaling | None = None,
) -> PreTrainedModel:
    """A saved reward model, or a causal language model with a new head: normal, std 1/√(D+1), from torch's global seed.

    The language-model head is not loaded. `config.pad_token_id` is the caller's to set. Raises UserError as `load_model` does, and
    for a folder whose head gives more than one number.
    """
    config = read_config(name_or_path, trust_remote_code, revision, score_head=True)
    stored = stores_score_head(config)
    kind, config = _kind_of(name_or_path, config, trust_remote_code, revision)
    if rope is not None:
        scale_rope(config, rope)
    chosen = hardware_dtype() if dtype == "auto" else getattr(torch, dtype)
    drawn = frozenset() if stored else frozenset({f"{HEAD}.weight"})
    options: dict[str, Any] = {"revision": revision, "device_map": own_device(device_map) if quantization else device_map}
    with quantizing(quantization, chosen, (HEAD,)) as quantised:
        model = read_weights(kind, name_or_path, drawn=drawn, config=config, dtype=chosen, **options, **quantised)
    if quantization is not None:
        report(model, name_or_path, quantization)
    if not stored:
        weight = score_head(model).weight
        with torch.no_grad():
            # Drawn on the host in float32: the same head whatever the device and the type of the rest.
            weight.copy_(torch.randn(weight.shape) / math.sqrt(weight.shape[1] + 1))  # arXiv 2403.17031, detail 11
    return model


def empty_reward_model(name_or_path: str, config: Any) -> PreTrainedModel:
    """The same without its weights, of a config that was read with `score_head`. Raises UserError as it does."""
    kind, config = _kind_of(name_or_path, config, trust_remote_code=False, revision="main")
    return without_weights(lambda: kind(config))


def has_score_head(model: nn.Module) -> bool:
    """Whether this is a reward model, inside a PEFT wrapper or not."""
    core = unwrap(model)
    return type(core).__name__.endswith("ForSequenceClassification") and isinstance(getattr(core, HEAD, None), nn.Module)


def score_head(model: nn.Module) -> Any:
    """The head of a reward model, inside a PEFT wrapper (then peft's wrapper of the head) or not. Raises TypeError where there is none."""
    if not has_score_head(model):
        raise TypeError(f"{type(unwrap(model)).__name__} has no score head")
    return getattr(unwrap(model), HEAD)


def library_class(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """The class of transformers' that loads a saved reward model; None where only `load_reward_model` does."""
    theirs: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    return theirs if theirs in type(model).__mro__ else None


def set_padding(model: PreTrainedModel, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
    """Name the padding token in the config: one that ends no chat, if there is any (then it becomes the tokenizer's, too).

    A model class of transformers reads the score at the last token that is not padding. Were that the stop token, which ends every
    chat, it would read the score before it.
    """
    if tokenizer.pad_token_id in stop_token_ids:
        others = unused_tokens(tokenizer)
        others = [token for token in others if tokenizer.convert_tokens_to_ids(token) not in stop_token_ids]
        if others:
            tokenizer.pad_token = others[0]
        else:
            logger.warning("the padding token is the stop token: plain transformers will read scores one token too early")
    model.config.pad_token_id = tokenizer.pad_token_id


def install_scores(model: nn.Module) -> None:
    """Let the forward of a reward model (inside a PEFT wrapper or not) also take `score_at_S`.

    With `score_at_S` (flat indices into B·T, repeats allowed) it returns SequenceScores, without it what it always did. The method
    is replaced on the instance, so that DDP, FSDP and DeepSpeed still wrap one module and call one forward.
    """
    score_head(model)
    core = unwrap(model)
    if core.__dict__.get("_posttrain_scores"):
        return
    own = core.__dict__.get("forward")  # set where accelerate has hooked the model
    original: Callable[..., Any] = own or type(core).forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, score_at_S: Tensor | None = None, **kwargs: Any) -> Any:
        if score_at_S is None:
            return (own or functools.partial(original, self))(*args, **kwargs)
        if args:
            raise TypeError("with score_at_S every input is a keyword")
        return _score_forward(self, score_at_S, **kwargs)

    core.forward = types.MethodType(forward, core)
    core._posttrain_scores = True


def _score_forward(core: PreTrainedModel, score_at_S: Tensor, **inputs: Any) -> SequenceScores:
    """The forward for scores: decoder, then the head at `score_at_S`, in the head's own type under autocast too."""
    inputs = {key: value for key, value in inputs.items() if value is not None and key != "return_dict"}  # PEFT passes None
    balanced = inputs.pop("output_router_logits", getattr(core.config, "output_router_logits", False))
    balance = balance_function(core) if balanced else None
    if balance is not None:
        inputs["output_router_logits"] = True
    output = find_decoder(core)(**inputs)
    hidden_SD = output.last_hidden_state.flatten(0, 1)
    hidden_SD = hidden_SD.index_select(0, score_at_S.to(hidden_SD.device))
    head = score_head(core)
    with torch.autocast(hidden_SD.device.type, enabled=False):
        scores_S = head(hidden_SD.to(head.weight.dtype)).squeeze(-1).float()
    router_loss = None
    if balance is not None:
        router_loss = core.config.router_aux_loss_coef * balance(
            output.router_logits, attention_mask=inputs.get("attention_mask")
        )
    return SequenceScores(scores_S, router_loss)


def _kind_of(name: str, config: Any, trust_remote_code: bool, revision: str) -> tuple[Any, Any]:
    """(class, config) of the reward model of a config."""
    if stores_score_head(config) and config.num_labels != 1:
        raise UserError(f"{name}: is a classifier of {config.num_labels} labels, not a reward model, which has one")
    causal = _causal_class(name, config, trust_remote_code, revision)
    if causal.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # of a model that also sees: its language model, as AutoModelForCausalLM takes it
    config.num_labels = 1
    return _reward_class(name, causal, config), config


def _causal_class(name: str, config: Any, trust_remote_code: bool, revision: str) -> Any:
    """The causal language model's class of a config: its own code's, else transformers'."""
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own and trust_remote_code:
        return get_class_from_dynamic_module(own, resolve_model(name), revision=revision)
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if mapped is None:
        raise UserError(f"{name}: is a {config.model_type}, of which transformers knows no causal language model")
    return mapped[0] if isinstance(mapped, tuple) else mapped


def _reward_class(name: str, causal: type[PreTrainedModel], config: Any) -> type[PreTrainedModel]:
    """A class with the decoder of `causal` under the same name, and `score`. Named and saved like transformers' where it has one."""
    with torch.device("meta"):
        model = causal(config)
        decoder = find_decoder(model)
        prefix = next((child_name for child_name, child in model.named_children() if child is decoder), None)
        if prefix is None:
            raise UserError(f"{name}: {causal.__name__} has no decoder apart from its head, so it cannot be a reward model")
        twin = cast("Any", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None))
        if twin is not None and _fits(twin(config), prefix, decoder):
            return _with_float_head(twin)
    family: Any = next(c for c in type(decoder).__mro__[1:] if issubclass(c, PreTrainedModel))

    def build(self: Any, config: Any) -> None:
        family.__init__(self, config)
        self.num_labels = config.num_labels
        setattr(self, prefix, type(decoder)(config))
        setattr(self, HEAD, nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False))
        self.post_init()

    title = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "ForSequenceClassification"
    members = {"__init__": build, "base_model_prefix": prefix, "__module__": causal.__module__}
    return _with_float_head(type(title, (GenericForSequenceClassification, family), members))


def _fits(twin: PreTrainedModel, prefix: str, decoder: nn.Module) -> bool:
    """Whether transformers' class reads a score per position off the same decoder (BERT's, say, reads it off another layer)."""
    head = getattr(twin, HEAD, None)
    plain = isinstance(head, nn.Linear) and head.out_features == 1 and head.bias is None
    return plain and type(getattr(twin, prefix, None)) is type(decoder)


def _with_float_head(kind: Any) -> Any:
    """The same class, its head in float32: read so from the folder, and lifting its input."""

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        getattr(self, HEAD).float().register_forward_pre_hook(_lift)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _lift(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the input in the type of the head."""
    return (args[0].to(next(module.parameters()).dtype), *args[1:])
