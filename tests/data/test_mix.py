"""Weighted mixes: shares hold at every length, no row comes twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from posttrain.data.load import DataPlan, DataSource, LoadedRows, load_rows
from rows import encode_text, text_of, write_texts


def test_weights_give_shares_and_no_row_twice(tmp_path: Path) -> None:
    names = [
        write_texts(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(n)])
        for name, n in (("a", 300), ("b", 50), ("c", 100))
    ]

    def mixed(seed: int, max_rows: int = -1) -> LoadedRows:
        source = DataSource(",".join(names), weights=(0.6, 0.1, 0.3))
        return load_rows(source, DataPlan("text", max_rows=max_rows, seed=seed), encode_text, "v1")

    rows = [text_of(row) for row in mixed(1).dataset]
    assert len(set(rows)) == len(rows)
    for n in range(1, len(rows)):
        share = Counter(row[0] for row in rows[:n])
        assert all(abs(share[name] - n * weight) <= 2 for name, weight in (("a", 0.6), ("b", 0.1), ("c", 0.3)))
    assert Counter(row[0] for row in rows)["c"] == 100, "it ends where a dataset is used up"
    assert mixed(1).ledger.notes == [
        f"the mix ends where {names[2]} has no more rows; give it less weight to take more of the others"
    ]
    counts = mixed(1).ledger.datasets
    assert [(c.rows_in, c.trained) for c in counts.values()] == [
        (n, Counter(row[0] for row in rows)[k]) for k, n in (("a", 300), ("b", 50), ("c", 100))
    ]
    assert [text_of(row) for row in mixed(2).dataset] != rows
    assert [text_of(row) for row in mixed(1, 20).dataset] == rows[:20]
    assert mixed(1, len(rows) - 1).ledger.notes == [], "the limit ended it, not a dataset"
    plain = load_rows(DataSource(",".join(names)), DataPlan("text"), encode_text, "v1")
    assert [text_of(row)[0] for row in plain.dataset] == ["a"] * 300 + ["b"] * 50 + ["c"] * 100
