"""Threads spin while they wait only where the machine is ours, and never against what the user has set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.commands import threads

SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": threads.SPINS}
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("before", "busy", "after"),
    [
        ({}, 0.0, SPINNING),
        ({}, 0.24, SPINNING),
        ({}, 0.25, ASLEEP),
        ({}, 1.0, ASLEEP),
        ({"LOCAL_WORLD_SIZE": "1"}, 0.0, SPINNING),
        ({"LOCAL_WORLD_SIZE": "2"}, 0.0, ASLEEP),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 1.0, {}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 0.0, {}),
        ({"GOMP_SPINCOUNT": "7"}, 0.0, {}),
    ],
)
def test_what_is_set(before: dict[str, str], busy: float, after: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "busy_share", lambda: busy)
    environ = dict(before)
    threads.set_waiting(environ)
    assert environ == before | after


def stat(*rows: str) -> str:
    return "cpu  1 2 3 4 5 6 7 8 9 10\n" + "\n".join(rows) + "\nintr 1\n"


@pytest.mark.parametrize(
    ("second", "share"),
    [
        # user nice system idle iowait irq softirq steal: 20 ticks each of two processors
        (("cpu0 100 0 0 520 0 0 0 0 0 0", "cpu1 100 0 0 520 0 0 0 0 0 0"), 0.0),
        (("cpu0 120 0 0 500 0 0 0 0 0 0", "cpu1 100 0 0 515 5 0 0 0 0 0"), 0.5),
        (("cpu0 100 5 5 500 0 2 3 5 0 0", "cpu1 120 0 0 500 0 0 0 0 0 0"), 1.0),
        (("cpu0 100 0 0 500 0 0 0 0 0 0", "cpu1 100 0 0 500 0 0 0 0 0 0"), 0.0),  # no tick in between
    ],
)
def test_share_of_others(second: tuple[str, ...], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "cpu2 9 9 9 9 9 9 9 9 9 9"  # one that we may not run on
    first = ("cpu0 100 0 0 500 0 0 0 0 0 0", "cpu1 100 0 0 500 0 0 0 0 0 0")
    texts = iter([stat(*first, other), stat(*second, other.replace("9", "99"))])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(Path, "read_text", lambda *_: next(texts))
    monkeypatch.setattr(threads, "LOOK_SECONDS", 0.0)
    assert threads.busy_share() == pytest.approx(share)


def test_a_system_that_does_not_tell_counts_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert threads.busy_share() == 1.0


def test_this_system_tells() -> None:
    assert 0.0 <= threads.busy_share() <= 1.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["merge", "--base_model", "a", "--lora_model", "b", "--output_dir", "c"],
            ["posttrain.commands.merge", "PASSIVE", threads.SPINS],
        ),
        (["run", "pipeline.yaml"], ["posttrain.commands.run", "None", "None"]),  # its commands look for themselves
    ],
)
def test_the_command_line_sets_it_before_torch_is_loaded(words: list[str], expected: list[str]) -> None:
    program = (
        "import importlib, os, sys\n"
        "from posttrain import cli\n"
        "from posttrain.commands import threads\n"
        "threads.busy_share = lambda: 0.0\n"
        "def stop(name):\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(name, os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))\n"
        "    raise SystemExit(0)\n"
        "importlib.import_module = stop\n"
        f"cli.main({words!r})\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in SPINNING}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ)
    assert done.stdout.split() == expected, done.stderr


def test_openmp_puts_the_turns_before_the_policy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        capture_output=True,
        text=True,
        env={**os.environ, **SPINNING, "OMP_DISPLAY_ENV": "verbose"},
    )
    assert f"GOMP_SPINCOUNT = '{threads.SPINS}'" in done.stderr
