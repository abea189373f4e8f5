"""DPO beside TRL: pairs per second, peak memory, losses and margins, same model, pairs, order and adapter.

    make bench                                    # installs TRL beside the project and runs this among others
    .venv/bin/python benchmarks/dpo.py --pairs 12 # more or fewer pairs; --only ours,trl to choose; --ratios "" leaves those out

Each contender runs in a process of its own, one after the other. All get the very same token ids in the same order and start from the
same adapter. "In training alone" leaves out the reference pass and the first step; "end to end" is all pairs over the time from the
first reference forward to the end of the last step. TRL either computes the reference within each step, by the model without its
adapter (trl: its training cannot be told apart from its reference), or before training (trl_precompute).
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from common import MODEL, OUT, StepClock, counted, run_contender, save_rows, trl_lora
from pairs import (
    Row,
    build_ours,
    contend,
    finish,
    measure,
    pair_arguments,
    pair_parser,
    prepared_pairs,
    report,
    same_start,
    train_ours,
)

CONTENDERS = ("ours", "ours_apart", "trl", "trl_precompute", "trl_padding_free")
TARGETS = {"end_to_end": 2.5, "per_second": 2.0}
SHARING = "sharing"  # the process that measures it by itself
SYNTHETIC_TOKENS, SYNTHETIC_PAIRS, REPEATS = 512, 2, 3  # of prompt + answer; a batch; the least time of


def run(name: str, rows: list[Row], steps: int, dtype: str) -> dict[str, Any]:
    """One contender."""
    if name == SHARING:
        return step_seconds(rows)
    if name.startswith("ours"):
        return train_ours(rows, steps, dtype, reward=False, shared_prefix=name == "ours")
    return run_trl(rows, steps, dtype, name)


def run_trl(rows: list[Row], steps: int, dtype: str, mode: str) -> dict[str, Any]:
    """TRL's DPOTrainer on ids that are ready, with its memory-saving activation recomputation off (faster) as ours has it."""
    import torch
    import trl
    from datasets import Dataset

    from posttrain.model.embedded import resolve_model
    from posttrain.model.load import load_tokenizer

    reference_seconds = [0.0]

    class OnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # it would tokenize text, and takes no ids

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            reference_seconds[0] = time.perf_counter() - began
            return dataset

    arguments = trl.DPOConfig(
        **pair_arguments(steps, dtype), max_length=None, gradient_checkpointing=False, beta=0.1,
        precompute_ref_log_probs=mode == "trl_precompute", padding_free=mode == "trl_padding_free",
        model_init_kwargs={"dtype": getattr(torch, dtype)},
    )  # fmt: skip
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer = OnIds(
        resolve_model(MODEL),
        args=arguments,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        processing_class=load_tokenizer(MODEL),
        peft_config=trl_lora("CAUSAL_LM"),
    )
    if mode == "trl_padding_free" and not trainer.padding_free:
        return {"unavailable": f"TRL {trl.__version__} takes padding_free=True, warns that it is switched off, and pads"}
    same_start(trainer.model)
    clock = StepClock()
    trainer.data_collator = counted(trainer.data_collator, clock, lambda batch: len(batch["input_ids"]) // 2)
    return finish(trainer, clock, {"reference_seconds": reference_seconds[0]})


def synthetic_pairs(ratio: float) -> list[Row]:
    """Pairs of random ids, prompt : answer = ratio, prompt + answer always of one length: without sharing they cost the same."""
    draw = random.Random(0)
    answer_tokens = round(SYNTHETIC_TOKENS / (1 + ratio))
    lengths = {"prompt_ids": SYNTHETIC_TOKENS - answer_tokens, "chosen_ids": answer_tokens, "rejected_ids": answer_tokens}
    return [
        {"margin": 0.0, **{name: [draw.randrange(100, 40_000) for _ in range(n)] for name, n in lengths.items()}}
        for _ in range(SYNTHETIC_PAIRS)
    ]


def step_seconds(rows: list[Row]) -> dict[str, Any]:
    """Forward and backward of every SYNTHETIC_PAIRS rows, with sharing and without in turn: the least of REPEATS, in seconds."""
    import torch

    from posttrain.data.pack import split
    from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart
    from posttrain.objectives.dpo import Preference
    from posttrain.training.resolve import CPU_FORWARD_TOKENS

    model, objective = build_ours("bfloat16", reward=False), Preference()

    def seconds(batch: Any) -> float:
        began = time.perf_counter()
        for part in split(batch, CPU_FORWARD_TOKENS):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = objective(model, part)
            loss.total.backward()
        return time.perf_counter() - began

    result: dict[str, Any] = {"shared": [], "apart": []}
    for start in range(0, len(rows), SYNTHETIC_PAIRS):
        group = [
            {**row, "reference_chosen": [0.0] * len(row["chosen_ids"]), "reference_rejected": [0.0] * len(row["rejected_ids"])}
            for row in rows[start : start + SYNTHETIC_PAIRS]
        ]
        batches = {"shared": collate_pairs(group), "apart": collate_pairs_apart(group)}
        times = [{name: seconds(batch) for name, batch in batches.items()} for _ in range(REPEATS)]
        for name in batches:
            result[name].append(min(time[name] for time in times))
    return result


def sharing_by_ratio(ratios: list[float]) -> dict[str, Any]:
    """What prefix sharing alone gives a training step, by the ratio of prompt to answer."""
    if not ratios:
        return {}
    groups = [synthetic_pairs(ratio) for ratio in ratios]
    file = save_rows("dpo_synthetic", [row for group in groups for row in group])
    took = run_contender(__file__, SHARING, file, 0, "bfloat16")
    results = {}
    for ratio, group, shared, apart in zip(ratios, groups, took["shared"], took["apart"], strict=True):
        both = 2 * SYNTHETIC_TOKENS
        fewer = both / (both - len(group[0]["prompt_ids"]))
        results[str(ratio)] = {"speed": apart / shared, "fewer_tokens": fewer}
        print(
            f"prompt/answer {ratio:g}, {SYNTHETIC_TOKENS} tokens together: {SYNTHETIC_PAIRS / shared:.3f} pairs/s with prefix sharing,"
            f" {SYNTHETIC_PAIRS / apart:.3f} without: {apart / shared:.2f}x ({fewer:.2f}x fewer tokens)"
        )
    return results


def main() -> None:
    """Parse, run, write outputs/bench/dpo.json."""
    parser = pair_parser(__doc__, CONTENDERS, hidden=(SHARING,))
    parser.add_argument("--ratios", default="0.3,1,3", help="of prompt to answer, to measure prefix sharing alone at")
    args = parser.parse_args()
    if args.contender:
        contend(args, run)
        return
    only = [name for name in args.only.split(",") if name]
    results = measure(__file__, *prepared_pairs(args.pairs, args.max_length), only) if only else {}
    results["ratios"] = report(results, TARGETS)
    results["sharing_by_ratio"] = sharing_by_ratio([float(ratio) for ratio in args.ratios.split(",") if ratio])
    (OUT / "dpo.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
