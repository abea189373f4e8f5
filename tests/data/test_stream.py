"""Streaming equals loading row for row, whole, sharded, shuffled, stopped and resumed anywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from posttrain.data.load import DataPlan, DataSource, EncodedRows, load_rows, stream_rows
from posttrain.data.stream import RowStream
from posttrain.types import RowError, Text, UserError
from rows import GOOD, TEXTS, encode_text, write_texts

PLAN = DataPlan("text", bad_rows="skip")


@pytest.fixture
def corpus(tmp_path: Path) -> DataSource:
    """Three files in a folder."""
    for n in range(3):
        write_texts(tmp_path / f"{n}.jsonl", TEXTS[n * 240 : (n + 1) * 240])
    return DataSource(str(tmp_path))


def mixed(corpus: DataSource) -> DataSource:
    return DataSource(",".join(f"{corpus.file_dir}/{n}.jsonl" for n in range(3)), weights=(0.5, 0.2, 0.3))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_rows", [-1, 100])
def test_streaming_equals_loading(corpus: DataSource, weighted: bool, max_rows: int) -> None:
    source = mixed(corpus) if weighted else corpus
    plan = DataPlan("text", bad_rows="skip", max_rows=max_rows)
    loaded = load_rows(source, plan, encode_text, "v1")
    stream = stream_rows(source, plan, encode_text)
    assert list(stream) == list(loaded.dataset)
    assert stream.ledger.drops == loaded.ledger.drops
    assert stream.ledger.total.trained == loaded.ledger.total.trained
    assert stream.ledger.encoded_rows == loaded.ledger.encoded_rows
    stream.ledger.assert_identity()
    if not weighted and max_rows < 0:
        assert stream.ledger.to_json() == loaded.ledger.to_json()


def test_ledger_grows_and_counts_a_row_once(corpus: DataSource) -> None:
    stream = stream_rows(corpus, PLAN, encode_text)
    rows = iter(stream)
    for _ in range(50):
        next(rows)
    stream.ledger.assert_identity()
    assert stream.ledger.total.trained == len([n for n, _ in GOOD if n <= stream.ledger.total.rows_in])
    assert len(list(stream)) == len(list(stream)), "a second pass gives the rows again"
    assert stream.ledger.total.rows_in == 700
    next(iter(stream))
    assert stream.ledger.total.rows_in == 700, "a third pass that only begins leaves the account whole"


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (3, 0), (2, 2)])
@pytest.mark.parametrize("buffer_rows", [0, 16])
def test_every_row_goes_to_one_shard(corpus: DataSource, world_size: int, workers: int, buffer_rows: int) -> None:
    wanted = Counter((row["source"], bytes(row["input_ids"])) for row in stream_rows(corpus, PLAN, encode_text))
    seen: Counter[Any] = Counter()
    limited = 0
    for rank in range(world_size):
        stream = stream_rows(corpus, PLAN, encode_text, buffer_rows, rank, world_size)
        for row in DataLoader(stream, batch_size=None, num_workers=workers):
            seen[row["source"], bytes(row["input_ids"])] += 1
        few = stream_rows(corpus, DataPlan("text", bad_rows="skip", max_rows=50), encode_text, buffer_rows, rank, world_size)
        limited += len({row["source"] for row in DataLoader(few, batch_size=None, num_workers=workers)})
        if workers:
            with pytest.raises(UserError, match="--dataloader_num_workers"):
                stream.state_dict()
    assert seen == wanted
    assert limited == 50


def test_shuffle_buffer(corpus: DataSource) -> None:
    plain = list(stream_rows(corpus, PLAN, encode_text))
    stream = stream_rows(corpus, PLAN, encode_text, 64)
    first, again = list(stream), list(stream)
    assert first == again == list(stream_rows(corpus, PLAN, encode_text, 64))
    key = str
    assert first != plain
    assert sorted(first, key=key) == sorted(plain, key=key)
    number = {row["source"]: n for n, row in enumerate(plain)}
    early = [n - number[row["source"]] for n, row in enumerate(first)]
    assert min(early) >= -64 * 8 / 7 - 2, "a row comes early by no more than the buffer (rows of an example, dropped rows beside)"
    assert max(early) > 64, "and may come late by more"
    stream.set_epoch(1)
    assert list(stream) != first
    other = stream_rows(corpus, DataPlan("text", bad_rows="skip", seed=43), encode_text, 64)
    assert list(other) != first


class Counting:
    """encode_text that keeps the sources it was called with."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def __call__(self, example: Text) -> EncodedRows:
        self.sources.append(example.source)
        return encode_text(example)


@pytest.mark.parametrize("buffer_rows", [0, 16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_rows", [-1, 333])
def test_resume_goes_on_at_the_same_row(corpus: DataSource, buffer_rows: int, weighted: bool, max_rows: int) -> None:
    source = mixed(corpus) if weighted else corpus
    plan = DataPlan("text", bad_rows="skip", max_rows=max_rows)

    def fresh(encode: Any = encode_text) -> RowStream:
        stream = stream_rows(source, plan, encode, buffer_rows, 1, 3)
        stream.set_epoch(3)
        return stream

    whole = fresh()
    rows = list(whole)
    for stop in (0, 1, 2, 3, 4, 17, 80, len(rows) - 1, len(rows)):
        first = fresh()
        taking = iter(first)
        head = [next(taking) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        encode = Counting()
        second = stream_rows(source, plan, encode, buffer_rows, 1, 3)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert head + list(second) == rows, f"stopped after {stop}"
        second.ledger.assert_identity()
        assert second.ledger.to_json() == whole.ledger.to_json()
        consumed = {row["source"] for row in head}
        assert len(consumed & set(encode.sources)) <= 1, "only an example in the middle of its rows is encoded again"


def test_resume_mistakes(corpus: DataSource, tmp_path: Path) -> None:
    stream = stream_rows(corpus, PLAN, encode_text, 8, 0, 2)
    taking = iter(stream)
    next(taking)
    state = stream.state_dict()
    with pytest.raises(UserError, match="resume it with as many processes"):
        stream_rows(corpus, PLAN, encode_text, 8).load_state_dict(state)
    write_texts(tmp_path / "0.jsonl", ["gone"])
    write_texts(tmp_path / "1.jsonl", ["gone"])
    write_texts(tmp_path / "2.jsonl", ["gone"])
    changed = stream_rows(corpus, PLAN, encode_text, 8, 0, 2)
    changed.load_state_dict(state)
    with pytest.raises(UserError, match="the data changed since the stream was saved"):
        next(iter(changed))


def test_bad_rows_error(corpus: DataSource) -> None:
    stream = stream_rows(corpus, DataPlan("text"), encode_text)
    with pytest.raises(RowError, match=r"0.jsonl:10:text: too long \(--bad_rows skip"):
        list(stream)
