"""`posttrain score`: a file of chats or preference pairs → JSONL of a reward model's scores, in the rows' order."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from posttrain import flags
from posttrain.commands.forward import chosen_rope, say_rope
from posttrain.commands.generate import WINDOW_BATCHES, check_files
from posttrain.commands.inference import loading_of, with_system
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.data.ledger import Ledger
from posttrain.data.load import DataSource, iter_examples
from posttrain.data.pack import Row, collate, collate_padded
from posttrain.data.pack_pairs import collate_pairs, collate_pairs_padded
from posttrain.data.template import apply_template, encode_chat, encode_pair, message_dicts, stop_token_ids
from posttrain.model.adapter import is_reward_adapter, load_adapter, read_adapter_config
from posttrain.model.attention import enable_segments
from posttrain.model.load import (
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
    read_config,
    resize_embeddings,
    stores_score_head,
)
from posttrain.model.merge import merge_tokenizer_folder
from posttrain.model.reward import install_scores, load_reward_model, set_padding
from posttrain.model.rope import context_tokens
from posttrain.types import Chat, Pair, RowError, UserError

Scored = tuple[float, ...]  # the score of a chat; of a pair those of its chosen and its rejected answer


@dataclass(frozen=True)
class Rater:
    """A reward model in evaluation mode on its device, and the tokenizer it was trained with. `packed`: rows without padding."""

    model: Any
    tokenizer: Any
    packed: bool
    context_tokens: int


def run(config: Config) -> None:
    """Rate the file and say what came out."""
    quiet_libraries()
    chosen, files = config.group(flags.InferenceFlags), config.group(flags.ScoreFlags)
    if files.batch_size < 1:
        raise UserError(f"--batch_size {files.batch_size}: must be at least 1")
    check_files(files.data_file, files.output_file)
    rater = load_rater(chosen)
    scores = score(rater, read_rated(files.data_file, chosen.system_prompt), files.output_file, files.batch_size)
    say(f"{summary(scores)}: {files.output_file}")


def load_rater(chosen: flags.InferenceFlags) -> Rater:
    """The reward model, with its adapter unmerged where one is named. Raises UserError where neither has a score head."""
    base, lora, trust = chosen.base_model, chosen.lora_model, chosen.trust_remote_code
    if lora and not is_reward_adapter(read_adapter_config(lora)):
        raise UserError(f"--lora_model {lora}: has no score head; `posttrain rm` trains a reward model")
    config = read_config(base, trust, score_head=True)
    if not lora and not stores_score_head(config):
        raise UserError(f"--base_model {base}: has no score head; name a reward model, or the adapter of one with --lora_model")
    folder = merge_tokenizer_folder(base, lora, chosen.tokenizer_path) if lora else chosen.tokenizer_path or base
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    if chosen.tokenizer_path:
        check_tokenizer(tokenizer, chosen.tokenizer_path, "--tokenizer_path", base, trust_remote_code=trust)
    apply_template(tokenizer, chosen.template_name)
    device_map = "auto" if torch.cuda.is_available() else None
    how = loading_of(chosen)
    model: Any = load_reward_model(
        base, chosen.dtype, quantization=how.quantization, trust_remote_code=trust, device_map=device_map,
        rope=chosen_rope(how.rope, lora, "--lora_model"),
    )  # fmt: skip
    say_rope(model)
    if lora:
        resize_embeddings(model, tokenizer)
    check_vocabulary(model, tokenizer)
    set_padding(model, tokenizer, stop_token_ids(tokenizer))
    if lora:
        model = load_adapter(model, lora, trainable=False)
    packed = enable_segments(model.eval()).packed
    install_scores(model)
    return Rater(model, tokenizer, packed, context_tokens(model.config) or tokenizer.model_max_length)


def read_rated(data_file: str, system_prompt: str | None = None) -> Iterator[Chat | Pair]:
    """The rows of a file: chats that end in an answer, and pairs. RowError for a row that is neither."""
    for row in iter_examples(DataSource(data_file, flag="--data_file"), "rated", "error", -1, Ledger()):
        assert isinstance(row, Chat | Pair)
        if isinstance(row, Pair):
            yield dataclasses.replace(row, prompt=with_system(row.prompt, system_prompt))
        else:
            yield dataclasses.replace(row, messages=with_system(row.messages, system_prompt))


def score(rater: Rater, rows: Iterable[Chat | Pair], output_file: str, batch_size: int) -> list[Scored]:
    """Write one object a row and return the scores in the rows' order.

    Lines are written as their window is done, so that a job cut short leaves what it had.
    """
    # All are encoded first: a row that cannot be used is told before hours are spent on the others.
    encoded = [(row, encode(rater, row)) for row in rows]
    if not encoded:
        raise UserError("--data_file holds no row")
    scores: list[Scored] = []
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(encoded), unit=" rows", disable=None)
    with open(output_file, "w", encoding="utf-8") as out, bar:
        for start in range(0, len(encoded), batch_size * WINDOW_BATCHES):
            window = encoded[start : start + batch_size * WINDOW_BATCHES]
            scored = score_window(rater, [columns for _, columns in window], batch_size, bar)
            for (row, _), of_row in zip(window, scored, strict=True):
                out.write(json.dumps(to_line(row, of_row), ensure_ascii=False) + "\n")
            out.flush()
            scores += scored
    return scores


def encode(rater: Rater, row: Chat | Pair) -> Row:
    """The ids as in training: prompt, then each answer through its stop token. RowError when they do not fit the model's context."""
    columns: dict[str, Any]
    if isinstance(row, Pair):
        prompt, chosen, rejected = encode_pair(rater.tokenizer, row)
        n_tokens = len(prompt) + max(len(chosen), len(rejected))
        columns = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": row.margin}
    else:
        (only,) = encode_chat(rater.tokenizer, row)
        n_tokens = len(only.input_ids)
        columns = {"input_ids": only.input_ids, "trained": only.trained}
    if n_tokens > rater.context_tokens:
        raise RowError(row.source, "messages", f"{n_tokens} tokens, and the model's context holds {rater.context_tokens}")
    return columns


