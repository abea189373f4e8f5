"""From tokenized examples to micro-batches: rows of segments without padding, or padded rows for models that need them.

A row, here, is what `tokenize.py` makes of an example: {"input_ids", "trained" (0/1 per id), "source"}.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.types import PackedBatch, Segment, SegmentTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = Mapping[str, Any]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices so that each group's lengths sum to at most `capacity`: best-fit decreasing, deterministic.

    Longest first, each into the fullest group that still has room. Uses at most 11/9 of the optimal number of groups
    (Johnson 1973). O(n log n): a bitmask of free spaces answers "smallest space >= length" in one shift.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a length of {max(lengths)} tokens does not fit into {capacity}")
    groups: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> groups with exactly that space
    spaces = 0  # bit s is set when a group has s free tokens
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            group = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
            groups[group].append(index)
        else:
            space, group = capacity, len(groups)
            groups.append([index])
        with_space[space - length].append(group)
        spaces |= 1 << (space - length)
    return groups


def collate(rows: Sequence[Row]) -> PackedBatch:
    """One row (1, T) of root segments, T = the sum of the rows' lengths. The first token of a segment is never a target."""
    ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
    ends = np.cumsum([len(i) for i in ids])
    starts = ends - [len(i) for i in ids]
    ids_T = np.concatenate(ids)
    trained_T = np.concatenate([np.asarray(row["trained"], dtype=bool) for row in rows])
    trained_T[starts] = False
    target_at_N = np.flatnonzero(trained_T)
    return PackedBatch(
        input_ids_BT=torch.from_numpy(ids_T)[None],
        position_ids_BT=torch.from_numpy(np.concatenate([np.arange(len(i)) for i in ids]))[None],
        predict_N=torch.from_numpy(target_at_N - 1),
        targets_N=torch.from_numpy(ids_T[target_at_N]),
        sequence_N=torch.from_numpy(np.searchsorted(ends, target_at_N, side="right")),
        n_sequences=len(rows),
        n_tokens=len(ids_T),
        segments=SegmentTable(tuple(Segment(int(s), int(e)) for s, e in zip(starts, ends, strict=True))),
    )


def collate_padded(rows: Sequence[Row]) -> PackedBatch:
    """Rows (B, T) padded on the right to the longest, with a mask, for models that cannot take segments.

    The padding id is 0; it is masked out of attention, never a target, and its position is 0.
    """
    n_rows, longest = len(rows), max(len(row["input_ids"]) for row in rows)
    ids_BT = np.zeros((n_rows, longest), dtype=np.int64)
    mask_BT: NDArray[Any] = np.zeros((n_rows, longest), dtype=np.int64)
    trained_BT = np.zeros((n_rows, longest), dtype=bool)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids_BT[index, :length] = row["input_ids"]
        mask_BT[index, :length] = 1
        trained_BT[index, :length] = np.asarray(row["trained"], dtype=bool)
    trained_BT[:, 0] = False
    sequence_N, target_at_N = np.nonzero(trained_BT)
    return PackedBatch(
        input_ids_BT=torch.from_numpy(ids_BT),
        position_ids_BT=torch.from_numpy((np.cumsum(mask_BT, 1) - 1) * mask_BT),
        predict_N=torch.from_numpy(sequence_N * longest + target_at_N - 1),
        targets_N=torch.from_numpy(ids_BT[sequence_N, target_at_N]),
        sequence_N=torch.from_numpy(sequence_N),
        n_sequences=n_rows,
        n_tokens=int(mask_BT.sum()),
        attention_mask_BT=torch.from_numpy(mask_BT),
    )


def split(batch: PackedBatch, max_tokens: int) -> list[PackedBatch]:
    """Cut a packed batch into parts of at most `max_tokens` where a root segment begins; one that is longer stays whole.

    The two sequences of a pair (a batch with columns over P) stay together, whether they share their prompt or not. The parts hold
    the same segments and targets, so the sums over them are those of the batch: the same update from less memory. A padded batch
    comes back as it is.
    """
    if batch.segments is None or batch.n_tokens <= max_tokens:
        return [batch]
    segments = batch.segments.segments
    leaves = batch.segments.leaves()
    together = 2 if any(name.endswith("_P") for name in batch.extras) else 1  # sequences that no cut parts
    roots = [i for i, segment in enumerate(segments) if segment.parent is None and bisect_left(leaves, i) % together == 0]
    cuts = [0]
    for root, next_root in zip(roots, [*roots[1:], len(segments)], strict=True):
        end = segments[next_root - 1].end
        if end - segments[cuts[-1]].start > max_tokens and root > cuts[-1]:
            cuts.append(root)
    bounds = list(zip(cuts, [*cuts[1:], len(segments)], strict=True))
    return [_part(batch, bound, (bisect_left(leaves, bound[0]), bisect_left(leaves, bound[1]))) for bound in bounds]


def _part(batch: PackedBatch, bound: tuple[int, int], sequences: tuple[int, int]) -> PackedBatch:
    """Segments [first, last) of a packed batch, which hold the sequences [first, last), as a batch of their own."""
    assert batch.segments is not None
    segments = batch.segments.segments
    first, last = bound
    start, end = segments[first].start, segments[last - 1].end
    low, high = (int(torch.searchsorted(batch.sequence_N, sequence)) for sequence in sequences)
    spans = {"N": (low, high), "S": sequences, "P": (sequences[0] // 2, sequences[1] // 2)}
    moved = tuple(
        Segment(s.start - start, s.end - start, None if s.parent is None else s.parent - first) for s in segments[first:last]
    )
    return PackedBatch(
        input_ids_BT=batch.input_ids_BT[:, start:end],
        position_ids_BT=batch.position_ids_BT[:, start:end],
        predict_N=batch.predict_N[low:high] - start,
        targets_N=batch.targets_N[low:high],
        sequence_N=batch.sequence_N[low:high] - sequences[0],
        n_sequences=sequences[1] - sequences[0],
        n_tokens=end - start,
        segments=SegmentTable(moved),
        extras={name: column[slice(*spans[name[-1]])] for name, column in batch.extras.items()},
    )
