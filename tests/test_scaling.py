"""What processes send each other, counted by the kernel in a network of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


def test_lora_under_ddp_sends_the_adapters_gradients_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by `accelerate launch`, as the benchmark is by torchrun: both launchers are used."""
    if os.geteuid() or shutil.which("ip") is None or subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        pytest.skip("a network of its own needs root, unshare and iproute2")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    try:
        scaling.save_inputs(tmp_path)
        got = scaling.start(tmp_path, "lora", 2, {}, scaling.ACCELERATE)
        assert got["processes"] == 2
        assert 0 < 10 * got["trained"] < got["total"]  # the base's gradients would not go unseen
        theory = scaling.ENGINES[0].sent_bytes(got["total"], got["trained"], 2, 1)
        assert theory == 4 * got["trained"]
        assert theory <= got["sent_bytes"] <= scaling.HEADERS * theory
    finally:
        sys.modules.pop("scaling")
