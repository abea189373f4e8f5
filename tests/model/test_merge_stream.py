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

from adapters import save_adapter, save_base, save_reward_adapter, stir
from conftest import tiny_llama
from posttrain.commands.merge import merge
from posttrain.model import merge as merge_module
from posttrain.model import merge_stream
from posttrain.model.adapter import Lora, attach_lora, base_fingerprint
from posttrain.model.load import load_model
from posttrain.model.merge import WriteOptions
from posttrain.model.merge_plan import Stream
from posttrain.model.rope import RopeScaling
from posttrain.model.shards import empty_model, find_shards, folder_fingerprint
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
# Their experts are stored one by one and stacked as they are read, or stored as one tensor already.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "olmoe": {}, "phimoe": {}, "granitemoe": {},
    "glm4_moe": {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},  # and its router has a buffer
}  # fmt: skip
ATTENTION = Lora(rank=4, alpha=12, target_modules="q_proj,k_proj,v_proj,o_proj")


@pytest.fixture
def streamed(caplog: pytest.LogCaptureFixture) -> Any:
    """Why merges since the last call were not tensor by tensor, one reason each."""
    caplog.set_level(logging.INFO, "posttrain.model.merge")

    def last() -> list[str]:
        said = [record.message for record in caplog.records if record.message.startswith("merge: ")]
        caplog.clear()
        return [line.partition("because ")[2] for line in said]

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


