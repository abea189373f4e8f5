"""`posttrain show` of preference pairs: what a pair looks like, as text and as JSON, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.commands.show import REJECTED, TRAINED

PAIRS: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "what is 1?"}], "chosen": "the fox rests", "rejected": "a dog", "margin": 0.5},
    {
        "conversations": [{"from": "human", "value": "what is 2?"}],
        "chosen": "the fox",
        "rejected": "a dog in the shade of a tree",
    },
    {"conversations": [{"from": "human", "value": "what is 3?"}], "chosen": "the fox", "rejected": "the fox "},
]


@pytest.fixture
def words(model_folder: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return ["show", "--model_name_or_path", str(model_folder), "--train_file_dir", str(file), "--bad_rows", "skip"]


def shown(words: list[str], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main([*words, *more]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_pair_as_text(stage: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(words, capsys, "--stage", stage)
    prompt = "<|im_start|>user\nwhat is 1?<|im_end|>\n<|im_start|>assistant\n"
    assert f"tokens, margin 0.5\n{prompt}\n── chosen\n«the fox rests<|im_end|>»\n── rejected\n«a dog<|im_end|>»\n" in out
    assert "lengths of 2 pairs, prompt + answer (two a pair), in tokens" in out
    assert "rejected answer longer in 1 pairs, as long in 0, shorter in 1" in out
    assert "rows: 3 in = 2 trained + 1 dropped" in out
    assert "pairs.jsonl:3:rejected" in out


def test_answers_have_their_colours(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = shown(words, capsys, "--stage", "rm", "--rows", "1")
    assert f"{TRAINED}the fox rests<|im_end|>" in out
    assert f"{REJECTED}a dog<|im_end|>" in out


def test_counts_are_those_of_the_rows(words: list[str], capsys: pytest.CaptureFixture[str], tokenizer: Any) -> None:
    out = shown(words, capsys, "--stage", "dpo", "--output_format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2
    names = {"prompt", "chosen", "rejected"}
    assert all(row.keys() == {"source", "margin", *names, *(f"{name}_ids" for name in names)} for row in rows)
    assert [row["margin"] for row in rows] == [0.5, 0]
    for row in rows:
        for name in names:
            assert tokenizer.decode(row[f"{name}_ids"]) == row[name]
    tokens = {name: sum(len(row[f"{name}_ids"]) for row in rows) for name in names}
    text = shown(words, capsys, "--stage", "dpo")
    total = f"{sum(tokens.values())} tokens: {tokens['prompt']} prompt, {tokens['chosen']} chosen, {tokens['rejected']} rejected"
    assert total in text
    longest = max(len(row["prompt_ids"]) + len(row[f"{name}_ids"]) for row in rows for name in ("chosen", "rejected"))
    assert f"longest: {longest}\nprompts" in text
    assert sum(int(line.split()[-1]) for line in text.splitlines() if "–" in line) == 4  # two answers a pair


def test_answers_that_are_cut(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model reads its score at the stop token, so a cut answer keeps it; a policy must not learn to stop there."""
    cut = ("--output_format", "jsonl", "--max_target_length", "3", "--rows", "1")
    (reward,), (policy,) = (
        [json.loads(line) for line in shown(words, capsys, "--stage", stage, *cut).splitlines()] for stage in ("rm", "dpo")
    )
    assert len(reward["chosen_ids"]) == len(policy["chosen_ids"]) == 3
    assert reward["chosen"].endswith("<|im_end|>")
    assert "<|im_end|>" not in policy["chosen"]
    assert "truncated" in shown(words, capsys, "--stage", "rm", "--max_target_length", "3")


def test_no_pairs(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[2]) + "\n")
    assert shown(words, capsys, "--stage", "rm").startswith("no rows\nrows: 1 in = 0 trained + 1 dropped")
