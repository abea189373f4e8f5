"""`posttrain plan` against the memory that runs really take, and its table for models of other sizes.

    .venv/bin/python benchmarks/plan.py               # every configuration, writes docs/results/plan.md
    .venv/bin/python benchmarks/plan.py --only sft    # those whose name begins so; prints only
    .venv/bin/python benchmarks/plan.py --table       # 1.5B to 70B by arithmetic, writes docs/results/memory.md

Each run is the command line itself, on the real model and the project's examples, in a process of its own. Its peak is the largest
resident set above that just before the weights are read, after a training step of a two-layer toy, so that interpreter, libraries and
what they load when they are first used are in the baseline. Peaks are taken with glibc told to return what is freed
(MALLOC_MMAP_THRESHOLD_=131072), so that they are what the run holds and not what the allocator holds back; --default measures both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import MODEL, ROOT

RESULTS = ROOT / "docs" / "results"
OUT = ROOT / "outputs" / "bench" / "plan"
# How long the rows of examples/ are on average, in the model's template, for the forecast: those of the first steps here.
LENGTHS: dict[str, dict[str, int]] = {
    "sft": {"example_tokens": 155},
    "dpo": {"max_source_length": 45, "max_target_length": 93},
    "ppo": {"max_source_length": 67, "max_target_length": 48},  # most answers stop before 64
}
SFT = {"per_device_train_batch_size": 6, "model_max_length": 384}
PACKED = {"per_device_train_batch_size": 2, "model_max_length": 1024, "packing": True, "forward_tokens": 2048}
DPO = {"per_device_train_batch_size": 4}
PPO = {
    "rollout_batch_size": 8, "mini_batch_size": 8, "max_target_length": 64, "max_steps": 1,
    "reward_func": f"{Path(__file__).resolve()}:length",
}  # fmt: skip
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sft LoRA": SFT,
    "sft LoRA, parts of 512 tokens": {**SFT, "forward_tokens": 512},
    "sft LoRA, packed": PACKED,
    "sft LoRA, packed, checkpointing": {**PACKED, "gradient_checkpointing": True},
    "sft LoRA, float32": {**SFT, "dtype": "float32", "bf16": False},
    "sft LoRA, unfused": {**SFT, "fused": False},
    "sft QLoRA, 4 bits": {**SFT, "qlora": True},
    "sft all weights": {**SFT, "use_peft": False},
    "sft all weights, checkpointing": {**SFT, "use_peft": False, "gradient_checkpointing": True},
    "dpo LoRA": DPO,
    "dpo all weights": {**DPO, "use_peft": False},
    "ppo LoRA": PPO,
    "ppo all weights": {**PPO, "use_peft": False},
}


def length(answers: list[str]) -> list[float]:
    """A reward that costs no memory."""
    return [len(answer) / 100 for answer in answers]


def words(name: str, folder: Path) -> list[str]:
    """The command line of a configuration."""
    stage = name.split()[0]
    given = {
        "model_name_or_path": MODEL, "train_file_dir": ROOT / "examples" / ("pairs" if stage == "dpo" else "sft"),
        "output_dir": folder, "overwrite_output_dir": True, "max_steps": 2, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    if stage != "ppo":
        given |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return [stage, *(word for flag, value in {**given, **CONFIGURATIONS[name]}.items() for word in (f"--{flag}", str(value)))]


# --- measuring ---------------------------------------------------------------------------------------------------------------


def resident(line: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    found = re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def warm_up(quantization: Any) -> None:
    """A training step of a toy, by the parts of a run."""
    import torch
    import torch._dynamo
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.data.pack import collate
    from posttrain.model.adapter import Lora, attach_lora
    from posttrain.model.attention import enable_segments
    from posttrain.model.fused import fuse
    from posttrain.model.load import load_model
    from posttrain.model.logprobs import install_logprobs

    state = torch.get_rng_state()
    toy = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(toy).to(torch.bfloat16).save_pretrained(folder)
        model = attach_lora(load_model(folder, "bfloat16", quantization=quantization), Lora())
        batch = collate([{"input_ids": list(range(100)), "trained": [1] * 100}] * 2)
        enable_segments(model)
        install_logprobs(model)
        fuse(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
        output.logprobs_N.sum().backward()
        optimizer.step()
    torch.set_rng_state(state)


def measure(name: str) -> None:
    """Run a configuration in this process and print its figures as the last line."""
    import gc

    from posttrain import cli
    from posttrain.commands import build, ppo, ppo_actors, train

    found: dict[str, int] = {}
    build_model = build.build_model

    def spy(config: Any, tokenizer: Any) -> Any:
        warm_up(build.quantization(config))
        gc.collect()
        found["baseline"] = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        return build_model(config, tokenizer)

    train.build_model = ppo_actors.build_model = spy  # type: ignore[assignment]
    assert ppo
    with tempfile.TemporaryDirectory() as cache:  # prepared data and DPO's reference pass are made, not found
        models = Path(os.environ.get("POSTTRAIN_CACHE") or "~/.cache/posttrain").expanduser() / "models"
        if models.is_dir():
            (Path(cache) / "models").symlink_to(models)
        code = cli.main([*words(name, OUT / "run"), "--cache_dir", cache])
    print(json.dumps({**found, "peak": resident("VmHWM"), "code": code}))


def forecast(name: str) -> dict[str, float]:
    """What `posttrain plan` says of a configuration: bytes by item, and the total."""
    from posttrain.cli import main

    stage, *flags = words(name, OUT / "run")
    lengths = [word for flag, tokens in LENGTHS[stage].items() for word in (f"--{flag}", str(tokens))]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["plan", stage, *flags, *lengths]) == 0
    total = re.search(r"^total: ([\d,]+) bytes", text.getvalue(), re.MULTILINE)
    assert total
    return {"total": float(total[1].replace(",", ""))}


def alone(name: str, returning: bool) -> dict[str, float]:
    """A measurement in a process of its own. `returning`: glibc returns what is freed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if returning:
        env["MALLOC_MMAP_THRESHOLD_"] = "131072"
    done = subprocess.run([sys.executable, __file__, "--measure", name], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    if found.get("code"):
        sys.exit(f"{name}: the run failed:\n{done.stderr[-3000:]}")
    return found


def measured(name: str, returning: bool, again: bool) -> float:
    """The peak of a configuration above its baseline, in bytes, remembered between calls."""
    file = OUT / ("returning.json" if returning else "default.json")
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    if again or name not in known:
        found = alone(name, returning)
        known[name] = found["peak"] - found["baseline"]
        OUT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=2))
    return known[name]


