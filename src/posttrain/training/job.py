"""A process that is one of several: its connections to the others, what they agree on, and how it leaves them."""

from __future__ import annotations

import atexit
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
from accelerate.utils import gather_object
from torch import distributed

from posttrain.training.artifacts import find_checkpoint, whole_checkpoints
from posttrain.types import UserError

# What torch says of a connection that broke, beside its own error classes: gloo raises a plain RuntimeError.
_LOST = (
    "gloo/transport",
    "Gloo connectFullMesh failed",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
)


def several() -> bool:
    """Whether this process is one of several (torchrun sets WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connect(on_cpu: bool, backend: str | None, timeout_seconds: int) -> None:
    """Connect the processes of a CPU run. On GPUs the library does, with the same timeout; on a CPU it leaves the timeout out."""
    if not several() or not on_cpu or distributed.is_initialized():
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ["WORLD_SIZE"]) and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = _interface_towards(os.environ.get("MASTER_ADDR", ""))
        if name:
            os.environ["GLOO_SOCKET_IFNAME"] = name
    with lost_connection_told("while the processes were meeting", timeout_seconds):
        distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=timeout_seconds))


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
def lost_connection_told(when: str, timeout_seconds: int, folder: Path | None = None) -> Iterator[None]:
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
            f"process {os.environ.get('RANK')} on {socket.gethostname()}: lost the connection to the other processes {when}: one of"
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
    named = wanted is not None and wanted.lower() not in ("auto", "true", "false")
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
            " share no file system, train with --save_on_each_node True, or copy the folder to every node"
        )
    return own[max(shared)] if shared else None


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
