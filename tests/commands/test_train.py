"""Whole runs through the command line, on the tiny model: what they write, exact resume, streams, and mistakes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from posttrain.cli import main

CHATS = [
    {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"the fox number {i} rests"}]}
    for i in range(17)
]
COMMON = ("--bf16", "False", "--logging_steps", "2", "--learning_rate", "1e-2", "--report_to", "none", "--lora_dropout", "0.1")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return file


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text(
        "".join(f"the quick brown fox number {i} jumps over the lazy dog in the shade of tree {i}\n" for i in range(40))
    )
    return file


def run(*argv: Any) -> None:
    assert main([str(a) for a in argv]) == 0


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def same_run(first: Path, second: Path, weights: str) -> None:
    """Weights, optimizer and metrics (but for the clock) are equal."""
    assert digest(first / weights) == digest(second / weights)
    last = max(first.glob("checkpoint-*"), key=lambda c: int(c.name.split("-")[1])).name
    for name in (weights, "optimizer.pt", "scheduler.pt"):
        assert digest(first / last / name) == digest(second / last / name), name
    clock = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime_seconds")
    logs = [[{k: v for k, v in line.items() if k not in clock} for line in lines(f / "metrics.jsonl")] for f in (first, second)]
    assert logs[0] == logs[1]


def test_sft_run_folder(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(
        "sft", "--model_name_or_path", model_folder, "--train_file_dir", chats, "--validation_split_percentage", "20",
        "--output_dir", out, "--per_device_train_batch_size", "4", "--num_train_epochs", "3", "--logging_steps", "1",
        "--bf16", "False", "--learning_rate", "1e-2",
    )  # fmt: skip
    expected = {
        "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer.json", "train_results.txt",
        "eval_results.txt", "trainer_state.json", "metrics.jsonl", "run.json", "ledger.json", "logs",
    }  # fmt: skip
    assert expected <= {f.name for f in out.iterdir()}
    assert list((out / "logs").glob("events.out.tfevents.*"))
    assert {c.name for c in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
    ledger = json.loads((out / "ledger.json").read_text())
    assert (ledger["train"]["rows_in"], ledger["train"]["trained"], ledger["train"]["held_out"]) == (17, 14, 3)
    logged = lines(out / "metrics.jsonl")
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    final = next(line for line in logged if "eval_loss" in line)
    assert f"eval_loss = {final['eval_loss']}" in (out / "eval_results.txt").read_text()
    record = json.loads((out / "run.json").read_text())
    assert record["parents"]["base"]["name"] == str(model_folder)
    assert len(record["parents"]["base"]["hash"]) == 32
    assert (record["config"]["learning_rate"], record["config"]["do_train"], record["config"]["do_eval"]) == (1e-2, True, True)
    assert record["versions"]["torch"].startswith("2.")


def test_full_training_writes_a_model_that_loads(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    run("sft", "--model_name_or_path", model_folder, "--train_file_dir", chats, "--output_dir", out, "--use_peft", "False",
        "--max_steps", "3", "--save_strategy", "no", *COMMON[:-2])  # fmt: skip
    before, after = AutoModelForCausalLM.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(out)
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(model_folder).chat_template


@pytest.mark.parametrize("case", ["sft_lora", "sft_full", "sft_packed", "pt", "pt_stream"])
def test_resume_equals_an_uninterrupted_run(case: str, model_folder: Path, chats: Path, corpus: Path, tmp_path: Path) -> None:
    stage = case.split("_")[0]
    words: list[Any] = [stage, "--model_name_or_path", model_folder, *COMMON]
    words += ["--train_file_dir", chats if stage == "sft" else corpus, "--per_device_train_batch_size", 2, "--save_steps", 3]
    words += ["--gradient_accumulation_steps", 2, "--max_steps", 8, "--eval_steps", 4, "--validation_file_dir"]
    words += [chats if stage == "sft" else corpus]
    words += {"sft_packed": ["--packing", "True", "--model_max_length", 128], "pt": ["--block_size", 64],
              "pt_stream": ["--block_size", 64, "--streaming", "True", "--shuffle_buffer_rows", 7]}.get(case, [])  # fmt: skip
    if case == "sft_full":
        words = [w for w in words if w not in ("--lora_dropout", "0.1")] + ["--use_peft", "False"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*words, "--output_dir", whole)
    # The interrupted run is one whose later checkpoints are gone; its metrics still hold what came after.
    run(*words, "--output_dir", cut)
    for step in (6, 8):
        for file in sorted((cut / f"checkpoint-{step}").iterdir()):
            file.unlink()
    run(*words, "--output_dir", cut, "--resume_from_checkpoint", "auto")
    assert json.loads((cut / "run.json").read_text())["resumed_from"].endswith("checkpoint-3")
    same_run(whole, cut, "model.safetensors" if case == "sft_full" else "adapter_model.safetensors")


def test_an_evaluation_of_the_last_step_is_not_done_twice(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("sft", "--model_name_or_path", model_folder, "--train_file_dir", chats, "--validation_split_percentage", 20, "--output_dir",
        out, "--eval_strategy", "epoch", "--num_train_epochs", 2, "--save_strategy", "no", *COMMON)  # fmt: skip
    evaluated = [line for line in lines(out / "metrics.jsonl") if "eval_loss" in line]
    assert [line["epoch"] for line in evaluated] == [1.0, 2.0]
    assert f"eval_loss = {evaluated[-1]['eval_loss']}" in (out / "eval_results.txt").read_text()


def test_peft_path_goes_on_from_weights_only(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    common = ("sft", "--model_name_or_path", model_folder, "--train_file_dir", chats, "--save_strategy", "no", *COMMON)
    run(*common, "--output_dir", tmp_path / "a", "--max_steps", 6)
    run(*common, "--output_dir", tmp_path / "b", "--max_steps", 1, "--peft_path", tmp_path / "a", "--logging_steps", 1)
    first = lines(tmp_path / "a" / "metrics.jsonl")
    second = lines(tmp_path / "b" / "metrics.jsonl")
    assert second[0]["loss"] < first[0]["loss"] - 0.1
    assert json.loads((tmp_path / "b" / "run.json").read_text())["parents"]["adapter"]["name"] == str(tmp_path / "a")


def test_stream_writes_its_ledger(model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write_text(corpus.read_text() + "\n\n")
    out = tmp_path / "run"
    run("pt", "--model_name_or_path", model_folder, "--train_file_dir", corpus, "--output_dir", out, "--streaming", "True",
        "--max_steps", 12, "--block_size", 64, "--bad_rows", "skip", "--save_strategy", "no", *COMMON)  # fmt: skip
    ledger = json.loads((out / "ledger.json").read_text())["train"]
    assert ledger["trained"] == 40
    assert "rows: 40 in = 40 trained + 0 dropped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train_file_dir", "nowhere"], "nowhere"),
        ([], "needs training data"),
        (["--train_file_dir", "{chats}", "--dataset_name", "x"], "give one"),
        (["--train_file_dir", "{chats}", "--use_peft", "False", "--peft_path", "x"], "--peft_path belongs to LoRA"),
        (["--train_file_dir", "{chats}", "--lora_rank", "0"], "--lora_rank 0"),
        (["--train_file_dir", "{chats}", "--target_modules", "q_prj"], "did you mean 'q_proj'?"),
        (["--train_file_dir", "{chats}", "--model_type", "qwen2"], "--model_type qwen2"),
        (["--train_file_dir", "{chats}", "--resume_from_checkpoint", "True"], "no whole checkpoint"),
        (["--train_file_dir", "{chats}", "--resume_from_checkpoint", "elsewhere"], "not a checkpoint folder"),
        (["--train_file_dir", "{chats}", "--do_eval", "True", "--max_steps", "1"], "--do_eval True needs held-out rows"),
        (
            ["--train_file_dir", "{chats}", "--validation_file_dir", "{chats}", "--validation_split_percentage", "5"],
            "both name the held-out rows",
        ),
        (["--train_file_dir", "{chats}", "--template_name", "vicuan"], "vicuna"),
        (["--train_file_dir", "{chats}", "--use_peft", "False", "--fp16", "True"], "--fp16"),
        (["--train_file_dir", "{chats}", "--load_best_model_at_end", "True"], "save and eval strategy"),
        (
            ["--train_file_dir", "{chats}", "--gradient_checkpointing_kwargs", '{{"reentrant": true}}'],
            "--gradient_checkpointing_kwargs reentrant: expected one of use_reentrant",
        ),
        (["--train_file_dir", "{bad}"], "bad.jsonl:2:"),
    ],
)
def test_mistakes(
    words: list[str], said: str, model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(CHATS[0]) + '\n{"conversations": [\n')
    words = [w.format(chats=chats, bad=bad) for w in words]
    line = fails(capsys, "sft", "--model_name_or_path", model_folder, "--output_dir", tmp_path / "out", *words)
    assert said in line
    assert line.startswith("posttrain: ")
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "told before anything is trained"


def test_the_keys_of_checkpointing_are_torchs() -> None:
    import inspect

    from torch.utils.checkpoint import checkpoint

    from posttrain.training.resolve import CHECKPOINT_KEYS

    named = {*inspect.signature(checkpoint).parameters} - {"function", "args", "kwargs", "context_fn"}
    assert {*CHECKPOINT_KEYS} == named | {"preserve_rng_state"}  # which it takes out of its **kwargs


def test_output_dir_that_holds_a_run(model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sft", "--model_name_or_path", model_folder, "--train_file_dir", chats, "--output_dir", tmp_path / "out",
             "--max_steps", 1, "--save_strategy", "no", *COMMON)  # fmt: skip
    run(*words)
    assert "already holds a run" in fails(capsys, *words)
    again = fails(capsys, *words, "--overwrite_output_dir", "True", "--peft_path", tmp_path / "out")
    assert "--overwrite_output_dir would delete --peft_path" in again
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    run(*words, "--overwrite_output_dir", "True")
    run(*words, "--resume_from_checkpoint", "auto")


def test_recipes_name_known_flags() -> None:
    from posttrain import cli, config

    for recipe in sorted((ROOT / "recipes").glob("demo_*.yaml")):
        stage = recipe.stem.removeprefix("demo_")
        command = cli.COMMANDS[stage]
        config.parse(stage, command.groups, command.training, ["--config", str(recipe), "--model_name_or_path", "m"])
