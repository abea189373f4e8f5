"""Packing a stream: the same rows as loading, nothing lost over passes, and resume at any group."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.load import DataPlan, DataSource, load_rows, stream_rows
from posttrain.data.pack_stream import PackedStream
from posttrain.data.tokenize import EncodeText, fingerprint

N_ROWS = 37


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "rests"]
    file.write_text("\n".join(" ".join(words[(i + j) % len(words)] for j in range(3 + i % 9)) for i in range(N_ROWS)))
    return file


def stream(corpus: Path, tokenizer: Any, buffer_rows: int = 0, window: int | None = None) -> PackedStream:
    source = DataSource(str(corpus))
    return PackedStream(stream_rows(source, DataPlan(kind="text"), EncodeText(tokenizer, 24), buffer_rows), 24)


def flat(groups: Any) -> list[list[int]]:
    return sorted(list(row["input_ids"]) for group in groups for row in group)


def test_one_pass_holds_what_loading_holds(corpus: Path, tokenizer: Any) -> None:
    loaded = load_rows(DataSource(str(corpus)), DataPlan(kind="text"), EncodeText(tokenizer, 24), fingerprint(tokenizer))
    groups: list[Any] = []
    packed = stream(corpus, tokenizer)
    for group in packed:
        if len([row for g in groups for row in g]) == len(loaded.dataset):
            break
        assert sum(len(row["input_ids"]) for row in group) <= 24
        groups.append(group)
    assert flat(groups) == sorted(list(ids) for ids in loaded.dataset["input_ids"])
    assert packed.rows.epoch == 1  # the pass ended, the next one began
    packed.rows.ledger.assert_identity()
    assert packed.rows.ledger.total.trained == N_ROWS


@pytest.mark.parametrize("buffer_rows", [0, 8])
@pytest.mark.parametrize("stop", [1, 5, 17, 40])
def test_resume_goes_on_at_the_same_group(
    corpus: Path, tokenizer: Any, buffer_rows: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.data.pack_stream.WINDOW_ROWS", 10)
    whole = list(itertools.islice(stream(corpus, tokenizer, buffer_rows), 60))
    first = stream(corpus, tokenizer, buffer_rows)
    iterator = iter(first)
    head = [next(iterator) for _ in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    second = stream(corpus, tokenizer, buffer_rows)
    second.load_state_dict(state)
    assert head + list(itertools.islice(second, 60 - stop)) == whole
    passes = [row["source"] for group in whole for row in group]
    assert len(set(passes)) == N_ROWS  # sixty groups are more than a pass: every row was seen
