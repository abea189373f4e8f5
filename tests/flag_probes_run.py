"""Probes of run, and of what inference has beside the flags of generate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flag_probes import Lab, probe
from posttrain.commands import chat
from posttrain.commands import run as command
from posttrain.training import artifacts


def ran(lab: Lab, *runs: dict[str, Any]) -> list[list[str]]:
    """The folders that each of several `posttrain run` fills, one run after the other; the stages themselves do nothing."""
    found: list[list[str]] = []

    def start(words: list[str]) -> int:
        folder = Path(words[words.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_run(folder, "sft", {}, parents={})
        found[-1].append(folder.name)
        return 0

    shutil.rmtree(lab.pipeline.parent / "pipeline", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "start", start)
        for flags in runs:
            found.append([])
            lab.good("run", **flags)
    return found


ALL = ["pt", "pt-merged", "sft", "sft-merged"]


@probe("run", "pipeline")
def pipeline(lab: Lab) -> None:
    file = lab.path("short.yaml")
    file.write_text(lab.pipeline.read_text().replace("stage: sft", "stage: sft, name: chat, merge: false"))
    assert ran(lab, {"pipeline": file}) == [[*ALL[:2], "chat"]]


@probe("run", "from_stage")
def from_stage(lab: Lab) -> None:
    assert ran(lab, {}, {}, {"from_stage": "sft"}) == [ALL, [], ALL[2:]]


@probe("run", "only")
def only(lab: Lab) -> None:
    assert ran(lab, {"only": "pt"}, {}) == [ALL[:2], ALL[2:]]


@probe("run", "dry_run")
def dry_run(lab: Lab) -> None:
    assert ran(lab, {"dry_run": True}, {}) == [[], ALL]


TALK: dict[str, Any] = {"interactive": True, "data_file": None, "output_file": None, "stdin": "what is 0?\nwhat is 1?\n"}


@probe("inference", "interactive")
def interactive(lab: Lab) -> None:
    assert "does nothing with --interactive" in lab.fails("inference", interactive=True)
    assert "Input: " not in lab.good("inference", **TALK).out


@probe("inference", "single_turn")
def single_turn(lab: Lab) -> None:
    assert "does nothing without --interactive" in lab.fails("inference", single_turn=True)
    lengths: list[int] = []
    answer = chat.answer

    def spy(answerer: Any, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        lengths.append(len(prompts[0]))
        return answer(answerer, prompts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "answer", spy)
        for alone in (False, True):
            lab.good("inference", **TALK, single_turn=alone)
    assert lengths[0] == lengths[2] == lengths[3] < lengths[1]
