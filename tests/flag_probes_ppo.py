"""Probes of the flags that only ppo has: rollouts, rewards, the loss, the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flag_probes import Lab, Run, probe
from flag_probes_data import ledger
from posttrain.config import parse
from posttrain.types import UserError

REWARDS = Path(__file__).with_name("ppo_rewards.py")


def value_of(run: Run) -> dict[str, Tensor]:
    """The saved tensors of the value."""
    return load_file(run.folder / "value" / "value.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors."""
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def of_first_rollout(run: Run, name: str) -> Tensor:
    """A column of all tokens of the first rollout, in the order of the first pass over it."""
    return torch.cat([batch.extras[name] for batch in run.batches[:2]])


def reward_less_score(run: Run) -> list[float]:
    """What is taken from the scores, by step."""
    return [reward - score for reward, score in zip(run.logged("reward"), run.logged("score"), strict=True)]


# --- rollouts -------------------------------------------------------------------------------------------------------------


@probe("ppo", "rollout_batch_size")
def rollout_batch_size(lab: Lab) -> None:
    counts = [sum(batch.n_sequences for batch in run.batches) for run in (lab.ppo(), lab.ppo(rollout_batch_size=4))]
    assert counts == [8 * 2 * 2, 4 * 2 * 2]  # episodes · epochs · steps


@probe("ppo", "num_generations")
def num_generations(lab: Lab) -> None:
    one, two = lab.ppo(), lab.ppo(num_generations=2)
    assert sum(batch.n_sequences for batch in two.batches) == 2 * sum(batch.n_sequences for batch in one.batches)
    assert sum(s.parent is None for batch in two.batches for s in batch.segments.segments) == 32  # type: ignore[union-attr]


@probe("ppo", "mini_batch_size")
def mini_batch_size(lab: Lab) -> None:
    for run, size in ((lab.ppo(), 4), (lab.ppo(mini_batch_size=8), 8)):
        assert {batch.n_sequences for batch in run.batches} == {size}


@probe("ppo", "num_ppo_epochs")
def num_ppo_epochs(lab: Lab) -> None:
    assert [len(lab.ppo(num_ppo_epochs=n).batches) for n in (1, 3)] == [4, 12]


@probe("ppo", "temperature")
def temperature(lab: Lab) -> None:
    assert lab.ppo(temperature=0.03).logged("entropy_nats")[0] < lab.ppo().logged("entropy_nats")[0] - 0.5


@probe("ppo", "max_source_length")
def max_source_length(lab: Lab) -> None:
    turns = [{"role": role, "content": "the quick brown fox"} for role in ("user", "assistant") * 2]
    asked = [{"messages": [*turns, {"role": "user", "content": f"what is {i}?"}]} for i in range(8)]
    file = lab.jsonl(f"{lab.count}-long.jsonl", asked)
    whole, cut = lab.ppo(train_file_dir=file), lab.ppo(train_file_dir=file, max_source_length=60)
    assert (ledger(whole)["truncated_rows"], ledger(cut)["truncated_rows"]) == (0, 8)
    assert max(s.end - s.start for batch in cut.batches for s in batch.segments.segments) <= 60  # type: ignore[union-attr]


@probe("ppo", "max_target_length")
def max_target_length(lab: Lab) -> None:
    for run, longest in ((lab.ppo(), 6), (lab.ppo(max_target_length=3), 3)):
        segments = [s for batch in run.batches for s in batch.segments.segments]  # type: ignore[union-attr]
        assert max(s.end - s.start for s in segments if s.parent is not None) == longest


@probe("ppo", "rollout_engine")
def rollout_engine(lab: Lab) -> None:
    assert "vllm" in lab.fails("ppo", rollout_engine="vllm")


# --- rewards --------------------------------------------------------------------------------------------------------------


@probe("ppo", "reward_func")
def reward_func(lab: Lab) -> None:
    assert lab.ppo(reward_func=f"{REWARDS}:constant").logged("score") == [0.5, 0.5]
    assert lab.ppo().logged("score") == lab.ppo().logged("score_vowels") != [0.5, 0.5]


