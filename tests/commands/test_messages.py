"""What a user reads when a job of several processes fails: each reason once, and the reason of a process that fails alone, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from posttrain.commands.report import first_to_say
from preference_runs import pairs, words, write

# Both fail in the same way, then one in another.
SCRIPT = """
import os, sys
from posttrain.cli import main
codes = [main(["sft", "--no_such_flag", "1"])]
if os.environ["RANK"] == "1":
    codes.append(main(["sft", "--no_such_word", "1"]))
os._exit(0 if set(codes) == {2} else 1)
"""


def two_processes(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_reason_is_said_once_and_one_of_a_single_process_is_said(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT)
    done = two_processes(script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--no_such_flag is unknown") == 1
    assert done.stderr.count("--no_such_word is unknown") == 1


def test_a_process_says_its_reason_again_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert first_to_say("no file") and first_to_say("no file")  # noqa: PT018
    for rank in "01":
        (tmp_path / "attempt_0" / rank).mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    assert first_to_say("no file") and first_to_say("no file")  # noqa: PT018
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "1" / "error.json"))
    monkeypatch.setattr(os, "getpid", lambda: -1)  # another process
    assert not first_to_say("no file")
    assert first_to_say("another reason")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "1" / "error.json"))  # a folder that is gone
    assert first_to_say("no file")


@pytest.mark.slow
def test_who_waits_for_a_process_that_failed_has_no_traceback(model_folder: Path, tmp_path: Path) -> None:
    """The first process prepares the data and finds a row without an answer; the other waits for it."""
    rows = [*pairs(3), {"conversations": [{"from": "human", "value": "what?"}], "chosen": "a fox"}]
    flags = {"model_name_or_path": model_folder, "train_file_dir": write(tmp_path / "pairs.jsonl", rows)}
    done = two_processes("-m", "posttrain", *words("dpo", tmp_path / "out", **flags))
    assert done.returncode
    assert done.stderr.count("pairs.jsonl:4:") == 1, done.stderr
    assert "src/posttrain/" not in done.stderr, done.stderr  # a line of a traceback
