"""Two hosts on one machine: network namespaces joined by a cable, each with its own address and its own disk at the same path.

The guide's two-node command runs on both; the same flags on either side, as a user would type them.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo_runs
from conftest import ROOT
from preference_runs import lines, logged, pairs, run, weights, words, write

SCRIPTS = {"sft": "supervised_finetuning.py", "dpo": "dpo_training.py", "ppo": "ppo_training.py"}
PATIENCE_SECONDS = 10  # --ddp_timeout
GUIDE_SECONDS = 300  # for a whole run: this machine may be busy


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def why_not() -> str:
    """Why this machine cannot play two, or nothing."""
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "needs iproute2 (ip)"
    name = f"pt{os.getpid()}try"
    done = ip("netns", "add", name)
    if done.returncode:
        return f"ip netns add: {done.stderr.strip()}"
    made = ip("-n", name, "link", "add", "name", "left", "type", "veth", "peer", "name", "right")
    ip("netns", "del", name)
    return f"no veth pair: {made.stderr.strip()}" if made.returncode else ""


class Hosts:
    """Two machines 10.199.0.1 and 10.199.0.2. What node N has at `disk` lies at `folders[N]` for the test to see."""

    def __init__(self, folder: Path):
        self.names = [f"pt{os.getpid()}n{node}" for node in (0, 1)]
        self.folders = [folder / f"node{node}" for node in (0, 1)]
        self.disk = folder / "disk"
        self.ports = itertools.count(29_500)
        for each in (*self.folders, self.disk):
            each.mkdir()
        self.started: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        for name in self.names:
            assert ip("netns", "add", name).returncode == 0
        cable = [
            "link",
            "add",
            "name",
            "cable",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            self.names[1],
        ]
        assert ip(*cable).returncode == 0
        for node, name in enumerate(self.names):
            for each in (("addr", "add", f"10.199.0.{node + 1}/24", "dev", "cable"), ("link", "set", "lo", "up")):
                assert ip("-n", name, *each).returncode == 0
        self.cable("up")

    def cable(self, state: str) -> None:
        """Plug the cable in (`up`) or pull it (`down`)."""
        for name in self.names:
            assert ip("-n", name, "link", "set", "cable", state).returncode == 0

    def start(self, stage: str, **flags: Any) -> None:
        """The guide's command on both hosts."""
        command_line = ppo_runs.words if stage == "ppo" else partial(words, stage)
        port = next(self.ports)
        for node, name in enumerate(self.names):
            torchrun = [
                sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--nnodes", "2", "--node_rank", node,
                "--master_addr", "10.199.0.1", "--master_port", port, ROOT / "scripts" / SCRIPTS[stage],
                *command_line(self.disk / stage, **flags)[1:],
            ]  # fmt: skip
            own_disk = f'mount --bind {self.folders[node]} {self.disk} && cd {self.disk} && exec "$@"'
            command = ["ip", "netns", "exec", name, "sh", "-c", own_disk, "sh", *map(str, torchrun)]
            env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
            env.pop("POSTTRAIN_CACHE", None)
            log = (self.folders[node] / "log.txt").open("w")
            self.started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True, start_new_session=True))

    def wait(self) -> list[int]:
        """Exit codes of both torchruns."""
        codes = [process.wait(GUIDE_SECONDS) for process in self.started]
        self.started = []
        return codes

    def said(self, node: int) -> str:
        return (self.folders[node] / "log.txt").read_text()

    def close(self) -> None:
        for process in self.started:
            process.kill()
        for name in self.names:
            for pid in ip("netns", "pids", name).stdout.split():  # workers of a torchrun that was killed
                os.kill(int(pid), 9)
            ip("netns", "del", name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made = Hosts(tmp_path)
    try:
        made.open()
        yield made
    finally:
        made.close()


def chats(n_rows: int) -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"the fox number {i} rests"}]}
        for i in range(n_rows)
    ]


def deliver(hosts: Hosts, model_folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Model and rows on both disks; the flags that name them there."""
    for folder in hosts.folders:
        shutil.copytree(model_folder, folder / "model", dirs_exist_ok=True)
        write(folder / "rows.jsonl", rows)
    return {
        name: hosts.disk / file
        for name, file in (("model_name_or_path", "model"), ("train_file_dir", "rows.jsonl"), ("cache_dir", "cache"))
    }


def same_as_one(hosts: Hosts, stage: str, model_folder: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Weights and losses of the run on two hosts are those of one process that does the same."""
    own = {
        "model_name_or_path": model_folder,
        "train_file_dir": hosts.folders[0] / "rows.jsonl",
        "per_device_train_batch_size": 4,
    }
    one = run(stage, tmp_path / f"one-{stage}", **{**flags, **own, "cache_dir": tmp_path / "cache-one"})
    two = hosts.folders[0] / stage
    still = run(stage, tmp_path / f"still-{stage}", **{**flags, **own, "max_steps": 1, "learning_rate": 0})
    assert float((weights(one) - weights(still)).abs().max()) > 1e-3
    assert float((weights(one) - weights(two)).abs().max()) <= 1e-6
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-6)


FLAGS = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "audit": False}


def prepared(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "cache" / "datasets").iterdir())