@probe("ppo", "reward_weights")
def reward_weights(lab: Lab) -> None:
    both = f"{REWARDS}:vowels,{REWARDS}:constant"
    run = lab.ppo(reward_func=both, reward_weights="2,-1")
    assert run.logged("score")[0] == pytest.approx(2 * run.logged("score_vowels")[0] - 0.5)


@probe("ppo", "reward_adapter")
def reward_adapter(lab: Lab) -> None:
    run = lab.ppo(reward_adapter=lab.reward_adapter)
    assert run.logged("score_reward_adapter")
    assert run.logged("score")[0] == pytest.approx(run.logged("score_reward_adapter")[0] + run.logged("score_vowels")[0])
    assert run.read("run.json")["parents"]["reward_adapter"]["name"] == str(lab.reward_adapter)


def reward_model(lab: Lab) -> Path:
    """A reward model in a folder of its own."""
    return lab.good("merge", lora_model=lab.reward_adapter, base_model=lab.model, output_dir=lab.path("reward-model")).folder


@probe("ppo", "reward_model_name_or_path")
def reward_model_name_or_path(lab: Lab) -> None:
    run = lab.ppo(reward_model_name_or_path=reward_model(lab))
    assert run.logged("score_reward_model")
    assert run.logged("score")[0] == pytest.approx(run.logged("score_reward_model")[0] + run.logged("score_vowels")[0])


@probe("ppo", "reward_batch_size")
def reward_batch_size(lab: Lab) -> None:
    from posttrain.training import token_scores

    sizes: list[int] = []
    collate = token_scores._by_prompt

    def spy(sequences: Any) -> Any:
        sizes.append(len(sequences))
        return collate(sequences)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_scores, "_by_prompt", spy)
        lab.good("ppo", reward_model_name_or_path=reward_model(lab), reward_batch_size=3, max_steps=1)
    assert sizes == [3, 3, 2]


@probe("ppo", "init_kl_coef")
def init_kl_coef(lab: Lab) -> None:
    assert not lab.ppo(init_kl_coef=0).logged("kl_nats")
    run = lab.ppo(init_kl_coef=5, missing_eos_penalty=0)
    assert abs(run.logged("kl_nats")[1]) > 1e-3
    assert reward_less_score(run)[1] == pytest.approx(-5 * run.logged("kl_nats")[1], rel=1e-3)


@probe("ppo", "adap_kl_ctrl")
def adap_kl_ctrl(lab: Lab) -> None:
    assert lab.ppo().logged("kl_coef") == [0.05, 0.05]
    assert lab.ppo(adap_kl_ctrl=True).logged("kl_coef")[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 10000), rel=1e-9)


@probe("ppo", "kl_horizon")
def kl_horizon(lab: Lab) -> None:
    run = lab.ppo(adap_kl_ctrl=True, kl_horizon=16)
    assert run.logged("kl_coef")[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 16), rel=1e-9)


@probe("ppo", "kl_target")
def kl_target(lab: Lab) -> None:
    moving = {"max_steps": 9, "learning_rate": 0.1}
    assert "(target 1e-06 × 2)" in lab.fails("ppo", **moving, kl_target=1e-6)
    steered = {"adap_kl_ctrl": True, "kl_horizon": 16, "guards": False, **moving}
    coefs = [lab.ppo(**steered, kl_target=target).logged("kl_coef")[-1] for target in (1e-6, 1e6)]
    assert coefs[0] > coefs[1]


@probe("ppo", "missing_eos_penalty")
def missing_eos_penalty(lab: Lab) -> None:
    for run, penalty in ((lab.ppo(), 1), (lab.ppo(missing_eos_penalty=3), 3)):
        assert reward_less_score(run)[0] == pytest.approx(-penalty * (1 - run.logged("stop_rate")[0]), abs=1e-5)


