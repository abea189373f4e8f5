"""Merging a reward model's adapter: plain transformers loads the folder where it has the class, and the scores are base + adapter's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters import save_adapter, save_base, save_reward_adapter
from flag_probes_models import coded_model
from posttrain.commands.merge import merge
from posttrain.model import merge as merge_module
from posttrain.model.adapter import Lora, load_adapter
from posttrain.model.certificate import PROMPTS
from posttrain.model.merge import WriteOptions
from posttrain.model.merge_plan import Stream
from posttrain.model.reward import install_scores, load_reward_model, score_head
from posttrain.model.score_certificate import ScoreCertificate, same_order
from posttrain.types import UserError

IDS = torch.arange(4, 60)[None]


def save_family(folder: Path, family: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> str:
    tiny(family, vocab_size=len(tokenizer), max_position_embeddings=512).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def all_scores(model: Any, ids: Tensor = IDS) -> Tensor:
    install_scores(model)
    with torch.no_grad():
        scores: Tensor = model.eval()(input_ids=ids, score_at_S=torch.arange(ids.numel())).scores_S
    return scores


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "granite", "olmoe"])
def test_the_folder_scores_like_base_and_adapter(tmp_path: Path, tokenizer: Any, family: str) -> None:
    base = save_family(tmp_path / "base", family, tokenizer)
    adapter = save_reward_adapter(base, tmp_path / "adapter", Lora(rank=4, alpha=12))
    certificate = merge(base, adapter, str(tmp_path / "merged"))
    expected = all_scores(load_adapter(load_reward_model(base, "float32"), adapter))
    assert expected.std() > 0.05
    torch.testing.assert_close(all_scores(load_reward_model(str(tmp_path / "merged"), "float32")), expected, atol=1e-5, rtol=1e-4)
    assert isinstance(certificate, ScoreCertificate)
    assert certificate.kept > 0.999
    assert certificate.n_tokens == sum(len(tokenizer(text)["input_ids"]) for text in PROMPTS)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"}  # how a config says num_labels = 1
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["architectures"] == [type(load_reward_model(base)).__name__]
    if family in ("granite", "olmoe"):
        assert certificate.read_by == "posttrain (transformers has no such class)"
    else:
        assert certificate.read_by == f"transformers' {config['architectures'][0]}"
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(input_ids=IDS).logits[0, 0], expected[-1], atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "merged/merge_certificate.json").read_text())["ok"] is True


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_decoder_is_rounded_to_the_bases_type_and_the_head_is_not(
    tmp_path: Path, tokenizer: Any, stored: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", tokenizer, stored)
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    certificate = merge(base, adapter, str(tmp_path / "merged"))
    weights = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if name != "score.weight"} == {stored}
    trained = score_head(load_adapter(load_reward_model(base, "float32"), adapter)).weight
    assert torch.equal(weights["score.weight"], trained)
    assert not any("lm_head" in name for name in weights)
    assert 0 < certificate.mean_abs <= certificate.mean_abs_allowed  # type: ignore[union-attr]
    assert certificate.sum_max_abs < certificate.max_abs  # type: ignore[union-attr]


def test_an_adapter_on_a_saved_reward_model(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    merge(base, save_reward_adapter(base, tmp_path / "first"), str(tmp_path / "once"))
    tokenizer.save_pretrained(tmp_path / "once")
    second = save_reward_adapter(str(tmp_path / "once"), tmp_path / "second")
    merge(str(tmp_path / "once"), second, str(tmp_path / "twice"))
    expected = all_scores(load_adapter(load_reward_model(str(tmp_path / "once"), "float32"), second))
    torch.testing.assert_close(all_scores(load_reward_model(str(tmp_path / "twice"), "float32")), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="once: is a LlamaForSequenceClassification, not a causal"):
        merge(str(tmp_path / "once"), save_adapter(base, tmp_path / "causal"), str(tmp_path / "mixed"))


def test_a_model_with_code_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    save_base(tmp_path / "plain", tokenizer)
    base = str(coded_model(tmp_path / "plain", tmp_path / "base"))
    trusting = WriteOptions(trust_remote_code=True)
    adapter = save_reward_adapter(base, tmp_path / "adapter", trust_remote_code=True)
    merge(base, adapter, str(tmp_path / "merged"), write=trusting)
    expected = all_scores(load_adapter(load_reward_model(base, "float32", trust_remote_code=True), adapter))
    got = all_scores(load_reward_model(str(tmp_path / "merged"), "float32", trust_remote_code=True))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


FAULTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "one matrix 5 % too large": ("model.layers.0.mlp.up_proj.weight", lambda weight: weight.mul_(1.05)),
    "a head of the wrong sign": ("score.weight", lambda weight: weight.neg_()),
    "a NaN": ("model.norm.weight", lambda weight: weight[0].fill_(float("nan"))),
}


def break_sum(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The fault in what the merge makes, whichever way it goes."""
    name, harm = FAULTS[fault]
    whole, streamed = merge_module._merge, Stream.written

    def wrong(adapted: Any, adapter: str) -> Any:
        merged = whole(adapted, adapter)
        with torch.no_grad():
            harm(merged.get_parameter(name))
        return merged

    def written(self: Stream, written_name: str, dtype: torch.dtype) -> Tensor:
        weight = streamed(self, written_name, dtype).clone()
        if written_name == name:
            harm(weight)
        return weight

    monkeypatch.setattr(merge_module, "_merge", wrong)
    monkeypatch.setattr(Stream, "written", written)


