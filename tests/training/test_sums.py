"""Sums and counts go on from a checkpoint wherever the run's tensors lie."""

from __future__ import annotations

import pytest
import torch

from posttrain.training.sums import Sums, averages


def test_sums_go_on_from_what_was_saved() -> None:
    sums = Sums(lambda tensor: tensor)
    sums.load({"loss": (6.0, 3.0)})
    sums.add("loss", torch.tensor(2.0), 1.0)
    assert averages(sums.totals()) == pytest.approx({"loss": 2.0})


def test_loaded_sums_move_to_the_device_of_the_run() -> None:
    sums = Sums(lambda tensor: tensor)
    sums.load({"loss": (6.0, 3.0)})
    sums.add("loss", torch.tensor(2.0, device="meta"), 1.0)
    assert sums._pairs["loss"].device.type == "meta"
