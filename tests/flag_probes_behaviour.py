"""Probes of what the library's fields do under our trainer: optimizer, schedule, precision, memory and seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flag_probes import Lab, Run, probe
from posttrain.config import parse
from posttrain.training.trainer import ObjectiveTrainer

SAVED = {"save_steps": 3}  # a checkpoint with the optimizer at the last step


@contextlib.contextmanager
def seen_in_steps(look: Any) -> Iterator[list[Any]]:
    """What `look(trainer)` gives at every micro-batch."""
    seen: list[Any] = []
    step = ObjectiveTrainer.training_step

    def spy(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(look(trainer))
        return step(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "training_step", spy)
        yield seen


# --- how much -------------------------------------------------------------------------------------------------------------


@probe("library", "output_dir")
def output_dir(lab: Lab) -> None:
    folder = lab.path("here")
    lab.good("sft", output_dir=folder)
    assert (folder / "run.json").is_file()


@probe("library", "per_device_train_batch_size")
def per_device_train_batch_size(lab: Lab) -> None:
    assert {batch.n_sequences for batch in lab.sft().batches} == {4}
    assert {batch.n_sequences for batch in lab.sft(per_device_train_batch_size=2).batches} == {2}


@probe("library", "num_train_epochs")
def num_train_epochs(lab: Lab) -> None:
    for epochs, steps in ((1, 5), (2.5, 13)):
        assert lab.sft(num_train_epochs=epochs, max_steps=None).logs[-1]["step"] == steps


@probe("library", "max_steps")
def max_steps(lab: Lab) -> None:
    assert [lab.sft(max_steps=n).logs[-1]["step"] for n in (2, 7)] == [2, 7]


@probe("library", "gradient_accumulation_steps")
def gradient_accumulation_steps(lab: Lab) -> None:
    whole = lab.sft(per_device_train_batch_size=8, max_steps=2)
    cut = lab.sft(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    assert (len(whole.batches), len(cut.batches)) == (2, 8)
    assert whole.logged("loss") == pytest.approx(cut.logged("loss"), abs=1e-5)


@probe("library", "do_train")
def do_train(lab: Lab) -> None:
    assert not lab.sft(do_train=False).batches


@probe("library", "do_eval")
def do_eval(lab: Lab) -> None:
    flags = {"validation_file_dir": lab.other_chats}
    assert [len(lab.sft(**flags, do_eval=value).logged("eval_loss")) for value in (True, False)] == [1, 0]


@probe("library", "resume_from_checkpoint")
def resume_from_checkpoint(lab: Lab) -> None:
    flags = {"save_steps": 2, "save_strategy": None}
    whole = lab.good("sft", **flags)
    losses, n_logs = whole.logged("loss"), len(whole.logs)
    for file in (whole.folder / "checkpoint-3").iterdir():
        file.unlink()
    cut = lab.good("sft", **flags, output_dir=whole.folder, resume_from_checkpoint="auto")
    assert len(cut.batches) == 1
    assert cut.logged("loss") == losses
    assert cut.weights  # read before the folder is written again
    again = lab.good("sft", **flags, output_dir=whole.folder, resume_from_checkpoint="auto")  # a finished run stays as it is
    assert not again.batches
    assert again.moved(cut) == 0
    assert len(again.logs) == n_logs


# --- optimizer and schedule -----------------------------------------------------------------------------------------------


@probe("library", "learning_rate")
def learning_rate(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(learning_rate=1e-3)
    assert (max(one.logged("learning_rate")), max(other.logged("learning_rate"))) == (1e-2, 1e-3)
    assert one.moved(other) > 1e-3


@probe("library", "lr_scheduler_type")
def lr_scheduler_type(lab: Lab) -> None:
    rates = {name: lab.sft(lr_scheduler_type=name, max_steps=5).logged("learning_rate")[-1] for name in ("constant", "linear")}
    assert rates["constant"] == 1e-2
    assert rates["linear"] < 5e-3


@probe("library", "lr_scheduler_kwargs")
def lr_scheduler_kwargs(lab: Lab) -> None:
    run = lab.sft(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr": 0.009}')
    assert run.logged("learning_rate")[-1] > 9e-3
    assert lab.sft().logged("learning_rate")[-1] < 9e-3


@probe("library", "warmup_steps")
def warmup_steps(lab: Lab) -> None:
    assert lab.sft(warmup_steps=0).logged("learning_rate")[0] == 1e-2
    assert lab.sft(warmup_steps=2).logged("learning_rate")[:2] == [0, 5e-3]
    assert lab.sft(warmup_steps=0.67).logged("learning_rate")[:2] == pytest.approx([0, 1e-2 / 3])


@probe("library", "optim")
def optim(lab: Lab) -> None:
    kinds = [lab.sft(**SAVED, save_strategy=None, optim=name).state()["state"][0].keys() for name in ("adamw_torch", "adagrad")]
    assert [("exp_avg" in kind, "sum" in kind) for kind in kinds] == [(True, False), (False, True)]


def groups(lab: Lab, **flags: Any) -> dict[str, Any]:
    """The optimizer's settings at the end of a run."""
    return dict(lab.sft(**SAVED, save_strategy=None, **flags).state()["param_groups"][0])


