"""`posttrain show`: rows as the model sees them. The first thing to look at when a run surprises."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

from posttrain import flags
from posttrain.commands.report import quiet_libraries, say
from posttrain.commands.rows import PAIR_STAGES, stream
from posttrain.config import Config
from posttrain.data.template import apply_template
from posttrain.model.load import load_tokenizer

Row = dict[str, Any]
BARS = 12  # of the histogram
BAR_CHARACTERS = 50
TRAINED, REJECTED, PLAIN = "\x1b[1;32m", "\x1b[1;31m", "\x1b[0m"


def run(config: Config) -> None:
    """Print the first rows, then (as text) the lengths of all of them and the ledger."""
    quiet_libraries()
    settings, model = config.group(flags.ShowFlags), config.group(flags.ShowModelFlags)
    tokenizer = load_tokenizer(
        model.tokenizer_name_or_path or model.model_name_or_path, trust_remote_code=model.trust_remote_code
    )
    if settings.stage != "pt":
        say(f"template: {apply_template(tokenizer, config['template_name']).name}")
    rows = stream(config, settings.stage, tokenizer)
    if settings.output_format == "jsonl":
        for row in islice(rows, settings.rows if settings.rows >= 0 else None):
            print(json.dumps({**row, **texts(row, tokenizer)}, ensure_ascii=False))
        return
    pairs = settings.stage in PAIR_STAGES
    measure, text, summary = (pair_lengths, coloured_pair, pair_summary) if pairs else (row_lengths, coloured, row_summary)
    lengths: list[Any] = []
    for count, row in enumerate(rows):
        if count < settings.rows or settings.rows < 0:
            print(text(row, tokenizer), end="\n\n")
        lengths.append(measure(row))
    print(summary(lengths) if lengths else "no rows")
    print(rows.ledger.summary())


def texts(row: Row, tokenizer: Any) -> dict[str, str]:
    """What the ids of a row say: `text` of a row, `prompt`, `chosen` and `rejected` of a pair."""
    names = {"input_ids": "text", "prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    return {names[key]: tokenizer.decode(ids, skip_special_tokens=False) for key, ids in row.items() if key in names}


def marks(colour: str = TRAINED) -> tuple[str, str]:
    """What goes before and after trained tokens: a colour, off a terminal « and »."""
    on_terminal = (sys.stdout.isatty() or "FORCE_COLOR" in os.environ) and "NO_COLOR" not in os.environ
    return (colour, PLAIN) if on_terminal else ("«", "»")


def coloured(row: Row, tokenizer: Any) -> str:
    """A heading and the row's text, trained tokens in bold green (off a terminal: between « and »)."""
    ids, trained = row["input_ids"], row["trained"]
    before, after = marks()
    parts, start = [f"── {row['source']}: {len(ids)} tokens, {sum(trained)} trained\n"], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            parts.append(f"{before}{text}{after}" if trained[start] else text)
            start = end
    return "".join(parts)


def coloured_pair(row: Row, tokenizer: Any) -> str:
    """A heading, the prompt, and either answer under its name: the chosen one in bold green, the rejected one in bold red."""
    prompt, chosen, rejected = pair_lengths(row)
    margin = f", margin {row['margin']:g}" if row["margin"] else ""
    text = texts(row, tokenizer)
    parts = [f"── {row['source']}: prompt {prompt}, chosen {chosen}, rejected {rejected} tokens{margin}", text["prompt"]]
    for name, colour in (("chosen", TRAINED), ("rejected", REJECTED)):
        before, after = marks(colour)
        parts.append(f"── {name}\n{before}{text[name]}{after}")
    return "\n".join(parts)


def row_lengths(row: Row) -> tuple[int, int]:
    """Tokens, and how many of them are trained."""
    return len(row["input_ids"]), sum(row["trained"])


def pair_lengths(row: Row) -> tuple[int, int, int]:
    """Tokens of the prompt, of the chosen and of the rejected answer."""
    return len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])


def row_summary(lengths: Sequence[tuple[int, int]]) -> str:
    """Lengths and token counts of rows."""
    tokens, trained = (sum(column) for column in zip(*lengths, strict=True))
    shown = histogram([length for length, _ in lengths], f"lengths of {len(lengths):,} rows, in tokens")
    return f"{shown}\n{tokens:,} tokens, {trained:,} of them trained"


def pair_summary(lengths: Sequence[tuple[int, int, int]]) -> str:
    """Lengths and token counts of pairs, and which answer is longer: a model may learn just that."""
    prompts, chosen, rejected = zip(*lengths, strict=True)
    whole = [prompt + answer for prompt, *answers in lengths for answer in answers]
    tokens = {"prompt": sum(prompts), "chosen": sum(chosen), "rejected": sum(rejected)}
    longer, equal = sum(r > c for _, c, r in lengths), sum(r == c for _, c, r in lengths)
    lines = [
        histogram(whole, f"lengths of {len(lengths):,} pairs, prompt + answer (two a pair), in tokens"),
        f"prompts  {quantiles(prompts)}",
        f"answers  {quantiles(chosen + rejected)}",
        f"{sum(tokens.values()):,} tokens: {', '.join(f'{n:,} {name}' for name, n in tokens.items())}",
        f"rejected answer longer in {longer:,} pairs, as long in {equal:,}, shorter in {len(lengths) - longer - equal:,}",
    ]
    return "\n".join(lines)


def histogram(lengths: Sequence[int], title: str) -> str:
    """Lengths in tokens as a bar chart, with the quantiles that a length limit is chosen by."""
    width = max(1, -(-(max(lengths) + 1) // BARS))
    counts = [0] * (max(lengths) // width + 1)
    for length in lengths:
        counts[length // width] += 1
    lines = [title]
    for index, count in enumerate(counts):
        bar = "█" * round(BAR_CHARACTERS * count / max(counts)) or ("▏" if count else "")
        lines.append(f"{index * width:>7}–{(index + 1) * width - 1:<7} {bar} {count}")
    return "\n".join([*lines, quantiles(lengths)])


def quantiles(lengths: Sequence[int]) -> str:
    """One line: what length 50, 90 and 99 % do not exceed, and the longest."""
    ordered = sorted(lengths)
    found = {q: ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (50, 90, 99)}
    return "  ".join(f"{q} %: ≤ {n}" for q, n in found.items()) + f"  longest: {ordered[-1]}"
