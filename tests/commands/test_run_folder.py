"""A folder that holds a run: what starts over in it, what goes on from it, and what leaves it as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ppo_runs
from conftest import ROOT
from posttrain.cli import main
from preference_runs import digest, lines, logged, pairs, words, write

# The second process finds a fault in the model; the first has none.
FAULT = """
import os, sys
from posttrain.cli import main
from posttrain.commands import train
from posttrain.types import UserError
load = train.build_model
def build_model(config, tokenizer):
    if os.environ["RANK"] == "1" and sys.argv[1] == "fault":
        raise UserError("this process cannot load it")
    return load(config, tokenizer)
train.build_model = build_model
sys.exit(main(sys.argv[2:]))
"""


def chats(file: Path) -> Path:
    rows = [
        {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"fox {i} rests"}]}
        for i in range(9)
    ]
    return write(file, rows)


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The flags of every run of sft here."""
    return {"model_name_or_path": model_folder, "train_file_dir": chats(tmp_path / "chats.jsonl"), "save_strategy": "steps",
            "save_steps": 3, "audit": False}  # fmt: skip


def command(stage: str, out: Path, **flags: Any) -> list[str]:
    return ppo_runs.words(out, **flags) if stage == "ppo" else words(stage, out, **flags)


def fails(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line that a refused command ends with."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in said)
    return said[-1]


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest(file) for file in folder.rglob("*") if file.is_file()}


# --- starting over --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_what_cannot_start_deletes_nothing(
    stage: str, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if stage == "ppo":
        speaker = ppo_runs.save_speaker(tmp_path / "speaker", scale=8)
        base = {"model_name_or_path": speaker, "train_file_dir": ppo_runs.write_prompts(tmp_path / "prompts.jsonl", ["a", "b"])}
    out = tmp_path / "run"
    assert main(command(stage, out, **base, max_steps=1)) == 0
    (out / "notes.txt").write_text("mine")
    before = content(out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(base["train_file_dir"]).read_text() + '{"conversations": [\n')
    damaged = tmp_path / "damaged"
    shutil.copytree(base["model_name_or_path"], damaged)
    (damaged / "model.safetensors").write_bytes(b"half")
    again = {**base, "max_steps": 1, "overwrite_output_dir": True}
    faults = [
        ({"model_name_or_path": tmp_path / "no-such-model"}, "no-such-model: no such model folder"),
        ({"model_name_or_path": damaged}, "damaged"),
        ({"train_file_dir": broken}, "broken.jsonl:"),
        ({"target_modules": "q_prj"}, "did you mean 'q_proj'?"),
        ({"cache_dir": out / "cache"}, "--overwrite_output_dir would delete --cache_dir"),
        ({"overwrite_output_dir": False}, "already holds a run"),
    ]
    for change, said in faults:
        assert said in fails(capsys, command(stage, out, **{**again, **change}))
        assert content(out) == before, change
    assert main(command(stage, out, **again)) == 0
    assert not (out / "notes.txt").exists()
    assert (out / "run.json").is_file()


def test_one_of_two_processes_that_cannot_start_deletes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    out, script = tmp_path / "run", tmp_path / "fault.py"
    assert main(words("sft", out, **base)) == 0
    before = content(out)
    script.write_text(FAULT)
    for kind, code in (("fault", 1), ("none", 0)):
        argv = words("sft", out, **{**base, "overwrite_output_dir": True, "max_steps": 1, "per_device_train_batch_size": 2})
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, kind, *argv],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if kind == "fault":
            assert "this process cannot load it" in done.stderr
            assert content(out) == before
    assert not (out / "checkpoint-3").exists()
    assert [line["step"] for line in lines(out)] == [1, 1]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("no", ["False", "fALSE"])
def test_not_to_resume_is_no_leave_to_go_on(
    stage: str, no: str, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}")
    (out / "checkpoint-7").mkdir()
    flags = {"model_name_or_path": base["model_name_or_path"], "train_file_dir": base["train_file_dir"], "max_steps": 1}
    assert "already holds a run" in fails(capsys, command(stage, out, **flags, resume_from_checkpoint=no))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("resume_from_checkpoint: false\n")
    assert "already holds a run" in fails(capsys, command(stage, out, **flags, config=recipe))
    if stage == "sft":
        assert main(command(stage, out, **flags, resume_from_checkpoint=no, overwrite_output_dir=True)) == 0
        assert "cut short" not in capsys.readouterr().err
        assert not (out / "checkpoint-7").exists()


