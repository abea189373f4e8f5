"""The model of a grown vocabulary: rows for new pieces, and what it makes of held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from posttrain.types import UserError


def grow_rows(model: PreTrainedModel, first_id: int, parts: Sequence[tuple[int, ...]]) -> int:
    """Give each new piece a row: the mean of its old pieces' rows, in the embedding and in the output head (and its bias).

    first_id   id of the first new piece; ids before it keep their rows
    parts      the old ids that each new piece stands for, in the order of the new ids

    Returns by how many rows the embedding grew: fewer than pieces where the base has unused rows behind its last id, as models
    padded for speed do.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    if first_id > old_rows:
        raise UserError(
            f"the tokenizer has {first_id} ids but the model's embedding {old_rows} rows: they do not belong together"
        )
    needed = first_id + len(parts)
    if needed > old_rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight, *([head.weight, getattr(head, "bias", None)] if head is not None else [])]
    for table in {id(table): table for table in tables if table is not None}.values():
        _fill(table, first_id, parts)
    return max(0, needed - old_rows)


def _fill(table: Tensor, first_id: int, parts: Sequence[tuple[int, ...]]) -> None:
    """Rows from `first_id` on become means of old rows, computed in float32; a tied table is filled once."""
    with torch.no_grad():
        old = table[:first_id].float()
        for new_id, ids in enumerate(parts, first_id):
            table[new_id] = old[list(ids)].mean(0).to(table.dtype)


@torch.no_grad()
def total_nats(model: nn.Module, rows: Sequence[list[int]], start_id: int) -> float:
    """The sum of -log p over all ids of all rows, in nats; each row is predicted from `start_id` on, so that no id is free."""
    was_training = model.training
    model.eval()
    total = 0.0
    for ids in rows:
        if ids:
            inputs = torch.tensor([[start_id, *ids[:-1]]])
            logits = model(input_ids=inputs, use_cache=False).logits[0]
            total += float(cross_entropy(logits.float(), torch.tensor(ids), reduction="sum"))
    model.train(was_training)
    return total
