"""The learning rate of a run that goes on: that of its own schedule, to the bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from posttrain.training.resume import follow_schedule

RATES = (0.3, 0.007)  # of two groups
KINDS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")


def scheduled(kind: str, n_steps: int) -> Any:
    """A schedule over an optimizer of two groups."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES]
    return get_scheduler(kind, torch.optim.SGD(groups), 2, num_training_steps=n_steps)


def stepped(schedule: Any, n_steps: int) -> Any:
    for _ in range(n_steps):
        schedule.optimizer.step()
        schedule.step()
    return schedule


def resumed(kind: str, before: Any, planned: int | None, n_steps: int, folder: Path) -> Any:
    """A new run's schedule that goes on from `before`, which was `planned` for so many steps."""
    (folder / "trainer_state.json").write_text(json.dumps({} if planned is None else {"max_steps": planned}))
    schedule = scheduled(kind, n_steps)
    schedule.optimizer.load_state_dict(before.optimizer.state_dict())
    schedule.load_state_dict(before.state_dict())
    follow_schedule(schedule, str(folder), n_steps)
    return schedule


def rates(schedule: Any) -> list[float]:
    found = [group["lr"] for group in schedule.optimizer.param_groups]
    assert found == schedule.get_last_lr()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_that_of_the_new_schedule(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("posttrain"), "propagate", True)
    caplog.set_level(logging.INFO, "posttrain")
    for done in (1, 3, 6):
        before = stepped(scheduled(kind, 6), done)
        for planned in (6, None):
            same = resumed(kind, before, planned, 6, tmp_path)
            assert rates(same) == rates(before)
            assert same.state_dict() == before.state_dict()
        assert not caplog.records
        longer = resumed(kind, before, 6, 10, tmp_path)
        for n_steps in range(done, 10):
            assert rates(longer) == rates(stepped(scheduled(kind, 10), n_steps))
            stepped(longer, 1)
        assert "was planned for 6 steps, this one is for 10" in caplog.text
        caplog.clear()


def test_a_schedule_that_follows_a_metric_is_left_alone(tmp_path: Path) -> None:
    schedule = scheduled("reduce_lr_on_plateau", 6)
    schedule.optimizer.param_groups[0]["lr"] = 0.1
    follow_schedule(schedule, str(tmp_path), 9)
    assert schedule.optimizer.param_groups[0]["lr"] == 0.1
