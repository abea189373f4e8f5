"""One process → two: tokens a second with one thread each, and the bytes that an optimizer step puts on the wire, beside theory.

Bytes are counted by the kernel: the processes run in a network namespace of their own, so everything that its loopback carries is
theirs, headers included, whatever library sent it. Needs root and iproute2. `--bytes_only` leaves the clock out, for a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIRST_STEP, LAST_STEP = 3, 8  # bytes are those of the steps between: warmed up, and nothing is saved or logged
WORKER_RESULT = "wire.json"
DEEPSPEED = str(ROOT / "scripts" / "deepspeed_zero_stage{}_config.json")
FSDP2 = '{"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'
LIVE_PARAMETERS = 1_000_000_000
HEADERS = 1.05  # TCP, the weight of the step (a number), the barrier at either end


@dataclass(frozen=True)
class Engine:
    """Flags of an engine, and what each process sends a step by theory."""

    name: str
    flags: dict[str, Any]
    sent_bytes: Callable[[int, int, int, int], float]  # (all parameters, trainable ones, processes, scatter) → bytes; all in fp32


def _ring(parameters: float, processes: int) -> float:
    """What a process sends in a ring's reduce-scatter or all-gather of fp32 numbers; an all-reduce is both."""
    return 4 * parameters * (processes - 1) / processes


# scatter: what a reduce-scatter costs, 1 as a ring does it, 2 where the library does an all-reduce and drops what is not wanted.
# ZeRO-3 and FSDP2 gather parameters for the forward and again for the backward pass, frozen ones too; of a model below
# stage3_max_live_parameters ZeRO-3 keeps what the forward pass has gathered.
ENGINES = [
    Engine("DDP", {}, lambda total, trained, p, scatter: _ring(2 * trained, p)),
    Engine("ZeRO-1", {"deepspeed": "FOLDER/zero1.json"}, lambda total, trained, p, scatter: _ring((scatter + 1) * trained, p)),
    Engine("ZeRO-2", {"deepspeed": DEEPSPEED.format(2)}, lambda total, trained, p, scatter: _ring((scatter + 1) * trained, p)),
    Engine("ZeRO-3", {"deepspeed": DEEPSPEED.format(3)},
           lambda total, trained, p, scatter: _ring(total * (1 if total < LIVE_PARAMETERS else 2) + scatter * trained, p)),
    Engine("FSDP2", {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP2},
           lambda total, trained, p, scatter: _ring(2 * total + scatter * trained, p)),
]  # fmt: skip


def save_inputs(folder: Path, rows: int = 64) -> None:
    """A random llama of 1.8 million parameters, its byte-level tokenizer, chats, and the file of ZeRO-1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    core.train_from_iterator(
        ["the fox rests"], trainers.BpeTrainer(vocab_size=300, special_tokens=marks, show_progress=False,
                                               initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=512)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1, bos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    stage1 = json.loads(Path(DEEPSPEED.format(2)).read_text())
    stage1["zero_optimization"]["stage"] = 1
    (folder / "zero1.json").write_text(json.dumps(stage1))
    chats = [[{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": "the fox rests " * 12}] for i in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))


TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "{}", "--master_addr", "127.0.0.1")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "{}", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no")  # fmt: skip


def start(folder: Path, name: str, processes: int, flags: dict[str, Any], launcher: tuple[str, ...] = TORCHRUN) -> dict[str, Any]:
    """One run of `posttrain sft` in a network of its own; what its first process measured."""
    out = folder / name
    given = {
        "model_name_or_path": folder / "model", "train_file_dir": folder / "rows.jsonl", "output_dir": out, "template_name": "chatml",
        "cache_dir": folder / "cache", "per_device_train_batch_size": 4, "max_steps": LAST_STEP, "num_train_epochs": 9,
        "save_strategy": "no", "logging_steps": 1000, "report_to": "none", "bf16": False, "audit": False, "packing": False, **flags,
    }  # fmt: skip
    words = [str(word).replace("FOLDER", str(folder)) for flag, value in given.items() for word in (f"--{flag}", value)]
    launch = [sys.executable, "-m", *(word.format(processes) for word in launcher), __file__, "--worker", *words]
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *launch]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("posttrain: ") or "Error" in line]
        raise RuntimeError(f"{name}: {said[0] if said else done.stderr[-500:]}")
    return dict(json.loads((out / WORKER_RESULT).read_text()))


def loopback_bytes() -> int:
    """Sent over the loopback of this process's own network so far."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def work(words: list[str]) -> int:
    """A process of the run: `posttrain sft`, with a callback that reads the kernel's counter."""
    import time

    from torch import distributed
    from transformers import TrainerCallback

    from posttrain.cli import main
    from posttrain.commands import train

    class Wire(TrainerCallback):
        def __init__(self, trainer: Any):
            sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
            self.total, self.trained = sum(size for size, _ in sizes), sum(size for size, needed in sizes if needed)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step not in (FIRST_STEP, LAST_STEP):
                return
            if distributed.is_initialized():
                distributed.barrier()
            now = (loopback_bytes(), time.perf_counter())
            if state.global_step == FIRST_STEP:
                self.then = now
            elif state.is_world_process_zero:
                steps = LAST_STEP - FIRST_STEP
                found = {
                    "sent_bytes": (now[0] - self.then[0]) / steps / args.world_size, "seconds": (now[1] - self.then[1]) / steps,
                    "total": self.total, "trained": self.trained, "processes": args.world_size,
                }  # fmt: skip
                Path(args.output_dir, WORKER_RESULT).write_text(json.dumps(found))

    given = train.use_callbacks
    train.use_callbacks = lambda trainer, callbacks: given(trainer, [*callbacks, Wire(trainer)])
    return main(["sft", *words])


HEAD = (
    "| weights | engine | sent by a process a step | theory | theory, all-reduce for reduce-scatter | measured / the latter"
    " | 2 processes / 1, tokens a second |\n|---|---|---|---|---|---|---|"
)


def line(kind: str, engine: Engine, got: dict[str, Any], speed: float | None) -> str:
    """A row of the table."""
    ring, reduced = (engine.sent_bytes(got["total"], got["trained"], 2, scatter) for scatter in (1, 2))
    return (
        f"| {kind} | {engine.name} | {got['sent_bytes'] / 1e6:.3f} MB | {ring / 1e6:.3f} MB | {reduced / 1e6:.3f} MB"
        f" | {got['sent_bytes'] / reduced:.2f} | {'not measured' if speed is None else f'{speed:.2f}'} |"
    )


def table(folder: Path, bytes_only: bool) -> str:
    """Every engine with LoRA and with all weights, as Markdown."""
    lines = [HEAD]
    for kind, more in (("LoRA r=8", {}), ("all", {"use_peft": False})):
        alone = None if bytes_only else start(folder, f"{kind}-one", 1, more)
        for engine in ENGINES:
            try:
                got = start(folder, f"{kind}-{engine.name}", 2, {**more, **engine.flags})
            except RuntimeError as error:
                print(error, file=sys.stderr)
                lines.append(f"| {kind} | {engine.name} | did not run | | | | |")
                continue
            lines.append(line(kind, engine, got, None if alone is None else 2 * alone["seconds"] / got["seconds"]))
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.exit(work(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes_only", action="store_true")
    with tempfile.TemporaryDirectory() as name:
        save_inputs(Path(name))
        print(table(Path(name), parser.parse_args().bytes_only))
