"""Merging tensor by tensor: the folder is that of the merge in memory, bit for bit; memory stays small; what is wrong is seen."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from adapters import save_adapter, save_base, stir
from conftest import tiny_llama
from posttrain.commands.merge import merge
from posttrain.model import merge as merge_module
from posttrain.model.adapter import Lora, attach_lora, base_fingerprint
from posttrain.model.load import load_model
from posttrain.model.merge import WriteOptions
from posttrain.model.merge_plan import Stream
from posttrain.model.rope import RopeScaling
from posttrain.model.shards import empty_model, folder_fingerprint
from posttrain.types import UserError

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "bloom",
    "glm4",
    "cohere2",
    "olmo2",
    "phi3",
    "falcon",
]


@pytest.fixture
def streamed(caplog: pytest.LogCaptureFixture) -> Any:
    """Says whether the last merge was tensor by tensor."""
    caplog.set_level(logging.INFO, "posttrain.model.merge")

    def last() -> bool:
        said = [record.message for record in caplog.records if record.message.startswith("merge: ")]
        caplog.clear()
        return not said

    return last


def save_family(folder: Path, family: str, tokenizer: Any, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> str:
    tiny(family, vocab_size=len(tokenizer), max_position_embeddings=512, **changes).to(dtype).save_pretrained(
        folder, max_shard_size="20KB"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def both(base: str, adapter: str, root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """The certificates of the two ways; the folders are `stream` and `whole`."""
    found = [merge(base, adapter, str(root / "stream"), **options)]
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "open_stream", lambda *_: "of this test")
        found.append(merge(base, adapter, str(root / "whole"), **options))
    return found


def assert_same_folder(root: Path, ignored: tuple[str, ...] = ("merge_certificate.json",)) -> None:
    one, other = (weights(root / way) for way in ("stream", "whole"))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name
    for file in (root / "whole").glob("*.json"):
        if file.name not in ignored and "index" not in file.name:
            assert json.loads(file.read_text()) == json.loads((root / "stream" / file.name).read_text()), file.name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_merged_as_in_memory(
    tmp_path: Path, tokenizer: Any, family: str, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    base = save_family(tmp_path / "base", family, tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter", Lora(rank=4, alpha=12))
    certificates = both(base, adapter, tmp_path, monkeypatch, write=WriteOptions(max_shard_size="20KB"))
    assert not streamed()
    assert len(list((tmp_path / "stream").glob("model-*.safetensors"))) > 1
    assert_same_folder(tmp_path)
    for one in certificates:
        assert one.ok
    assert certificates[0].adapter_kl_nats == pytest.approx(certificates[1].adapter_kl_nats, rel=1e-3)
    assert certificates[0].adapter_kl_nats > 1e-5
    assert certificates[0].mean_kl_nats == pytest.approx(certificates[1].mean_kl_nats, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [Lora(rank=4, rslora=True), Lora(rank=2, modules_to_save="lm_head"), Lora(rank=2, modules_to_save="embed_tokens"),
     Lora(rank=2, modules_to_save="embed_tokens,lm_head")],
    ids=["rslora", "head", "embedding", "both"],
)  # fmt: skip
def test_what_is_trained_whole(
    tmp_path: Path, tokenizer: Any, lora: Lora, tied: bool, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter", lora)
    merge(base, adapter, str(tmp_path / "stream"))
    assert streamed()
    (tmp_path / "stream").rename(tmp_path / "once")
    certificates = both(base, adapter, tmp_path, monkeypatch)
    assert_same_folder(tmp_path)
    assert {one.tied_head for one in certificates} == {tied}


def test_grown_vocabulary_and_stretched_positions(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    import copy

    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=False)
    trained = copy.deepcopy(tokenizer)
    trained.add_tokens(["<extra-1>", "<extra-2>"])
    adapted = attach_lora(load_model(base, "float32", rope=RopeScaling("yarn", factor=2)), Lora())
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    trained.save_pretrained(tmp_path / "adapter")
    both(base, str(tmp_path / "adapter"), tmp_path, monkeypatch, resize_emb=True)
    assert_same_folder(tmp_path)
    config = json.loads((tmp_path / "stream" / "config.json").read_text())
    assert (config["vocab_size"], config["rope_parameters"]["rope_type"]) == (len(trained), "yarn")


def resident_bytes() -> int:
    """Memory of this process that is no file's."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The most that a block of code has in memory above what there was."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed before would count for nothing
        self.start, self.most, self.done = resident_bytes(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, resident_bytes() - self.start)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def test_peak_memory_is_that_of_a_layer_and_a_file(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24}
    model = tiny_llama(vocab=len(tokenizer), **shape)
    size = 4 * sum(p.numel() for p in model.parameters())
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="10MB")
    tokenizer.save_pretrained(tmp_path / "base")
    del model
    adapter = save_adapter(str(tmp_path / "base"), tmp_path / "adapter", Lora(rank=4))
    small = save_base(tmp_path / "small", tokenizer)
    merge(small, save_adapter(small, tmp_path / "small-adapter"), str(tmp_path / "small-merged"))  # imports what is imported late
    peaks = []
    for way in ("stream", "whole"):
        if way == "whole":
            monkeypatch.setattr(merge_module, "open_stream", lambda *_: "of this test")
        with Peak() as peak:
            merge(
                str(tmp_path / "base"), adapter, str(tmp_path / way), dtype="float32", write=WriteOptions(max_shard_size="10MB")
            )
        peaks.append(peak.most / size)
    assert_same_folder(tmp_path)
    # Of the model in float32, 303 MB: a layer has 12, a file 10, and three times the certificate's texts as much as four layers.
    assert peaks[0] < 0.5, peaks
    assert peaks[1] > 1, peaks


