"""Random rows of preference pairs, and models small enough to reason about, shared by the tests of the preference stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.model.logprobs import TokenLogprobs
from posttrain.types import PackedBatch


def random_pairs(
    n_pairs: int, seed: int = 0, *, vocab: int = 96, prompt: int = 12, answer: int = 9, reference: bool = True
) -> list[dict[str, Any]]:
    """What `EncodePair` gives, with random tokens: prompts and answers of 1 to `prompt` and `answer` tokens, a margin each."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(1, vocab, (length,), generator=generator).tolist()

    rows: list[dict[str, Any]] = []
    for index in range(n_pairs):
        row: dict[str, Any] = {"prompt_ids": tokens(prompt), "chosen_ids": tokens(answer), "rejected_ids": tokens(answer)}
        row |= {"margin": float(torch.rand(1, generator=generator)), "source": f"random:{index + 1}"}
        if reference:
            for name in ("chosen", "rejected"):
                row[f"reference_{name}"] = (-6 * torch.rand(len(row[f"{name}_ids"]), generator=generator)).tolist()
        rows.append(row)
    return rows


def contexts(batch: PackedBatch) -> list[list[tuple[tuple[int, ...], int]]]:
    """Of every sequence its (context, target) pairs, in order; a context is all that the model sees, as tokens, positions checked."""
    found: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(batch.n_sequences)]
    ids, positions = batch.input_ids_BT.flatten(), batch.position_ids_BT.flatten()
    longest = batch.input_ids_BT.shape[1]
    for at, target, sequence in zip(batch.predict_N.tolist(), batch.targets_N.tolist(), batch.sequence_N.tolist(), strict=True):
        if batch.segments is None:
            seen = list(range(at // longest * longest, at + 1))
            assert batch.attention_mask_BT is not None
            assert batch.attention_mask_BT.flatten()[seen].all(), "a context holds padding"
        else:
            table = batch.segments
            index = next(i for i, segment in enumerate(table.segments) if segment.start <= at < segment.end)
            runs = [(segment.start, segment.end) for segment in table.ancestors(index)]
            seen = [t for start, end in [*runs, (table.segments[index].start, at + 1)] for t in range(start, end)]
        assert positions[seen].tolist() == list(range(len(seen)))
        found[sequence].append((tuple(ids[seen].tolist()), target))
    return found


class Bigram(nn.Module):
    """A language model whose next token depends on the token before it alone: it cannot be misled by a collation."""

    def __init__(self, vocab: int = 96, seed: int = 0):
        super().__init__()
        self.table_VV = nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor, predict_N: Tensor, targets_N: Tensor, **_: Any) -> TokenLogprobs:
        logprobs_NV = self.table_VV[input_ids.flatten()[predict_N]].log_softmax(-1)
        return TokenLogprobs(logprobs_NV.gather(1, targets_N[:, None])[:, 0])