@torch.inference_mode()
def score_window(rater: Rater, rows: Sequence[Row], batch_size: int, bar: tqdm) -> list[Scored]:
    """Scores in the rows' order. Chats and pairs are computed apart, the longest first: little padding, and memory that does not
    suffice shows early."""
    scores: dict[int, Scored] = {}
    for pairs in (False, True):
        order = [i for i in range(len(rows)) if ("prompt_ids" in rows[i]) is pairs]
        order.sort(key=lambda i: -sum(len(ids) for name, ids in rows[i].items() if name.endswith("ids")))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            together = _collate([rows[i] for i in batch], pairs, rater.packed).to(rater.model.device)
            of_batch = rater.model(**together.model_inputs(), score_at_S=together.last_S()).scores_S.tolist()
            per_row = 2 if pairs else 1
            scores.update((i, tuple(of_batch[per_row * k : per_row * (k + 1)])) for k, i in enumerate(batch))
            bar.update(len(batch))
    return [scores[i] for i in range(len(rows))]


def _collate(rows: Sequence[Row], pairs: bool, packed: bool) -> Any:
    if pairs:
        return collate_pairs(rows) if packed else collate_pairs_padded(rows)
    return collate(rows) if packed else collate_padded(rows)


def to_line(row: Chat | Pair, scores: Scored) -> dict[str, Any]:
    """What is written for a row."""
    tools = {"tools": list(row.tools)} if row.tools else {}
    if isinstance(row, Chat):
        return {"source": row.source, "messages": message_dicts(row.messages), **tools, "score": scores[0]}
    chosen, rejected = (message_dicts([*row.prompt, answer])[-1] for answer in (row.chosen, row.rejected))
    return {
        "source": row.source,
        "messages": message_dicts(row.prompt),
        **tools,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
        "score_margin": scores[0] - scores[1],
    }


def summary(scores: Sequence[Scored]) -> str:
    """One line: rows, mean and standard deviation of all scores; of pairs also how many are told apart rightly."""
    every = [value for row in scores for value in row]
    line = f"{len(scores):,} rows, mean score {statistics.fmean(every):.4f}, standard deviation {statistics.pstdev(every):.4f}"
    margins = [row[0] - row[1] for row in scores if len(row) == 2]
    if margins:
        right = sum(margin > 0 for margin in margins)
        line += (
            f"; {len(margins):,} pairs, accuracy {100 * right / len(margins):.1f} %, mean margin {statistics.fmean(margins):.4f}"
        )
    return line
