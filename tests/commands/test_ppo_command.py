"""Whole runs of posttrain ppo on a tiny model: what they report, exact resume, guards, rewards, modes, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flag_probes_models import reward_adapter
from posttrain.cli import main
from ppo_runs import REWARDS, digest, letter_tokenizer, lines, logged, run, save_speaker, weights, words, write_prompts

ASKED = [f"question {letter}" for letter in "abcdefghijk"]
METRICS = {
    "step", "score", "score_std", "score_vowels", "kl_nats", "kl_k3_nats", "approx_kl_nats", "entropy_nats", "clip_fraction",
    "value_clip_fraction", "explained_variance", "stop_rate", "response_tokens", "policy_loss", "value_loss", "ratio", "reward",
    "grad_norm", "learning_rate", "kl_coef", "early_stop", "rollout_tokens_per_second", "update_tokens_per_second", "seconds_gather", "seconds_rollout",
    "seconds_score", "seconds_measure", "seconds_update",
}  # fmt: skip


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker") / "model", scale=8)


@pytest.fixture
def base(speaker: Path, tmp_path: Path) -> dict[str, Any]:
    """The flags of every run here."""
    return {"model_name_or_path": speaker, "train_file_dir": write_prompts(tmp_path / "prompts.jsonl", ASKED)}


def fails(capsys: pytest.CaptureFixture[str], out: Path, **flags: Any) -> str:
    """The line that a run ends with which must be refused."""
    assert main(words(out, **flags)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# --- what a run leaves ----------------------------------------------------------------------------------------------------


def test_the_run_folder(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = write_prompts(tmp_path / "held_out.jsonl", ["an unseen one", "another"])
    out = run(tmp_path / "run", **base, validation_file_dir=held_out, eval_steps=2, save_steps=2, save_total_limit=1, max_steps=5,
              report_to="tensorboard")  # fmt: skip
    said = capsys.readouterr().err
    expected = {
        "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer.json", "metrics.jsonl", "samples.jsonl",
        "run.json", "ledger.json", "logs", "value", "checkpoint-4", "train_results.txt", "eval_results.txt", "trainer_state.json",
    }  # fmt: skip
    assert expected <= {file.name for file in out.iterdir()}
    assert len(list(out.glob("checkpoint-*"))) == 1
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in raw if "score" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all(set(line) == METRICS for line in steps)
    evaluated = [line for line in raw if "eval_score" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4, 5]
    assert set(evaluated[0]) >= {"eval_score_std", "eval_kl_nats", "eval_stop_rate", "eval_response_tokens"}
    assert "gradient audit: 58 of 58 trainable tensors moved, 21 frozen ones did not" in said
    assert "prompt                                answer" in said
    record = json.loads((out / "run.json").read_text())
    assert record["stage"] == "ppo"
    assert record["parents"]["base"]["name"] == str(base["model_name_or_path"])
    ledgers = json.loads((out / "ledger.json").read_text())
    assert (ledgers["train"]["trained"], ledgers["validation"]["trained"]) == (11, 2)


def test_rewards_add_up_in_the_log(base: dict[str, Any], tmp_path: Path) -> None:
    """reward = score − penalty · (cut answers) − baseline − β · KL, on average; and the samples say what they scored."""
    flags = {"missing_eos_penalty": 0.5, "reward_baseline": 0.25, "init_kl_coef": 0.2, "max_steps": 4, "logging_steps": 2}
    flags |= {"rollout_batch_size": 16, "max_target_length": 20}
    out = run(tmp_path / "run", **base, **flags)
    assert [line["step"] for line in lines(out)] == [2, 4]
    for line in lines(out):
        assert 0 < line["stop_rate"] < 1
        expected = line["score"] - 0.5 * (1 - line["stop_rate"]) - 0.25 - 0.2 * line["kl_nats"]
        assert line["reward"] == pytest.approx(expected, abs=1e-5)
    assert abs(lines(out)[-1]["kl_nats"]) > 1e-2
    samples = lines(out, "samples.jsonl")
    assert {sample["step"] for sample in samples} == {2, 4}
    for sample in samples:
        vowels = sum(letter in "aeiou" for letter in sample["answer"]) / max(len(sample["answer"]), 1)
        assert sample["score"] == pytest.approx(vowels, abs=1e-6)
        assert {"source", "prompt", "stopped", "kl_nats"} <= set(sample)


def test_the_first_step_starts_at_the_reference(base: dict[str, Any], tmp_path: Path) -> None:
    out = run(tmp_path / "run", **base, mini_batch_size=8, num_ppo_epochs=1, max_steps=2)
    first, second = lines(out)
    assert first["kl_nats"] == pytest.approx(0, abs=1e-4)
    assert abs(second["kl_nats"]) > 1e-3
    for line in (first, second):  # one update a rollout: nothing is off-policy
        assert line["ratio"] == pytest.approx(1, abs=1e-5)
        assert line["clip_fraction"] == 0
        assert line["approx_kl_nats"] == pytest.approx(0, abs=1e-6)
    assert first["explained_variance"] == pytest.approx(0, abs=1e-6)  # the value's head is zero


def test_the_policy_merges_and_speaks(base: dict[str, Any], tmp_path: Path) -> None:
    out = run(tmp_path / "run", **base, save_steps=3)
    texts = []
    for adapter in (out, out / "checkpoint-3"):
        merged = tmp_path / f"merged-{adapter.name}"
        argv = ["merge", "--base_model", base["model_name_or_path"], "--lora_model", adapter, "--output_dir", merged]
        assert main([str(word) for word in argv]) == 0
        model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
        assert tokenizer.chat_template == letter_tokenizer().chat_template
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "say"}], add_generation_prompt=True, return_tensors="pt"
        )
        texts.append(model(**inputs).logits)
    assert torch.equal(*texts)
    plain = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])(**inputs).logits
    assert float((texts[0] - plain).detach().abs().max()) > 1e-2


# --- exact resume ---------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "adapter": {"adap_kl_ctrl": True, "kl_target": 2.0, "kl_horizon": 40, "num_generations": 2, "early_stopping": True, "target_kl": 0.05},
    "trunk": {"value_sharing": "trunk", "gradient_checkpointing": True, "lr_scheduler_type": "cosine", "warmup_steps": 4},
    "full": {"use_peft": False, "learning_rate": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_resume_equals_an_uninterrupted_run(case: str, base: dict[str, Any], tmp_path: Path) -> None:
    """By hash: policy, value, optimizer, schedule, KL weight, guards, metrics and samples."""
    held_out = write_prompts(tmp_path / "held_out.jsonl", ["an unseen one", "another"])
    flags = {**base, "max_steps": 5, "save_steps": 2, "validation_file_dir": held_out, "eval_steps": 2, **RESUMED[case]}
    whole = run(tmp_path / "whole", **flags)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)  # a run that stopped after step 3: what came later is gone or will be cut off
    shutil.rmtree(cut / "checkpoint-4")
    shutil.rmtree(cut / "value")
    policy = "model.safetensors" if case == "full" else "adapter_model.safetensors"
    (cut / policy).unlink()
    run(cut, **flags, resume_from_checkpoint="auto")
    assert json.loads((cut / "run.json").read_text())["resumed_from"].endswith("checkpoint-2")
    names = [policy, "value/value.safetensors"]
    names += [
        f"checkpoint-4/{name}" for name in (policy, "trained.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
    ]
    for name in names:
        assert digest(whole / name) == digest(cut / name), name
    assert lines(whole) == lines(cut)
    assert lines(whole, "samples.jsonl") == lines(cut, "samples.jsonl")
    assert float((weights(whole) - weights(run(tmp_path / "other", **{**flags, "seed": 7}))).abs().max()) > 1e-4
    finished = {name: digest(cut / name) for name in names}
    run(cut, **flags, resume_from_checkpoint="auto", overwrite_output_dir=None)  # the last checkpoint is before the end
    assert {name: digest(cut / name) for name in names} == finished
    assert lines(whole) == lines(cut)


def test_a_checkpoint_of_other_weights_or_another_stage_is_refused(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path / "run", **base, save_steps=2)
    line = fails(capsys, out, **base, resume_from_checkpoint=out / "checkpoint-2", lora_rank=4)
    assert "its adapter was trained with --lora_rank 8, this run has --lora_rank 4" in line
    line = fails(capsys, out, **base, resume_from_checkpoint=out / "checkpoint-2", value_sharing="trunk")
    assert "its weights are of another kind" in line
    line = fails(capsys, out, **{**base, "max_steps": 1}, resume_from_checkpoint="auto")
    assert f"--max_steps 1: {out / 'checkpoint-2'} is beyond it" in line
    (out / "checkpoint-2" / "trained.safetensors").unlink()
    assert "is not a checkpoint of posttrain ppo" in fails(capsys, out, **base, resume_from_checkpoint="auto")


# --- KL controller and guards ---------------------------------------------------------------------------------------------


def test_the_weight_of_the_kl_follows_its_target(base: dict[str, Any], tmp_path: Path) -> None:
    flags = {"adap_kl_ctrl": True, "kl_target": 0.2, "kl_horizon": 20, "init_kl_coef": 0.1, "max_steps": 5, "save_steps": 5}
    flags |= {"guards": False}
    out = run(tmp_path / "run", **base, **flags)
    coef = 0.1
    for line in lines(out):
        assert line["kl_coef"] == pytest.approx(coef, rel=1e-9)
        coef *= 1 + min(max(line["kl_nats"] / 0.2 - 1, -0.2), 0.2) * 8 / 20
    assert json.loads((out / "checkpoint-5" / "trainer_state.json").read_text())["kl"] == {"coef": pytest.approx(coef, rel=1e-9)}
    assert len(set(logged(out, "kl_coef"))) == 5
    fixed = run(tmp_path / "fixed", **base, init_kl_coef=0.1)
    assert logged(fixed, "kl_coef") == [0.1] * 3


def test_a_guard_ends_the_run_and_keeps_the_last_good_checkpoint(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**base, "kl_target": 0.001, "learning_rate": 0.05, "max_steps": 9, "save_steps": 1}
    line = fails(capsys, tmp_path / "run", **flags)
    assert "KL to the reference" in line
    assert "(3 steps in a row)" in line
    last = int(line.partition("stopped at step ")[2].partition(":")[0]) - 1
    assert line.endswith(f"the last good checkpoint is {tmp_path / 'run' / f'checkpoint-{last}'}")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / f"checkpoint-{last}" / "chat_template.jinja").is_file()
    assert lines(tmp_path / "run")[-1]["step"] == last + 1  # what the guard saw is in the log
    none = fails(capsys, tmp_path / "none", **{**flags, "save_steps": 0})
    assert "there is no checkpoint to go back to: --save_steps" in none
    run(tmp_path / "free", **{**flags, "kl_target": None}, guards=False)


def test_numbers_that_are_none_end_the_run(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, tmp_path / "run", **base, learning_rate=1e30, max_grad_norm=0, max_steps=9)
    assert "not a finite number" in line or "not numbers any more" in line


# --- rewards --------------------------------------------------------------------------------------------------------------


def test_several_scores_are_weighted(base: dict[str, Any], tmp_path: Path) -> None:
    rm = reward_adapter(base["model_name_or_path"], tmp_path / "rm")
    merged = tmp_path / "rm-merged"
    assert (
        main([str(w) for w in ("merge", "--base_model", base["model_name_or_path"], "--lora_model", rm, "--output_dir", merged)])
        == 0
    )
    flags = {
        "reward_adapter": rm,
        "reward_model_name_or_path": merged,
        "reward_func": f"{REWARDS}:vowels",
        "reward_weights": "2,-0.5,3",
    }
    for line in lines(run(tmp_path / "run", **base, dtype="float32", **flags)):
        by_adapter, by_model, vowels = (line[f"score_{name}"] for name in ("reward_adapter", "reward_model", "vowels"))
        assert line["score"] == pytest.approx(2 * by_adapter - 0.5 * by_model + 3 * vowels, abs=1e-5)
        assert by_adapter == pytest.approx(by_model, abs=1e-4)  # the same reward model, as an adapter and merged
    assert line["score_std"] > 0
    parents = json.loads((tmp_path / "run" / "run.json").read_text())["parents"]
    assert {name: parent["name"] for name, parent in parents.items() if name != "base"} == {
        "reward_adapter": str(rm), "reward_model": str(merged),
    }  # fmt: skip


def test_a_reward_adapter_of_another_base_is_refused_with_both_hashes(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.model.adapter import base_fingerprint

    other = save_speaker(tmp_path / "other", scale=9)
    rm = reward_adapter(other, tmp_path / "rm")
    line = fails(capsys, tmp_path / "run", **base, reward_adapter=rm)
    for folder in (other, base["model_name_or_path"]):
        fingerprint = base_fingerprint(AutoModelForCausalLM.from_pretrained(folder))
        assert fingerprint is not None
        assert fingerprint[:8] in line
    assert "was trained on another base" in line


def test_the_value_adapter_starts_from_the_reward_adapter(base: dict[str, Any], tmp_path: Path) -> None:
    rm = reward_adapter(base["model_name_or_path"], tmp_path / "rm")
    out = run(tmp_path / "run", **base, reward_adapter=rm, value_learning_rate=1e-9, max_steps=1)
    started, ended = load_file(rm / "adapter_model.safetensors"), load_file(out / "value" / "value.safetensors")
    for name, tensor in started.items():
        if "lora_" in name:
            own = ended[f"policy_model.{name.removesuffix('.weight')}.value.weight"]
            torch.testing.assert_close(tensor, own, atol=1e-7, rtol=0)


def test_a_function_sees_the_columns_of_the_row(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"say {letter}", "gold": letter, "line": number} for number, letter in enumerate("abcdefgh", 1)]
    asked = tmp_path / "gold.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {**base, "train_file_dir": asked, "reward_func": f"{REWARDS}:has_gold", "max_steps": 2}
    for workers in (1, 2):
        out = run(tmp_path / f"run-{workers}", **flags, preprocessing_num_workers=workers, overwrite_cache=True)
        for sample in lines(out, "samples.jsonl"):
            assert sample["score"] == (sample["prompt"][-1] in sample["answer"])
        assert {sample["score"] for sample in lines(out, "samples.jsonl")} == {0.0, 1.0}
    del rows[4]["gold"]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = fails(capsys, tmp_path / "lacking", **flags)
    assert "gold.jsonl:5:gold: no such column, which --reward_func asks for; the row's columns: question, line" in line
    run(tmp_path / "dropped", **flags, bad_rows="skip")
    run(tmp_path / "other", **{**flags, "reward_func": f"{REWARDS}:vowels"})  # not from the rows that were prepared for another


# --- modes ----------------------------------------------------------------------------------------------------------------


def test_all_weights(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The policy is a model of its own, the value starts from the reward model, and the vocabulary grows for all of them."""
    rm = reward_adapter(base["model_name_or_path"], tmp_path / "rm")
    merged = tmp_path / "rm-merged"
    assert (
        main([str(w) for w in ("merge", "--base_model", base["model_name_or_path"], "--lora_model", rm, "--output_dir", merged)])
        == 0
    )
    flags = {**base, "use_peft": False, "learning_rate": 1e-3, "value_learning_rate": 1e-9}
    out = run(tmp_path / "run", **flags, reward_model_name_or_path=merged, reward_func=None)
    assert f"value: starts from {merged}" in capsys.readouterr().err
    before, after = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"]), AutoModelForCausalLM.from_pretrained(out)
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    decoder, value = load_file(merged / "model.safetensors"), load_file(out / "value" / "value.safetensors")
    for name, tensor in decoder.items():
        if name != "score.weight":
            torch.testing.assert_close(tensor, value[f"value_model.{name}"], atol=1e-6, rtol=0)
    grown = tmp_path / "grown"
    shutil.copytree(base["model_name_or_path"], grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(["é"])
    tokenizer.save_pretrained(grown)
    asked = write_prompts(tmp_path / "grown.jsonl", ["é so"])
    out = run(tmp_path / "wide", **{**flags, "model_name_or_path": grown, "train_file_dir": asked}, max_steps=1)
    assert lines(out)[0]["kl_nats"] == pytest.approx(0, abs=1e-5)
    assert AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_a_run_goes_on_from_an_sft_adapter_which_is_its_reference(base: dict[str, Any], tmp_path: Path) -> None:
    first = run(tmp_path / "first", **base)
    second = run(tmp_path / "second", **base, peft_path=first)
    assert lines(second)[0]["kl_nats"] == pytest.approx(0, abs=1e-4)
    assert abs(lines(second)[-1]["kl_nats"]) > 1e-2
    assert json.loads((second / "run.json").read_text())["parents"]["adapter"]["name"] == str(first)
    assert set(load_file(first / "adapter_model.safetensors")) == set(load_file(second / "adapter_model.safetensors"))


@pytest.mark.parametrize("flags", [{"dtype": "bfloat16"}, {"value_sharing": "trunk"}, {"use_peft": False, "learning_rate": 1e-3}])
def test_half_precision(flags: dict[str, Any], base: dict[str, Any], tmp_path: Path) -> None:
    """In bfloat16 ratios differ from 1 by rounding; scores and KL stay numbers. Beside a run in float32 in the same process."""
    flags = {**base, "mini_batch_size": 8, "num_ppo_epochs": 1, **flags}
    run(tmp_path / "full", **{**flags, "dtype": "float32"}, max_steps=1)
    half = run(tmp_path / "half", **{**flags, "bf16": True})
    for line in lines(half):
        assert line["ratio"] == pytest.approx(1, abs=0.02)
    assert lines(half)[0]["kl_nats"] == pytest.approx(0, abs=0.2)
    saved = load_file(next(half.glob("*model.safetensors")))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# --- mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"reward_func": None}, "nothing gives scores"),
        ({"train_file_dir": None}, "needs training data"),
        ({"rollout_batch_size": 0}, "--rollout_batch_size 0: must be at least 1"),
        ({"mini_batch_size": 3}, "must divide the 8 episodes"),
        ({"mini_batch_size": 4, "num_generations": 3}, "must be a multiple of --num_generations 3"),
        ({"gamma": 1.5}, "--gamma 1.5: must be in [0, 1]"),
        ({"cliprange": 0}, "--cliprange 0.0"),
        ({"temperature": 0}, "--temperature 0.0: must be above 0"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"kl_target": 0}, "--kl_target 0.0: must be above 0"),
        ({"learning_rate": -1}, "--learning_rate -1.0: must be above 0"),
        ({"adam_beta2": 1}, "--adam_beta2 1.0: must be in [0, 1)"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows a metric"),
        ({"lr_scheduler_type": "liner"}, "--lr_scheduler_type liner"),
        ({"modules_to_save": "lm_head"}, "--modules_to_save: the roles of PPO share"),
        ({"use_peft": False, "lora_rank": 4}, "--lora_rank belongs to LoRA"),
        ({"use_peft": False, "reward_adapter": "x"}, "--reward_adapter shares the policy's base"),
        ({"target_kl": 0.2}, "--target_kl does nothing without --early_stopping True"),
        ({"kl_horizon": 7}, "--kl_horizon does nothing without --adap_kl_ctrl True"),
        ({"kl_target": 3, "guards": False}, "--kl_target does nothing without"),
        ({"kl_target": 3, "init_kl_coef": 0}, "--kl_target does nothing without"),
        ({"adap_kl_ctrl": True, "init_kl_coef": 0}, "--adap_kl_ctrl scales"),
        ({"kl_loss_coef": 0.1, "init_kl_coef": 0}, "--kl_loss_coef needs the reference"),
        ({"eval_steps": 2}, "--eval_steps does nothing without held-out prompts"),
        ({"save_total_limit": 2}, "--save_total_limit does nothing without --save_steps"),
        ({"reward_batch_size": 2}, "--reward_batch_size does nothing without --reward_model_name_or_path"),
        ({"max_eval_samples": 2}, "--max_eval_samples does nothing without"),
        ({"max_source_length": 5}, "prompts.jsonl:1"),
        ({"gradient_checkpointing": True, "padding_free": False}, "--gradient_checkpointing True: needs packed rows"),
        ({"report_to": "wandb"}, "--report_to wandb: not known or not installed"),
        ({"max_steps": 0}, "--max_steps 0 trains nothing"),
        ({"max_steps": -5}, "--max_steps -5: must be a number of rollouts, or -1"),
        ({"reward_baseline": "inf"}, "--reward_baseline inf: must be a finite number"),
        ({"fsdp": True}, "--fsdp shards over processes: start them with torchrun"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json: no such file"),
        (
            {"reward_func": f"{REWARDS}:raises"},
            "ppo_rewards.py:raises: raised IndexError: string index out of range (ppo_rewards.py:",
        ),
        ({"reward_func": f"{REWARDS}:short"}, "ppo_rewards.py:short: gave 7 scores for 8 answers"),
        ({"reward_func": f"{REWARDS}:none_of"}, "ppo_rewards.py:none_of: gave nan for"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes(
    flags: dict[str, Any], said: str, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, tmp_path / "out", **{**base, **flags})
    assert said in line
    assert line.startswith("posttrain: ")
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "told before anything is trained"


def test_an_adapter_with_layers_trained_whole_is_refused(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.model.adapter import Lora, attach_lora

    whole = attach_lora(AutoModelForCausalLM.from_pretrained(base["model_name_or_path"]), Lora(modules_to_save="lm_head"))
    whole.save_pretrained(tmp_path / "whole")
    assert "layers that are trained whole (lm_head)" in fails(capsys, tmp_path / "out", **base, peft_path=tmp_path / "whole")


def test_a_held_out_set_of_a_named_dataset_is_needed_for_evaluation(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = [json.loads(line) for line in base["train_file_dir"].read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "dataset"))
    flags = {**base, "train_file_dir": None, "dataset_name": tmp_path / "dataset"}
    assert "--eval_steps needs held-out prompts" in fails(capsys, tmp_path / "out", **flags, eval_steps=1)


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ("{", {}, "ds.json: cannot be read as JSON"),
        ("[]", {}, "ds.json: expected a JSON object"),
        ('{"zero_optimization": {"stage": 5}}', {}, "ds.json: zero_optimization must be an object with stage 1, 2 or 3"),
        ("{}", {"fsdp": True}, "--deepspeed and --fsdp both shard the model: give one"),
        ("{}", {"load_in_8bit": True}, "--deepspeed: a quantised base stays whole on every process"),
        ("{}", {"rollout_engine": "vllm"}, "--deepspeed: vLLM is handed whole adapters only"),
    ],
)
def test_what_cannot_be_sharded(
    content: str, flags: dict[str, Any], said: str, base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "ds.json").write_text(content)
    assert said in fails(capsys, tmp_path / "out", **base, deepspeed=tmp_path / "ds.json", **flags)
