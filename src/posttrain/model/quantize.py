"""A frozen base in 4 or 8 bits (bitsandbytes), quantised tensor by tensor while it is read.

In 4 bits the fused experts of a mixture are quantised too: they are 3-D parameters of no linear layer, which transformers leaves in 16
bits without a word, and in Mixtral they hold 95 % of the weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from posttrain.types import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

# NF4 with one float32 scale per 64 weights, the same with its scales in 8 bits (QLoRA, arXiv 2305.14314), LLM.int8() (2208.07339).
Quantization = Literal["4bit", "4bit-double", "8bit"]
REGISTERED = "bitsandbytes_4bit"  # transformers' name of the quantiser that ours stands in for


def quantization_of(load_in_4bit: bool, load_in_8bit: bool, *, double: bool) -> Quantization | None:
    """How a base is loaded for these flags; `double`: scales in 8 bits too. Raises UserError for both at once."""
    if load_in_4bit and load_in_8bit:
        raise UserError("--load_in_4bit True and --load_in_8bit True exclude each other: give one")
    if load_in_4bit:
        return "4bit-double" if double else "4bit"
    return "8bit" if load_in_8bit else None


@contextlib.contextmanager
def quantizing(
    quantization: Quantization | None, compute: torch.dtype, unquantized: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Options for `from_pretrained` inside the block. `compute`: type of the products; `unquantized`: modules left as they are.

    Raises UserError without bitsandbytes. None: no options.
    """
    if quantization is None:
        yield {}
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"loading in {quantization[:4]} needs bitsandbytes; run: pip install 'posttrain[quant]'") from error
    skipped = list(unquantized) or None  # None: transformers finds the output head itself
    if quantization == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=quantization == "4bit-double",
            bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=skipped,
        )  # fmt: skip
    theirs = AUTO_QUANTIZER_MAPPING[REGISTERED]
    AUTO_QUANTIZER_MAPPING[REGISTERED] = ExpertQuantizer
    try:
        yield {"quantization_config": settings}
    finally:
        AUTO_QUANTIZER_MAPPING[REGISTERED] = theirs


def report(model: PreTrainedModel, name: str, quantization: Quantization) -> None:
    """Log how many bytes are in which type; for a mixture in 8 bits also what stayed in 16."""
    _keep_layout(model)
    sizes = ", ".join(f"{dtype} {size:,} bytes" for dtype, size in bytes_by_dtype(model).items())
    logger.info("%s in %s: %s", name, quantization, sizes)
    left = [parameter for key, parameter in model.named_parameters() if is_expert(key, parameter)]
    if left:
        size = sum(p.numel() * p.element_size() for p in left)
        logger.warning(
            "its experts stay in %s (%s bytes): 8 bits are for linear layers, and these are fused; --load_in_4bit True takes them too",
            str(left[0].dtype).removeprefix("torch."), f"{size:,}",
        )  # fmt: skip