HEAD = f"""# `posttrain plan` beside what runs take

Made by `python benchmarks/plan.py`, whose head says how peaks are taken: {MODEL} on `examples/`, one thread, bfloat16 unless said, two steps
(PPO: one rollout), each run the command itself in a process of its own. All figures are MiB above interpreter, libraries and prepared data.

The two figures of oneDNN's kernels in `src/posttrain/training/forecast.py` were fitted to these runs; everything else is arithmetic. Forecasts are
given the mean lengths of the rows of these steps; with the longest that the flags allow they are larger.
"""


def compare(only: str, default: bool, again: bool) -> None:
    """All configurations; the page is written when none is left out. `default`: measured with the allocator as it is, too."""
    rows = []
    title = ["| configuration | forecast | measured peak | forecast off by |", "|---|---|---|---|"]
    if default:
        title = [f"{line}{more}" for line, more in zip(title, (" glibc's default allocator |", "---|"), strict=True)]
    print("\n".join(title), flush=True)
    for name in (name for name in CONFIGURATIONS if name.startswith(only)):
        above, planned = measured(name, True, again), forecast(name)["total"]
        cells = [f"{planned / 2**20:,.0f}", f"{above / 2**20:,.0f}", f"{100 * (planned / above - 1):+.1f} %"]
        if default:
            cells.append(f"{measured(name, False, again) / 2**20:,.0f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    if not only:
        (RESULTS / "plan.md").write_text("\n".join([HEAD, *title, *rows]) + "\n", encoding="utf-8")


def main() -> None:
    """Parse and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--default", action="store_true", help="measure with the allocator as it is, too")
    parser.add_argument("--again", action="store_true", help="measure what has been measured before")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--measure", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
    elif args.table:
        import plan_table

        (RESULTS / "memory.md").write_text(plan_table.page(), encoding="utf-8")
    else:
        compare(args.only, args.default, args.again)


if __name__ == "__main__":
    main()
