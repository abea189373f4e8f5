"""`posttrain extend-vocab` and the training of what it writes: saved, resumed, merged, read back; and mistakes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_llama
from flag_probes_models import coded_model
from posttrain.cli import main
from posttrain.training.artifacts import content_hash
from vocabularies import domain_lines, sentencepiece_base, sentencepiece_model, unigram_base

TRAIN = ("--bf16", "False", "--logging_steps", "2", "--learning_rate", "1e-2", "--report_to", "none", "--lora_dropout", "0.1",
         "--per_device_train_batch_size", "4", "--block_size", "64", "--save_steps", "2")  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("\n".join(domain_lines()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Byte-level with a tied head, SentencePiece's BPE and Unigram with an untied one."""
    root = tmp_path_factory.mktemp("bases")
    tiny_llama(vocab=len(tokenizer)).save_pretrained(root / "tied")
    tokenizer.save_pretrained(root / "tied")
    untied = sentencepiece_base(root / "untied")
    rows = len(AutoTokenizer.from_pretrained(untied))
    tiny_llama(vocab=rows, tie_word_embeddings=False, bos_token_id=1, pad_token_id=0).save_pretrained(untied)
    unigram = unigram_base(root / "unigram")
    unigram.save_pretrained(root / "unigram")
    tiny_llama(vocab=len(unigram), tie_word_embeddings=False, bos_token_id=1, pad_token_id=0).save_pretrained(root / "unigram")
    return {"tied": root / "tied", "untied": untied, "unigram": root / "unigram"}


def run(*argv: Any) -> None:
    assert main([str(a) for a in argv]) == 0


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def extend(base: Path, corpus: Path, out: Path, *more: Any) -> None:
    run("extend-vocab", "--model_name_or_path", base, "--train_file_dir", corpus, "--vocab_size", 40, "--output_dir", out, *more)


@pytest.mark.parametrize("kind", ["tied", "untied", "unigram"])
def test_the_written_folder(
    bases: dict[str, Path], corpus: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    extend(bases[kind], corpus, out, "--validation_split_percentage", 20)
    said = capsys.readouterr().out
    old, new = AutoTokenizer.from_pretrained(bases[kind]), AutoTokenizer.from_pretrained(out)
    assert (new.chat_template, new.special_tokens_map) == (old.chat_template, old.special_tokens_map)
    assert not (out / "tokenizer.model").exists()
    facts = json.loads((out / "run.json").read_text())
    assert facts["parents"]["base"] == {"name": str(bases[kind]), "hash": content_hash(bases[kind])}
    vocabulary = facts["vocabulary"]
    assert vocabulary["tokens"] == [len(old), len(new)] == [len(old), len(old) + 40]
    # Weights: old rows as they were, a new row the mean of what the base gave for its text.
    model, base = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (out, bases[kind]))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        grown, before = getattr(model, table)().weight, getattr(base, table)().weight
        assert torch.equal(grown[: len(old)], before)
        assert grown.shape[0] == len(new)
        names = {token: name for name, token in new.get_vocab().items()}
        for new_id in range(len(old), len(new)):
            ids = [token.id for token in old.backend_tokenizer.model.tokenize(names[new_id])]
            assert len(ids) > 1
            torch.testing.assert_close(grown[new_id], before[ids].mean(0))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (kind == "tied")
    # The account: the rows, and the gain computed here once more.
    ledger = json.loads((out / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["trained"], ledger["held_out"]) == (60, 48, 12)
    held = facts["held_out"]
    sources = [line for line in domain_lines() if line]
    every = [sum(len(t(line, add_special_tokens=False)["input_ids"]) for line in sources) for t in (old, new)]
    assert held["after"]["tokens"] < 0.6 * held["before"]["tokens"]
    for one, whole in zip(("before", "after"), every, strict=True):  # the sentences are alike
        assert held[one]["tokens"] / held[one]["characters"] == pytest.approx(whole / sum(map(len, sources)), rel=0.1)
    assert held["before"]["nats"] > 0
    assert held["after"]["nats"] > 0
    per_character = [held[one]["tokens"] / held[one]["characters"] for one in ("before", "after")]
    assert f"tokens per character: {per_character[0]:.4f} -> {per_character[1]:.4f}" in said
    reached = "chosen by their scores" if kind == "unigram" else f"reached by {vocabulary['merges']} merges"
    assert f"40 new pieces {reached}" in said
    assert (vocabulary["merges"] == 0) is (kind == "unigram")
    assert len(vocabulary["examples"]) == 10
    assert said.count(" -> 1)") == 10


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["tied", "untied", "unigram"])
def test_pt_on_it_saves_resumes_merges_and_reloads(bases: dict[str, Path], corpus: Path, kind: str, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    extend(bases[kind], corpus, grown, "--max_eval_samples", 0)
    pt = ("pt", "--model_name_or_path", grown, "--train_file_dir", corpus, "--modules_to_save", "embed_tokens,lm_head", *TRAIN)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*pt, "--max_steps", 4, "--output_dir", whole)
    run(*pt, "--max_steps", 4, "--output_dir", cut)
    for file in cut.glob("checkpoint-4/*"):
        file.unlink()
    (cut / "checkpoint-4").rmdir()
    run(*pt, "--max_steps", 4, "--output_dir", cut, "--resume_from_checkpoint", "auto")
    for file in ("adapter_model.safetensors", "checkpoint-4/adapter_model.safetensors", "checkpoint-4/optimizer.pt"):
        assert digest(whole / file) == digest(cut / file), file
    merged = tmp_path / "merged"
    run("merge", "--base_model", grown, "--lora_model", whole, "--output_dir", merged, "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (kind == "tied")
    n_old = len(AutoTokenizer.from_pretrained(bases[kind]))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(model, table)().weight - getattr(before, table)().weight).abs().amax(1)
        assert moved[n_old:].max() > 1e-3  # new rows were trained, and are in the merged file
    saved = load_file(whole / "adapter_model.safetensors")
    trained = next(tensor for name, tensor in saved.items() if "embed_tokens" in name)
    assert torch.equal(model.model.embed_tokens.weight, trained)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(grown).get_vocab()
    assert tokenizer("患者感染病毒")["input_ids"] == AutoTokenizer.from_pretrained(grown)("患者感染病毒")["input_ids"]