def is_expert(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the fused matrices of a layer's experts, (experts, out, in) or (experts, in, out)."""
    return parameter.ndim == 3 and "expert" in name and parameter.is_floating_point()


def check_experts(model: nn.Module, targets: list[str]) -> None:
    """Raises UserError where an adapter is asked for on experts that are stored in 4 bits."""
    modules: Iterable[Any] = [module for module in model.modules() if hasattr(module, "parametrizations")]
    names = {
        name for module in modules for name, kept in module.parametrizations.items() if hasattr(kept.original, "quant_state")
    }
    for target in targets:
        if target.rsplit(".", 1)[-1] in names and not any(
            name.endswith(target) for name, module in model.named_modules() if hasattr(module, "in_features")
        ):
            raise UserError(
                f"--target_modules {target}: fused experts in 4 bits take no adapter; leave them out, or load in bfloat16"
            )


def check_trainable(model: nn.Module, names: list[str], flag: str) -> None:
    """Raises UserError for modules that would be trained whole but have quantised weights."""
    for path, module in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if leaf in names and any(not p.is_floating_point() for p in module.parameters()):
            raise UserError(f"{flag} {leaf}: its weights are quantised and cannot be trained; leave it out, or load in bfloat16")


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters by storage type, largest first, the scales of quantised ones included: what a load really saved."""
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        for tensor in [parameter.data, *_scales(parameter)]:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(sizes.most_common())


def _scales(parameter: nn.Parameter) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scales = getattr(parameter, "SCB", None)  # of 8 bits, one a row
        return [] if scales is None else [scales]
    inner = state.state2
    return [state.absmax, *([] if inner is None else [inner.absmax])]


def _keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they are laid out: in evaluation bitsandbytes would repack them for some CPUs and round their scales, so
    that a run that was evaluated would go on with other weights than one that was not."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class ExpertQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantiser, for fused experts too. Each is quantised as soon as it is read."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """A weight of a linear layer, or fused experts."""
        if super().param_needs_quantization(model, param_name, **kwargs):
            return True
        module, _, leaf = param_name.rpartition(".")
        parameter = model.get_submodule(module)._parameters.get(leaf)
        return parameter is not None and is_expert(param_name, parameter)

    def get_quantize_ops(self) -> Any:
        """What is done to a tensor that was read."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

        modules: list[Any] = list(model.modules())
        for module in modules:
            names = [name for name, p in module._parameters.items() if p is not None and hasattr(p, "posttrain_state")]
            for name in names:
                packed: Any = module._parameters[name]
                state = packed.posttrain_state
                replace_parameter_4bit_prequantized(module, name, state.as_dict(), packed.device)
                original: Any = module.parametrizations[name].original
                # What counts parameters and bytes looks for it here, as on bitsandbytes' own layers.
                original.quant_state = module.parametrizations[name][0].quant_state
            if names:
                module.forward = types.MethodType(functools.partial(_expert_forward, weakref.ref(model)), module)
        loaded: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return loaded


class _Quantize(Bnb4bitQuantize):
    """The operation on one tensor: ours for experts, transformers' for linear layers."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, read in input_dict.items():
            value = read[0] if isinstance(read, list) else read
            if is_expert(name, value):
                result[name] = _quantized(value, self.hf_quantizer.quantization_config)
            else:
                result |= super().convert({name: value}, **kwargs)
        return result


def _quantized(value: Tensor, settings: BitsAndBytesConfig) -> nn.Parameter:
    """The packed weights of one fused parameter, with the state that takes them back."""
    import bitsandbytes

    data, state = bitsandbytes.functional.quantize_4bit(
        value.contiguous(),
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    )
    state.dtype = settings.bnb_4bit_compute_dtype  # not that of the file: what it is taken back to meets the layer's input
    packed: Any = nn.Parameter(data, requires_grad=False)
    packed.posttrain_state = state
    return cast("nn.Parameter", packed)


class _Slice(NamedTuple):
    """A view of a dequantised parameter, remembered in its place."""

    module: nn.Module
    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _expert_forward(model: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The experts' own forward, after which no dequantised weight stays for the backward pass: it is made again there.

    Otherwise every layer would keep its experts in 16 bits until then. Where layers are checkpointed one layer at most does, and hooks
    of ours would keep what checkpointing lets go.
    """
    usual = type(self).forward
    if not torch.is_grad_enabled() or model().is_gradient_checkpointing:
        return usual(self, *args, **kwargs)
    # Inside the forward bitsandbytes' cache gives one tensor however often the parameter is read.
    weights = {getattr(self, name).untyped_storage().data_ptr(): name for name in cast("Any", self.parametrizations)}

    def pack(tensor: Tensor) -> Tensor | _Slice:
        name = weights.get(tensor.untyped_storage().data_ptr())
        if name is None:
            return tensor
        return _Slice(self, name, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Tensor | _Slice) -> Tensor:
        if not isinstance(saved, _Slice):
            return saved
        return _last.of(saved.module, saved.name).as_strided(saved.shape, saved.stride, saved.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return usual(self, *args, **kwargs)


class _Last:
    """The parameter dequantised last: the backward pass asks for its experts one after the other."""

    def __init__(self) -> None:
        self.key: tuple[Any, str] | None = None
        self.value: Tensor | None = None

    def of(self, module: nn.Module, name: str) -> Tensor:
        """The dequantised parameter."""
        if self.value is None or self.key is None or self.key[0]() is not module or self.key[1] != name:
            self.value = None  # before the next one: never two at a time
            self.value, self.key = getattr(module, name), (weakref.ref(module), name)
        return self.value


_last = _Last()
