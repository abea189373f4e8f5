"""A process that is one of several: its connections to the others, what they agree on, and how it leaves them."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import psutil
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed

from posttrain.training.artifacts import find_checkpoint, remove_run, resumes, whole_checkpoints
from posttrain.types import UserError

# What torch says of a connection that broke, beside its own error classes: gloo raises a plain RuntimeError.
_LOST = (
    "gloo/transport",
    "Gloo connectFullMesh failed",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
)
_LIFE = "posttrain/life"  # of the keys by which processes find the part of the store that is theirs


def several() -> bool:
    """Whether this process is one of several (torchrun sets WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connect(on_cpu: bool, backend: str | None, timeout_seconds: int) -> None:
    """Connect the processes of a CPU run, for which the library leaves the timeout out, and of a job that torchrun may start again.

    All others the library connects, with the same timeout.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    again = shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if not several() or not (on_cpu or again) or distributed.is_initialized():
        return
    rank, world, patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_seconds)
    if on_cpu and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < world and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = _interface_towards(os.environ.get("MASTER_ADDR", ""))
        if name:
            os.environ["GLOO_SOCKET_IFNAME"] = name
    with lost_connection_told(timeout_seconds):
        store: distributed.Store | None = None
        if shared:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = store_of_this_life(distributed.TCPStore(host, port, is_master=False, timeout=patience), rank, world, patience)
        how = backend or ("gloo" if on_cpu else None)
        distributed.init_process_group(how, timeout=patience, store=store, rank=rank, world_size=world)


def store_of_this_life(shared: distributed.Store, rank: int, world: int, patience: timedelta) -> distributed.Store:
    """A part of `shared` that no earlier life of the job has written to. A collective.

    torchrun keeps one store over its restarts, in which the addresses of processes that have ended still stand, and a process that is
    quicker than its partner would take those (github.com/pytorch/pytorch/issues/135712). torchrun's count of restarts is each node's
    own, so it cannot name a life: the first process draws a name and tells it whoever asks, until all others have come. What was asked
    by processes of earlier lives is answered along and read by nobody.
    """
    if rank:
        number = shared.add(f"{_LIFE}/asked", 1)
        shared.wait([f"{_LIFE}/answer/{number}"], patience)
        name = shared.get(f"{_LIFE}/answer/{number}").decode()
        shared.set(f"{_LIFE}/{name}/{rank}", "here")
        return distributed.PrefixStore(f"{_LIFE}/{name}", shared)
    name, answered, until = uuid4().hex, 0, time.monotonic() + patience.total_seconds()
    missing = list(range(1, world))
    while missing:
        asked = shared.add(f"{_LIFE}/asked", 0)
        for number in range(answered + 1, asked + 1):
            shared.set(f"{_LIFE}/answer/{number}", name)
        answered = asked
        missing = [other for other in missing if not shared.check([f"{_LIFE}/{name}/{other}"])]
        if missing and time.monotonic() > until:
            raise distributed.DistStoreError(f"Timed out waiting for process {', '.join(map(str, missing))}")
        time.sleep(0.01 if missing else 0)
    return distributed.PrefixStore(f"{_LIFE}/{name}", shared)


def _interface_towards(address: str) -> str | None:
    """The network interface that leads to `address`. Gloo takes that of the host's own name, which is often the loopback."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing: the kernel only looks up the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = [name for name, known in psutil.net_if_addrs().items() if own in (entry.address.partition("%")[0] for entry in known)]
    return found[0] if found else None


@contextmanager
def lost_connection_told(timeout_seconds: int, folder: Path | None = None) -> Iterator[None]:
    """A connection that breaks is one line: what happened, where to look, how to go on. Other errors pass as they are."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        known = isinstance(error, distributed.DistError) or any(sign in text for sign in _LOST)
        if not several() or not known:
            raise
        saved = whole_checkpoints(folder) if folder is not None else {}
        then = (
            f"; the last whole checkpoint is {saved[max(saved)]}: --resume_from_checkpoint auto goes on from it" if saved else ""
        )
        raise UserError(
            f"process {os.environ.get('RANK')} on {socket.gethostname()}: lost the connection to the other processes: one of"
            f" them ended (then its own error says why), or the network was gone for --ddp_timeout {timeout_seconds} seconds{then}."
            f" torch: {text[-200:]}"
        ) from error


def agreed_checkpoint(folder: Path, wanted: str | None) -> str | None:
    """As `find_checkpoint`, the same for all processes. A collective.

    Where nodes share no file system a crash can leave them with different checkpoints: `auto` takes the last that all of them have.
    """
    if not several():
        return find_checkpoint(folder, wanted)
    found, trouble = None, ""
    try:
        found = find_checkpoint(folder, wanted)
    except UserError as error:
        trouble = str(error)
    named = wanted is not None and resumes(wanted) and wanted.lower() not in ("auto", "true")
    own = {} if found is None else {_step(found): found} if named else {k: str(c) for k, c in whole_checkpoints(folder).items()}
    seen: list[tuple[set[int], str]] = gather_object([(set(own), trouble)])
    for rank, (_, other) in enumerate(seen):
        if other:
            raise UserError(trouble or f"process {rank}: {other}")
    shared = set.intersection(*(steps for steps, _ in seen))
    if not shared and any(steps for steps, _ in seen):
        without = next((str(rank) for rank, (steps, _) in enumerate(seen) if not steps), "?")
        raise UserError(
            f"--resume_from_checkpoint {wanted}: the processes have no checkpoint in common (process {without} has none): where nodes"
            " share no file system, copy the folder to every node, or (not in ppo) train with --save_on_each_node True"
        )
    return own[max(shared)] if shared else None


def start_over(folder: Path, overwrite: bool, writes: bool) -> None:
    """Delete the old run, once every process has loaded and accepted what the new one needs. A collective.

    writes  whether this process is the one that writes into `folder`
    """
    if not overwrite:
        return
    state = PartialState()
    state.wait_for_everyone()
    if writes:
        remove_run(folder)
    state.wait_for_everyone()  # where nodes share a file system, none has written by then


def _step(checkpoint: str) -> int:
    number = Path(checkpoint).name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def leave_at_exit() -> None:
    """Close the connections to the other processes when this one ends.

    Left open until the interpreter is taken down, their threads may ask for it when it is gone, which aborts a run that has finished.
    """
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_initialized():
        gc.collect()  # a trainer is full of cycles, and while its DDP module lives the connections do
        distributed.destroy_process_group()
