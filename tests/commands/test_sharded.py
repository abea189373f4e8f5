"""DeepSpeed and FSDP2 in two processes: the update, the figures and the files are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ROOT
from posttrain.cli import main
from posttrain.training.engine_setup import LAYOUT_FILE, check_layout, write_layout
from posttrain.types import UserError
from preference_runs import lines, logged, pairs, run, weights, words, write

pytest.importorskip("deepspeed")
CONFIGS = ROOT / "scripts"
# Several commands by one start of the processes. Exit codes are written down; what DeepSpeed leaves running ends with the process.
SCRIPT = """
import json, os, sys
from posttrain.cli import main
from posttrain.training.engine_setup import check_layout
from posttrain.types import UserError
codes = [main(argv) for argv in json.loads(sys.argv[1])]
print("codes", codes, flush=True)
os._exit(0)
"""
ENGINES = {
    "zero2": {"deepspeed": CONFIGS / "deepspeed_zero_stage2_config.json"},
    "zero3": {"deepspeed": CONFIGS / "deepspeed_zero_stage3_config.json"},
    "offload": {"deepspeed": CONFIGS / "deepspeed_zero_stage3_offload_config.json"},
    "fsdp2": {"fsdp": True, "fsdp_config": CONFIGS / "fsdp2_config.json"},
}
SHARED: dict[str, Any] = {
    "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": None, "num_train_epochs": 1,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
HALVES = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}


def zero1_file(folder: Path) -> Path:
    """The settings of stage 2 with another number."""
    settings = json.loads((CONFIGS / "deepspeed_zero_stage2_config.json").read_text())
    settings["zero_optimization"]["stage"] = 1
    file = folder / "zero1.json"
    file.write_text(json.dumps(settings))
    return file


def two_processes(commands: list[list[str]], folder: Path) -> tuple[list[int], str]:
    """(exit codes, standard error) of commands done one after the other by two processes."""
    script = folder / "several.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("codes ")[2].splitlines()[0]), done.stderr


def data(stage: str, folder: Path) -> dict[str, Any]:
    """13 and 5 rows in global batches of 4: at the end one process has a row too few."""
    made = {"train": pairs(13), "held_out": pairs(5, "dog")}
    if stage == "pt":
        made = {name: [{"text": f"{p['chosen']}. {p['rejected']}"} for p in rows] for name, rows in made.items()}
    if stage == "sft":
        made = {
            name: [{"conversations": [*p["conversations"], {"from": "gpt", "value": p["chosen"]}]} for p in rows]
            for name, rows in made.items()
        }
    return {
        "train_file_dir": write(folder / f"{stage}-train.jsonl", made["train"]),
        "validation_file_dir": write(folder / f"{stage}-held_out.jsonl", made["held_out"]),
    }


def cases(stage: str, name: str) -> dict[str, Any]:
    """All weights for one of two, an adapter for the other; forward passes in parts; packed rows of two or so."""
    whole = {"use_peft": False} if name == "whole" else {"forward_tokens": 60}
    if stage == "pt":  # whose documents are always packed, and cut where a row ends
        return whole | {"block_size": 48}
    return whole | ({"packing": True, "model_max_length": 64} if stage == "sft" and name != "whole" else {})


def compare(one: Path, two: Path) -> None:
    """Weights, losses and held-out figures are those of one process, in files that stand alone."""
    assert float((weights(one) - weights(two)).abs().max()) <= 1e-6
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-5)
    steps = [line["step"] for line in lines(one)]
    assert [line["step"] for line in lines(two)] == steps, "every line is written once"
    figures = [{k: v for k, v in lines(folder)[-1].items() if k.startswith("eval_")} for folder in (one, two)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5, abs=1e-5)
    if (one / "reward.json").is_file():
        biases = [json.loads((folder / "reward.json").read_text())["bias"] for folder in (one, two)]
        assert biases[1] == pytest.approx(biases[0], abs=1e-5)


def merges_as_one(base: Path, folder: Path) -> None:
    """The adapter of two processes passes the merge's certificate, and gives the model that the adapter of one gives."""
    for name in ("one-sft-adapter", "two-sft-adapter"):
        words = {"base_model": base, "lora_model": folder / name, "output_dir": folder / f"merged-{name}"}
        assert main(["merge", *(str(word) for flag, value in words.items() for word in (f"--{flag}", value))]) == 0
    one, two = (folder / f"merged-{name}-sft-adapter" for name in ("one", "two"))
    assert float((weights(one) - weights(two)).abs().max()) <= 1e-6
    assert (two / "merge_certificate.json").is_file()