@pytest.mark.parametrize("tampered", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_wrong_weight_fails_the_certificate(
    tmp_path: Path, tokenizer: Any, tampered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    right = Stream.written

    def wrong(self: Stream, name: str, dtype: torch.dtype) -> torch.Tensor:
        return right(self, name, dtype) * (1.01 if name == tampered else 1)

    monkeypatch.setattr(Stream, "written", wrong)
    with pytest.raises(RuntimeError, match="is not base \\+ adapter; nothing was written"):
        merge(base, adapter, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_what_is_merged_in_memory_says_why(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "posttrain.model.merge")
    base = save_base(tmp_path / "base", tokenizer)
    mixture = save_family(tmp_path / "mixture", "mixtral", tokenizer)
    for name, where, lora, why in (
        ("dora", base, Lora(dora=True), "not a plain LoRA (use_dora)"),
        ("experts", mixture, Lora(target_modules="q_proj"), "stored under other names than the model has"),
    ):
        adapter = save_adapter(where, tmp_path / name, lora)
        assert merge(where, adapter, str(tmp_path / f"{name}-merged")).ok
        assert why in caplog.text
        caplog.clear()


def without(adapter: str, folder: Path, part: str) -> str:
    """A copy of an adapter that lacks the tensors of a name."""
    folder.mkdir()
    kept = {name: t for name, t in load_file(Path(adapter, "adapter_model.safetensors")).items() if part not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(Path(adapter, "adapter_config.json").read_text())
    return str(folder)


def test_adapters_that_do_not_fit(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter", Lora(modules_to_save="lm_head"))
    for part, said in (
        ("layers.1.self_attn.q_proj.lora_B", "lacks weights of the adapter it describes, the first is model.layers.1.self_attn.q_proj.lora_B"),
        ("layers.1.self_attn.q_proj", "the first is model.layers.1.self_attn.q_proj.lora_A"),
        ("embed_tokens", "the first is model.embed_tokens"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            merge(base, without(adapter, tmp_path / part, part), str(tmp_path / "merged"))
    save_base(tmp_path / "wide", tokenizer, hidden_size=64)
    foreign = tmp_path / "adapter" / "adapter_config.json"
    foreign.write_text(json.dumps({**json.loads(foreign.read_text()), "auto_mapping": None}))
    with pytest.raises(UserError, match=r"does not fit .*wide \(lm_head is \(311, 32\) in the adapter, \(311, 64\)"):
        merge(str(tmp_path / "wide"), adapter, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_hash_of_the_files_is_that_of_the_model(tmp_path: Path, tokenizer: Any, family: str) -> None:
    base = save_family(tmp_path / "base", family, tokenizer)
    model = load_model(base, "float32")
    assert folder_fingerprint(base, empty_model(model.config)) == base_fingerprint(model) is not None
    other = save_family(tmp_path / "other", family, tokenizer, torch.float32, initializer_range=0.5)
    assert folder_fingerprint(other, empty_model(model.config)) == base_fingerprint(load_model(other, "float32"))