@probe("ppo", "reward_baseline")
def reward_baseline(lab: Lab) -> None:
    one, other = lab.ppo(), lab.ppo(reward_baseline=0.7)
    assert one.logged("reward")[0] - other.logged("reward")[0] == pytest.approx(0.7, abs=1e-6)


@probe("ppo", "score_clip")
def score_clip(lab: Lab) -> None:
    free, clipped = lab.ppo(), lab.ppo(score_clip=0.25)
    assert clipped.logged("score")[0] == free.logged("score")[0]  # what is logged is the score itself
    assert free.logged("reward")[0] < -0.3 < -0.25 <= clipped.logged("reward")[0]


@probe("ppo", "whiten_rewards")
def whiten_rewards(lab: Lab) -> None:
    white, plain = (of_first_rollout(lab.ppo(whiten_rewards=value), "returns_N") for value in (True, False))
    assert float(white.std()) > 1.5 * float(plain.std())


@probe("ppo", "whiten_advantages")
def whiten_advantages(lab: Lab) -> None:
    white, plain = (of_first_rollout(lab.ppo(whiten_advantages=value), "advantages_N") for value in (True, False))
    assert abs(float(white.mean())) < 1e-5
    assert abs(float(plain.mean())) > 1e-2


@probe("ppo", "gamma", "lam")
def gamma_and_lambda(lab: Lab) -> None:
    """Values are zero at first and only the last token has a reward: the one before it has γλ of its advantage, two before (γλ)² …"""
    flags = {"whiten_rewards": False, "whiten_advantages": False, "max_steps": 1}
    for run, factor in ((lab.ppo(**flags), 0.95), (lab.ppo(**flags, gamma=0.8, lam=0.5), 0.4)):
        batch = run.batches[0]
        first_N = batch.extras["advantages_N"][batch.sequence_N == 0]
        assert len(first_N) > 2
        assert (first_N[:-1] / first_N[1:]).tolist() == pytest.approx([factor] * (len(first_N) - 1), rel=1e-4)


# --- the loss -------------------------------------------------------------------------------------------------------------


@probe("ppo", "cliprange")
def cliprange(lab: Lab) -> None:
    assert lab.ppo(cliprange=1e-4).logged("clip_fraction")[0] > lab.ppo(cliprange=0.9).logged("clip_fraction")[0] + 0.1


@probe("ppo", "dual_clip")
def dual_clip(lab: Lab) -> None:
    free, bounded = (lab.ppo(cliprange=0.9, dual_clip=value).logged("clip_fraction")[0] for value in (None, 1.0001))
    assert bounded > free + 0.05


@probe("ppo", "cliprange_value")
def cliprange_value(lab: Lab) -> None:
    tight, wide = (lab.ppo(cliprange_value=value).logged("value_clip_fraction")[0] for value in (1e-5, 1e5))
    assert tight > 0.1 > wide == 0


@probe("ppo", "vf_coef")
def vf_coef(lab: Lab) -> None:
    assert value_of(lab.ppo())["value_head.weight"].any()
    assert not value_of(lab.ppo(vf_coef=0, audit=False))["value_head.weight"].any()


@probe("ppo", "entropy_coef")
def entropy_coef(lab: Lab) -> None:
    assert not lab.ppo().logged("loss_entropy_nats")
    more = lab.ppo(entropy_coef=5)
    assert more.logged("loss_entropy_nats")
    assert more.moved(lab.ppo()) > 1e-4


@probe("ppo", "kl_loss_coef")
def kl_loss_coef(lab: Lab) -> None:
    assert not lab.ppo().logged("kl_loss_nats")
    held = lab.ppo(kl_loss_coef=50)
    assert held.logged("kl_loss_nats")
    assert held.moved(lab.ppo()) > 1e-4


@probe("ppo", "early_stopping")
def early_stopping(lab: Lab) -> None:
    run = lab.ppo(early_stopping=True, target_kl=1e-9)
    assert run.logged("early_stop") == [1, 1]
    assert len(run.batches) == 4 < len(lab.ppo().batches)  # the first update of a rollout is always on its own policy


