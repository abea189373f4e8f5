"""Probes of the flags of a quantised base and of a mixture's router, in training and where a model is used."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from flag_probes import PROBES, Lab, probe
from posttrain.model.load import load_tokenizer
from preference_runs import tiny_mixtral

SAID = re.compile(r" in (4bit|4bit-double|8bit): (?:.*)\b(uint8|int8) [\d,]+ bytes")


def said(text: str) -> str | None:
    """How the base was loaded, by the line that says so."""
    found = SAID.search(text)
    return found[1] if found else None


@probe("train", "load_in_4bit")
def load_in_4bit(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(load_in_4bit=True)
    assert (said(one.err), said(other.err)) == (None, "4bit")
    before, after = (run.logged(lab.measure)[0] for run in (one, other))
    assert before != after == pytest.approx(before, rel=0.02)


@probe("train", "load_in_8bit")
def load_in_8bit(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(load_in_8bit=True)
    assert (said(one.err), said(other.err)) == (None, "8bit")
    before, after = (run.logged(lab.measure)[0] for run in (one, other))
    assert before != after == pytest.approx(before, rel=0.02)


@probe("train", "qlora")
def qlora(lab: Lab) -> None:
    assert said(lab.sft(qlora=True).err) == "4bit-double"
    assert "exclude" in lab.fails("sft", load_in_4bit=True, load_in_8bit=True)


@probe("train", "router_aux_loss_coef")
def router_aux_loss_coef(lab: Lab) -> None:
    mixture = tiny_mixtral(lab.path("mixture"), load_tokenizer(str(lab.model)))
    own, more, off = (lab.sft(model_name_or_path=mixture, router_aux_loss_coef=weight) for weight in (None, 0.5, 0))
    assert more.logged("router_loss")[0] == pytest.approx(500 * own.logged("router_loss")[0], rel=1e-3)
    assert not off.logged("router_loss")


def _used(flag: str, how: str, command: str) -> Callable[[Lab], None]:
    def check(lab: Lab) -> None:
        found = [said(lab.good(command, stdin="what is 1?\n", **{flag: value}).err) for value in (False, True)]
        assert found == [None, how]

    return check


for _flag, _how in (("load_in_4bit", "4bit-double"), ("load_in_8bit", "8bit")):
    for _command in ("generate", "chat", "inference", "score"):
        PROBES[_command, _flag] = _used(_flag, _how, _command)
