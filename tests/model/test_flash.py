"""FlashAttention packages: how their kernels are called, when they are taken, and that the line says what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import tiny_llama
from posttrain.model import flash as module
from posttrain.model import kernels
from posttrain.model.attention import NAME, enable_segments, register
from posttrain.model.flash import Flash, attend_flash, installed_flash, use_flash
from posttrain.model.kernels import attend_each, attend_varlen, gather, views
from posttrain.model.segments import Locality
from posttrain.types import Segment, SegmentTable

BRANCHES = SegmentTable((Segment(0, 6), Segment(6, 10, 0), Segment(10, 13, 0), Segment(13, 20)))


def package_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """What flash_attn_varlen_func documents: per sequence, causality from the bottom right, window (left, right), grouped heads."""
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        part = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1]), slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
        query, key, value = q[part[0]], k[part[1]], v[part[1]]
        assert len(query) <= max_seqlen_q
        assert len(key) <= max_seqlen_k
        place = torch.arange(len(key))[None] - (torch.arange(len(query)) + len(key) - len(query))[:, None]
        visible = place <= 0 if causal else torch.ones_like(place, dtype=torch.bool)
        if window_size[0] >= 0:
            visible &= place >= -window_size[0]
        heads = (x.transpose(0, 1) for x in (query, key, value))
        output = F.scaled_dot_product_attention(*heads, attn_mask=visible, scale=softmax_scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window_tokens", [None, 3])
@pytest.mark.parametrize("tuple_output", [False, True])
def test_a_package_computes_what_single_calls_compute(window_tokens: int | None, tuple_output: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 20, 8, generator=generator) for n in (4, 2, 2))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        output = package_kernel(*args, **kwargs)
        return (output, None) if tuple_output else output

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return attend_flash(kernel, *args, **kwargs)

    got = attend_varlen(attend, query, key, value, gather(BRANCHES, query.device), 0.3, window_tokens)
    plan = views(BRANCHES, Locality(window_tokens=window_tokens), query.device)
    torch.testing.assert_close(got, attend_each(query, key, value, plan, 0.3, 0.0))


def test_the_package_that_was_chosen_is_taken_where_tensors_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = (torch.zeros(1, 2, 4, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert kernels._varlen_function(half, half, half, package_kernel) is package_kernel
    assert kernels._varlen_function(single, single, single, package_kernel) is None
    narrow = half[..., :4]
    assert kernels._varlen_function(narrow, narrow, narrow, package_kernel) is None
    assert kernels._varlen_function(half, half, half, None) not in (None, package_kernel)


def test_the_registered_function_carries_the_package() -> None:
    from transformers import AttentionInterface

    register(package_kernel)
    try:
        assert AttentionInterface()[NAME].keywords == {"flash": package_kernel}
    finally:
        register()
    assert AttentionInterface()[NAME] is kernels.segment_attention


def test_the_newest_package_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_flash() is None  # no CUDA device here
    fakes = {
        name: type("Fake", (), {"flash_attn_varlen_func": staticmethod(package_kernel)})
        for name in ("flash_attn", "flash_attn_interface")
    }
    monkeypatch.setattr(module.importlib, "import_module", lambda name: fakes[name])
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: True)
    found = installed_flash()
    assert found is not None
    assert found.implementation == "flash_attention_2"
    monkeypatch.setattr(module, "is_flash_attn_3_available", lambda: True)
    newest = installed_flash()
    assert newest is not None
    assert newest.implementation == "flash_attention_3"


PACKAGE = Flash("FlashAttention-2", "flash_attention_2", package_kernel)


@pytest.mark.parametrize(
    ("packed", "flash", "device", "dtype", "said"),
    [
        (True, None, "cpu", torch.bfloat16, "blocks of queries (our kernel for the CPU); FlashAttention needs a CUDA device, and this is cpu"),
        (False, None, "cpu", torch.bfloat16, "SDPA; FlashAttention needs a CUDA device"),
        (True, None, "mps", torch.bfloat16, "SDPA; FlashAttention needs a CUDA device, and this is mps"),
        (True, None, "cuda", torch.bfloat16, "torch's variable-length flash kernel; no flash-attn package is installed"),
        (True, PACKAGE, "cuda", torch.bfloat16, "FlashAttention-2"),
        (True, PACKAGE, "cuda", torch.float32, "SDPA, one call per example, because flash kernels take bfloat16 or float16"),
        (False, None, "cuda", torch.bfloat16, "SDPA, of which torch chooses the kernel; no flash-attn package is installed"),
        (False, PACKAGE, "cuda", torch.float32, "SDPA, because flash kernels take"),
    ],
)  # fmt: skip
def test_the_line_says_what_runs(packed: bool, flash: Flash | None, device: str, dtype: torch.dtype, said: str) -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    assert use_flash(model, flash, packed=packed, device=device, dtype=dtype).startswith(said)
    assert model.config._attn_implementation == before


def test_padded_rows_are_switched_to_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_llama(), list[str]()
    monkeypatch.setattr(model, "set_attn_implementation", asked.append)
    assert use_flash(model, PACKAGE, packed=False, device="cuda", dtype=torch.bfloat16) == "FlashAttention-2, padded rows"
    assert asked == ["flash_attention_2"]


def test_dropout_in_attention_is_said() -> None:
    model = tiny_llama(attention_dropout=0.1)
    enable_segments(model)
    assert "attention dropout" in use_flash(model, PACKAGE, packed=True, device="cuda", dtype=torch.bfloat16)
    assert use_flash(model, None, packed=True, device="cpu", dtype=torch.bfloat16).startswith("SDPA;")