@pytest.mark.parametrize(
    ("family", "dora"), [*((family, False) for family in FAMILIES), *((family, True) for family in ("llama", "gpt2", "gpt_neox"))]
)
def test_families_are_merged_as_in_memory(
    tmp_path: Path, tokenizer: Any, family: str, dora: bool, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    base = save_family(tmp_path / "base", family, tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter", Lora(rank=4, alpha=12, dora=dora))
    certificates = both(base, adapter, tmp_path, monkeypatch, write=WriteOptions(max_shard_size="20KB"))
    assert streamed() == ["of this test"]
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
    certificates = both(base, adapter, tmp_path, monkeypatch)
    assert_same_folder(tmp_path)
    assert streamed() == ["of this test"]
    assert {one.tied_head for one in certificates} == {tied}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_keep_their_experts_as_they_are_stored(
    tmp_path: Path, tokenizer: Any, family: str, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    base = save_family(tmp_path / "base", family, tokenizer, **MIXTURES[family])
    adapter = save_adapter(base, tmp_path / "adapter", ATTENTION)
    certificates = both(base, adapter, tmp_path, monkeypatch, write=WriteOptions(max_shard_size="20KB"))
    assert streamed() == ["of this test"]
    assert_same_folder(tmp_path)
    stored, written = (weights(Path(folder)) for folder in (base, tmp_path / "stream"))
    assert written.keys() == stored.keys()
    experts = [name for name in stored if ".experts." in name or "_linear" in name]
    assert experts
    assert all(torch.equal(written[name], stored[name]) for name in experts)
    assert certificates[0].adapter_kl_nats == pytest.approx(certificates[1].adapter_kl_nats, rel=1e-3)
    assert certificates[0].adapter_kl_nats > 1e-5


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "granite", "olmoe"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_reward_models(
    tmp_path: Path, tokenizer: Any, family: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    """Also those of families that transformers has no class for (granite, olmoe), and an adapter on a merged reward model."""
    base = save_family(tmp_path / "base", family, tokenizer, stored)
    for name, start in (("first", base), ("second", str(tmp_path / "first" / "stream"))):
        root = tmp_path / name
        adapter = save_reward_adapter(start, root / "adapter")
        one, other = both(start, adapter, root, monkeypatch, write=WriteOptions(max_shard_size="20KB"))
        assert streamed() == ["of this test"]
        assert_same_folder(root)
        assert weights(root / "stream")["score.weight"].dtype == torch.float32
        assert one.ok
        assert one.adapter_mean_abs == pytest.approx(other.adapter_mean_abs, rel=1e-3)
        assert (one.read_by, one.n_tokens) == (other.read_by, other.n_tokens)


def test_an_old_file_of_weights_is_merged_alike(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, streamed: Any
) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = Path(save_adapter(base, tmp_path / "adapter"))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    both(base, str(adapter), tmp_path, monkeypatch)
    assert streamed() == ["of this test"]
    assert_same_folder(tmp_path)
    torch.save({"code": Path("x")}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="code from a file is not run"):
        merge(base, str(adapter), str(tmp_path / "merged"))


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


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Peak:
    """The most that a block of code has in memory above what there was."""

    def __enter__(self) -> Peak:
        gc.collect()
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once: measured is what is in use, not what is kept
        libc.malloc_trim(0)  # else memory that was freed before would count for nothing
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
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 25)


def big_llama(folder: Path, tokenizer: Any) -> str:
    """303 MB in float32."""
    model = tiny_llama(vocab=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=24)
    return save_big(model, folder, tokenizer)


def middling_llama(folder: Path, tokenizer: Any) -> str:
    """80 MB."""
    return save_big(
        tiny_llama(vocab=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=24), folder, tokenizer
    )


def big_mixture(folder: Path, tokenizer: Any) -> str:
    """334 MB in float32, 95 % of it experts."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_local_experts": 8,
        "sliding_window": None,
    }
    return save_big(tiny("mixtral", vocab_size=len(tokenizer), max_position_embeddings=512, **sizes), folder, tokenizer)


def save_big(model: Any, folder: Path, tokenizer: Any) -> str:
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
    tokenizer.save_pretrained(folder)
    return str(folder)


PEAKS = {
    "lora": (big_llama, lambda base, folder: save_adapter(base, folder, Lora(rank=4))),
    "dora": (middling_llama, lambda base, folder: save_adapter(base, folder, Lora(rank=4, dora=True))),
    "reward model": (middling_llama, lambda base, folder: save_reward_adapter(base, folder, Lora(rank=4), scale=0.02)),
    "mixture": (big_mixture, lambda base, folder: save_adapter(base, folder, ATTENTION)),
}


@pytest.mark.parametrize("kind", PEAKS)
def test_peak_memory_is_that_of_a_layer_and_a_file(
    tmp_path: Path, tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, adapt = PEAKS[kind]
    base = save(tmp_path / "base", tokenizer)
    size = 4 * sum(tensor.numel() for tensor in weights(tmp_path / "base").values())
    adapter = adapt(base, tmp_path / "adapter")
    small = save_base(tmp_path / "small", tokenizer)
    merge(small, save_adapter(small, tmp_path / "small-adapter"), str(tmp_path / "small-merged"))  # imports what is imported late

    def peak(way: str) -> float:
        with Peak() as found:
            merge(
                base, adapter, str(tmp_path / way), dtype="float32", write=WriteOptions(max_shard_size=f"{size // 30_000_000}MB")
            )
        return found.most / size

    # Of the big llama a layer has 12 MB, a file 10, and three times the certificate's texts as much as four layers; of the mixture 14.
    # What does not grow with a model is a larger share of the middling one (0.42 to 0.64 measured).
    # The whole model at once takes 2.2 times its size.
    assert (found := peak("stream")) < (0.5 if "big" in save.__name__ else 1), found
    if kind == "lora":
        monkeypatch.setattr(merge_module, "open_stream", lambda *_: "of this test")
        assert peak("whole") > 1
        assert_same_folder(tmp_path)


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


def test_a_wrong_expert_fails_the_certificate(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_family(tmp_path / "base", "mixtral", tokenizer, torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", ATTENTION)
    right = merge_stream._cast

    def wrong(shards: Any, key: str, dtype: torch.dtype) -> torch.Tensor:
        return right(shards, key, dtype) * (1.01 if key.endswith("layers.1.block_sparse_moe.experts.2.w2.weight") else 1)

    monkeypatch.setattr(merge_stream, "_cast", wrong)
    with pytest.raises(RuntimeError, match="is not base \\+ adapter; nothing was written"):
        merge(base, adapter, str(tmp_path / "merged"))


def test_experts_are_those_that_transformers_reads(tmp_path: Path, tokenizer: Any) -> None:
    """Each parameter made of the files is the one that the library makes; shapes are known without reading."""
    for family, changes in MIXTURES.items():
        base = save_family(tmp_path / family, family, tokenizer, **changes)
        model = load_model(base, "bfloat16")
        shards = find_shards(base, empty_model(model.config))
        assert shards is not None
        for name, parameter in model.named_parameters():
            assert torch.equal(shards.read(name), parameter), name
            assert shards.shape(name) == tuple(parameter.shape)


def test_what_is_merged_in_memory_says_why(tmp_path: Path, tokenizer: Any, streamed: Any) -> None:
    mixture = save_family(tmp_path / "mixture", "mixtral", tokenizer)
    adapter = save_adapter(mixture, tmp_path / "experts", Lora(target_modules="q_proj,experts.down_proj"))
    assert merge(mixture, adapter, str(tmp_path / "merged")).ok
    assert streamed() == ["the adapter is not a plain LoRA (target_parameters)"]
    base = save_base(tmp_path / "base", tokenizer)
    file = Path(save_adapter(base, tmp_path / "adapter")) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"q_proj": 4}}))
    assert merge(base, str(file.parent), str(tmp_path / "patterned")).ok
    assert streamed() == ["the adapter is not a plain LoRA (alpha_pattern)"]


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


def test_matrices_without_their_lengths(tmp_path: Path, tokenizer: Any) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter", Lora(dora=True))
    for part, first in (("layers.0.mlp.up_proj.lora_magnitude", "layers.0.mlp.up_proj.lora_magnitude_vector"),):
        with pytest.raises(UserError, match=f"lacks weights of the adapter it describes, the first is model.{first}"):
            merge(base, without(adapter, tmp_path / "part", part), str(tmp_path / "merged"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral", "qwen3_moe"])
def test_the_hash_of_the_files_is_that_of_the_model(tmp_path: Path, tokenizer: Any, family: str) -> None:
    base = save_family(tmp_path / "base", family, tokenizer)
    model = load_model(base, "float32")
    assert folder_fingerprint(base, empty_model(model.config)) == base_fingerprint(model) is not None
    other = save_family(tmp_path / "other", family, tokenizer, torch.float32, initializer_range=0.5)
    assert folder_fingerprint(other, empty_model(model.config)) == base_fingerprint(load_model(other, "float32"))
