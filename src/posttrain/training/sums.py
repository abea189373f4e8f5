"""Metrics as sums and counts on the device: exact averages over any cut into micro-batches and ranks, one host sync per log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over the ranks


class Sums:
    """Running (sum, count) pairs by name, in float64."""

    def __init__(self, reduce: Reduce):
        self._reduce = reduce
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to one metric; tensors stay on their device."""
        device = total.device if isinstance(total, Tensor) else None
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in (total, count)])
        # What was loaded from a checkpoint lies on the host and moves to the device once.
        self._pairs[name] = self._pairs[name].to(pair.device) + pair if name in self._pairs else pair

    def totals(self) -> dict[str, tuple[float, float]]:
        """(sum, count) over all ranks. A collective: every rank calls it, with the same names."""
        names = sorted(self._pairs)
        if not names:
            return {}
        device = next((p.device for p in self._pairs.values() if p.device.type != "cpu"), torch.device("cpu"))
        summed = self._reduce(torch.stack([self._pairs[name].to(device) for name in names]))
        return {name: (row[0], row[1]) for name, row in zip(names, summed.tolist(), strict=True)}

    def clear(self) -> None:
        """Start a new window."""
        self._pairs = {}

    def load(self, totals: dict[str, Any]) -> None:
        """Go on from saved totals (on one rank only: they are already summed over all)."""
        self._pairs = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in totals.items()}


def averages(totals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """sum / count of each metric; those without a count, and those only others are derived from (_…), are left out."""
    return {name: total / count for name, (total, count) in totals.items() if count > 0 and not name.startswith("_")}
