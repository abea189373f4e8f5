"""Held-out rows: a seeded share that leaks nothing, or files of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from posttrain.data.load import DataPlan, DataSource, Splits, load_splits
from posttrain.types import UserError
from rows import TEXTS, encode_text, text_of, write_texts

PLAN = DataPlan("text", bad_rows="skip")


@pytest.fixture
def corpus(tmp_path: Path) -> DataSource:
    return DataSource(write_texts(tmp_path / "a.jsonl", TEXTS))


@pytest.mark.parametrize(("percentage", "limit", "eval_limit"), [(10.0, -1, -1), (10.0, 100, 5), (0.01, -1, -1), (50.0, 1, -1)])
def test_held_out_rows(corpus: DataSource, percentage: float, limit: int, eval_limit: int) -> None:
    def split(seed: int = 1) -> Splits:
        plan = DataPlan("text", bad_rows="skip", max_rows=limit, seed=seed)
        return load_splits(corpus, None, plan, encode_text, "v1", percentage, eval_limit)

    both = split()
    assert both.validation is not None
    train, held = ({row["source"] for row in side.dataset} for side in (both.train, both.validation))
    assert not train & held
    used = both.train.ledger.total.trained + both.train.ledger.total.held_out
    wanted = max(1, int(percentage / 100 * (686 if limit < 0 else -(-limit * 100 // (100 - percentage)))))
    assert len(held) == (min(wanted, eval_limit) if eval_limit > 0 else wanted)
    assert len(train) == (686 - wanted if limit < 0 else limit)
    assert used <= 686
    for side in (both.train, both.validation):
        side.ledger.assert_identity()
        assert side.ledger.total.trained == len({row["source"] for row in side.dataset})
        assert side.ledger.encoded_rows == len(side.dataset)
        numbers = [int(row["source"].split(":")[-1]) for row in side.dataset]
        assert numbers == sorted(numbers)
    assert both.train.ledger.total.rows_in == 700
    again = split()
    assert again.validation is not None
    assert list(again.validation.dataset) == list(both.validation.dataset)
    other = split(seed=2).validation
    assert other is not None
    assert limit == 1 or list(other.dataset) != list(both.validation.dataset)


def test_equal_content_is_never_on_both_sides(tmp_path: Path) -> None:
    source = DataSource(write_texts(tmp_path / "a.jsonl", [f"row {i % 40}" for i in range(400)]))
    both = load_splits(source, None, PLAN, encode_text, "v1", 25.0)
    assert both.validation is not None
    train, held = (Counter(text_of(row) for row in side.dataset) for side in (both.train, both.validation))
    assert not set(train) & set(held)
    assert sum(held.values()) == 100
    same = DataSource(write_texts(tmp_path / "b.jsonl", ["row"] * 10))
    with pytest.raises(UserError, match="fewer than two different rows"):
        load_splits(same, None, PLAN, encode_text, "v1", 25.0)


def test_validation_files_win(corpus: DataSource, tmp_path: Path) -> None:
    held_out = DataSource(write_texts(tmp_path / "b.jsonl", ["one", "two", "three"]), flag="--validation_file_dir")
    both = load_splits(corpus, held_out, PLAN, encode_text, "v1", 10.0, 2)
    assert both.validation is not None
    assert [text_of(row) for row in both.validation.dataset] == ["one", "two"]
    assert both.train.ledger.total.trained == 686
    assert load_splits(corpus, None, PLAN, encode_text, "v1").validation is None
    with pytest.raises(UserError, match=r"^--validation_file_dir"):
        load_splits(corpus, DataSource("absent", flag="--validation_file_dir"), PLAN, encode_text, "v1")
