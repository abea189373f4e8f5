"""Probes of score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from flag_probes import Lab, probe
from flag_probes_commands import rows
from flag_probes_models import reward_adapter
from posttrain.commands import score


def scores(lab: Lab, **flags: Any) -> list[float]:
    """What the reward model gives the chats."""
    return [row["score"] for row in rows(lab.good("score", **flags).folder)]


@probe("score", "base_model")
def base_model(lab: Lab) -> None:
    merged = lab.good("merge", lora_model=lab.reward_adapter, base_model=lab.model).folder
    given = {"base_model": merged, "lora_model": None}
    assert scores(lab, **given) == pytest.approx(scores(lab), abs=1e-5)
    assert "has no score head" in lab.fails("score", lora_model=None)


@probe("score", "lora_model")
def lora_model(lab: Lab) -> None:
    other = reward_adapter(lab.model, lab.path("other-reward"), seed=1)
    assert scores(lab) != pytest.approx(scores(lab, lora_model=other), abs=1e-2)


@probe("score", "tokenizer_path")
def tokenizer_path(lab: Lab) -> None:
    assert scores(lab) != pytest.approx(scores(lab, tokenizer_path=lab.other_model), abs=1e-2)


@probe("score", "template_name")
def template_name(lab: Lab) -> None:
    assert scores(lab) != pytest.approx(scores(lab, template_name="alpaca"), abs=1e-2)


@probe("score", "system_prompt")
def system_prompt(lab: Lab) -> None:
    run = lab.good("score", system_prompt="be brief")
    assert {row["messages"][0]["content"] for row in rows(run.folder)} == {"be brief"}
    assert [row["score"] for row in rows(run.folder)] != pytest.approx(scores(lab), abs=1e-3)


@probe("score", "dtype")
def dtype(lab: Lab) -> None:
    one, other = (scores(lab, dtype=name) for name in ("float32", "bfloat16"))
    assert one == pytest.approx(other, abs=0.2)
    assert one != pytest.approx(other, abs=1e-5)


@probe("score", "trust_remote_code")
def trust_remote_code(lab: Lab) -> None:
    assert "--trust_remote_code" in lab.fails("score", base_model=lab.coded_model)
    assert scores(lab, base_model=lab.coded_model, trust_remote_code=True) == scores(lab)


@probe("score", "data_file")
def data_file(lab: Lab) -> None:
    assert [len(scores(lab, data_file=file)) for file in (lab.chats, lab.other_chats)] == [17, 9]


@probe("score", "output_file")
def output_file(lab: Lab) -> None:
    target = lab.path("elsewhere.jsonl")
    lab.good("score", output_file=target)
    assert len(rows(target)) == 17


@probe("score", "batch_size")
def batch_size(lab: Lab) -> None:
    sizes: list[int] = []
    collate = score._collate

    def spy(of_batch: Sequence[Any], *args: Any) -> Any:
        sizes.append(len(of_batch))
        return collate(of_batch, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "_collate", spy)
        torch.testing.assert_close(*(torch.tensor(scores(lab, batch_size=n)) for n in (7, 17)), atol=1e-5, rtol=0)
    assert sizes == [7, 7, 3, 17]
