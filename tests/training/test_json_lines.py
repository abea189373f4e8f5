"""Files that a run appends to, read again: texts with unusual separators, and a line that a killed process left unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.commands.ppo_report import SAMPLES_FILE, Reporter
from posttrain.training.artifacts import json_lines
from posttrain.training.callbacks import METRICS_FILE, MetricsFile

SEPARATED = "one\u2028two\x85three\x1cfour"


def write(file: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + torn, encoding="utf-8")


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    rows = [{"step": 1, "answer": SEPARATED}, {"step": 2, "answer": "plain"}]
    write(tmp_path / "a.jsonl", rows, torn='{"step": 3, "ans')
    found = json_lines(tmp_path / "a.jsonl")
    assert [row for _, row in found] == rows
    assert "".join(line for line, _ in found) == (tmp_path / "a.jsonl").read_text(encoding="utf-8").removesuffix(
        '{"step": 3, "ans'
    )


@pytest.mark.parametrize("name", [SAMPLES_FILE, METRICS_FILE])
def test_a_resumed_ppo_run_keeps_the_samples_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    rows = [{"step": step, "answer": SEPARATED} for step in (1, 2, 3)]
    write(tmp_path / name, rows, torn='{"step": 4, "answer": "cu')
    alone: Any = SimpleNamespace(log_with=[], is_main_process=True)
    Reporter(tmp_path, alone, None, None).begin(2)
    assert [row for _, row in json_lines(tmp_path / name)] == rows[:2]


def test_a_resumed_run_keeps_the_metrics_of_its_checkpoint(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    write(tmp_path / METRICS_FILE, rows, torn='{"step": 2, "lo')
    state, args = SimpleNamespace(global_step=1), SimpleNamespace(should_save=True)
    MetricsFile(tmp_path).on_train_begin(args, state, None)  # type: ignore[arg-type]
    assert [row for _, row in json_lines(tmp_path / METRICS_FILE)] == rows[:1]