# --- going on -------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_kind_is_told_by_its_flags(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = {**base, "target_modules": "q_proj,v_proj", "lora_rank": 8}
    assert main(words("sft", out, **flags)) == 0
    checkpoint = out / "checkpoint-3"
    cases = [
        ({"lora_rank": 4}, "--lora_rank 8, this run has --lora_rank 4: give"),
        ({"lora_alpha": 4}, "--lora_alpha 16, this run has --lora_alpha 4: give"),
        ({"use_rslora": True}, "--use_rslora False, this run has --use_rslora True: give"),
        ({"use_dora": True, "lora_rank": 2}, "--lora_rank 8 --use_dora False, this run has --lora_rank 2 --use_dora True: give"),
        ({"target_modules": "v_proj"}, "--target_modules q_proj,v_proj, this run has --target_modules v_proj: give"),
        ({"modules_to_save": "lm_head"}, "--modules_to_save (none), this run has --modules_to_save "),
    ]
    for change, said in cases:
        line = fails(capsys, words("sft", out, **{**flags, **change}, resume_from_checkpoint="auto"))
        assert line.startswith(f"posttrain: --resume_from_checkpoint {checkpoint}: its adapter was trained with {said}")
        assert line.endswith(f"with --peft_path {checkpoint}")
    whole = {name: value for name, value in flags.items() if name not in ("target_modules", "lora_rank")} | {"use_peft": False}
    assert "holds an adapter, and this run trains all weights" in fails(
        capsys, words("sft", out, **whole, resume_from_checkpoint="auto")
    )
    reward = {**flags, "train_file_dir": write(tmp_path / "pairs.jsonl", pairs(6))}
    line = fails(capsys, words("rm", tmp_path / "rm", **reward, resume_from_checkpoint=checkpoint))
    assert "holds an adapter of a language model, and this run trains a reward model" in line
    layers = ",".join(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj"))
    same = {**flags, "target_modules": layers, "lora_dropout": 0.1, "max_steps": 4}  # the same tensors
    assert main(words("sft", out, **same, resume_from_checkpoint="auto")) == 0


def test_a_whole_model_is_no_adapter(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(words("sft", out, **base, use_peft=False)) == 0
    line = fails(capsys, words("sft", out, **base, resume_from_checkpoint="auto"))
    assert f"holds a whole model, and this run trains an adapter: give --use_peft False, or start a new run from its weights with --model_name_or_path {out / 'checkpoint-3'}" in line  # fmt: skip


def test_a_longer_run_goes_on_at_its_own_rate(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(words("sft", out, **base)) == 0
    assert main(words("sft", tmp_path / "plain", **{**base, "max_steps": 5, "save_strategy": "no"})) == 0
    assert "schedule: " not in capsys.readouterr().err
    assert main(words("sft", out, **base, resume_from_checkpoint="auto")) == 0
    assert "schedule: " not in capsys.readouterr().err
    assert main(words("sft", out, **{**base, "max_steps": 5}, resume_from_checkpoint="auto")) == 0
    said = f"schedule: the run that saved {out / 'checkpoint-3'} was planned for 3 steps, this one is for 5: "
    assert capsys.readouterr().err.count(said) == 1
    rates = logged(out, "learning_rate")
    assert rates[3:] == logged(tmp_path / "plain", "learning_rate")[3:]
    assert min(rates[3:]) > 0


def test_a_longer_run_of_ppo_goes_on_at_its_own_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {
        "model_name_or_path": ppo_runs.save_speaker(tmp_path / "speaker", scale=8),
        "train_file_dir": ppo_runs.write_prompts(tmp_path / "prompts.jsonl", [f"question {letter}" for letter in "abcdefgh"]),
        "lr_scheduler_type": "linear", "save_steps": 1, "audit": False, "mini_batch_size": 8, "num_ppo_epochs": 1,
    }  # fmt: skip
    out = ppo_runs.run(tmp_path / "run", **base, max_steps=2)
    ppo_runs.run(out, **base, max_steps=2, resume_from_checkpoint="auto")
    assert "schedule: " not in capsys.readouterr().err
    ppo_runs.run(out, **base, max_steps=3, resume_from_checkpoint="auto")
    said = f"schedule: the run that saved {out / 'checkpoint-2'} was planned for 2 steps, this one is for 3: "
    assert capsys.readouterr().err.count(said) == 1
    # One update a rollout: at the rate 0, with which the shorter run ended, it would change nothing.
    saved = [digest(out / f"checkpoint-{step}" / "trained.safetensors") for step in (2, 3)]
    assert saved[0] != saved[1]
    line = fails(capsys, ppo_runs.words(out, **base, max_steps=3, resume_from_checkpoint="auto", lora_rank=4))
    assert "its adapter was trained with --lora_rank 8, this run has --lora_rank 4: give the flags" in line


def test_the_folder_of_a_run_is_no_checkpoint(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(words("sft", out, **base)) == 0
    start = f"posttrain: --resume_from_checkpoint {out}: is the folder of a run, not a checkpoint; "
    line = fails(capsys, words("sft", out, **base, resume_from_checkpoint=out))
    assert line == f"{start}name its last checkpoint, {out / 'checkpoint-3'}, or give auto"
    line = fails(capsys, words("sft", tmp_path / "other", **base, resume_from_checkpoint=out))
    assert line == f"{start}name its last checkpoint, {out / 'checkpoint-3'}"
    (out / "trainer_state.json").unlink()  # a run that was interrupted
    assert fails(capsys, words("sft", tmp_path / "other", **base, resume_from_checkpoint=out)) == line
    shutil.rmtree(out / "checkpoint-3")
    line = fails(capsys, words("sft", tmp_path / "other", **base, resume_from_checkpoint=out))
    assert line == f"{start}it has no whole checkpoint, so there is nothing to go on from"
    assert json.loads((out / "run.json").read_text())["stage"] == "sft"
