"""Scores of a file: those of each answer alone at its stop token, whatever the batch, in order, with adapter or merged; refusals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters import save_adapter, save_base, stir
from posttrain import flags
from posttrain.cli import main
from posttrain.commands.score import load_rater, read_rated, score, summary
from posttrain.data.formats import parse
from posttrain.model import attention
from posttrain.model.adapter import Lora, attach_lora, load_adapter
from posttrain.model.reward import install_scores, load_reward_model

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "rests"}]},
    {"question": "who rests?", "response_chosen": "the lazy dog", "response_rejected": "a tree in the shade"},
    {"instruction": "name a fox", "output": "the quick brown fox jumps over the lazy dog and rests"},
    {
        "conversations": [
            {"from": "human", "value": "a"}, {"from": "gpt", "value": "dog?"},
            {"from": "human", "value": "the lazy dog rests in the shade of a tree"}, {"from": "gpt", "value": "yes"},
        ]
    },
    {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "over the tree"}],
        "chosen": {"role": "assistant", "content": "jumps"},
        "rejected": {"role": "assistant", "content": "rests in the shade of a tree in the shade of a tree"},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: str, tokenizer: Any) -> str:
    folder = tmp_path_factory.mktemp("reward-adapter")
    torch.manual_seed(1)
    adapted = attach_lora(load_reward_model(base, "float32"), Lora())
    stir(adapted)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def save_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rate(base: str, adapter: str | None, tmp_path: Path, rows: list[Any], batch_size: int = 8) -> list[dict[str, Any]]:
    rater = load_rater(flags.InferenceFlags(base_model=base, lora_model=adapter, dtype="float32"))
    score(rater, read_rated(str(save_rows(tmp_path / "rows.jsonl", rows))), str(tmp_path / "out.jsonl"), batch_size)
    return written(tmp_path / "out.jsonl")


def numbers(row: dict[str, Any]) -> list[float]:
    return [row["score"]] if "score" in row else [row["score_chosen"], row["score_rejected"]]


def by_hand(base: str, adapter: str, tokenizer: Any, chats: list[list[dict[str, Any]]]) -> list[float]:
    """The model on each rendered chat alone, cut behind its last stop token, read there."""
    model = load_adapter(load_reward_model(base, "float32"), adapter, trainable=False).eval()
    install_scores(model)
    scores = []
    for chat in chats:
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n"), return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            scores.append(model(input_ids=ids, score_at_S=torch.tensor([ids.shape[1] - 1])).scores_S.item())
    return scores


def turns(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The whole dialogues of a written row."""
    return [row["messages"]] if "score" in row else [[*row["messages"], row[name]] for name in ("chosen", "rejected")]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_those_of_each_answer_alone(
    base: str, adapter: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, packed: bool
) -> None:
    if not packed:
        monkeypatch.setattr(attention, "_unsupported", lambda core, decoder: "not today")
    out = rate(base, adapter, tmp_path, ROWS, batch_size)
    assert [row["source"] for row in out] == [f"{tmp_path}/rows.jsonl:{i + 1}" for i in range(len(ROWS))]
    assert [len(numbers(row)) for row in out] == [1, 2, 1, 1, 2]
    got = [value for row in out for value in numbers(row)]
    expected = by_hand(base, adapter, tokenizer, [chat for row in out for chat in turns(row)])
    assert got == pytest.approx(expected, abs=1e-5)
    assert statistics.pstdev(got) > 0.05
    for row in out:
        if "score_margin" in row:
            assert row["score_margin"] == row["score_chosen"] - row["score_rejected"]


def test_scores_do_not_depend_on_the_batch(base: str, adapter: str, tmp_path: Path) -> None:
    rows = [{"question": "a fox " * (i % 7), "answer": "rests " * (1 + i % 5)} for i in range(1, 40) if i % 7]
    one, three, all_ = ([row["score"] for row in rate(base, adapter, tmp_path, rows, size)] for size in (1, 3, 64))
    assert three == pytest.approx(one, abs=1e-5)
    assert all_ == pytest.approx(one, abs=1e-5)


