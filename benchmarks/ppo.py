"""PPO beside TRL 0.24, the last with a PPOTrainer: episodes per second, peak memory, and where the time goes.

    make bench                                      # runs this among others
    .venv/bin/python benchmarks/ppo.py --rollouts 3 # more rollouts; --only ours,trl to choose

Each contender runs in a process of its own, one after the other; TRL in an environment of its own, which the first run makes
under outputs/bench. Ours is the command `posttrain ppo` with its defaults, bar the sizes. Nobody stops: every answer has the same
number of tokens. All get the same prompts of one length, the same number of episodes a rollout, a minibatch and a micro-batch
(which TRL's memory follows: see --micro_rows, --trl_rollout_rows), LoRA on all linear layers of policy and value, and a reward model on
the same base. An episode's time holds its generation, scoring, log-probs and values, and its share of the updates; the
first rollout, which warms up, is left out. Peak memory is the process's largest resident set.

    ours        values by an adapter of their own
    ours_top    --value_layers 10: of 30, the last ones
    ours_trunk  --value_sharing trunk: values off the policy's hidden states
    ours_group  --num_generations 4: as many episodes to a quarter of the prompts
    ours_sft    `posttrain sft` on sequences as long, for its memory
    trl         trl 0.24.0 with transformers 5.6.0
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ppo_trl
from common import ALPHA, MODEL, OUT, RANK, gibibytes, run_contender
from ppo_ours import PARTS, SFT_STEPS, Job, run_ours, run_sft

CONTENDERS = ("ours", "ours_top", "ours_trunk", "ours_group", "ours_sft", "trl")
PREPARE = (
    "prepare"  # a process, too, that makes what the contenders read: a child's peak begins at its parent's, which stays small
)
SPEED_TARGETS = {"ours": 1.5, "ours_trunk": 2.0}
MEMORY_TARGET, SFT_MEMORY_TARGET = 0.6, 1.3
TEMPERATURE = 1.0
SIZES = {"episodes": 16, "mini_batch": 8, "epochs": 2, "generations": 4, "prompt_tokens": 192, "response_tokens": 64}


# --- what the contenders read -------------------------------------------------------------------------------------------------


def words_of(pool: Sequence[str], wanted_tokens: int, count: Callable[[str], int], draw: random.Random) -> str:
    """A text of random words for which `count` gives exactly so many tokens. Raises ValueError where no text is short enough."""
    words = [draw.choice(pool) for _ in range(wanted_tokens)]
    while excess := count(" ".join(words)) - wanted_tokens:
        if excess >= len(words):
            raise ValueError(f"{wanted_tokens} tokens are less than what stands around the text")
        words = words[:-excess] if excess > 0 else words + [draw.choice(pool) for _ in range(-excess)]
    return " ".join(words)


def prepare(job: Job, rollouts: int) -> Job:
    """Prompts and chats of exact lengths in files, and an adapter of a reward model that was not trained."""
    from posttrain.data.template import apply_template, encode_chat, encode_prompt
    from posttrain.model.embedded import resolve_model
    from posttrain.model.load import load_tokenizer
    from posttrain.types import Chat, Message, Prompt

    tokenizer, draw, sizes = load_tokenizer(MODEL), random.Random(0), job["sizes"]
    apply_template(tokenizer, None)
    pool = [token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha() and token[1:].islower()]
    pool = sorted(word for word in pool if word.isascii() and len(word) > 2)

    def ids(question: str) -> list[int]:
        return encode_prompt(tokenizer, Prompt((Message("user", question),), ""))

    def chat_ids(question: str, answer: str) -> list[int]:
        return encode_chat(tokenizer, Chat((Message("user", question), Message("assistant", answer)), ""))[0].input_ids

    whole = sizes["prompt_tokens"] + sizes["response_tokens"]
    n_prompts = max(rollouts * sizes["episodes"], SFT_STEPS * sizes["mini_batch"])
    prompts = [words_of(pool, sizes["prompt_tokens"], lambda q: len(ids(q)), draw) for _ in range(n_prompts)]
    chats = [(q, words_of(pool, whole, lambda a, q=q: len(chat_ids(q, a)), draw)) for q in prompts]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    for name, rows in (("prompts", [messages[:1] for messages in turns]), ("chats", turns)):
        folder = OUT / f"ppo_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    save_reward_adapter(OUT / "ppo_reward", tokenizer)
    return {**job, "model": resolve_model(MODEL), "prompt_ids": [ids(q) for q in prompts[: rollouts * sizes["episodes"]]]}


def save_reward_adapter(folder: Path, tokenizer: Any) -> None:
    """As `posttrain rm` leaves one, its second matrices random: scores as costly as those of a trained one."""
    import torch

    from posttrain.model.adapter import Lora, attach_lora
    from posttrain.model.reward import load_reward_model

    torch.manual_seed(0)
    model = attach_lora(load_reward_model(MODEL, "bfloat16"), Lora(rank=RANK, alpha=ALPHA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


# --- the comparison -----------------------------------------------------------------------------------------------------------


def show(name: str, result: dict[str, Any]) -> None:
    """One contender's figures."""
    if "seconds" not in result:
        print(f"{name:<10} peak {gibibytes(result['peak_bytes'])}", flush=True)
        return
    parts = part_seconds(result)
    print(
        f"{name:<10} {result['per_second']:.3f} episodes/s   peak {gibibytes(result['peak_bytes'])}   trainable {result['trainable']:,}\n"
        f"{'':10} seconds a rollout: " + ", ".join(f"{part} {parts[part]:.1f}" for part in PARTS),
        flush=True,
    )
    if passes := result.get("passes"):
        shown = ", ".join(f"{role} {found['passes']:g} ({found['tokens']:,.0f})" for role, found in passes.items())
        print(f"{'':10} forward passes a rollout (tokens): {shown}")
    if logits := result.get("logits"):
        print(
            f"{'':10} largest tensor over the vocabulary while log-probs are measured: {logits['rows']} rows × {logits['vocabulary']:,}"
            f" (micro-batch: {logits['tokens']} response tokens)"
        )


