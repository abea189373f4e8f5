"""Training on a quantised base through the command line: every stage, exact resume, a mixture of experts from load to merge, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import ppo_runs
from posttrain.cli import main
from posttrain.training.resolve_quantized import OF_BITSANDBYTES, UNPAGED
from preference_runs import digest, lines, logged, pairs, run, tiny_mixtral, words, write, young_garbage

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures(young_garbage.__name__)

ATTENTION = "q_proj,k_proj,v_proj,o_proj"
CHATS = [{"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"the fox {i} rests"}]}
         for i in range(16)]  # fmt: skip
SAID = re.compile(r" in (4bit|4bit-double|8bit): .*\buint8 ([\d,]+) bytes")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", CHATS)


def fails(capsys: pytest.CaptureFixture[str], stage: str, **flags: Any) -> str:
    assert main(words(stage, Path("never"), **flags)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# --- every stage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])
def test_every_stage_trains_on_4_bits(
    stage: str, model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    how: dict[str, Any] = {"qlora": True, "load_in_4bit": True}
    if stage == "ppo":
        ppo_runs.run(
            out, model_name_or_path=ppo_runs.save_speaker(tmp_path / "model"),
            train_file_dir=ppo_runs.write_prompts(tmp_path / "prompts.jsonl", list("abcdefgh")), max_steps=2, **how,
        )  # fmt: skip
    else:
        text = write(tmp_path / "pairs.jsonl", pairs()) if stage in ("rm", "dpo") else chats
        if stage == "pt":
            text = tmp_path / "corpus.txt"
            text.write_text("".join(f"the quick brown fox number {i} jumps over the lazy dog\n\n" for i in range(24)))
            how["block_size"] = 64
        run(stage, out, model_name_or_path=model_folder, train_file_dir=text, gradient_checkpointing=True, **how)
    error = capsys.readouterr().err
    found = SAID.search(error)
    assert found
    assert found[1] == "4bit-double"
    assert stage == "ppo" or re.search(r"gradient audit: (\d+) of \1 trainable tensors moved", error)
    saved = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert max(float(tensor.abs().max()) for name, tensor in saved.items() if "lora_B" in name) > 0


@pytest.mark.parametrize("how", ["load_in_4bit", "qlora", "load_in_8bit"])
def test_resume_equals_an_uninterrupted_run(how: str, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "model_name_or_path": model_folder, "train_file_dir": chats, "validation_file_dir": chats, "max_steps": 7, "eval_steps": 4,
        "save_strategy": None, "save_steps": 3, "lora_dropout": 0.1, "optim": "adamw_bnb_8bit", "bf16": True, how: True,
    }  # fmt: skip
    whole = run("sft", tmp_path / "whole", **flags)
    # Neither sees the other's evaluation: the run that goes on starts from step 3.
    cut = run("sft", tmp_path / "cut", **{**flags, "max_steps": 7, "eval_steps": 4})
    for step in (6, 7):
        for file in (cut / f"checkpoint-{step}").iterdir():
            file.unlink()
        (cut / f"checkpoint-{step}").rmdir()
    run("sft", cut, **flags, resume_from_checkpoint="auto")
    for name in ("adapter_model.safetensors", "checkpoint-7/optimizer.pt", "checkpoint-7/adapter_model.safetensors"):
        assert digest(whole / name) == digest(cut / name), name
    assert lines(whole) == lines(cut)


def test_an_evaluation_changes_no_weight(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    flags = {"model_name_or_path": model_folder, "train_file_dir": chats, "qlora": True, "bf16": True}
    plain = run("sft", tmp_path / "plain", **flags)
    watched = run("sft", tmp_path / "watched", **flags, validation_file_dir=chats, eval_steps=1)
    assert digest(plain / "adapter_model.safetensors") == digest(watched / "adapter_model.safetensors")


# --- a mixture of experts, from load to merge ------------------------------------------------------------------------------


def test_a_mixture_from_load_to_merge(tokenizer: Any, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, sliding_window=None, pad_token_id=3, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    start = {"model_name_or_path": tmp_path / "start", "train_file_dir": chats}
    # A model that has learnt something: its loss is no longer that of guessing, which rounding could not change.
    base = run("sft", tmp_path / "base", **start, use_peft=False, max_steps=15, learning_rate=2e-3)
    assert logged(base, "loss")[-1] < logged(base, "loss")[0] - 1
    flags: dict[str, Any] = {
        "model_name_or_path": base, "train_file_dir": chats, "target_modules": ATTENTION, "bf16": True, "dtype": "bfloat16",
        "max_steps": 12,
    }  # fmt: skip
    full = run("sft", tmp_path / "full", **flags)
    capsys.readouterr()
    small = run("sft", tmp_path / "small", **flags, qlora=True, load_in_4bit=True, optim="paged_adamw_32bit")
    error = capsys.readouterr().err
    assert "router loss: load balancing x 0.001" in error
    assert "gradient audit: 16 of 16 trainable tensors moved, 21 frozen ones did not" in error
    assert logged(small, "router_loss")[0] > 0
    assert logged(small, "loss")[0] == pytest.approx(logged(full, "loss")[0], rel=0.02)
    epoch = 4  # steps
    assert sum(logged(small, "loss")[-epoch:]) < sum(logged(small, "loss")[:epoch]) - 0.1
    assert {name.split(".")[-3] for name in load_file(small / "adapter_model.safetensors")} == {*ATTENTION.split(",")}

    merged = tmp_path / "merged"
    assert main(["merge", "--base_model", str(base), "--lora_model", str(small), "--output_dir", str(merged)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    whole = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in loaded.named_parameters():
        adapted = any(f".{target}." in name for target in ATTENTION.split(","))
        assert torch.equal(parameter, whole.get_parameter(name)) == (not adapted), name

    prompts, answers = write(tmp_path / "prompts.jsonl", [{"messages": CHATS[0]["messages"][:1]}]), tmp_path / "answers.jsonl"
    for model in (["--base_model", merged], ["--base_model", base, "--lora_model", small]):
        argv = [
            "generate",
            *model,
            "--load_in_4bit",
            True,
            "--data_file",
            prompts,
            "--output_file",
            answers,
            "--max_new_tokens",
            4,
        ]
        assert main([str(word) for word in argv]) == 0
        found = SAID.search(capsys.readouterr().err)
        assert found
        assert found[1] == "4bit-double"
        assert json.loads(answers.read_text())["output"]


@pytest.mark.parametrize("coefficient", [None, 0.5, 0])
def test_router_loss_has_the_weight_that_is_asked_for(
    coefficient: float | None, tokenizer: Any, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_mixtral(tmp_path / "mixtral", tokenizer)
    out = run(
        "sft", tmp_path / "run", model_name_or_path=folder, train_file_dir=chats, router_aux_loss_coef=coefficient, max_steps=1
    )
    assert (
        f"router loss: {'off' if coefficient == 0 else f'load balancing x {coefficient or 0.001:g}'}" in capsys.readouterr().err
    )
    gap = logged(out, "loss")[0] - logged(out, "nll_nats")[0]
    # Two of four experts, nearly evenly chosen: 2 per layer's worth, times the weight.
    assert gap == pytest.approx({None: 0.001, 0.5: 0.5, 0: 0.0}[coefficient] * 2, rel=0.1, abs=1e-6)


# --- what is said and refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "--load_in_4bit True and --load_in_8bit True exclude each other"),
        ({"qlora": True, "load_in_8bit": True}, "--qlora True loads the base in 4 bits, --load_in_8bit True in 8"),
        ({"qlora": True, "load_in_4bit": False}, "which --load_in_4bit False forbids"),
        ({"load_in_4bit": True, "use_peft": False}, "--load_in_4bit True: quantised weights cannot be trained"),
        ({"load_in_8bit": True, "use_peft": False}, "--load_in_8bit True: quantised weights cannot be trained"),
        ({"qlora": True, "use_peft": False}, "--use_peft True trains an adapter on them"),
        ({"router_aux_loss_coef": 0.1}, "LlamaForCausalLM has no load balancing loss"),
        ({"qlora": True, "modules_to_save": "q_proj"}, "--modules_to_save q_proj: its weights are quantised"),
    ],
)
def test_contradictions(
    flags: dict[str, Any], said: str, model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model_name_or_path": model_folder, "train_file_dir": chats, "output_dir": tmp_path / "run", **flags}
    assert said in fails(capsys, "sft", **given)


def test_ppo_refuses_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model_name_or_path": "m", "train_file_dir": "d", "reward_func": "f.py:f", "load_in_4bit": True, "use_peft": False}
    assert main(ppo_runs.words(tmp_path / "run", **{**given, "reward_func": None, "reward_model_name_or_path": "r"})) == 2
    assert "quantised weights cannot be trained" in capsys.readouterr().err


def test_qlora_alone_says_what_it_implies(
    model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("sft", tmp_path / "run", model_name_or_path=model_folder, train_file_dir=chats, qlora=True)
    assert "--qlora True: implies --load_in_4bit True, NF4 with its scales in 8 bits" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["config"]["load_in_4bit"] is True


@pytest.mark.parametrize("name", sorted(OF_BITSANDBYTES))
def test_optimizers_of_bitsandbytes_on_a_cpu(
    name: str, model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(
        "sft", tmp_path / "run", model_name_or_path=model_folder, train_file_dir=chats, optim=name, use_cpu=True, max_steps=2
    )
    used = json.loads((out / "run.json").read_text())["config"]["optim"]
    assert used == UNPAGED.get(name, name)
    assert (f"--optim {name}: pages are for a GPU's memory; on this CPU it is {used}" in capsys.readouterr().err) == (
        name in UNPAGED
    )
    assert max(float(t.abs().max()) for key, t in load_file(out / "adapter_model.safetensors").items() if "lora_B" in key) > 0


# --- going on from an old adapter -----------------------------------------------------------------------------------------


def test_an_old_adapter_file_goes_on_and_runs_no_code(
    model_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model_name_or_path": model_folder, "train_file_dir": chats}
    first = run("sft", tmp_path / "first", **flags)
    new = run("sft", tmp_path / "new", **flags, peft_path=first)
    weights = first / "adapter_model.safetensors"
    torch.save(load_file(weights), first / "adapter_model.bin")
    weights.unlink()
    capsys.readouterr()
    old = run("sft", tmp_path / "old", **flags, peft_path=first)
    assert f"adapter {first}: weights only; optimizer, schedule and data start anew" in capsys.readouterr().err
    assert digest(old / "adapter_model.safetensors") == digest(new / "adapter_model.safetensors")

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Bomb()}, first / "adapter_model.bin")
    assert "code from a file is not run" in fails(capsys, "sft", **flags, peft_path=first, output_dir=tmp_path / "never")
    assert not (tmp_path / "ran").exists()