def test_merged_model_and_plain_transformers_give_the_same(base: str, adapter: str, tmp_path: Path, tokenizer: Any) -> None:
    merged = str(tmp_path / "merged")
    assert main(["merge", "--base_model", base, "--lora_model", adapter, "--output_dir", merged]) == 0
    (tmp_path / "a").mkdir()
    with_adapter, of_merged = rate(base, adapter, tmp_path / "a", ROWS), rate(merged, None, tmp_path, ROWS)
    for one, other in zip(with_adapter, of_merged, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
    plain, saved = AutoModelForSequenceClassification.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    for row in of_merged:
        for chat, value in zip(turns(row), numbers(row), strict=True):
            text = saved.apply_chat_template(chat, tokenize=False).rstrip("\n")
            with torch.no_grad():
                assert plain(**saved(text, return_tensors="pt")).logits.item() == pytest.approx(value, abs=1e-5)


def test_the_command_writes_and_sums_up(base: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = save_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "deep" / "scores.jsonl"
    argv = ["score", "--base_model", base, "--lora_model", adapter, "--data_file", str(data), "--output_file", str(out)]
    assert main([*argv, "--dtype", "float32"]) == 0
    rows = written(out)
    every = [value for row in rows for value in numbers(row)]
    margins = [row["score_margin"] for row in rows if "score_margin" in row]
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"5 rows, mean score {statistics.fmean(every):.4f}, standard deviation {statistics.pstdev(every):.4f}; 2 pairs,"
        f" accuracy {50 * sum(m > 0 for m in margins):.1f} %, mean margin {statistics.fmean(margins):.4f}: {out}"
    )
    # A line can be read again, as what it is.
    assert parse(rows[1], "again:1", "pair").chosen.content == "the lazy dog"  # type: ignore[union-attr]
    assert parse(rows[0], "again:1", "chat").messages[-1].content == "rests"  # type: ignore[union-attr]


def test_the_summary() -> None:
    assert summary([(1.0,), (3.0,)]) == "2 rows, mean score 2.0000, standard deviation 1.0000"
    line = summary([(1.0, 0.0), (1.0, 1.0), (0.0, 5.0), (2.0,)])  # a tie is no right order
    assert line.endswith("; 3 pairs, accuracy 33.3 %, mean margin -1.3333")


def test_the_answer_is_rated_whatever_its_weight(base: str, adapter: str, tmp_path: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "fox"}]}
    weighted = {"messages": [plain["messages"][0], {**plain["messages"][1], "weight": 0}]}
    one, other = rate(base, adapter, tmp_path, [plain, weighted])
    assert one["score"] == pytest.approx(other["score"], abs=1e-6)  # at other places of one packed row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, r"rows\.jsonl:2:messages\[0\]: the last turn is not the assistant's"),
        (
            {"conversations": [{"from": s, "value": "x"} for s in ("human", "gpt", "human")]},
            r"rows\.jsonl:2:conversations\[2\]: the last turn is not the assistant's: there is no answer to rate",
        ),
        ({"question": "a dog?"}, r"rows\.jsonl:2:answer: missing: the answer"),
        ({"text": "a document"}, r"rows\.jsonl:2:text: a row of format text where a chat with its answer or a preference pair"),
        ({"question": "a?", "answer": "fox " * 600}, r"rows\.jsonl:2:messages: \d+ tokens, and the model's context holds 512"),
        ({"question": "a?", "answer": "<|im_end|>"}, r"rows\.jsonl:2:messages\[1\]: holds the stop token"),
    ],
)
def test_rows_that_cannot_be_rated(
    base: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], message: str
) -> None:
    data = save_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    check = refused(["--base_model", base, "--lora_model", adapter], data, tmp_path, capsys)
    check(message)
    assert not (tmp_path / "out.jsonl").exists()


def refused(argv: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Run the command; what is given back checks its one line."""
    import re

    code = main(["score", *argv, "--data_file", str(data), "--output_file", str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().err.splitlines()[-1]

    def check(message: str) -> None:
        assert code == 2
        assert re.search(message, said), said

    return check


def test_models_without_a_score_head(
    base: str, adapter: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_rows(tmp_path / "rows.jsonl", ROWS)
    refused(["--base_model", base], data, tmp_path, capsys)(
        "--base_model .*: has no score head; name a reward model, or the adapter"
    )
    causal = save_adapter(base, tmp_path / "causal")
    refused(["--base_model", base, "--lora_model", causal], data, tmp_path, capsys)("--lora_model .*causal: has no score head")
    other = save_base(tmp_path / "other", tokenizer, seed=5)
    refused(["--base_model", other, "--lora_model", adapter], data, tmp_path, capsys)("was trained on another base")
    refused(["--base_model", adapter], data, tmp_path, capsys)("holds an adapter, not a model")
    refused(["--base_model", base, "--lora_model", adapter, "--batch_size", "0"], data, tmp_path, capsys)("--batch_size 0: must")
    (tmp_path / "empty.jsonl").write_text("")
    refused(["--base_model", base, "--lora_model", adapter], tmp_path / "empty.jsonl", tmp_path, capsys)("--data_file")