@probe("ppo", "target_kl")
def target_kl(lab: Lab) -> None:
    assert [len(lab.ppo(early_stopping=True, target_kl=value).batches) for value in (1e-9, 1e9)] == [4, 8]


@probe("ppo", "value_sharing")
def value_sharing(lab: Lab) -> None:
    assert set(value_of(lab.ppo(value_sharing="trunk"))) == {"value_head.weight", "value_head.bias"}
    assert len(value_of(lab.ppo())) > 2


@probe("ppo", "value_layers")
def value_layers(lab: Lab) -> None:
    trained = {n for n in range(2) for name in value_of(lab.ppo(value_layers=1)) if f".layers.{n}." in name}
    assert trained == {1}
    assert {n for n in range(2) for name in value_of(lab.ppo()) if f".layers.{n}." in name} == {0, 1}
    assert "the model has 2 layers" in lab.fails("ppo", value_layers=3)
    assert "--value_sharing adapter" in lab.fails("ppo", value_layers=1, value_sharing="trunk")


@probe("ppo", "guards")
def guards(lab: Lab) -> None:
    drifting = {"max_steps": 8, "learning_rate": 0.3, "max_target_length": 64}
    assert "stopped at step" in lab.fails("ppo", **drifting)
    lab.ppo(**drifting, guards=False)


# --- the loop -------------------------------------------------------------------------------------------------------------


def steps(run: Run, name: str = "score") -> list[int]:
    """The steps at which a metric was logged."""
    return [line["step"] for line in run.logs if name in line]


@probe("ppo", "output_dir")
def output_dir(lab: Lab) -> None:
    folder = lab.path("here")
    lab.good("ppo", output_dir=folder)
    assert (folder / "run.json").is_file()


@probe("ppo", "max_steps")
def max_steps(lab: Lab) -> None:
    assert [steps(lab.ppo(max_steps=n))[-1] for n in (1, 4)] == [1, 4]


@probe("ppo", "num_train_epochs")
def num_train_epochs(lab: Lab) -> None:
    assert [steps(lab.ppo(max_steps=None, num_train_epochs=n))[-1] for n in (1, 2.5)] == [3, 6]  # 17 prompts, 8 a rollout


@probe("ppo", "learning_rate")
def learning_rate(lab: Lab) -> None:
    one, other = lab.ppo(), lab.ppo(learning_rate=1e-3, value_learning_rate=0.1)
    assert one.moved(other) > 1e-3
    assert (max(one.logged("learning_rate")), max(other.logged("learning_rate"))) == (5e-3, 5e-4)


@probe("ppo", "value_learning_rate")
def value_learning_rate(lab: Lab) -> None:
    one, other = (lab.ppo(value_learning_rate=rate, max_steps=1, num_ppo_epochs=1, mini_batch_size=8) for rate in (1e-1, 1e-4))
    assert one.moved(other) == 0
    assert apart(value_of(one), value_of(other)) > 1e-2


def group(lab: Lab, **flags: Any) -> dict[str, Any]:
    """The optimizer's settings of the policy, from a checkpoint."""
    run = lab.ppo(save_steps=2, **flags)
    return dict(run.state()["param_groups"][0])


@probe("ppo", "weight_decay")
def weight_decay(lab: Lab) -> None:
    assert (group(lab)["weight_decay"], group(lab, weight_decay=0.5)["weight_decay"]) == (0, 0.5)
    assert lab.ppo().moved(lab.ppo(weight_decay=0.5)) > 1e-4


@probe("ppo", "adam_beta1", "adam_beta2")
def adam_betas(lab: Lab) -> None:
    assert group(lab)["betas"] == (0.9, 0.95)
    assert group(lab, adam_beta1=0.5, adam_beta2=0.7)["betas"] == (0.5, 0.7)
    assert lab.ppo().moved(lab.ppo(adam_beta1=0.5, adam_beta2=0.7)) > 1e-4


@probe("ppo", "adam_epsilon")
def adam_epsilon(lab: Lab) -> None:
    assert (group(lab)["eps"], group(lab, adam_epsilon=1e-2)["eps"]) == (1e-5, 1e-2)
    assert lab.ppo().moved(lab.ppo(adam_epsilon=1e-2)) > 1e-3


