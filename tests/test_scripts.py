"""The guide's commands under their own names, each to its end on a tiny model: every flag of theirs is taken."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from flag_probes import untouched
from flag_probes_models import reward_adapter
from posttrain import cli, config

SCRIPTS = ROOT / "scripts"
# What the guide lists for a run folder, beside the adapter.
RUN_FOLDER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer_config.json",
    "train_results.txt",
    "trainer_state.json",
)
TINY: dict[str, Any] = {"max_steps": 2, "max_train_samples": 6, "max_eval_samples": 2}


def shell_words(name: str) -> list[str]:
    """The script and flags of a run_*.sh, variables as their defaults."""
    text = (SCRIPTS / name).read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "torch.distributed.run" in line)
    line = re.sub(r"\$\{\w+:\+[^}]*\}", "", line)
    line = re.sub(r'"\$\{\w+:-([^}]*)\}"', r"\1", line).replace('"$@"', "")
    words = shlex.split(line)
    return words[words.index("--nproc_per_node") + 2 :]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, stdin: str = "") -> int:
    """`python scripts/x.py …` in this process. Returns the exit code."""
    with monkeypatch.context() as patch, untouched():
        patch.setattr(sys, "argv", list(words))
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture
def files(tmp_path: Path, model_folder: Path) -> dict[str, Path]:
    """Tiny rows of every kind, and a reward model's adapter."""
    chats = [
        {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"the fox {i} rests"}]}
        for i in range(8)
    ]
    pairs = [{"conversations": chat["conversations"][:1], "chosen": "the fox rests", "rejected": "a lazy dog"} for chat in chats]
    for name, rows in (("sft", chats), ("pairs", pairs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    return {name: tmp_path / name for name in ("sft", "pairs", "pretrain")} | {
        "reward": reward_adapter(model_folder, tmp_path / "reward")
    }


CASES = {
    "run_pt.sh": ("pretrain", {"block_size": 32}),
    "run_sft.sh": ("sft", {}),
    "run_rm.sh": ("pairs", {}),
    "run_dpo.sh": ("pairs", {}),
    "run_ppo.sh": ("sft", {"max_target_length": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_command_runs_to_its_end(
    name: str, files: dict[str, Path], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows, more = CASES[name]
    out = tmp_path / "out"
    given = {
        "model_name_or_path": model_folder, "train_file_dir": files[rows], "validation_file_dir": files[rows], "output_dir": out,
        "cache_dir": tmp_path / "cache", **TINY, **more,
    }  # fmt: skip
    if name == "run_ppo.sh":
        given |= {"reward_adapter": files["reward"]}
    words = [*shell_words(name), *(str(word) for flag, value in given.items() for word in (f"--{flag}", value))]
    assert run(words, monkeypatch) == 0, capfd.readouterr().err
    for file in RUN_FOLDER:
        assert (out / file).is_file(), file
    assert list((out / "logs").rglob("events.out.tfevents*"))
    if "--do_eval" in words:  # not in the guide's run_ppo.sh
        assert "eval_loss = " in (out / "eval_results.txt").read_text()
    said = capfd.readouterr().err
    assert "note: --device_map is not needed" in said
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    if name != "run_ppo.sh":
        assert list(out.glob("checkpoint-*"))
        assert "note: --evaluation_strategy is now --eval_strategy" in said or name == "run_dpo.sh"


def test_merge_and_inference(
    files: dict[str, Path], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, merged, answers = tmp_path / "sft-run", tmp_path / "merged", tmp_path / "answers.jsonl"
    words = [*shell_words("run_sft.sh"), "--model_name_or_path", str(model_folder), "--train_file_dir", str(files["sft"]),
             "--validation_file_dir", str(files["sft"]), "--output_dir", str(out), "--cache_dir", str(tmp_path / "cache"),
             "--max_steps", "1", "--template_name", "vicuna"]  # fmt: skip
    assert run(words, monkeypatch) == 0
    merge = (
        f"scripts/merge_peft_adapter.py --model_type auto --base_model {model_folder} --tokenizer_path {out} --lora_model {out}"
    )
    assert run([*merge.split(), "--output_dir", str(merged)], monkeypatch) == 0
    assert (merged / "model.safetensors").is_file()
    questions = tmp_path / "questions.txt"
    questions.write_text("what is a fox?\nwhat is a dog?\n")
    ask = f"scripts/inference.py --model_type auto --base_model {model_folder} --lora_model {out} --template_name vicuna"
    short = "--max_new_tokens 4 --temperature 0 --repetition_penalty 1.1"
    batch = f"{ask} --tokenizer_path {out} --data_file {questions} --output_file {answers} --eval_batch_size 2 {short}"
    assert run(batch.split(), monkeypatch) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == ["what is a fox?", "what is a dog?"]
    capfd.readouterr()
    assert run([*f"{ask} --interactive --single_tune True {short}".split()], monkeypatch, stdin="what is a fox?\n") == 0
    talked = capfd.readouterr().out
    assert talked.strip() == rows[0]["output"].strip()
    monkeypatch.chdir(tmp_path)
    assert run(f"{ask} {short}".split(), monkeypatch) == 0
    assert capfd.readouterr().out.count("Input: ") == len((tmp_path / "predictions_result.jsonl").read_text().splitlines()) == 2


def test_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "alpaca.json", tmp_path / "chats.jsonl"
    source.write_text(json.dumps([{"instruction": "name a fox", "input": "", "output": "red"}]))
    words = f"scripts/convert_dataset.py --in_file {source} --out_file {target} --data_type alpaca"
    assert run(words.split(), monkeypatch) == 0
    assert json.loads(target.read_text())["conversations"][1] == {"from": "gpt", "value": "red"}


def test_a_script_of_its_own_process_passes_the_exit_code_on() -> None:
    words = [sys.executable, SCRIPTS / "pretraining.py", "--block_siz", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("posttrain: --block_siz is unknown: did you mean --block_size?")


def test_shell_scripts_are_well_formed() -> None:
    for file in SCRIPTS.glob("run_*.sh"):
        subprocess.run(["bash", "-n", file], check=True)
        assert file.stat().st_mode & 0o111
        assert file.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_engine_files_contradict_no_flag(stage: int) -> None:
    """What a flag says stands as `auto`, which the library fills in."""
    read = json.loads((SCRIPTS / f"deepspeed_zero_stage{stage}_config.json").read_text())
    assert read["zero_optimization"]["stage"] == stage
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert read[name] == "auto"
    assert read["bf16"]["enabled"] == read["fp16"]["enabled"] == "auto"


# --- flags of the guide's commands that no run_*.sh of ours has ------------------------------------------------------------

GUIDE = {
    "pt": "--model_type bloom --use_fast_tokenizer False --keep_linebreaks True --overwrite_cache True --streaming False --packing True"
    " --validation_split_percentage 1 --modules_to_save embed_tokens,lm_head --peft_path x --trust_remote_code True",
    "sft": "--template_name vicuna --model_max_length 512 --ignore_pad_token_for_loss True --peft_path x --qlora False"
    " --load_in_4bit True --load_in_8bit False --rope_scaling linear --flash_attn True --shift_attn True --neft_alpha 5"
    " --deepspeed deepspeed_zero_stage2_config.json --fp16",
    "rm": "--model_type bloom --use_fast_tokenizer False --load_in_4bit True --load_in_8bit False --modules_to_save x",
    "dpo": "--template_name vicuna --min_target_length 4 --beta 0.1 --optim adamw_torch --lr_scheduler_type cosine --warmup_steps 100",
    "ppo": "--reward_model_name_or_path x --reward_model_device cuda:0 --template_name vicuna --mini_batch_size 1 --min_target_length 4"
    " --init_kl_coef 0.2 --adap_kl_ctrl True --gradient_accumulation_steps 1 --report_to tensorboard --do_eval --num_train_epochs 1"
    " --per_device_train_batch_size 1 --eval_strategy steps --eval_steps 100 --gradient_checkpointing True --missing_eos_penalty 1.0"
    " --response_length 100 --load_in_4bit False --load_in_8bit False",
    "merge": "--model_type bloom --base_model_name_or_path x --peft_model_path y --resize_emb True",
    "inference": "--model_type bloom --resize_emb True --single_tune True --interactive True --load_in_4bit True --load_in_8bit False",
}


@pytest.mark.parametrize("command", GUIDE)
def test_a_word_of_the_guide_is_known(command: str) -> None:
    table = cli.COMMANDS[command]
    options = config.options_of(table.groups, table.training)
    for word in re.findall(r"--(\w+)", GUIDE[command]):
        config.canonical(options, word, f"--{word}", [], command)
