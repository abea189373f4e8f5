"""Probes of plan."""

from __future__ import annotations

import re
from typing import Any

from flag_probes import Lab, probe


def total(lab: Lab, **flags: Any) -> int:
    """The bytes that a plan ends with."""
    found = re.search(r"^total: ([\d,]+) bytes", lab.good("plan", **flags).out, re.MULTILINE)
    assert found
    return int(found[1].replace(",", ""))


@probe("plan", "stage")
def stage(lab: Lab) -> None:
    assert "KV cache" in lab.good("plan", stage="ppo").out
    assert "KV cache" not in lab.good("plan", stage="dpo").out
    assert "expected one of pt, sft, rm, ppo, dpo" in lab.fails("plan", stage="merge")


@probe("plan", "num_processes")
def num_processes(lab: Lab) -> None:
    assert "DDP, 4 ×" in lab.good("plan", num_processes=4).out
    assert total(lab, num_processes=4, fsdp=True, use_peft=False) < total(lab, fsdp=True, use_peft=False)
    assert "must be at least 1" in lab.fails("plan", num_processes=0)


@probe("plan", "device")
def device(lab: Lab) -> None:
    assert "1 × GPU" in lab.good("plan", device="cuda").out
    assert "1 × CPU" in lab.good("plan", device="cpu").out
    assert "16,384 tokens at once" in lab.good("plan", device="cuda", per_device_train_batch_size=16).out


@probe("plan", "device_memory_gib")
def device_memory_gib(lab: Lab) -> None:
    assert "in 64 GiB: fits" in lab.good("plan", device_memory_gib=64).out
    assert "does not fit" in lab.good("plan", device_memory_gib=0.001).out


@probe("plan", "example_tokens")
def example_tokens(lab: Lab) -> None:
    assert total(lab, example_tokens=16) < total(lab)
    assert "--max_source_length" in lab.fails("plan", stage="dpo", example_tokens=16)
