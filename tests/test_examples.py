"""The examples are what the demo counts on, and the scripts beside the package run."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys

import pytest
from demo import follows_style, results
from report import write_page

from conftest import ROOT

EXAMPLES = ROOT / "examples"


def chats(*names: str) -> list[list[dict[str, str]]]:
    files = [EXAMPLES / name for name in names]
    return [json.loads(line)["conversations"] for file in files for line in file.read_text().splitlines()]


def test_counts_and_style() -> None:
    train, held_out = chats("sft/train_a.jsonl", "sft/train_b.jsonl"), chats("heldout/heldout.jsonl")
    assert len(train) >= 240
    assert len(held_out) == 40
    assert len((EXAMPLES / "pretrain" / "articles.txt").read_text().splitlines()) >= 60
    answers = [turn["value"] for chat in train + held_out for turn in chat if turn["from"] == "gpt"]
    assert all(follows_style(answer) for answer in answers)


def test_held_out_questions_are_new() -> None:
    asked = [
        turn["value"].lower()
        for chat in chats("sft/train_a.jsonl", "sft/train_b.jsonl")
        for turn in chat
        if turn["from"] == "human"
    ]
    for chat in chats("heldout/heldout.jsonl"):
        question = chat[0]["value"].lower()
        assert not difflib.get_close_matches(question, asked, n=1, cutoff=0.8), question


def pairs(*names: str) -> list[tuple[str, str, str]]:
    """(question, chosen, rejected) of files of pairs with one question each."""
    found = []
    for name in names:
        for line in (EXAMPLES / name).read_text().splitlines():
            row = json.loads(line)
            assert row.keys() == {"conversations", "chosen", "rejected"}
            (asked,) = row["conversations"]
            found.append((asked["value"], row["chosen"], row["rejected"]))
    return found


PAIR_FILES = {"train": ("pairs/train_a.jsonl", "pairs/train_b.jsonl"), "held out": ("heldout_pairs/heldout_pairs.jsonl",)}


def test_pairs_are_of_the_questions_that_sft_has() -> None:
    """Chosen answers are SFT's own, so training pairs hold nothing of the held-out questions, which are far from SFT's."""
    for which, files in (("train", ("sft/train_a.jsonl", "sft/train_b.jsonl")), ("held out", ("heldout/heldout.jsonl",))):
        answered = {(chat[0]["value"], chat[1]["value"]) for chat in chats(*files)}
        found = pairs(*PAIR_FILES[which])
        assert len({question for question, _, _ in found}) == len(found), "a question comes twice"
        assert {(question, chosen) for question, chosen, _ in found} <= answered
    assert len(pairs(*PAIR_FILES["train"])) >= 200
    assert len(pairs(*PAIR_FILES["held out"])) == 40


@pytest.mark.parametrize("which", PAIR_FILES)
def test_what_tells_a_pair_apart(which: str) -> None:
    """Mostly the house style, but neither a pattern alone nor the length."""
    found = pairs(*PAIR_FILES[which])
    assert all(follows_style(chosen) for _, chosen, _ in found)
    broken = sum(not follows_style(rejected) for _, _, rejected in found) / len(found)
    assert 0.8 <= broken < 1
    for length in (len, lambda text: len(text.split())):
        longer = sum(length(rejected) > length(chosen) for _, chosen, rejected in found) / len(found)
        assert 0.4 <= longer <= 0.6
        ratios = sorted(length(rejected) / length(chosen) for _, chosen, rejected in found)
        assert 0.9 < ratios[len(ratios) // 2] < 1.1
        assert 0.5 < ratios[0] < ratios[-1] < 2
    assert all(rejected.strip() and rejected != chosen for _, chosen, rejected in found)


def test_style_check_can_fail() -> None:
    good = "In short: Rest.\n\nWhat to do:\n- Sleep.\n- Drink.\n\nSee a doctor if: it lasts."
    assert follows_style(good)
    assert not follows_style("You should rest and drink water.")
    assert not follows_style(good.replace("- Sleep.\n- Drink.\n", "Sleep and drink.\n"))
    assert not follows_style(good.replace("\n\nSee a doctor if: it lasts.", ""))
    assert not follows_style(f"{good}\n\n{good}")


def test_report_page(tmp_path) -> None:  # type: ignore[no-untyped-def]
    report = {
        "model": "tiny <model>", "minutes": 1.5,
        "sft": {"loss_before": 3.0, "loss_after": 1.25, "adherence_before": 0.0, "adherence_after": 0.9},
        "rm": {"accuracy": 0.95},
        "dpo": {"accuracy_before": 0.5, "accuracy_after": 0.75, "adherence_before": 0.9, "adherence_after": 0.925,
                "score_before": 1.5, "score_after": 2.25},
        "ppo": {"adherence_before": 0.9, "adherence_after": 0.875, "score_before": 1.5, "score_after": 3.125},
        "curves": {"pt": [(1, 3.0), (2, 2.5)], "sft": [(1, 2.0), (5, 1.0)]},
        "ppo_curve": {"mean score of a rollout": [(1, -1.0), (2, 2.0)]},
        "answers": [{"question": "why?", "before": "<b>", "sft": "In short: so.", "dpo": "d", "ppo": "p"}],
    }  # fmt: skip
    write_page(report, results(report), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "tiny &lt;model&gt;" in page
    assert "&lt;b&gt;" in page
    for figure in ("90%", "95%", "75%", "92%", "2.25", "88%", "3.12"):
        assert f"<td>{figure}</td>" in page, figure
    assert page.count("<polyline") == 3
    assert page.count("after PPO") == 1


def test_gpu_check_dry_run() -> None:
    environment = {**os.environ, "POSTTRAIN_GPU_CHECK": "dry"}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_check.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "FAIL" not in done.stdout
    for check in ("packed = padded, mistral, bfloat16", "SFT, all weights", "SFT, QLoRA", "RM, LoRA", "DPO, LoRA", "PPO, LoRA"):
        assert f"| {check}" in done.stdout
    for engine in ("FSDP2", "ZeRO-2", "ZeRO-3"):
        assert f"| SFT, LoRA, {engine}, one process | step 3/3" in done.stdout
    assert "ours / transformers" in done.stdout