@pytest.mark.parametrize("way", ["stream", "whole"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_sum_fails_and_writes_nothing(
    tmp_path: Path, tokenizer: Any, fault: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    break_sum(monkeypatch, fault)
    if way == "whole":
        monkeypatch.setattr(merge_module, "open_stream", lambda *_: "of this test")
    with pytest.raises(RuntimeError, match=r"not base \+ adapter; nothing was written\nmerge certificate: FAILED"):
        merge(base, adapter, str(tmp_path / "merged"))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_file_without_its_head_fails(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is right, the file is not: only reading back can see it."""
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    original = merge_module._round

    def lossy(model: Any, dtype: torch.dtype) -> Any:
        with torch.no_grad():
            score_head(model).weight.mul_(1.01)
        return original(model, dtype)

    monkeypatch.setattr(merge_module, "_round", lossy)
    monkeypatch.setattr(merge_module, "open_stream", lambda *_: "of this test")
    with pytest.raises(RuntimeError, match="FAILED"):
        merge(base, adapter, str(tmp_path / "merged"))


def test_adapters_that_lack_a_head_or_have_another(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = Path(save_reward_adapter(base, tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    head = next(name for name in weights if "score" in name)
    save_file({name: weight for name, weight in weights.items() if name != head}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter: lacks weights of the adapter it describes, the first is .*score"):
        merge(base, str(adapter), str(tmp_path / "merged"))
    save_file({**weights, head: torch.zeros(2, 32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        merge(base, str(adapter), str(tmp_path / "merged"))


def test_padding_is_never_the_token_that_ends_a_chat(tmp_path: Path, tokenizer: Any) -> None:
    """Plain transformers reads the score at the last token that is not padding."""
    odd = copy.deepcopy(tokenizer)
    odd.pad_token = odd.eos_token
    base = save_base(tmp_path / "base", odd)
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    merge(base, adapter, str(tmp_path / "merged"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert saved.pad_token != saved.eos_token
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.pad_token_id == saved.pad_token_id
    chat = torch.tensor([[*range(4, 20), saved.eos_token_id]])
    expected = all_scores(load_adapter(load_reward_model(base, "float32"), adapter), chat)[-1]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=chat).logits[0, 0], expected, atol=1e-5, rtol=1e-4)


def test_the_printed_certificate(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    strong = merge(base, save_reward_adapter(base, tmp_path / "strong", scale=0.3), str(tmp_path / "merged-strong"))
    weak = merge(base, save_reward_adapter(base, tmp_path / "weak", scale=1e-5), str(tmp_path / "merged-weak"))
    assert strong.kept > 0.9 > weak.kept
    lines = str(strong).splitlines()
    assert lines[0].startswith("merge certificate: passed (bfloat16, scores at ")
    assert lines[-1].endswith(
        "read by transformers' LlamaForSequenceClassification; tokenizer as trained; chat template as trained"
    )


def test_order_of_scores() -> None:
    # Of the pairs (0, 1), (0, 2), (1, 2) of different scores, the last comes out the other way round.
    assert same_order(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 9.0, 5.0])) == pytest.approx(2 / 3)
