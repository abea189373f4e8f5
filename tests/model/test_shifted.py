"""S²-Attn against the paper's own recipe (roll, group, attend, roll back), written here from it; and where it must not act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor

from conftest import tiny_llama
from posttrain.model.attention import enable_segments
from posttrain.model.kernels import segment_attention
from posttrain.model.shifted import group_segments, install_shift, shift_segments
from posttrain.types import Segment, SegmentTable

GROUP = 8


def paper(query: Tensor, key: Tensor, value: Tensor, group: int) -> Tensor:
    """One row, (H, T, D) each with as many key heads, T a multiple of the group; gives (T, H, D).

    Algorithm 1 of the paper: the second half of the heads is rolled by −G/2, all attend within groups of G, and that half is rolled
    back. In the last rolled group, which holds the row's end and then its beginning, the two do not see each other.
    """
    n_heads, n_tokens, width = query.shape
    half = n_heads // 2

    def rolled(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:half], x[half:].roll(by, 1)])

    q, k, v = (rolled(x, -group // 2).reshape(n_heads, n_tokens // group, group, width) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) / width**0.5
    visible = torch.ones(group, group, dtype=torch.bool).tril().expand(n_heads, n_tokens // group, group, group).clone()
    visible[half:, -1, group // 2 :, : group // 2] = False
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return rolled((weights @ v).reshape(n_heads, n_tokens, width), group // 2).transpose(0, 1)


def chain(*lengths: int) -> SegmentTable:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return SegmentTable(tuple(Segment(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)))


def tensors(n_heads: int, n_groups: int, n_tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, n_tokens, 4) for n in (n_heads, n_groups, n_groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("n_heads", "n_groups"), [(4, 4), (4, 2), (4, 1), (9, 3)])
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["blocks", "each"])  # dropout takes the path of one call per segment
def test_each_example_is_what_the_paper_computes(n_heads: int, n_groups: int, dropout: float) -> None:
    lengths = (32, 16, 48)
    query, key, value = tensors(n_heads, n_groups, sum(lengths))
    got, _ = segment_attention(
        torch.nn.Module(), query, key, value, None, segments=shift_segments(chain(*lengths), GROUP), dropout=dropout
    )
    keys = [x.repeat_interleave(n_heads // n_groups, 1) for x in (key, value)]
    parts = zip(*(x[0].split(lengths, 1) for x in (query, *keys)), strict=True)
    expected = torch.cat([paper(*part, GROUP) for part in parts])[None]
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (got, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_short_examples_are_left_whole() -> None:
    table = chain(3, GROUP, 5)
    assert group_segments(table, GROUP, 0) == group_segments(table, GROUP, GROUP // 2) == table


def test_an_example_that_fills_no_whole_number_of_groups() -> None:
    pieces = [(s.start, s.end, s.parent) for s in group_segments(chain(19, 2), GROUP, 0).segments]
    assert pieces == [(0, 8, None), (8, 16, None), (16, 19, None), (19, 21, None)]
    pieces = [(s.start, s.end, s.parent) for s in group_segments(chain(19, 2), GROUP, GROUP // 2).segments]
    assert pieces == [(0, 4, None), (4, 12, None), (12, 19, None), (19, 21, None)]


@pytest.mark.parametrize("offset", [0, GROUP // 2])
def test_two_answers_to_a_prompt_are_grouped_as_if_each_had_its_own(offset: int) -> None:
    """The prompt of 13 tokens and each answer, packed with the prompt shared and apart: every token sees the same tokens."""
    shared = SegmentTable((Segment(0, 13), Segment(13, 22, 0), Segment(22, 25, 0), Segment(25, 28)))
    origins = [*range(13), *range(13, 22)], [*range(13), *range(22, 25)], [*range(25, 28)]
    grouped = group_segments(shared, GROUP, offset)
    for tokens in origins:
        alone = seen(group_segments(chain(len(tokens)), GROUP, offset)) if len(tokens) != 3 else seen(chain(3))
        packed = seen(grouped)
        for place, token in enumerate(tokens):
            assert packed[token] == {tokens[other] for other in alone[place]}


def seen(table: SegmentTable) -> dict[int, set[int]]:
    """token → tokens that it sees."""
    found = {}
    for index, segment in enumerate(table.segments):
        above = {token for ancestor in table.ancestors(index) for token in range(ancestor.start, ancestor.end)}
        found |= {token: above | set(range(segment.start, token + 1)) for token in range(segment.start, segment.end)}
    return found


def packed_row(*lengths: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 90, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "segments": chain(*lengths), "use_cache": False}


def shifted_model(**changes: Any) -> Any:
    model = tiny_llama(**changes)
    assert install_shift(model, GROUP, enable_segments(model)) == ""
    return model


def test_training_only() -> None:
    row, plain = packed_row(40, 30), tiny_llama()
    enable_segments(plain)
    model = shifted_model()
    whole = plain.eval()(**row).logits
    torch.testing.assert_close(model.eval()(**row).logits, whole)
    trained = model.train()(**row).logits
    assert (trained - whole).abs().max() > 1e-3
    torch.testing.assert_close(trained[:, : GROUP // 2], whole[:, : GROUP // 2])  # nothing is cut there
    padded = {"input_ids": row["input_ids"][:, :40], "use_cache": False}
    torch.testing.assert_close(model.eval()(**padded).logits, plain(**padded).logits)


def test_an_example_does_not_depend_on_its_neighbours() -> None:
    model = shifted_model().train()
    row, other = packed_row(40, 30), packed_row(40, 30)
    other["input_ids"][:, :40] = 7
    torch.testing.assert_close(model(**row).logits[:, 40:], model(**other).logits[:, 40:])


def test_the_beginning_does_not_see_the_end() -> None:
    model = shifted_model().train()
    row, other = packed_row(40), packed_row(40)
    other["input_ids"][:, 30:] = 7
    torch.testing.assert_close(model(**row).logits[:, :30], model(**other).logits[:, :30])


def test_gradient_checkpointing_computes_the_same_again() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = shifted_model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**packed_row(40, 30)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_model_that_cannot_says_why() -> None:
    model = tiny("gemma2")
    reason = install_shift(model, GROUP, enable_segments(model))
    assert "Gemma2" in reason
    assert "softcap" in reason
