"""The identity over seeded faults of every class: each is named at exactly its file:line:field, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from posttrain.data.formats import Kind
from posttrain.data.ledger import Drop, Ledger
from posttrain.data.load import DataPlan, DataSource, EncodedRows, load_rows
from posttrain.types import Example, RowError
from rows import openai, said, sharegpt

CALL = '{"name": "f", "arguments": {}}'

# (line of the file, field of the fault, start of its reason)
CHAT_FAULTS: list[tuple[str | bytes, str, str]] = [
    ('{"conversations": [', "column 20", "broken JSON"),
    (b'{"question": "\xc4\xe3", "answer": "x"}', "byte", "not UTF-8"),
    ("[1, 2]", "row", "expected an object"),
    (json.dumps({"foo": 1}), "row", "unknown format"),
    (json.dumps({"conversations": {"from": "human"}}), "conversations", "expected a list"),
    (json.dumps(sharegpt(("human", 1), ("gpt", "x"))), "conversations[0].value", "expected text"),
    (json.dumps({"conversations": [{"from": "human"}]}), "conversations[0].value", "missing"),
    (json.dumps({"instruction": "x"}), "output", "missing"),
    (json.dumps(sharegpt(("human", "x"), ("gpt", " "))), "conversations[1].value", "empty turn"),
    (json.dumps(sharegpt(("human", "x"), ("human", "y"), ("gpt", "z"))), "conversations[1]", "two user turns"),
    (json.dumps(sharegpt(("human", "x"))), "conversations", "no assistant turn"),
    (json.dumps(sharegpt(("gpt", "x"), ("human", "y"), ("gpt", "z"))), "conversations[0]", "starts with an assistant"),
    (json.dumps(sharegpt(("elf", "x"), ("gpt", "y"))), "conversations[0].from", "unknown role"),
    (json.dumps(sharegpt(("human", "x"), ("observation", "y"), ("gpt", "z"))), "conversations[1]", "tool result with no call"),
    (json.dumps(sharegpt(("human", "x"), ("function_call", "{"))), "conversations[1].value", "broken JSON"),
    (json.dumps(openai(said("user", "x"), said("assistant", "y", weight=0))), "messages", "every assistant turn has weight 0"),
    (json.dumps({"text": "a document"}), "text", "a row of format text"),
    (json.dumps({"question": "too long", "answer": "x"}), "messages", "prompt is too long"),
]
PAIR_FAULTS: list[tuple[str | bytes, str, str]] = [
    (json.dumps({"prompt": "x", "chosen": "y", "rejected": "y"}), "rejected", "chosen and rejected are equal"),
    (json.dumps({"prompt": "x", "chosen": "", "rejected": "y"}), "chosen", "empty answer"),
    (json.dumps({"prompt": "x", "chosen": "y", "rejected": " "}), "rejected", "empty answer"),
    (json.dumps({"prompt": "x", "chosen": "y"}), "rejected", "missing"),
    (json.dumps({"prompt": "x", "chosen": ["y"], "rejected": "z"}), "chosen[0]", "expected a turn"),
]
TEXT_FAULTS: list[tuple[str | bytes, str, str]] = [
    (json.dumps({"text": "\n"}), "text", "empty document"),
    (json.dumps({"text": ["x"]}), "text", "expected text"),
    (json.dumps({"text": "x"})[:-2], "column 10", "broken JSON"),
    (json.dumps({"question": "x", "answer": "y"}), "question", "a row of format qa"),
]
GOOD = {
    "chat": [
        {"question": "x", "answer": "y"},
        sharegpt(("human", "x"), ("function_call", CALL), ("observation", "y"), ("gpt", "z")),
    ],
    "pair": [{"prompt": "x", "chosen": "y", "rejected": "z"}],
    "text": [{"text": "x"}],
}


def encode(example: Example) -> EncodedRows:
    if "too long" in str(example):
        raise RowError(example.source, "messages", "prompt is too long: 3 tokens of 2")
    return EncodedRows([{"input_ids": [1, 2]}], truncated_tokens=3)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("kind", "faults"), [("chat", CHAT_FAULTS), ("pair", PAIR_FAULTS), ("text", TEXT_FAULTS)])
def test_identity_over_seeded_faults(
    tmp_path: Path, kind: Kind, faults: list[tuple[str | bytes, str, str]], workers: int
) -> None:
    random = Random(7)
    planted = faults * 5
    rows: list[tuple[str | bytes, str, str] | None] = [*planted, *[None] * 900]
    random.shuffle(rows)
    path = tmp_path / "rows.jsonl"
    wanted, good, line = [], [], 0
    with path.open("wb") as stream:
        for row in rows:
            if random.random() < 0.1:  # blank lines are no rows, but they are lines
                stream.write(b" \n")
                line += 1
            line += 1
            if row is None:
                good.append(f"{path}:{line}")
                content: str | bytes = json.dumps(random.choice(GOOD[kind]))
            else:
                content, field, reason = row
                wanted.append((f"{path}:{line}", f"byte {stream.tell() + 14}" if field == "byte" else field, reason))
            stream.write((content.encode() if isinstance(content, str) else content) + b"\n")
    plan = DataPlan(kind, bad_rows="skip", workers=workers)
    loaded = load_rows(DataSource(str(path)), plan, encode, "v1")
    ledger = loaded.ledger
    ledger.assert_identity()
    assert [(drop.source, drop.field) for drop in ledger.drops] == [(source, field) for source, field, _ in wanted]
    assert all(drop.reason.startswith(reason) for drop, (_, _, reason) in zip(ledger.drops, wanted, strict=True))
    assert [row["source"] for row in loaded.dataset] == good
    assert (ledger.total.rows_in, ledger.total.trained, ledger.total.dropped) == (len(rows), len(good), len(planted))
    assert ledger.truncations == [(source, 3) for source in good]
    assert sum(rows for _, rows in ledger.reasons()) == len(planted)


def small() -> Ledger:
    ledger = Ledger()
    ledger.took("a", "a:1", encoded_rows=2, truncated_tokens=7)
    for n in (2, 3, 4):
        ledger.drop("a", Drop(f"a:{n}", "text", "empty document"))
    ledger.drop("b", Drop("b:1", "text", "too long"))
    ledger.left("b", 5)
    ledger.note("b: 1 file holds no data")
    return ledger


def test_written_and_read_again(tmp_path: Path) -> None:
    ledger = small()
    ledger.write(tmp_path / "ledger.json")
    data = json.loads((tmp_path / "ledger.json").read_text())
    assert data["rows_in"] == data["trained"] + data["held_out"] + data["dropped"] + data["not_taken"] == 10
    assert data["identity"] == "rows_in = trained + held_out + dropped + not_taken"
    assert data["reasons"] == {"empty document": 3, "too long": 1}
    assert data["drops"][3] == {"source": "b:1", "field": "text", "reason": "too long"}
    assert (data["truncated_rows"], data["truncated_tokens"], data["encoded_rows"]) == (1, 7, 2)
    assert Ledger.from_json(data) == ledger


def test_summary() -> None:
    assert small().summary(listed_rows=2) == "\n".join(
        [
            "rows: 10 in = 1 trained + 4 dropped + 5 not taken",
            "  a: 4 in = 1 trained + 3 dropped",
            "  b: 6 in = 0 trained + 1 dropped + 5 not taken",
            "  dropped 3: empty document",
            "    a:2:text, a:3:text, and 1 more",
            "  dropped 1: too long",
            "    b:1:text",
            "  truncated 1 rows, 7 tokens cut; most: 7 at a:1",
            "  b: 1 file holds no data",
        ]
    )


def test_parts_merge() -> None:
    merged, once = Ledger(), small()
    merged.merge(once)
    merged.merge(small())
    merged.assert_identity()
    assert merged.total.rows_in == 20
    assert merged.drops == once.drops * 2
    assert merged.notes == once.notes
    assert once == small(), "the part is left as it was"


def test_a_lost_row_is_noticed() -> None:
    def break_counts(change: Any) -> None:
        ledger = small()
        change(ledger)
        with pytest.raises(AssertionError, match="row ledger"):
            ledger.assert_identity()

    break_counts(lambda ledger: setattr(ledger.datasets["a"], "rows_in", 5))
    break_counts(lambda ledger: ledger.drops.pop())
    break_counts(lambda ledger: ledger.move("a", 2, "held_out"))


def test_the_error_of_a_drop_says_how_to_go_on() -> None:
    error = Drop("a.jsonl:3", "text", "empty document").error()
    assert str(error) == "a.jsonl:3:text: empty document (--bad_rows skip leaves such rows out and counts them)"
