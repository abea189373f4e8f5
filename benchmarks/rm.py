"""Reward model training beside TRL: pairs per second, peak memory, losses and margins, same model, head, pairs, order and adapter.

    make bench                                   # installs TRL beside the project and runs this among others
    .venv/bin/python benchmarks/rm.py --pairs 12 # more or fewer pairs; --only ours,trl to choose

Each contender runs in a process of its own, one after the other. All get the very same token ids in the same order and start from the
same adapter and score head. "In training alone" leaves out the first step, "end to end" does not. TRL's RewardTrainer pads; it has no
other mode. Its head is in the type of the model, ours in float32, so in bf16 their losses differ more than in fp32.
"""

from __future__ import annotations

import json
from typing import Any

from common import MODEL, OUT, StepClock, counted, trl_lora
from pairs import Row, contend, finish, measure, pair_arguments, pair_parser, prepared_pairs, report, same_start, train_ours

CONTENDERS = ("ours", "ours_apart", "trl")
TARGETS = {"end_to_end": 2.5, "per_second": 2.0}


def run(name: str, rows: list[Row], steps: int, dtype: str) -> dict[str, Any]:
    """One contender."""
    if name.startswith("ours"):
        return train_ours(rows, steps, dtype, reward=True, shared_prefix=name == "ours")
    return run_trl(rows, steps, dtype)


def run_trl(rows: list[Row], steps: int, dtype: str) -> dict[str, Any]:
    """TRL's RewardTrainer on the same ids, with its memory-saving activation recomputation off (faster) as ours has it."""
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from posttrain.model.embedded import resolve_model
    from posttrain.model.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    # The library reads the score at the last token that is not the padding token: it must not be the answer's stop token.
    assert all(row[name][-1] != tokenizer.pad_token_id for row in rows for name in ("chosen_ids", "rejected_ids"))
    arguments = RewardConfig(
        **pair_arguments(steps, dtype), max_length=None, gradient_checkpointing=False,
        model_init_kwargs={"dtype": getattr(torch, dtype)},
    )  # fmt: skip
    whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
    trainer = RewardTrainer(
        resolve_model(MODEL),
        args=arguments,
        train_dataset=Dataset.from_list(whole),
        processing_class=tokenizer,
        peft_config=trl_lora("SEQ_CLS"),
    )
    same_start(trainer.model)
    clock = StepClock()
    trainer.data_collator = counted(trainer.data_collator, clock, lambda batch: len(batch["input_ids"]) // 2)
    return finish(trainer, clock, {"reference_seconds": 0.0})


def main() -> None:
    """Parse, run, write outputs/bench/rm.json."""
    args = pair_parser(__doc__, CONTENDERS).parse_args()
    if args.contender:
        contend(args, run)
        return
    results = measure(__file__, *prepared_pairs(args.pairs, args.max_length), args.only.split(","))
    results["ratios"] = report(results, TARGETS)
    (OUT / "rm.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
