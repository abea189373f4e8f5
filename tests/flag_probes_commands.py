"""Probes of convert, merge, generate and chat."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flag_probes import PROBES, Lab, Run, probe

# --- convert --------------------------------------------------------------------------------------------------------------


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@probe("convert", "in_file")
def in_file(lab: Lab) -> None:
    assert [len(rows(lab.good("convert", in_file=file).folder)) for file in (lab.chats, lab.other_chats)] == [17, 9]


@probe("convert", "out_file")
def out_file(lab: Lab) -> None:
    target = lab.path("elsewhere.jsonl")
    lab.good("convert", out_file=target)
    assert len(rows(target)) == 17


@probe("convert", "data_type")
def data_type(lab: Lab) -> None:
    file = lab.jsonl("both.jsonl", [{"instruction": "name a fox", "output": "red", "question": "a dog?", "answer": "grey"}])
    asked = [rows(lab.good("convert", in_file=file, data_type=name).folder)[0] for name in ("alpaca", "qa", "json2jsonl")]
    assert [row.get("conversations", [{}])[0].get("value") for row in asked] == ["name a fox", "a dog?", None]
    assert asked[2]["question"] == "a dog?"


@probe("convert", "file_type")
def file_type(lab: Lab) -> None:
    file = lab.path("table.txt")
    file.write_text("question,answer\na dog?,grey\na fox?,red\n")
    as_text = rows(lab.good("convert", in_file=file).folder)
    as_table = rows(lab.good("convert", in_file=file, file_type="csv").folder)
    assert as_text[1] == {"text": "a dog?,grey"}
    assert as_table[0]["conversations"][0]["value"] == "a dog?"


@probe("convert", "bad_rows")
def convert_bad_rows(lab: Lab) -> None:
    assert len(rows(lab.good("convert", in_file=lab.bad).folder)) == 8
    assert "bad.jsonl:6:" in lab.fails("convert", in_file=lab.bad, bad_rows="error")


# --- merge ----------------------------------------------------------------------------------------------------------------


def merged(run: Run) -> dict[str, torch.Tensor]:
    """All tensors of the merged model."""
    return {name: tensor for file in run.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same weights."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@probe("merge", "base_model", "output_dir")
def merge_base_model(lab: Lab) -> None:
    run = lab.good("merge", output_dir=lab.path("here"))
    assert run.folder.name.endswith("here")
    assert not same(merged(run), load_file(lab.model / "model.safetensors"))
    assert "another base" in lab.fails("merge", base_model=lab.other_model)


@probe("merge", "lora_model")
def merge_lora_model(lab: Lab) -> None:
    assert not same(merged(lab.good("merge")), merged(lab.good("merge", lora_model=lab.sft().folder)))


@probe("merge", "tokenizer_path")
def merge_tokenizer_path(lab: Lab) -> None:
    runs = [lab.good("merge"), lab.good("merge", tokenizer_path=lab.other_model)]
    assert ["!" in (run.folder / "chat_template.jinja").read_text() for run in runs] == [False, True]


@probe("merge", "resize_emb")
def merge_resize_emb(lab: Lab) -> None:
    from transformers import AutoTokenizer

    grown = lab.path("grown-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    tokenizer.add_tokens(["<a>", "<b>"], special_tokens=True)
    tokenizer.save_pretrained(grown)
    assert "--resize_emb" in lab.fails("merge", tokenizer_path=grown)
    run = lab.good("merge", tokenizer_path=grown, resize_emb=True)
    assert merged(run)["model.embed_tokens.weight"].shape[0] == len(tokenizer)


@probe("merge", "dtype")
def merge_dtype(lab: Lab) -> None:
    for name, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        assert {tensor.dtype for tensor in merged(lab.good("merge", dtype=name)).values()} == {expected}


@probe("merge", "max_shard_size")
def merge_max_shard_size(lab: Lab) -> None:
    counts = [len(list(lab.good("merge", max_shard_size=size).folder.glob("*.safetensors"))) for size in ("5GB", "60KB")]
    assert counts[0] == 1 < counts[1]


@probe("merge", "overwrite_output_dir")
def merge_overwrite_output_dir(lab: Lab) -> None:
    folder = lab.good("merge").folder
    before = merged(lab.good("merge", output_dir=folder, overwrite_output_dir=True, lora_model=lab.sft().folder))
    assert "is not empty" in lab.fails("merge", output_dir=folder)
    after = merged(lab.good("merge", output_dir=folder, overwrite_output_dir=True))
    assert not same(before, after)


# --- generate and chat ----------------------------------------------------------------------------------------------------


def answers(lab: Lab, command: str, **flags: Any) -> list[str]:
    """What the model says to three questions; of a chat, all that was printed."""
    if command != "chat":
        return [row["output"] for row in rows(lab.good(command, **flags).folder)]
    return [lab.good("chat", stdin="what is 0?\n/clear\nwhat is 1?\n/clear\nwhat is 2?\n", **flags).out]


@contextmanager
def batches(command: str) -> Iterator[list[list[list[int]]]]:
    """The batches of prompts that the model is given: of a file by our own decoding, in a chat by the library's."""
    from posttrain.commands import chat
    from posttrain.training import rollout

    module, name = (chat, "answer") if command == "chat" else (rollout, "_decode")
    seen, original = list[list[list[int]]](), getattr(module, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(list(args[1]))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, spy)
        yield seen


