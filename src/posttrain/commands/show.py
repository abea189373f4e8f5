"""`posttrain show`: rows as the model sees them. The first thing to look at when a run surprises."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from posttrain import flags
from posttrain.commands.report import quiet_libraries, say
from posttrain.commands.rows import stream
from posttrain.config import Config
from posttrain.data.template import apply_template
from posttrain.model.load import load_tokenizer

Row = dict[str, Any]
BARS = 12  # of the histogram
BAR_CHARACTERS = 50
TRAINED, PLAIN = "\x1b[1;32m", "\x1b[0m"


def run(config: Config) -> None:
    """Print the first rows, then (as text) the lengths of all of them and the ledger."""
    quiet_libraries()
    settings, model = config.group(flags.ShowFlags), config.group(flags.ShowModelFlags)
    tokenizer = load_tokenizer(
        model.tokenizer_name_or_path or model.model_name_or_path, trust_remote_code=model.trust_remote_code
    )
    if settings.stage == "sft":
        say(f"template: {apply_template(tokenizer, config['template_name']).name}")
    rows = stream(config, settings.stage, tokenizer)
    if settings.output_format == "jsonl":
        for count, row in enumerate(rows):
            if count == settings.rows:
                break
            text = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
            print(json.dumps({**row, "text": text}, ensure_ascii=False))
        return
    lengths, trained = [], 0
    for count, row in enumerate(rows):
        if count < settings.rows or settings.rows < 0:
            print(coloured(row, tokenizer), end="\n\n")
        lengths.append(len(row["input_ids"]))
        trained += sum(row["trained"])
    print(histogram(lengths))
    print(f"{sum(lengths):,} tokens, {trained:,} of them trained")
    print(rows.ledger.summary())


def coloured(row: Row, tokenizer: Any) -> str:
    """A heading and the row's text, trained tokens in bold green (off a terminal: between « and »)."""
    ids, trained = row["input_ids"], row["trained"]
    on_terminal = (sys.stdout.isatty() or "FORCE_COLOR" in os.environ) and "NO_COLOR" not in os.environ
    before, after = (TRAINED, PLAIN) if on_terminal else ("«", "»")
    parts, start = [f"── {row['source']}: {len(ids)} tokens, {sum(trained)} trained\n"], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            parts.append(f"{before}{text}{after}" if trained[start] else text)
            start = end
    return "".join(parts)


def histogram(lengths: Iterable[int]) -> str:
    """Row lengths in tokens as a bar chart, with the quantiles that a length limit is chosen by."""
    ordered = sorted(lengths)
    if not ordered:
        return "no rows"
    width = max(1, -(-(ordered[-1] + 1) // BARS))
    counts = [0] * (ordered[-1] // width + 1)
    for length in ordered:
        counts[length // width] += 1
    lines = [f"lengths of {len(ordered):,} rows, in tokens"]
    for index, count in enumerate(counts):
        bar = "█" * round(BAR_CHARACTERS * count / max(counts)) or ("▏" if count else "")
        lines.append(f"{index * width:>7}–{(index + 1) * width - 1:<7} {bar} {count}")
    quantiles = {q: ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (50, 90, 99)}
    lines.append("  ".join(f"{q} %: ≤ {n}" for q, n in quantiles.items()) + f"  longest: {ordered[-1]}")
    return "\n".join(lines)
