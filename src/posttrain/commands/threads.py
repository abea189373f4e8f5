"""How OpenMP's threads wait for each other: by spinning where the machine is ours, asleep where others compute on it."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

# Of libgomp's waiting loop. Measured with SmolLM2-135M on two cores, against threads that sleep at once: training 1.4 times as fast,
# decoding too; beside a process that keeps one core busy 2 and 2.6 times slower. At 1,000 training gains nothing, at 100,000 a busy
# core makes them 6 and 11 times slower.
SPINS = "10000"
BUSY_SHARE = 0.25  # of the processors' time: from here on the machine counts as shared
LOOK_SECONDS = 0.1


def set_waiting(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what OpenMP reads when torch is loaded, unless the user has. Several processes on one machine never spin."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(environ):
        return
    environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if environ.get("LOCAL_WORLD_SIZE", "1") == "1" and busy_share() < BUSY_SHARE:
        environ["GOMP_SPINCOUNT"] = SPINS  # libgomp, which torch's wheels bring along, puts it before the policy


def busy_share() -> float:
    """How much of the time of the processors that we may use others took just now, 0 to 1; 1 where the system does not tell."""
    try:
        before = _ticks()
        time.sleep(LOOK_SECONDS)
        after = _ticks()
    except (OSError, ValueError, AttributeError):  # not Linux
        return 1.0
    idle, total = after[0] - before[0], after[1] - before[1]
    return 1.0 - idle / total if total > 0 else 0.0


def _ticks() -> tuple[int, int]:
    """Idle and all ticks since the start of the system, of the processors that this process may run on."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    rows = [[int(word) for word in words[1:9]] for words in lines if words and words[0] in ours]
    return sum(row[3] + row[4] for row in rows), sum(map(sum, rows))