def prompt_tokens(lab: Lab, command: str, **flags: Any) -> list[list[int]]:
    """The ids of the prompts that the model is given."""
    with batches(command) as seen:
        answers(lab, command, **flags)
    return [prompt for batch in seen for prompt in batch]


def base_model(lab: Lab, command: str) -> None:
    assert answers(lab, command) != answers(lab, command, base_model=lab.merged)


def lora_model(lab: Lab, command: str) -> None:
    assert answers(lab, command) != answers(lab, command, lora_model=lab.adapter)


def tokenizer_path(lab: Lab, command: str) -> None:
    one, other = (max(map(len, prompt_tokens(lab, command, tokenizer_path=path))) for path in (None, lab.other_model))
    assert other > one  # by the '!' of its template


def template_name(lab: Lab, command: str) -> None:
    assert prompt_tokens(lab, command) != prompt_tokens(lab, command, template_name="alpaca")


def system_prompt(lab: Lab, command: str) -> None:
    one, other = (prompt_tokens(lab, command, system_prompt=text) for text in (None, "be brief"))
    assert all(len(b) > len(a) for a, b in zip(one, other, strict=True))


def dtype(lab: Lab, command: str) -> None:
    from posttrain.commands import inference

    types: list[torch.dtype] = []
    load = inference.load_model

    def spy(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        types.append(model.dtype)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "load_model", spy)
        for name in ("float32", "bfloat16"):
            answers(lab, command, dtype=name)
    assert types == [torch.float32, torch.bfloat16]


def trust_remote_code(lab: Lab, command: str) -> None:
    assert "--trust_remote_code" in lab.fails(command, base_model=lab.coded_model)
    assert answers(lab, command, base_model=lab.coded_model, trust_remote_code=True) == answers(lab, command)


def max_new_tokens(lab: Lab, command: str) -> None:
    short, long = (sum(map(len, answers(lab, command, max_new_tokens=n))) for n in (1, 12))
    assert short < long


def temperature(lab: Lab, command: str) -> None:
    assert answers(lab, command) != answers(lab, command, temperature=2)


def top_p(lab: Lab, command: str) -> None:
    hot = {"temperature": 2, "top_k": 0}
    assert answers(lab, command, **hot, top_p=1e-6) == answers(lab, command)
    assert answers(lab, command, **hot, top_p=1.0) != answers(lab, command)


def top_k(lab: Lab, command: str) -> None:
    hot = {"temperature": 2, "top_p": 1.0}
    assert answers(lab, command, **hot, top_k=1) == answers(lab, command)
    assert answers(lab, command, **hot, top_k=0) != answers(lab, command)


