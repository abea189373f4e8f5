"""What processes agree on and what they say when they lose each other; with real connections: tests/commands/test_two_machines.py."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed

from posttrain.training import job
from posttrain.types import UserError


def checkpoints(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        for name in ("trainer_state.json", "rng_state_0.pth"):
            (folder / f"checkpoint-{step}" / name).touch()
    return folder


def beside(monkeypatch: pytest.MonkeyPatch, steps: set[int], trouble: str = "") -> None:
    """Another process has these checkpoints."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(job, "gather_object", lambda own: [*own, (steps, trouble)])


def test_auto_is_the_last_checkpoint_that_all_processes_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints(tmp_path, 2, 4, 10)
    assert job.agreed_checkpoint(folder, "auto") == str(folder / "checkpoint-10")
    beside(monkeypatch, {2, 4, 6})
    assert job.agreed_checkpoint(folder, "auto") == str(folder / "checkpoint-4")
    beside(monkeypatch, set())
    assert job.agreed_checkpoint(tmp_path / "none", "auto") is None


@pytest.mark.parametrize("wanted", ["auto", "True", "checkpoint-10"])
def test_a_checkpoint_that_one_process_lacks_is_no_place_to_go_on_from(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints(tmp_path, 10)
    beside(monkeypatch, set())
    with pytest.raises(UserError, match=r"process 1 has none.*--save_on_each_node True"):
        job.agreed_checkpoint(folder, str(folder / wanted) if wanted.startswith("checkpoint") else wanted)


def test_no_process_waits_for_one_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(monkeypatch, set(), "no such folder")
    with pytest.raises(UserError, match="process 1: no such folder"):
        job.agreed_checkpoint(checkpoints(tmp_path, 10), "True")


def test_a_lost_connection_is_one_line_and_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints(tmp_path, 5)

    def fail(text: str) -> None:
        with job.lost_connection_told(30, folder):
            raise RuntimeError(text)

    lost = "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to complete"
    with pytest.raises(RuntimeError, match="gloo"):
        fail(lost)  # a process alone has no one to lose
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="shapes differ"):
        fail("shapes differ")
    with pytest.raises(UserError, match=r"lost the connection.*--ddp_timeout 30 seconds.*checkpoint-5") as told:
        fail(f"{lost}\nsecond line")
    assert "\n" not in str(told.value)


def test_the_interface_is_the_one_that_leads_there() -> None:
    assert job._interface_towards("127.0.0.1") == "lo"
    assert job._interface_towards("no.such.host.invalid") is None


def lives(shared: distributed.Store, world: int, late: int | None = None) -> list[distributed.Store]:
    """What the processes of one life get; process `late` comes when the others have waited."""
    found: dict[int, distributed.Store] = {}

    def live(rank: int) -> None:
        if rank == late:
            time.sleep(0.2)
        found[rank] = job.store_of_this_life(shared, rank, world, timedelta(seconds=20))

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("late", [None, 0, 2])
def test_a_life_of_the_job_finds_nothing_that_an_earlier_one_left(late: int | None) -> None:
    """torchrun's store outlives its processes: addresses of those that have ended stand in it."""
    shared = distributed.HashStore()
    for address in ("first", "second", "third"):
        stores = lives(shared, 3, late)
        assert not any(store.check(["address"]) for store in stores)
        stores[1].set("address", address)
        assert [store.get("address") for store in stores] == [address.encode()] * 3
        shared.add(f"{job._LIFE}/asked", 1)  # of a process that was ended before it had its answer


def test_a_process_that_does_not_come_is_named() -> None:
    with pytest.raises(distributed.DistStoreError, match="Timed out waiting for process 1, 2"):
        job.store_of_this_life(distributed.HashStore(), 0, 3, timedelta(seconds=0.05))
    with pytest.raises(distributed.DistStoreError):
        job.store_of_this_life(distributed.HashStore(), 1, 3, timedelta(seconds=0.05))
