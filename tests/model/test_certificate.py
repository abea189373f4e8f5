"""The merge certificate: faults in the sum and in the file are seen, rounding is measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import save_adapter, save_base
from conftest import tiny_llama
from posttrain.commands.merge import merge
from posttrain.model import merge as merge_module
from posttrain.model.certificate import PROMPTS, kl_nats
from posttrain.model.merge_plan import Stream


def test_kl_against_its_definition() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    # 0.5 ln 2 + 0 − 0.25 ln 2
    torch.testing.assert_close(kl_nats(p.log() + 3, q.log() - 1), torch.tensor([0.25]).double() * torch.log(torch.tensor(2.0)))


def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge the whole model at once."""
    monkeypatch.setattr(merge_module, "open_stream", lambda *_: "of this test")


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the arithmetic go wrong after peft's own merge."""
    in_memory(monkeypatch)
    original = merge_module._merge

    def wrong(adapted: Any, adapter: str) -> Any:
        merged = original(adapted, adapter)
        with torch.no_grad():
            change(merged)
        return merged

    monkeypatch.setattr(merge_module, "_merge", wrong)


FAULTS = {
    "one layer forgotten": lambda m: m.model.layers[1].mlp.down_proj.weight.copy_(
        tiny_llama(vocab=311).model.layers[1].mlp.down_proj.weight
    ),
    "one matrix 5 % too large": lambda m: m.model.layers[0].mlp.up_proj.weight.mul_(1.05),
    "a head gone astray": lambda m: m.model.embed_tokens.weight.copy_(m.model.embed_tokens.weight.roll(1, 0)),
    "a NaN": lambda m: m.model.norm.weight[0].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_sum_fails_loudly_and_writes_nothing(
    tmp_path: Path, tokenizer: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    spoil(monkeypatch, FAULTS[fault])
    with pytest.raises(RuntimeError, match=r"not base \+ adapter; nothing was written\nmerge certificate: FAILED"):
        merge(base, adapter, str(tmp_path / "merged"))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_folder_that_does_not_hold_what_was_computed_fails(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is right, the file is not: only reading back can see it."""
    from transformers import LlamaForCausalLM

    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    in_memory(monkeypatch)
    save = LlamaForCausalLM.save_pretrained

    def lossy(self: Any, folder: Any, **options: Any) -> None:
        with torch.no_grad():
            self.model.layers[0].mlp.up_proj.weight.mul_(0.5)
        save(self, folder, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lossy)
    with pytest.raises(RuntimeError, match="FAILED"):
        merge(base, adapter, str(tmp_path / "merged"))


STREAM_FAULTS = {
    "one layer forgotten": lambda path, right: 0 * right if path == "model.layers.1.mlp.down_proj" else right,
    "one matrix 5 % too large": lambda path, right: 1.05 * right if path == "model.layers.0.mlp.up_proj" else right,
    "another scale": lambda path, right: 1.02 * right,
}


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_a_wrong_sum_of_one_tensor_fails_loudly(
    tmp_path: Path, tokenizer: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is in bfloat16, whose rounding would hide such a fault in the file."""
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    right = Stream.written

    def wrong(self: Stream, name: str, dtype: torch.dtype) -> torch.Tensor:
        path, base_weight = name.removesuffix(".weight"), self.read(name).float()
        changed: torch.Tensor = base_weight + STREAM_FAULTS[fault](path, right(self, name, torch.float32) - base_weight)
        return changed.to(dtype)

    monkeypatch.setattr(Stream, "written", wrong)
    with pytest.raises(RuntimeError, match=r"not base \+ adapter; nothing was written\nmerge certificate: FAILED"):
        merge(base, adapter, str(tmp_path / "merged"))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_certificate_tells_how_much_of_a_weak_adapter_is_left(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    strong = merge(base, save_adapter(base, tmp_path / "strong", scale=0.3), str(tmp_path / "merged-strong"))
    weak = merge(base, save_adapter(base, tmp_path / "weak", scale=1e-4), str(tmp_path / "merged-weak"))
    assert strong.kept > 0.99 > 0.9 > weak.kept
    assert strong.n_tokens == sum(len(tokenizer(text)["input_ids"]) for text in PROMPTS)
    assert "head tied; tokenizer as trained; chat template as trained" in str(strong)