def repetition_penalty(lab: Lab, command: str) -> None:
    assert answers(lab, command) != answers(lab, command, repetition_penalty=5.0)


def seed(lab: Lab, command: str) -> None:
    one, again, other = (answers(lab, command, temperature=2, seed=n) for n in (1, 1, 2))
    assert one == again != other


LONG = "what is a fox? " * 100  # 1,100 tokens; the model has 512 positions


def told(lab: Lab, command: str, **flags: Any) -> tuple[int | None, str]:
    """A question that is too long: the tokens that the context is said to hold, answer and all; None where it was taken. And all that was said."""
    if command == "chat":
        said = lab.run("chat", stdin=f"{LONG}\n", **flags).err
        room = re.search(r"the context has room for (\d+)", said)
        return int(room[1]) + 8 if room else None, said  # --max_new_tokens
    row = {"messages": [{"role": "user", "content": LONG}]}
    if command == "score":
        row["messages"].append({"role": "assistant", "content": "red"})
    said = lab.run(command, data_file=lab.jsonl(f"long-{command}.jsonl", [row]), **flags).err
    holds = re.search(r"the model's context holds (\d+)", said)
    return int(holds[1]) if holds else None, said


def rope_scaling(lab: Lab, command: str) -> None:
    assert told(lab, command)[0] == 512
    for kind in ("linear", "dynamic", "yarn", "llama3"):
        held, said = told(lab, command, rope_scaling=kind, rope_factor=4)
        assert held is None
        assert f"rope: {kind}, factor 4" in said


def rope_factor(lab: Lab, command: str) -> None:
    assert told(lab, command, rope_scaling="dynamic", rope_factor=1.1)[0] == 563
    assert told(lab, command, rope_scaling="dynamic", rope_factor=4)[0] is None
    for flags, said in (
        ({"rope_scaling": "dynamic"}, "say by how much with --rope_factor"),
        ({"rope_factor": 2}, "--rope_factor does nothing without --rope_scaling"),
        ({"rope_scaling": "dynamic", "rope_factor": 1}, "--rope_factor 1.0: must be above 1"),
    ):
        assert said in told(lab, command, **flags)[1]


def _for(command: str, check: Callable[[Lab, str], None]) -> Callable[[Lab], None]:
    return lambda lab: check(lab, command)


for _check in (
    base_model, lora_model, tokenizer_path, template_name, system_prompt, dtype, trust_remote_code, max_new_tokens, temperature,
    top_p, top_k, repetition_penalty, seed,
):  # fmt: skip
    for _command in ("generate", "chat", "inference"):
        PROBES[_command, _check.__name__] = _for(_command, _check)


@probe("merge", "trust_remote_code")
def merge_trust_remote_code(lab: Lab) -> None:
    assert "--trust_remote_code" in lab.fails("merge", base_model=lab.coded_model)
    assert same(merged(lab.good("merge", base_model=lab.coded_model, trust_remote_code=True)), merged(lab.good("merge")))


def data_file(lab: Lab, command: str) -> None:
    file = lab.jsonl("one.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    assert [len(answers(lab, command, **data)) for data in ({}, {"data_file": file})] == [3, 1]


def output_file(lab: Lab, command: str) -> None:
    target = lab.path("elsewhere.jsonl")
    lab.good(command, output_file=target)
    assert len(rows(target)) == 3


def batch_size(lab: Lab, command: str) -> None:
    with batches(command) as seen:
        for n in (2, 3):
            lab.good(command, batch_size=n)
    assert [len(batch) for batch in seen] == [2, 1, 3]


for _check in (rope_scaling, rope_factor):
    for _command in ("generate", "chat", "inference", "score"):
        PROBES[_command, _check.__name__] = _for(_command, _check)


for _check in (data_file, output_file, batch_size):
    for _command in ("generate", "inference"):
        PROBES[_command, _check.__name__] = _for(_command, _check)