@probe("library", "optim_args")
def optim_args(lab: Lab) -> None:
    assert groups(lab, optim="sgd", audit=False, optim_args="momentum=0.9")["momentum"] == 0.9
    assert groups(lab, optim="sgd", audit=False)["momentum"] == 0


@probe("library", "weight_decay")
def weight_decay(lab: Lab) -> None:
    assert (groups(lab)["weight_decay"], groups(lab, weight_decay=0.5)["weight_decay"]) == (0, 0.5)
    assert lab.sft().moved(lab.sft(weight_decay=0.5)) > 1e-4


@probe("library", "adam_beta1", "adam_beta2")
def adam_betas(lab: Lab) -> None:
    assert groups(lab)["betas"] == (0.9, 0.999)
    assert groups(lab, adam_beta1=0.8, adam_beta2=0.9)["betas"] == (0.8, 0.9)
    assert lab.sft().moved(lab.sft(adam_beta1=0.8, adam_beta2=0.9)) > 1e-4


@probe("library", "adam_epsilon")
def adam_epsilon(lab: Lab) -> None:
    assert (groups(lab)["eps"], groups(lab, adam_epsilon=1e-2)["eps"]) == (1e-8, 1e-2)
    assert lab.sft().moved(lab.sft(adam_epsilon=1e-2)) > 1e-3


@probe("library", "max_grad_norm")
def max_grad_norm(lab: Lab) -> None:
    flags = {"optim": "sgd", "learning_rate": 1, "warmup_steps": 0, "max_steps": 1, "audit": False}

    def length(run: Run) -> float:  # of the step; B starts at zero and A has no gradient yet
        return float(sum((t**2).sum() for name, t in run.weights.items() if "lora_B" in name)) ** 0.5

    free, clipped = lab.sft(**flags, max_grad_norm=0), lab.sft(**flags, max_grad_norm=1e-3)
    assert length(free) == pytest.approx(free.logged("grad_norm")[0], rel=1e-3)
    assert length(clipped) == pytest.approx(1e-3, rel=1e-2)


# --- precision, memory, seeds ---------------------------------------------------------------------------------------------


@probe("library", "bf16")
def bf16(lab: Lab) -> None:
    half, full = (lab.sft(bf16=value, dtype="float32").logged("loss") for value in (True, False))
    assert half != full
    assert half == pytest.approx(full, abs=2e-2)


@probe("library", "fp16")
def fp16(lab: Lab) -> None:
    assert "--fp16 needs a GPU" in lab.fails("sft", fp16=True)


@probe("library", "use_cpu")
def use_cpu(lab: Lab) -> None:
    from posttrain import cli
    from posttrain.training.resolve import resolve

    command = cli.COMMANDS["sft"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        for words, expected in (([], False), ([] if lab.mute == "use_cpu" else ["--use_cpu"], True)):
            argv = ["--model_name_or_path", "m", "--train_file_dir", "d", *words]
            assert resolve(parse("sft", command.groups, True, argv))["use_cpu"] is expected


def attention_calls(lab: Lab, **flags: Any) -> int:
    """How often a layer's attention is computed in a run."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    calls = []
    forward = LlamaAttention.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", spy)
        run = lab.good("sft", **flags)
    assert run.logged("loss") == pytest.approx(lab.sft().logged("loss"), abs=1e-6)
    return sum(calls)


@probe("library", "gradient_checkpointing")
def gradient_checkpointing(lab: Lab) -> None:
    assert attention_calls(lab, gradient_checkpointing=True) == 2 * attention_calls(lab)  # 2 layers, 3 steps, forward again


@probe("library", "gradient_checkpointing_kwargs")
def gradient_checkpointing_kwargs(lab: Lab) -> None:
    flags = {"gradient_checkpointing": True, "lora_dropout": 0.5}
    exact, other = lab.sft(**flags), lab.sft(**flags, gradient_checkpointing_kwargs='{"preserve_rng_state": false}')
    assert exact.moved(lab.sft(lora_dropout=0.5)) < 1e-6
    assert other.moved(exact) > 1e-4  # the forward pass done again drops other values


@probe("library", "torch_empty_cache_steps")
def torch_empty_cache_steps(lab: Lab) -> None:
    cleared: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.clear_device_cache", lambda: cleared.append(1))
        lab.good("sft")
        assert cleared == []
        lab.good("sft", torch_empty_cache_steps=2)
    assert cleared == [1, 1]  # steps 0 and 2


@probe("library", "full_determinism")
def full_determinism(lab: Lab) -> None:
    for value in (False, True):
        with seen_in_steps(lambda _: torch.are_deterministic_algorithms_enabled()) as seen:
            lab.good("sft", full_determinism=value)
        assert set(seen) == {value}


@probe("library", "seed")
def seed(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(seed=7, data_seed=42)
    assert one.tokens() == other.tokens()  # the order of rows has its own
    assert one.moved(other) > 1e-2
    assert lab.sft(seed=7).tokens() != one.tokens()


@probe("library", "data_seed")
def data_seed(lab: Lab) -> None:
    assert lab.sft(data_seed=7).tokens() == lab.sft(seed=7).tokens() != lab.sft().tokens()
    streams = [lab.pt(streaming=True, data_seed=value).tokens() for value in (7, 8)]
    assert streams[0] != streams[1]
