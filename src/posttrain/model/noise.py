"""NEFTune: uniform noise on the embeddings while training, scaled by each example's own length (arXiv 2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.model.attention import find_decoder, unwrap
from posttrain.model.segments import ShiftedSegments
from posttrain.types import SegmentTable


def install_noise(model: nn.Module, alpha: float) -> None:
    """Let the input embedding of a model (inside a PEFT wrapper or not) add U(−1, 1) · α/√(L·d) to what it gives in training mode.

    d is the width and L the length of the example that the token belongs to: of its segments under packing, of the row without
    padding otherwise; groups of shifted attention do not cut it. Drawn from torch's global random state, so that a resumed run draws
    the same. In evaluation mode (and so in the reference pass of DPO) nothing is added. The prompt that two answers share counts with
    the longer one.
    """
    core = unwrap(model)
    noise = _Noise(alpha)
    find_decoder(core).register_forward_pre_hook(noise.see_row, with_kwargs=True)
    embedding: nn.Module = core.get_input_embeddings()
    embedding.register_forward_hook(noise.add)


class _Noise:
    """What the two hooks share: the lengths that belong to the row at hand."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.length_BT: Tensor | None = None  # None: the row's own length, nothing packed or padded

    def see_row(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder."""
        self.length_BT = None
        if not module.training:
            return
        segments, mask_BT = kwargs.get("segments"), kwargs.get("attention_mask")
        device = next(module.parameters()).device
        if segments is not None:
            table = segments.whole if isinstance(segments, ShiftedSegments) else segments
            self.length_BT = example_lengths(table, device)
        elif mask_BT is not None and mask_BT.ndim == 2:
            self.length_BT = mask_BT.sum(1, keepdim=True).clamp(min=1)

    def add(self, module: nn.Module, _args: Any, embedded_BTD: Tensor) -> Tensor | None:
        """Forward hook of the embedding. Drawn in float32: a uniform bfloat16 has 256 values only."""
        if not module.training:
            return None
        length = embedded_BTD.shape[1] if self.length_BT is None else self.length_BT.to(embedded_BTD.device)[..., None]
        noise_BTD = torch.empty_like(embedded_BTD, dtype=torch.float32, requires_grad=False).uniform_(-1, 1)
        width = embedded_BTD.shape[-1]
        scale = self.alpha / math.sqrt(width) * torch.as_tensor(length, device=embedded_BTD.device).rsqrt()
        return embedded_BTD + (noise_BTD * scale).to(embedded_BTD.dtype)


def example_lengths(table: SegmentTable, device: torch.device) -> Tensor:
    """For every token of a packed row the tokens of its example, ancestors included; of the longest that it belongs to. (1, T)."""
    segments = table.segments
    through = [segment.end - segment.start for segment in segments]  # tokens of the example through this segment
    for index, segment in enumerate(segments):
        if segment.parent is not None:
            through[index] += through[segment.parent]
    longest = list(through)
    for index in reversed(range(len(segments))):
        parent = segments[index].parent
        if parent is not None:
            longest[parent] = max(longest[parent], longest[index])
    counts = torch.tensor([segment.end - segment.start for segment in segments], device=device)
    return torch.repeat_interleave(torch.tensor(longest, device=device), counts)[None]