def part_seconds(result: dict[str, Any]) -> dict[str, float]:
    """Mean seconds by part over all rollouts but the first."""
    steps = result["seconds"][1:] or result["seconds"]
    return {part: sum(step[part] for step in steps) / len(steps) for part in PARTS}


def report(results: dict[str, Any]) -> dict[str, Any]:
    """Ours beside TRL, our PPO beside our SFT, and what the sharing of prompts gives alone."""
    ratios: dict[str, Any] = {}

    def compare(what: str, a: str, b: str, key: str, target: float | None = None) -> None:
        """result a / result b, where both are there; more is better in all but memory."""
        if a not in results or b not in results:
            return
        ratio = results[a][key] / results[b][key]
        least = key == "peak_bytes"
        reached = target is None or (ratio <= target if least else ratio >= target)
        ratios[what] = {"ratio": ratio, "to_reach": target, "reached": reached}
        goal = "" if target is None else f" (to reach: {'≤' if least else '≥'} {target}x)"
        print(f"{what}: {ratio:.2f}x{goal}{'' if reached else ' MISSED'}")

    for name, target in SPEED_TARGETS.items():
        compare(f"{name} / trl, episodes/s", name, "trl", "per_second", target)
        compare(f"{name} / trl, peak memory", name, "trl", "peak_bytes", MEMORY_TARGET)
    compare("ours / ours_sft, peak memory", "ours", "ours_sft", "peak_bytes", SFT_MEMORY_TARGET)
    compare("prefix sharing alone (ours_group / ours), episodes/s", "ours_group", "ours", "per_second")
    if {"ours", "ours_group"} <= results.keys():
        apart, shared = part_seconds(results["ours"]), part_seconds(results["ours_group"])
        ratios["prefix_sharing_by_part"] = {part: apart[part] / shared[part] for part in PARTS}
        print("  by part: " + ", ".join(f"{part} {ratio:.2f}x" for part, ratio in ratios["prefix_sharing_by_part"].items()))
    return ratios


def compete(job: Job, only: Sequence[str], rollouts: int, dtype: str) -> dict[str, Any]:
    """All contenders on one job, in one type of numbers."""
    interpreter = ppo_trl.python() if "trl" in only else None
    file = OUT / "ppo_job.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job))
    file.write_text(json.dumps(run_contender(__file__, PREPARE, file, rollouts, dtype)))
    sizes = job["sizes"]
    print(
        f"{rollouts} rollouts of {sizes['episodes']} episodes, {sizes['mini_batch']} an optimizer step, {job['micro_rows']} a micro-batch,"
        f" {sizes['epochs']} epochs; prompts {sizes['prompt_tokens']}, answers {sizes['response_tokens']} tokens; {MODEL},"
        f" LoRA r={RANK} on all linear layers, {dtype}"
    )
    results = {}
    for name in only:
        chosen = interpreter if name == "trl" and interpreter else sys.executable
        results[name] = run_contender(__file__, name, file, rollouts, dtype, chosen)
        show(name, results[name])
    return results


def contend(args: argparse.Namespace) -> None:
    """In a contender's process: run it and print its result."""
    job = json.loads(args.rows_file.read_text())
    if args.contender == PREPARE:
        result = prepare(job, args.steps)
    elif args.contender == "trl":
        result = ppo_trl.run_trl(job, args.steps, args.dtype)
    elif args.contender == "ours_sft":
        result = run_sft(job, args.dtype)
    else:
        result = run_ours(args.contender, job, args.steps, args.dtype)
    print(json.dumps(result))


def native() -> str:
    """What the processor computes in fastest: emulated bfloat16 would time the emulation."""
    import torch

    from posttrain.model.load import hardware_dtype

    return "bfloat16" if hardware_dtype() == torch.bfloat16 else "float32"


def main() -> None:
    """Parse, run, write outputs/bench/ppo.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas")
    parser.add_argument("--rollouts", type=int, default=2, help="the first is not counted")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro_rows", type=int, default=4, help="episodes of a micro-batch, of all contenders")
    parser.add_argument(
        "--trl_rollout_rows", type=int, help="episodes that TRL generates and scores at once [default: all, the fastest]"
    )
    parser.add_argument("--contender", choices=(*CONTENDERS, PREPARE), help=argparse.SUPPRESS)
    parser.add_argument("--rows_file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of all contenders [default: bfloat16 where the processor computes in it]",
    )
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    job = {
        "sizes": {name: getattr(args, name) for name in SIZES}, "micro_rows": args.micro_rows, "temperature": TEMPERATURE,
        "trl_rollout_rows": args.trl_rollout_rows or args.episodes,
    }  # fmt: skip
    results = compete(job, [name for name in args.only.split(",") if name], args.rollouts, args.dtype or native())
    results["ratios"] = report(results)
    (OUT / "ppo.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
