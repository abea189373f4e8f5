"""Rows of new pieces are means of old rows, tied or not; the loss is that of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from posttrain.model.vocabulary import grow_rows, total_nats
from posttrain.types import UserError

PARTS = [(5, 9), (5, 9, 30), (7,)]


def mean(table: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    return sum((table[i] for i in ids), torch.zeros_like(table[0])) / len(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_and_old_rows_stay(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    old = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    assert torch.equal(*old) is tied
    assert grow_rows(model, 400, PARTS) == 3
    now = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (now[0] is now[1]) is tied
    assert model.config.vocab_size == 403
    for before, after in zip(old, now, strict=True):
        assert torch.equal(after[:400], before)
        for new_id, ids in enumerate(PARTS, 400):
            torch.testing.assert_close(after[new_id], mean(before, ids))


def test_unused_rows_behind_the_last_id_are_taken_first() -> None:
    model = tiny_llama(vocab=402)
    assert grow_rows(model, 400, PARTS[:2]) == 0
    assert model.get_input_embeddings().weight.shape[0] == 402
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[401], mean(table, PARTS[1]))
    assert grow_rows(model, 401, PARTS) == 2


def test_a_bias_of_the_head_grows_too() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    head = nn.Linear(32, 400)
    bias = head.bias.detach().clone()
    model.set_output_embeddings(head)
    grow_rows(model, 400, PARTS)
    grown = model.get_output_embeddings().bias
    assert grown.shape == (403,)
    torch.testing.assert_close(grown[401], mean(bias, PARTS[1]))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="do not belong together"):
        grow_rows(tiny_llama(), 401, PARTS)


def test_total_nats_is_the_sum_over_every_id() -> None:
    model = tiny_llama().train()
    rows = [[5, 6, 7], [9]]
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            logprobs = model(input_ids=torch.tensor([[2, *row]])).logits[0].double().log_softmax(-1)
            expected -= sum(float(logprobs[i, target]) for i, target in enumerate(row))
    assert total_nats(model, [*rows, []], 2) == pytest.approx(expected, rel=1e-5)
    assert model.training
