"""`posttrain generate`: a file of prompts → JSONL of answers, in batches, in the prompts' order."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from posttrain import flags
from posttrain.commands.inference import Answer, Answerer, answer, answerer_of, check_sampling, finished, with_system
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.data.ledger import Ledger
from posttrain.data.load import DataSource, iter_examples
from posttrain.data.template import encode_prompt, message_dicts, stop_token_ids
from posttrain.model.attention import enable_segments, unwrap
from posttrain.training.decode import can_continue
from posttrain.training.rollout import Sampling
from posttrain.training.rollout import generate as sample
from posttrain.types import Prompt, RowError, UserError

WINDOW_BATCHES = 32  # prompts of this many batches are sorted by length together, then written in order


def run(config: Config) -> None:
    """Answer the file and say how fast."""
    quiet_libraries()
    model, files = config.group(flags.InferenceFlags), config.group(flags.GenerateFlags)
    sampling = config.group(flags.SamplingFlags)
    check_sampling(sampling)
    check_files(files.data_file, files.output_file)
    answerer = answerer_of(model)
    started = time.perf_counter()
    n_answers, n_tokens = generate(
        answerer, read_prompts(files.data_file, model.system_prompt), files.output_file, sampling, files.batch_size
    )
    seconds = time.perf_counter() - started
    say(f"{n_answers:,} answers, {n_tokens:,} tokens, {n_tokens / seconds:,.0f} tokens/s: {files.output_file}")


def check_files(data_file: str, output_file: str) -> None:
    """Raises UserError before a model is loaded for nothing."""
    source, target = Path(data_file), Path(output_file)
    if not source.exists():
        raise UserError(f"--data_file {data_file}: no such file")
    if target.is_dir():
        raise UserError(f"--output_file {output_file}: is a folder; name a file in it")
    if target.exists() and target.samefile(source):
        raise UserError(f"--output_file {output_file}: is --data_file itself")


def read_prompts(data_file: str, system_prompt: str | None = None) -> Iterator[Prompt]:
    """The prompts of a file: plain text (one a line) or rows of any chat format, whose last answer is left out."""
    for prompt in iter_examples(DataSource(data_file, flag="--data_file"), "prompt", "error", -1, Ledger()):
        assert isinstance(prompt, Prompt)
        yield Prompt(with_system(prompt.messages, system_prompt), prompt.source, prompt.tools)


def generate(
    answerer: Answerer, prompts: Iterable[Prompt], output_file: str, sampling: flags.SamplingFlags, batch_size: int
) -> tuple[int, int]:
    """Write one object a prompt: source, messages (and tools), output, n_tokens, stop_reason. Returns answers and their tokens.

    Lines are written as their window is done, so that a job cut short leaves what it had.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    torch.manual_seed(sampling.seed)
    enable_segments(answerer.model)  # prompts of a batch are then computed without padding, and a GPU's step can be recorded
    # All are encoded first: a prompt that cannot be used is told before hours are spent on the others.
    encoded = [(prompt, encode(answerer, prompt)) for prompt in prompts]
    if not encoded:
        raise UserError("--data_file holds no prompt")
    n_tokens = 0
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(encoded), unit=" answers", disable=None)
    with open(output_file, "w", encoding="utf-8") as out, bar:
        for start in range(0, len(encoded), batch_size * WINDOW_BATCHES):
            window = encoded[start : start + batch_size * WINDOW_BATCHES]
            replies = answer_window(answerer, [ids for _, ids in window], sampling, batch_size, start, bar)
            for (prompt, _), reply in zip(window, replies, strict=True):
                out.write(json.dumps(to_row(prompt, reply), ensure_ascii=False) + "\n")
                n_tokens += len(reply.ids)
            out.flush()
    return len(encoded), n_tokens


def answer_window(
    answerer: Answerer, prompts: Sequence[list[int]], sampling: flags.SamplingFlags, batch_size: int, first: int, bar: tqdm
) -> list[Answer]:  # fmt: skip
    """Answers in the prompts' order. The longest prompts go first: little padding, and memory that does not suffice shows early.

    `first` is the number of the first prompt in the file: a sampled answer follows from the seed and its prompt's number, whatever the
    batch. The library generates where a repetition penalty is asked for, the context is short or the model is spread over devices.
    """
    model, room = answerer.model, answerer.context_tokens - max(map(len, prompts))
    spread = len(set((getattr(unwrap(model), "hf_device_map", None) or {"": 0}).values())) > 1
    if sampling.repetition_penalty == 1 and sampling.max_new_tokens <= room and not spread and can_continue(model):
        stops = stop_token_ids(answerer.tokenizer)
        how = Sampling(
            sampling.max_new_tokens, tuple(stops), answerer.tokenizer.pad_token_id, sampling.temperature, sampling.top_p, sampling.top_k,
            batch_rows=batch_size,
        )  # fmt: skip
        numbers = range(first, first + len(prompts))
        responses = sample(model, prompts, how, sampling.seed, numbers=numbers, after_batch=bar.update)
        return [finished(answerer.tokenizer, response.ids, stops) for response in responses]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        replies.update(zip(batch, answer(answerer, [prompts[i] for i in batch], sampling), strict=True))
        bar.update(len(batch))
    return [replies[i] for i in range(len(prompts))]


def encode(answerer: Answerer, prompt: Prompt) -> list[int]:
    """The prompt's ids. Raises RowError when they leave no room in the context for an answer."""
    ids = encode_prompt(answerer.tokenizer, prompt)
    if len(ids) >= answerer.context_tokens:
        raise RowError(prompt.source, "messages", f"{len(ids)} tokens, and the model's context holds {answerer.context_tokens}")
    return ids


def to_row(prompt: Prompt, reply: Answer) -> dict[str, Any]:
    """The line of an answer."""
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {
        "source": prompt.source,
        "messages": message_dicts(prompt.messages),
        **tools,
        "output": reply.text,
        "n_tokens": len(reply.ids),
        "stop_reason": reply.stop_reason,
    }
