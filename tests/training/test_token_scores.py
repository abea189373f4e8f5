"""A reward model on the policy's tokens: the score of each sequence alone, however they are batched; and the bias of its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama
from posttrain.model.attention import enable_segments, find_decoder
from posttrain.model.reward import install_scores, load_reward_model, score_head
from posttrain.training.token_scores import Scorer, ScoreStatistics, chosen_statistics, read_bias, write_bias
from posttrain.types import PackedBatch, UserError

Sequences = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal model whose attention matters."""
    return save(tmp_path_factory.mktemp("model"))


def save(folder: Path, **changes: Any) -> str:
    model = tiny_llama(vocab=96, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


def scorer(folder: str, packed: bool, batch_rows: int = 4, batch_tokens: int = 0) -> Scorer:
    torch.manual_seed(3)
    model = load_reward_model(folder, "float32")
    assert not packed or enable_segments(model).packed
    install_scores(model)
    return Scorer(model, packed, batch_rows, batch_tokens)


def sequences() -> Sequences:
    """Three prompts with one to three answers, not side by side."""
    generator = torch.Generator().manual_seed(5)

    def some(n_tokens: int) -> list[int]:
        return torch.randint(1, 96, (n_tokens,), generator=generator).tolist()

    prompts = [some(9), some(4), some(13)]
    return [(prompts[p], some(n)) for p, n in ((0, 5), (1, 7), (0, 3), (2, 1), (1, 12), (0, 6))]


def apart(model: Any, rows: Sequences) -> Tensor:
    """By the definition: the head on the decoder's last hidden state at the last token of each sequence alone."""
    with torch.no_grad():
        hidden = [find_decoder(model)(input_ids=torch.tensor([p + a])).last_hidden_state[0, -1] for p, a in rows]
        return torch.stack(hidden) @ score_head(model).weight[0]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("batch_rows", "batch_tokens"), [(1, 0), (4, 0), (100, 30), (100, 0)])
def test_scores_are_those_of_each_sequence_alone(folder: str, packed: bool, batch_rows: int, batch_tokens: int) -> None:
    scores = scorer(folder, packed, batch_rows, batch_tokens)
    expected = apart(scorer(folder, False).model.eval(), sequences())
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.tensor(scores(sequences())), expected, rtol=1e-5, atol=1e-5)


def test_only_the_last_token_is_scored(folder: str) -> None:
    asked: list[tuple[int, ...]] = []
    scores = scorer(folder, True)
    forward = scores.model.forward

    def watching(**inputs: Any) -> Any:
        asked.append(tuple(inputs["input_ids"][0, inputs["score_at_S"]].tolist()))
        return forward(**inputs)

    scores.model.forward = watching
    scores(sequences())
    assert sorted(token for batch in asked for token in batch) == sorted(answer[-1] for _, answer in sequences())


@pytest.mark.parametrize("packed", [True, False])
def test_batches_keep_to_their_limits_and_prompts_are_shared(folder: str, packed: bool) -> None:
    batches: list[PackedBatch] = []

    def record(batch: PackedBatch) -> Tensor:
        batches.append(batch)
        return batch.input_ids_BT.flatten()[batch.last_S()].float()

    model = scorer(folder, packed).model
    rows = sequences()
    assert Scorer(model, packed, 100, 0, record)(rows) == [float(answer[-1]) for _, answer in rows]
    (whole,) = batches
    once = sum(len(answer) for _, answer in rows) + 9 + 4 + 13
    twice = sum(len(prompt) + len(answer) for prompt, answer in rows)
    assert whole.n_tokens == (once if packed else twice)
    batches.clear()
    assert Scorer(model, packed, 2, 0, record)(rows) == [float(answer[-1]) for _, answer in rows]
    assert [batch.n_sequences for batch in batches] == [2, 2, 2]
    batches.clear()
    assert Scorer(model, packed, 100, 20, record)(rows) == [float(answer[-1]) for _, answer in rows]
    assert all(batch.input_ids_BT.numel() <= 20 for batch in batches)
    # Packed: 9 + 5 + 3, 9 + 6, 4 + 7, 4 + 12, 13 + 1. Padded: no two sequences fit.
    assert len(batches) == (5 if packed else 6)
    batches.clear()
    Scorer(model, packed, 100, 1, record)(rows)
    assert [batch.n_sequences for batch in batches] == [1] * 6
    assert Scorer(model, packed, 2, 0, record)([]) == []


def test_no_dropout_no_gradient_and_the_model_goes_on_as_it_was(tmp_path: Path) -> None:
    scores = scorer(save(tmp_path, attention_dropout=0.5), False)
    expected = scores(sequences())
    scores.model.train()
    state = torch.random.get_rng_state()
    assert scores(sequences()) == expected
    assert scores.model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "score_at_S": torch.tensor([2])}
    assert scores.model(**inputs).scores_S.requires_grad


# ---------------------------------------------------------------- the bias


def pair_rows(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(8)
    return [
        {
            "prompt_ids": torch.randint(1, 96, (6,), generator=generator).tolist(),
            "chosen_ids": torch.randint(1, 96, (1 + i % 7,), generator=generator).tolist(),
            "rejected_ids": [1],
            "source": f"pairs.jsonl:{i + 1}",
        }
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("n_rows", "taken"), [(5, [0, 1, 2, 3, 4]), (8, [0, 1, 2, 3, 4, 5, 6, 7]), (16, range(0, 16, 2)), (20, None)]
)
def test_statistics_are_those_of_evenly_spaced_chosen_answers(folder: str, n_rows: int, taken: Any) -> None:
    rows = pair_rows(n_rows)
    taken = [0, 2, 5, 7, 10, 12, 15, 17] if taken is None else taken
    model = scorer(folder, False).model.eval()
    expected = apart(model, [(rows[i]["prompt_ids"], rows[i]["chosen_ids"]) for i in taken])
    found = chosen_statistics(scorer(folder, True), rows, max_rows=8)
    assert found.rows == len(taken)
    assert found.mean == pytest.approx(float(expected.mean()), abs=1e-5)
    assert found.std == pytest.approx(float(expected.std()), abs=1e-5)


def test_one_row_has_no_deviation(folder: str) -> None:
    assert chosen_statistics(scorer(folder, True), pair_rows(1)).std == 0


def test_the_bias_is_written_and_read(tmp_path: Path) -> None:
    assert read_bias(tmp_path) == 0
    write_bias(tmp_path, ScoreStatistics(1.25, 0.5, 7))
    content = json.loads((tmp_path / "reward.json").read_text())
    assert content == {"bias": -1.25, "std": 0.5, "rows": 7, "of": "chosen answers of the training pairs"}
    assert read_bias(str(tmp_path)) == -1.25


@pytest.mark.parametrize("content", ["{}", "[]", '{"bias": null}', '{"bias": "x"}', '{"bias": NaN}', "{", '{"bias": Infinity}'])
def test_a_broken_bias_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "reward.json").write_text(content)
    with pytest.raises(UserError, match=r"reward\.json:bias: "):
        read_bias(tmp_path)


def test_scores_that_are_no_numbers_are_not_written_down(folder: str) -> None:
    scores = scorer(folder, True)
    with torch.no_grad():
        score_head(scores.model).weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: the reward model scores its chosen answer nan"):
        chosen_statistics(scores, pair_rows(3))