@probe("ppo", "max_grad_norm")
def max_grad_norm(lab: Lab) -> None:
    """With a large ε, Adam's step is the gradient by that: what is clipped moves less."""
    flags = {"adam_epsilon": 10, "learning_rate": 1, "max_steps": 1, "audit": False, "init_kl_coef": 0}
    still = lab.ppo(**{**flags, "learning_rate": 1e-30})
    tiny, clipped, free = (still.moved(lab.ppo(**flags, max_grad_norm=norm)) for norm in (1e-6, 1e-2, 0))
    assert free > 2 * clipped > 20 * tiny


@probe("ppo", "lr_scheduler_type")
def lr_scheduler_type(lab: Lab) -> None:
    assert lab.ppo(lr_scheduler_type="constant").logged("learning_rate") == [1e-2, 1e-2]
    assert lab.ppo().logged("learning_rate")[-1] < 5e-3


@probe("ppo", "warmup_steps")
def warmup_steps(lab: Lab) -> None:
    assert lab.ppo().logged("learning_rate") == pytest.approx([5e-3, 0])  # after four optimizer steps, and after eight
    for warmup in (4, 0.5):
        assert lab.ppo(warmup_steps=warmup).logged("learning_rate") == pytest.approx([1e-2, 0])


@probe("ppo", "gradient_checkpointing")
def gradient_checkpointing(lab: Lab) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward, counts = LlamaAttention.forward, []
    for value in (False, True):
        calls: list[bool] = []

        def spy(*args: Any, _calls: list[bool] = calls, **kwargs: Any) -> Any:
            _calls.append(torch.is_grad_enabled())
            return forward(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaAttention, "forward", spy)
            run = lab.good("ppo", gradient_checkpointing=value)
        counts.append(sum(calls))
    assert counts[1] == 2 * counts[0]
    assert run.moved(lab.ppo()) < 1e-5


@probe("ppo", "bf16")
def bf16(lab: Lab) -> None:
    half, full = (lab.ppo(bf16=value, dtype="float32") for value in (True, False))
    assert half.logged("policy_loss")[0] != full.logged("policy_loss")[0]
    assert half.logged("entropy_nats")[0] == pytest.approx(full.logged("entropy_nats")[0], abs=2e-2)


@probe("ppo", "use_cpu")
def use_cpu(lab: Lab) -> None:
    from posttrain import cli
    from posttrain.training.resolve_ppo import resolve_ppo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        for flag, expected in (([], False), ([] if lab.mute == "use_cpu" else ["--use_cpu"], True)):
            argv = ["--model_name_or_path", "m", "--train_file_dir", "d", *flag]
            assert resolve_ppo(parse("ppo", cli.COMMANDS["ppo"].groups, False, argv))["use_cpu"] is expected


def engine_chosen(lab: Lab, **flags: Any) -> list[Any]:
    """The engine that would hold the trained module (and DeepSpeed's settings), in a process that torchrun started."""
    found: list[Any] = []

    def stand_in(name: str) -> Any:
        def stop(*parts: Any) -> None:
            found.extend([name, *parts[4:]])
            raise UserError("stopped before processes meet")

        return stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        for name in ("FullyShard", "DeepSpeed", "Replicated"):
            patch.setattr(f"posttrain.commands.ppo.{name}", stand_in(name))
        lab.run("ppo", **flags)
    return found


@probe("ppo", "fsdp")
def fsdp(lab: Lab) -> None:
    """What it does is held in tests/commands/test_ppo_processes.py."""
    assert (engine_chosen(lab), engine_chosen(lab, fsdp=True)) == (["Replicated"], ["FullyShard"])


@probe("ppo", "deepspeed")
def deepspeed(lab: Lab) -> None:
    """What it does is held in tests/commands/test_ppo_processes.py."""
    file = Path(__file__).parent.parent / "scripts" / "deepspeed_zero_stage2_config.json"
    chosen, settings = engine_chosen(lab, deepspeed=file)
    assert (chosen, settings["zero_optimization"]["stage"]) == ("DeepSpeed", 2)