@pytest.mark.slow  # one start of four Pythons more than the suite has time for; sft below has the same path
def test_dpo_on_two_hosts_is_as_on_one_and_only_the_first_saves(hosts: Hosts, model_folder: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, "max_steps": 4}
    hosts.start("dpo", **flags, **deliver(hosts, model_folder, pairs(13)))
    assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
    same_as_one(hosts, "dpo", model_folder, tmp_path, flags)
    first, second = hosts.folders
    assert prepared(first) == prepared(second)  # each once: nothing unfinished, nothing twice
    assert len(prepared(first)) == 1
    found = [[file.name for file in (folder / "cache" / "reference").iterdir()] for folder in hosts.folders]
    assert found[0] == found[1]
    assert len(found[0]) == 1
    assert hosts.said(0).count("reference log-probs: 13 pairs, computed") == 1
    assert "reference log-probs" not in hosts.said(1)  # said once per job
    assert (first / "dpo" / "run.json").is_file()
    assert not [file for file in (second / "dpo").rglob("*") if file.is_file()]


def test_sft_on_two_hosts_survives_a_cut_cable(hosts: Hosts, model_folder: Path, tmp_path: Path) -> None:
    """The cable is pulled after a checkpoint: both sides say so in one line and end; plugged in again, the run goes on to the same end."""
    flags = {**FLAGS, "max_steps": 40, "num_train_epochs": 9, "logging_steps": 1}
    both = {
        **flags, **deliver(hosts, model_folder, chats(40)), "save_strategy": "steps", "save_steps": 3, "save_on_each_node": True,
        "ddp_timeout": PATIENCE_SECONDS, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    first, second = (folder / "sft" for folder in hosts.folders)
    hosts.start("sft", **both)
    until = time.monotonic() + GUIDE_SECONDS
    while not all((folder / "checkpoint-3" / "trainer_state.json").is_file() for folder in (first, second)):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in hosts.started), hosts.said(0) + hosts.said(1)
        time.sleep(0.01)
    hosts.cable("down")
    cut = time.monotonic()
    assert all(hosts.wait()), hosts.said(0) + hosts.said(1)
    seconds = time.monotonic() - cut
    for node in (0, 1):
        line = next(line for line in hosts.said(node).splitlines() if "lost the connection" in line)
        assert line.startswith(f"posttrain: process {node} on ")
        assert f"--ddp_timeout {PATIENCE_SECONDS} seconds" in line
        assert "the last whole checkpoint is" in line
        assert "Traceback (most recent call last)" not in hosts.said(node).partition(line)[0]
    assert seconds < 3 * PATIENCE_SECONDS, seconds
    assert not (first / "train_results.txt").exists()
    hosts.cable("up")
    hosts.start("sft", **both)
    assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
    assert "resuming from" in hosts.said(0)
    same_as_one(hosts, "sft", model_folder, tmp_path, flags)
    files = [{str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} for folder in (first, second)]
    only_first = {name for name in files[0] - files[1] if not name.startswith("logs/") and "rng_state" not in name}
    assert not only_first
    for name in (
        "adapter_model.safetensors",
        "run.json",
        "ledger.json",
        "metrics.jsonl",
        "train_results.txt",
        "trainer_state.json",
    ):
        assert name in files[1]
    assert torch.equal(weights(first), weights(second))
    assert [line["step"] for line in lines(second)] == [*range(1, 41), 40]
    assert json.loads((second / "ledger.json").read_text()) == json.loads((first / "ledger.json").read_text())


@pytest.mark.slow
def test_ppo_on_two_hosts_is_as_on_one_and_survives_a_cut_cable(hosts: Hosts, tmp_path: Path) -> None:
    """Only the first host has the run folder: to go on after the cable was pulled, it is copied to the other."""
    for folder in (*hosts.folders, tmp_path):
        ppo_runs.save_speaker(folder / "model", scale=8)
        ppo_runs.write_prompts(folder / "prompts.jsonl", [f"question {letter}" for letter in "abcdefghijk"])
    # Small steps: where a clip or a sample flips, rounding becomes another run.
    flags: dict[str, Any] = {"dtype": "float32", "max_steps": 8, "save_steps": 2, "adam_epsilon": 1e-3, "learning_rate": 1e-3}
    names = {"model_name_or_path": "model", "train_file_dir": "prompts.jsonl", "cache_dir": "cache"}
    one = ppo_runs.run(tmp_path / "one", **flags, **{name: tmp_path / file for name, file in names.items()})
    both = {
        **flags, **{name: hosts.disk / file for name, file in names.items()}, "ddp_timeout": PATIENCE_SECONDS,
        "resume_from_checkpoint": "auto",
    }  # fmt: skip
    first, second = (folder / "ppo" for folder in hosts.folders)
    hosts.start("ppo", **both)
    until = time.monotonic() + GUIDE_SECONDS
    while not (first / "checkpoint-2" / "trainer_state.json").is_file():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in hosts.started), hosts.said(0) + hosts.said(1)
        time.sleep(0.01)
    hosts.cable("down")
    assert all(hosts.wait()), hosts.said(0) + hosts.said(1)
    for node in (0, 1):
        line = next(line for line in hosts.said(node).splitlines() if "lost the connection" in line)
        assert "Traceback (most recent call last)" not in hosts.said(node).partition(line)[0]
    assert not (first / "adapter_model.safetensors").exists()
    hosts.cable("up")
    hosts.start("ppo", **both)
    assert all(hosts.wait())
    assert "no checkpoint in common (process 1 has none)" in hosts.said(0)
    assert not [file for file in second.rglob("*") if file.is_file()]
    shutil.copytree(first, second, dirs_exist_ok=True)
    hosts.start("ppo", **both)
    assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
    assert "resuming from" in hosts.said(0)
    assert float((ppo_runs.weights(one) - ppo_runs.weights(first)).abs().max()) <= 1e-5
    for line, expected in zip(ppo_runs.lines(first), ppo_runs.lines(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