@pytest.mark.parametrize(
    "engine",
    ["zero3", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "offload"))],
)
def test_two_processes_are_as_one(engine: str, model_folder: Path, tmp_path: Path) -> None:
    engines = {**ENGINES, "zero1": {"deepspeed": zero1_file(tmp_path)}}
    flags = engines[engine]
    kinds = [("sft", "whole"), ("sft", "adapter"), ("rm", "adapter"), ("dpo", "whole"), ("pt", "whole"), ("pt", "adapter")]
    common = {
        stage: {"model_name_or_path": model_folder, **data(stage, tmp_path), **SHARED} for stage in ("sft", "rm", "dpo", "pt")
    }
    commands = [
        words(stage, tmp_path / f"two-{stage}-{kind}", **{**common[stage], **cases(stage, kind), **HALVES, **flags})
        for stage, kind in kinds
    ]
    saving = {
        **common["sft"],
        **HALVES,
        **flags,
        "use_peft": False,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    straight, again = tmp_path / "straight", tmp_path / "again"
    commands.append(words("sft", straight, **saving))
    checkpoint = straight / "checkpoint-2"
    commands.append(words("sft", again, **saving, resume_from_checkpoint=checkpoint))
    changed = {"zero1": "zero2", "zero2": "zero1"}.get(engine)  # the one's state fits the other
    if changed:
        other = {**saving, **engines[changed]}
        commands.append(words("sft", tmp_path / "other", **other, resume_from_checkpoint=checkpoint))
    codes, said = two_processes(commands, tmp_path)
    assert codes == [0] * len(commands), said
    assert json.loads((checkpoint / LAYOUT_FILE).read_text())["layout"].split()[0] in ("DeepSpeed", "FSDP")
    assert said.count("gradient audit: 20 of 20 trainable tensors moved") == 4, "said once per job"
    for stage, kind in kinds:
        one = run(stage, tmp_path / f"one-{stage}-{kind}", **{**common[stage], **cases(stage, kind)})
        compare(one, tmp_path / f"two-{stage}-{kind}")
    merges_as_one(model_folder, tmp_path)
    assert float((weights(straight) - weights(again)).abs().max()) <= 1e-7, "a resumed run goes on as it would have"
    if changed:
        assert float((weights(straight) - weights(tmp_path / "other")).abs().max()) <= 1e-7
    saved = load_file(tmp_path / "two-sft-whole" / "model.safetensors")
    assert "lm_head.weight" not in saved, "a tied matrix is saved once"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two-sft-whole", dtype=torch.float32)
    assert torch.equal(model.get_output_embeddings().weight, saved["model.embed_tokens.weight"])


def test_a_checkpoint_of_another_engine_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library would take the weights, leave the optimizer's state out, and say nothing."""
    flags = {"model_name_or_path": model_folder, **data("sft", tmp_path), **SHARED, "max_steps": 1}
    one = run("sft", tmp_path / "one", **{**flags, "save_strategy": "steps", "save_steps": 1})
    assert json.loads((one / "checkpoint-1" / LAYOUT_FILE).read_text()) == {"layout": "plain"}
    (one / "checkpoint-1" / LAYOUT_FILE).unlink()  # as it was saved before there was one
    folder = one / "checkpoint-1" / "global_step1"
    folder.mkdir()
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert main(words("sft", tmp_path / "two", **flags, resume_from_checkpoint=one / "checkpoint-1")) == 2
    assert "was saved by DeepSpeed ZeRO-1/2 over 1 processes, and this run is of one process or DDP" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["ZeRO-1/2", "ZeRO-3"])
def test_a_checkpoint_of_deepspeed_stays_with_its_number_of_processes(stage: str, tmp_path: Path) -> None:
    """DeepSpeed itself would end with a traceback (ZeRO-1/2) or with a file that is missing (ZeRO-3)."""
    (tmp_path / "global_step1").mkdir()
    for rank in range(4):
        for kind in ("optim", "model") if stage == "ZeRO-3" else ("optim",):
            (tmp_path / "global_step1" / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt").touch()
    file = SimpleNamespace(is_zero3=lambda: stage == "ZeRO-3")
    arguments: Any = SimpleNamespace(deepspeed="file.json", hf_deepspeed_config=file, fsdp=None, world_size=4)
    check_layout(str(tmp_path), arguments)
    arguments.world_size = 2
    line = f"was saved by DeepSpeed {stage} over 4 processes, and this run is of DeepSpeed {stage} over 2 processes: the optimizer's state"
    with pytest.raises(UserError, match=line):
        check_layout(str(tmp_path), arguments)


def test_a_node_has_the_files_of_its_own_processes(tmp_path: Path) -> None:
    """Without a file system that nodes share: what the checkpoint says counts, not how many files are there."""
    (tmp_path / "global_step1").mkdir()
    for rank in range(2):
        (tmp_path / "global_step1" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    file = SimpleNamespace(is_zero3=lambda: False)
    arguments: Any = SimpleNamespace(
        deepspeed="file.json", hf_deepspeed_config=file, fsdp=None, world_size=4, local_process_index=1
    )
    with pytest.raises(UserError, match="over 2 processes, and this run is of DeepSpeed ZeRO-1/2 over 4 processes"):
        check_layout(str(tmp_path), arguments)
    write_layout(tmp_path, arguments)
    assert not (tmp_path / LAYOUT_FILE).exists(), "one process of a node writes it"
    arguments.local_process_index = 0
    write_layout(tmp_path, arguments)
    check_layout(str(tmp_path), arguments)
    arguments.deepspeed = None
    with pytest.raises(UserError, match="ZeRO-1/2 over 4 processes, and this run is of one process or DDP"):
        check_layout(str(tmp_path), arguments)


def test_two_engines_at_once_are_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = {"model_name_or_path": model_folder, **data("sft", tmp_path), **ENGINES["zero3"], **ENGINES["fsdp2"]}
    assert main(words("sft", tmp_path / "out", **flags)) == 2
    assert "--deepspeed and --fsdp both shard the model: give one" in capsys.readouterr().err