@probe("ppo", "ddp_timeout")
def ddp_timeout(lab: Lab) -> None:
    found: list[int] = []

    def stop(on_cpu: bool, backend: str | None, timeout_seconds: int) -> None:
        found.append(timeout_seconds)
        raise UserError("stopped before processes meet")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.commands.ppo.connect", stop)
        for flags in ({}, {"ddp_timeout": 60}):
            lab.run("ppo", **flags)
    assert found == [1800, 60]


@probe("ppo", "seed")
def seed(lab: Lab) -> None:
    one, other = lab.ppo(), lab.ppo(seed=7)
    assert one.tokens() != other.tokens()
    assert one.moved(other) > 1e-2  # a new adapter starts from it
    samples = [(run.folder / "samples.jsonl").read_text() for run in (one, lab.good("ppo"), other)]
    assert samples[0] == samples[1] != samples[2]


@probe("ppo", "logging_steps")
def logging_steps(lab: Lab) -> None:
    assert steps(lab.ppo(max_steps=5, logging_steps=2)) == [2, 4, 5]


@probe("ppo", "eval_steps")
def eval_steps(lab: Lab) -> None:
    held_out = {"validation_file_dir": lab.other_chats, "max_steps": 5, "max_eval_samples": 2}
    assert steps(lab.ppo(**held_out), "eval_score") == [0, 5]
    assert steps(lab.ppo(**held_out, eval_steps=2), "eval_score") == [0, 2, 4, 5]


@probe("ppo", "save_steps")
def save_steps(lab: Lab) -> None:
    assert lab.ppo(max_steps=4, save_steps=2).checkpoints() == [2, 4]
    assert lab.ppo().checkpoints() == []


@probe("ppo", "save_total_limit")
def save_total_limit(lab: Lab) -> None:
    assert lab.ppo(max_steps=4, save_steps=1, save_total_limit=2).checkpoints() == [3, 4]


@probe("ppo", "report_to")
def report_to(lab: Lab) -> None:
    found = [list(lab.ppo(report_to=name).folder.rglob("events.*")) for name in ("none", "tensorboard")]
    assert [len(files) for files in found] == [0, 1]


@probe("ppo", "logging_dir")
def logging_dir(lab: Lab) -> None:
    elsewhere = lab.path("logs")
    run = lab.ppo(logging_dir=elsewhere, report_to="tensorboard")
    assert list(elsewhere.rglob("events.*"))
    assert not list(run.folder.rglob("events.*"))


@probe("ppo", "resume_from_checkpoint")
def resume_from_checkpoint(lab: Lab) -> None:
    run = lab.good("ppo", save_steps=1)
    scores, weights = run.logged("score"), run.weights
    for file in (run.folder / "checkpoint-2").iterdir():
        file.unlink()
    again = lab.good("ppo", save_steps=1, output_dir=run.folder, resume_from_checkpoint="auto")
    assert len(again.batches) == 4
    assert again.logged("score") == scores
    assert apart(again.weights, weights) == 0


@probe("ppo", "overwrite_output_dir")
def overwrite_output_dir(lab: Lab) -> None:
    folder = lab.good("ppo", save_steps=1).folder
    assert "already holds a run" in lab.fails("ppo", output_dir=folder)
    assert lab.good("ppo", output_dir=folder, overwrite_output_dir=True).checkpoints() == []


@probe("ppo", "audit")
def audit(lab: Lab) -> None:
    unmoved = {"learning_rate": 1e-30, "value_learning_rate": 1e-30, "max_steps": 3, "peft_path": lab.adapter}  # far from zero
    assert "did not move" in lab.fails("ppo", **unmoved)
    assert "gradient audit" not in lab.ppo(**unmoved, audit=False).err
    assert "gradient audit: 58 of 58 trainable tensors moved" in lab.ppo(max_steps=3).err