def test_pieces_of_a_trained_model(bases: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    file = sentencepiece_model(tmp_path, domain_lines(), 420, "domain")
    out = tmp_path / "out"
    extend(bases["tied"], corpus, out, "--domain_sp_model", file)
    facts = json.loads((out / "run.json").read_text())
    assert facts["parents"]["domain_sp_model"] == {"name": str(file), "hash": content_hash(file)}
    assert facts["held_out"]["after"]["tokens"] < facts["held_out"]["before"]["tokens"]


def test_a_model_with_code_of_its_own(
    bases: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    coded = coded_model(bases["tied"], tmp_path / "coded")
    base = ("extend-vocab", "--model_name_or_path", coded, "--train_file_dir", corpus, "--output_dir", tmp_path / "out")
    assert "trust_remote_code" in fails(capsys, *base)
    extend(coded, corpus, tmp_path / "out", "--trust_remote_code", True)
    assert (tmp_path / "out" / "coded.py").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "CodedForCausalLM"


def test_bad_rows_are_named_or_counted(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": line} for line in domain_lines()] + [{"text": 5}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("extend-vocab", "--model_name_or_path", bases["tied"], "--train_file_dir", file, "--output_dir", tmp_path / "out")
    assert "rows.jsonl:61:text" in fails(capsys, *base)
    run(*base, "--bad_rows", "skip")
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["dropped"] == 1


def test_mistakes_are_one_line(bases: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    base = ("extend-vocab", "--model_name_or_path", bases["tied"], "--train_file_dir", corpus, "--output_dir", out)
    for flag, value, said in (
        ("vocab_size", 0, "at least 1"),
        ("min_frequency", 0, "at least 1"),
        ("max_eval_samples", -2, "or -1 for all"),
        ("validation_split_percentage", 0, "more than 0 and less than 100"),
        ("domain_sp_model", "nowhere.model", "no such file"),
        ("min_frequency", 10_000, "no new piece occurs 10000 times"),
        ("output_dir", bases["tied"], "holds"),
        ("output_dir", corpus.parent, "holds"),
        ("output_dir", corpus, "holds"),
    ):
        message = fails(capsys, *base, f"--{flag}", value) if flag != "output_dir" else fails(capsys, *base[:-1], value)
        assert said in message, message
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is not empty" in fails(capsys, *base)
    run(*base, "--overwrite_output_dir", True)
    assert not (out / "mine.txt").exists()
