"""Probes of what the library's fields do under our trainer: when it logs, evaluates and saves, and the best model."""

from __future__ import annotations

import logging
import signal
import time
from typing import Any

import pytest
from safetensors.torch import load_file

from flag_probes import Lab, Run, probe
from flag_probes_behaviour import seen_in_steps

# --- logging --------------------------------------------------------------------------------------------------------------


def steps(run: Run, name: str) -> list[int]:
    """The steps at which a metric was logged."""
    return [line["step"] for line in run.logs if name in line]


@probe("library", "logging_strategy")
def logging_strategy(lab: Lab) -> None:
    epochs = {"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    logged = {name: steps(lab.sft(**epochs, logging_strategy=name), "loss") for name in ("steps", "epoch", "no")}
    assert logged == {"steps": [1, 2, 3, 4, 5, 6], "epoch": [3, 6], "no": []}


@probe("library", "logging_steps")
def logging_steps(lab: Lab) -> None:
    assert steps(lab.sft(max_steps=6, logging_steps=2), "loss") == [2, 4, 6]


@probe("library", "logging_first_step")
def logging_first_step(lab: Lab) -> None:
    assert [steps(lab.sft(logging_steps=2, logging_first_step=value), "loss") for value in (False, True)] == [[2], [1, 2]]


@probe("library", "log_level")
def log_level(lab: Lab) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        lab.good("sft")
        assert not lines
        lab.good("sft", log_level="info")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert any("Running training" in line for line in lines)


@probe("library", "disable_tqdm")
def disable_tqdm(lab: Lab) -> None:
    def bar(**flags: Any) -> bool:
        return "3/3" in lab.sft(**flags).err.replace("step 3/3", "")

    assert [bar(disable_tqdm=False), bar(disable_tqdm=True), bar()] == [True, False, False]  # no terminal: no bar

    class Terminal:
        """Standard error as a terminal."""

        def isatty(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.training.callbacks.sys.stderr", Terminal(), raising=False)
        from posttrain.training.callbacks import Progress

        assert Progress(None).with_bar


@probe("library", "report_to")
def report_to(lab: Lab) -> None:
    files = [list((lab.sft(report_to=name).folder / "logs").glob("events.*")) for name in ("none", "tensorboard")]
    assert [len(found) for found in files] == [0, 1]


@probe("library", "skip_memory_metrics")
def skip_memory_metrics(lab: Lab) -> None:
    assert not lab.sft().logged("train_mem_cpu_alloc_delta")
    assert lab.sft(skip_memory_metrics=False).logged("train_mem_cpu_alloc_delta")


@probe("library", "debug")
def debug(lab: Lab) -> None:
    with pytest.raises(ValueError, match="DebugUnderflowOverflow"):
        lab.run("sft", learning_rate=1e30, debug="underflow_overflow")


# --- evaluation -----------------------------------------------------------------------------------------------------------


def evaluated(lab: Lab, **flags: Any) -> list[int]:
    """The steps at which held-out rows were evaluated, the evaluation at the end of the run left out."""
    run = lab.sft(validation_file_dir=lab.other_chats, max_steps=6, per_device_train_batch_size=8, do_eval=False, **flags)
    return steps(run, "eval_loss")


@probe("library", "eval_strategy")
def eval_strategy(lab: Lab) -> None:
    found = {name: evaluated(lab, eval_strategy=name, logging_steps=2) for name in ("no", "steps", "epoch")}
    assert found == {"no": [], "steps": [2, 4, 6], "epoch": [3, 6]}


@probe("library", "eval_steps")
def eval_steps(lab: Lab) -> None:
    assert evaluated(lab, eval_steps=3) == [3, 6]


@probe("library", "eval_delay")
def eval_delay(lab: Lab) -> None:
    assert evaluated(lab, eval_strategy="steps", eval_steps=2, eval_delay=3) == [4, 6]


@probe("library", "eval_on_start")
def eval_on_start(lab: Lab) -> None:
    assert evaluated(lab, eval_strategy="steps", eval_steps=3, eval_on_start=True) == [0, 3, 6]


@probe("library", "per_device_eval_batch_size")
def per_device_eval_batch_size(lab: Lab) -> None:
    from posttrain.training import trainer

    sizes: list[int] = []
    loader = trainer.loader

    def spy(rows: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        if batches.seed is None:
            sizes.append(batches.batch_rows)
        return loader(rows, batches, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loader", spy)
        runs = [lab.good("sft", validation_file_dir=lab.other_chats, per_device_eval_batch_size=n) for n in (2, 5)]
    assert sizes == [2, 5]
    assert runs[0].logged("eval_loss") == pytest.approx(runs[1].logged("eval_loss"), abs=1e-6)


# --- saving ---------------------------------------------------------------------------------------------------------------


@probe("library", "save_strategy")
def save_strategy(lab: Lab) -> None:
    flags = {"max_steps": 6, "per_device_train_batch_size": 8}
    assert {name: lab.sft(**flags, save_strategy=name).checkpoints() for name in ("no", "epoch")} == {"no": [], "epoch": [3, 6]}


@probe("library", "save_steps")
def save_steps(lab: Lab) -> None:
    assert lab.sft(max_steps=6, save_strategy="steps", save_steps=2).checkpoints() == [2, 4, 6]


@probe("library", "save_total_limit")
def save_total_limit(lab: Lab) -> None:
    assert lab.sft(max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2).checkpoints() == [4, 6]


@probe("library", "save_only_model")
def save_only_model(lab: Lab) -> None:
    flags = {"save_strategy": "steps", "save_steps": 3}
    assert (lab.sft(**flags).folder / "checkpoint-3" / "optimizer.pt").is_file()
    run = lab.good("sft", **flags, save_only_model=True)
    assert not (run.folder / "checkpoint-3" / "optimizer.pt").exists()
    assert "no optimizer" in lab.fails("sft", output_dir=run.folder, resume_from_checkpoint="auto")


@probe("library", "enable_jit_checkpoint")
def enable_jit_checkpoint(lab: Lab) -> None:
    def terminate(trainer: Any) -> None:
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch, seen_in_steps(terminate):
            patch.setattr("transformers.trainer_jit_checkpoint.CheckpointManager.__init__.__defaults__", (0,))
            run = lab.good("sft", max_steps=6, enable_jit_checkpoint=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.checkpoints() == [1]
    assert run.logs[-1]["step"] < 6


# --- the best model -------------------------------------------------------------------------------------------------------

CHECKED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}


def best_run(lab: Lab, **flags: Any) -> Run:
    """A run that evaluates and saves every step, at a learning rate at which the held-out loss goes up and down."""
    return lab.sft(validation_file_dir=lab.other_chats, learning_rate=1, warmup_steps=0, **CHECKED, **flags)


def best_step(run: Run, choose: Any, metric: str = "eval_loss") -> int:
    """The step with the lowest or highest metric."""
    values = {line["step"]: line[metric] for line in run.logs if metric in line}
    return int(choose(values, key=lambda step: values[step]))


def is_checkpoint(run: Run, step: int) -> bool:
    """Whether the saved adapter is that of a checkpoint."""
    saved = load_file(run.folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    return all(bool((tensor == saved[name]).all()) for name, tensor in run.weights.items())


@probe("library", "load_best_model_at_end")
def load_best_model_at_end(lab: Lab) -> None:
    last, best = best_run(lab, do_eval=False), best_run(lab, do_eval=False, load_best_model_at_end=True)
    step = best_step(best, min)
    assert step < 4, "the lab's run no longer overshoots"
    assert is_checkpoint(last, 4)
    assert is_checkpoint(best, step)


@probe("library", "metric_for_best_model")
def metric_for_best_model(lab: Lab) -> None:
    run = best_run(lab, do_eval=False, load_best_model_at_end=True, metric_for_best_model="perplexity")
    state = run.read("trainer_state.json")
    assert state["best_metric"] == min(run.logged("eval_perplexity"))  # lower is better, without being told
    assert "expected one of loss, nll_nats, perplexity" in lab.fails(
        "sft", validation_file_dir=lab.other_chats, **CHECKED, metric_for_best_model="bleu"
    )


@probe("library", "greater_is_better")
def greater_is_better(lab: Lab) -> None:
    flags = {"do_eval": False, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    found = {value: best_run(lab, **flags, greater_is_better=value) for value in (True, False)}
    assert is_checkpoint(found[True], best_step(found[True], max))
    assert is_checkpoint(found[False], best_step(found[False], min))
