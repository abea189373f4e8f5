"""Preparing rows: the same for any number of processes and from the cache; limits, mixing, held-out rows, errors."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import work
from posttrain.data.files import RawRow, read_file
from posttrain.data.ledger import Ledger
from posttrain.data.load import DataPlan, DataSource, EncodedRows, iter_examples, load_rows, load_splits
from posttrain.data.sources import parse_weights
from posttrain.types import Chat, RowError, Text, UserError
from rows import GOOD, TEXTS, encode_text, text_of, write_texts

SHARED = Path(__file__).parents[3] / "shared" / "data"


def encode_chat(example: Chat) -> EncodedRows:
    return EncodedRows([{"input_ids": list(str(example.messages).encode())}])


PLAN = DataPlan("text", bad_rows="skip")


@pytest.fixture
def corpus(tmp_path: Path) -> DataSource:
    return DataSource(write_texts(tmp_path / "a.jsonl", TEXTS))


def test_rows_columns_and_account(corpus: DataSource) -> None:
    loaded = load_rows(corpus, PLAN, encode_text, "v1")
    wanted = [(f"{corpus.file_dir}:{n}", part) for n, t in GOOD for part in ([t[:8], t[8:16]] if "split" in t else [t[:8]])]
    assert [(row["source"], text_of(row)) for row in loaded.dataset] == wanted
    assert loaded.dataset.features["input_ids"].feature.dtype == "int32"
    assert loaded.dataset.features["trained"].feature.dtype == "int8"
    total = loaded.ledger.total
    assert (total.rows_in, total.trained, total.dropped, total.not_taken) == (700, 686, 14, 0)
    assert loaded.ledger.encoded_rows == len(wanted)
    assert [drop.source for drop in loaded.ledger.drops] == [f"{corpus.file_dir}:{i + 1}" for i in range(9, 700, 50)]
    assert dict(loaded.ledger.truncations) == {}, "no text is longer than its rows"


@pytest.mark.parametrize("max_rows", [-1, 300])
def test_any_number_of_processes_gives_the_same(corpus: DataSource, max_rows: int) -> None:
    results = []
    for workers in (1, 2, 3):
        plan = DataPlan("text", bad_rows="skip", max_rows=max_rows, workers=workers, overwrite_cache=True)
        loaded = load_rows(corpus, plan, encode_text, "v1")
        results.append((list(loaded.dataset), loaded.ledger.to_json()))
    assert results[0] == results[1] == results[2]
    total = results[0][1]
    assert total["rows_in"] == 700
    assert total["not_taken"] == (0 if max_rows < 0 else 700 - 300 - total["dropped"])


def test_spawned_processes(corpus: DataSource) -> None:
    rows = list(read_file(Path(str(corpus.file_dir))))
    chunks = [[(0, row) for row in rows[i : i + 100]] for i in range(0, 700, 100)]
    job = work.RowWork("text", "auto", encode_text)
    alone = list(work.run_chunks(job, chunks, False))
    spawned = list(work.run_chunks(job, chunks, False, 2, "spawn"))
    assert alone == spawned


def die(example: Text) -> EncodedRows:
    os._exit(9)


def test_a_process_that_dies_is_an_error_not_a_wait(corpus: DataSource) -> None:
    with pytest.raises(UserError, match="--preprocessing_num_workers 2: a process died"):
        load_rows(corpus, DataPlan("text", workers=2), die, "v1")


def test_bad_rows_error_stops_at_the_first_also_from_the_cache(corpus: DataSource) -> None:
    for workers in (1, 2):
        with pytest.raises(RowError, match=r"a.jsonl:10:text: too long \(--bad_rows skip leaves"):
            load_rows(corpus, DataPlan("text", workers=workers), encode_text, "v1")
    load_rows(corpus, PLAN, encode_text, "v1")
    with pytest.raises(RowError, match=r"a.jsonl:10:text: too long"):
        load_rows(corpus, DataPlan("text"), encode_text, "v1")
    assert len(load_rows(corpus, DataPlan("text", max_rows=9), encode_text, "v1").dataset) == 10, (
        "the bad row lies behind the limit"
    )


def test_cache_is_used_and_follows_content_and_plan(corpus: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counting(example: Text) -> EncodedRows:
        calls["n"] += 1
        return encode_text(example)

    def prepare(plan: DataPlan = PLAN, fingerprint: str = "v1", source: DataSource = corpus) -> tuple[int, Any]:
        calls.clear()
        loaded = load_rows(source, plan, counting, fingerprint)
        return calls["n"], (list(loaded.dataset), loaded.ledger.to_json())

    cold, first = prepare()
    assert cold == 700
    assert prepare() == (0, first), "the second time nothing is encoded, rows and ledger are the same"
    assert prepare(DataPlan("text", bad_rows="skip", workers=2, seed=7)) == (0, first), (
        "neither processes nor the seed change rows"
    )
    assert prepare(DataPlan("text", bad_rows="skip", overwrite_cache=True)) == (700, first)
    assert prepare(fingerprint="v2")[0] == 700
    assert prepare(DataPlan("text", bad_rows="skip", max_rows=5))[0] > 0
    assert prepare(source=DataSource(corpus.file_dir, data_format="text"))[0] == 700
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "elsewhere"))
    assert prepare()[0] == 700
    assert prepare(DataPlan("text", bad_rows="skip", cache_dir=str(tmp_path / "named"))) == (700, first)
    write_texts(tmp_path / "a.jsonl", ["changed", *TEXTS[1:]])
    changed, rows = prepare()
    assert changed == 700
    assert text_of(rows[0][0]) == "changed"


def test_a_failed_preparation_leaves_nothing(corpus: DataSource, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def failing(example: Text) -> EncodedRows:
        raise ZeroDivisionError if "600" in example.text else RowError(example.source, "text", "no")

    with pytest.raises(ZeroDivisionError):
        load_rows(corpus, DataPlan("text", bad_rows="skip", cache_dir=str(cache)), failing, "v1")
    assert list((cache / "datasets").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the cache folder.*--cache_dir"):
        load_rows(corpus, DataPlan("text", cache_dir=str(tmp_path / "file")), encode_text, "v1")


def test_no_row_left(tmp_path: Path) -> None:
    source = DataSource(write_texts(tmp_path / "a.jsonl", ["long"] * 3))
    with pytest.raises(UserError, match=r"a.jsonl: no row can be used, of 3 read; first: .*a.jsonl:1:text: too long"):
        load_rows(source, PLAN, encode_text, "v1")
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(UserError, match=r"b.jsonl: no row can be used, of 0 read"):
        load_rows(DataSource(str(tmp_path / "b.jsonl")), PLAN, encode_text, "v1")


def test_mistakes_name_the_flag(tmp_path: Path) -> None:
    name = write_texts(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="--dataset_weights: 2 weights for 1 datasets"):
        load_rows(DataSource(name, weights=(1, 2)), PLAN, encode_text, "v1")
    with pytest.raises(UserError, match="either --train_file_dir or --dataset_name"):
        load_rows(DataSource(), PLAN, encode_text, "v1")
    with pytest.raises(UserError, match=r"--max_train_samples.* 0: expected"):
        load_rows(DataSource(name), DataPlan("text", max_rows=0), encode_text, "v1")
    with pytest.raises(UserError, match="--validation_split_percentage 100"):
        load_splits(DataSource(name), None, PLAN, encode_text, "v1", 100)
    assert parse_weights("0.7, .3") == (0.7, 0.3)
    assert parse_weights(None) == parse_weights("") == ()
    for wrong in ("a,b", "1,0", "1,-2", "nan"):
        with pytest.raises(UserError, match=f"--dataset_weights {wrong}"):
            parse_weights(wrong)


def test_local_dataset_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    folder = tmp_path / "jsonl"
    folder.mkdir()
    write_texts(folder / "train.jsonl", ["one", "two"])
    write_texts(folder / "validation.jsonl", ["three"])
    saved = tmp_path / "saved"
    parts = {"train": Dataset.from_dict({"text": ["one", "two"]}), "validation": Dataset.from_dict({"text": ["three"]})}
    DatasetDict(parts).save_to_disk(str(saved))
    for name in (str(folder), str(saved)):
        both = load_splits(DataSource(dataset_name=name), None, PLAN, encode_text, "v1")
        assert both.validation is not None
        assert [(row["source"], text_of(row)) for row in both.train.dataset] == [
            (f"{name}[train]:1", "one"),
            (f"{name}[train]:2", "two"),
        ]
        assert [text_of(row) for row in both.validation.dataset] == ["three"]
        with pytest.raises(UserError, match=r"--dataset_name .*split .?test"):
            load_rows(DataSource(dataset_name=name, dataset_split="test"), PLAN, encode_text, "v1")

    with pytest.raises(UserError, match=r"--dataset_name ./absent: no such folder"):
        load_rows(DataSource(dataset_name="./absent"), PLAN, encode_text, "v1")


def test_a_file_that_breaks_off_is_an_error_also_under_skip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text": "b"')
    for workers in (1, 2):
        with pytest.raises(RowError, match=r"a.json:2:column 13: broken JSON: .*nothing behind it can be read"):
            load_rows(DataSource(str(path)), DataPlan("text", bad_rows="skip", workers=workers), encode_text, "v1")


def test_iter_examples(corpus: DataSource) -> None:
    ledger = Ledger()
    examples = list(iter_examples(corpus, "text", "skip", 3, ledger))
    assert [example.source.split(":")[-1] for example in examples] == ["1", "2", "3"]
    assert ledger.total.trained == 3
    with pytest.raises(RowError, match="a chat is wanted"):
        next(iter_examples(corpus, "chat", "error", -1, Ledger()))


def test_a_raw_row_keeps_its_fault() -> None:
    outcome = work.RowWork("text", "auto", encode_text)(RawRow("f:1", "{", is_json=True))
    assert outcome == ("f:1", "column 2", "broken JSON: Expecting property name enclosed in double quotes")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_shared_chats() -> None:
    source = DataSource(str(SHARED / "sft"))
    loaded = load_rows(source, DataPlan("chat", bad_rows="skip", workers=2), encode_chat, "v1")
    assert loaded.ledger.total.rows_in == 1550
    assert [(drop.source.split("/")[-1], drop.field, drop.reason) for drop in loaded.ledger.drops] == [
        ("sharegpt_zh_600.jsonl:59", "conversations[2].value", "empty turn")
    ]
