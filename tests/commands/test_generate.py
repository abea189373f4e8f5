"""Answers of a file: right whatever the batch, in order, ended where the template ends them, on model or adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lively import save_lively
from posttrain import flags
from posttrain.cli import main
from posttrain.commands import generate as generate_module
from posttrain.commands import inference
from posttrain.commands.generate import generate, read_prompts
from posttrain.commands.inference import Answerer, answer, finished, load_answerer, with_system
from posttrain.data.template import encode_prompt
from posttrain.types import Message, Prompt, RowError, UserError

GREEDY = flags.SamplingFlags(max_new_tokens=8, temperature=0)
QUESTIONS = ["the fox", "a", "the lazy dog rests in the shade of a tree and the quick brown fox jumps", "dog?", "over the tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return save_lively(tmp_path_factory.mktemp("lively"), tokenizer)


@pytest.fixture(scope="module")
def answerer(folder: str) -> Answerer:
    return load_answerer(folder, dtype="float32")


def prompts() -> list[Prompt]:
    return [Prompt((Message("user", question),), f"file:{i + 1}") for i, question in enumerate(QUESTIONS)]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def greedy_by_hand(answerer: Answerer, ids: list[int], n_tokens: int) -> list[int]:
    """No cache, no padding, no generate(): the likeliest next token, one after the other."""
    sequence = list(ids)
    for _ in range(n_tokens):
        with torch.no_grad():
            sequence.append(int(answerer.model(torch.tensor([sequence], device=answerer.model.device)).logits[0, -1].argmax()))
    return sequence[len(ids) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_greedy_answers_do_not_depend_on_the_batch(answerer: Answerer, tmp_path: Path, batch_size: int) -> None:
    assert generate(answerer, prompts(), str(tmp_path / "out.jsonl"), GREEDY, batch_size)[0] == len(QUESTIONS)
    written = rows(tmp_path / "out.jsonl")
    assert [row["source"] for row in written] == [f"file:{i + 1}" for i in range(len(QUESTIONS))]
    for prompt, row in zip(prompts(), written, strict=True):
        expected = finished(answerer.tokenizer, greedy_by_hand(answerer, encode_prompt(answerer.tokenizer, prompt), 8), [0, 2])
        assert (row["output"], row["n_tokens"], row["stop_reason"]) == (expected.text, len(expected.ids), expected.stop_reason)
    assert len({row["output"] for row in written}) > 1


def test_stop_token_ends_an_answer_and_is_not_part_of_it(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encode_prompt(answerer.tokenizer, prompts()[0])
    free = greedy_by_hand(answerer, ids, 8)
    stop = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    monkeypatch.setattr(inference, "stop_token_ids", lambda tokenizer: [stop])
    reply = answer(answerer, [ids], GREEDY)[0]
    assert reply.ids == free[: free.index(stop)]
    assert reply.stop_reason == "stop"
    assert answer(answerer, [ids], flags.SamplingFlags(max_new_tokens=2, temperature=0))[0].stop_reason == "length"


def test_answer_of_a_padding_token_is_not_taken_for_padding(answerer: Answerer) -> None:
    pad, stop = answerer.tokenizer.pad_token_id, answerer.tokenizer.eos_token_id
    assert finished(answerer.tokenizer, [7, pad, 9, stop, pad, pad], [stop]).ids == [7, pad, 9]


def test_sampling_is_seeded(answerer: Answerer, tmp_path: Path) -> None:
    def outputs(seed: int) -> list[str]:
        sampling = flags.SamplingFlags(max_new_tokens=8, temperature=2.0, top_p=1.0, seed=seed)
        generate(answerer, prompts(), str(tmp_path / "out.jsonl"), sampling, 2)
        return [row["output"] for row in rows(tmp_path / "out.jsonl")]

    assert outputs(1) == outputs(1)
    assert outputs(1) != outputs(2)


def of_file(answerer: Answerer, file: Path, batch_size: int = 2, **sampling: Any) -> list[str]:
    """What `posttrain generate` writes."""
    generate(answerer, prompts(), str(file), flags.SamplingFlags(**sampling), batch_size)
    return [row["output"] for row in rows(file)]


def test_a_sampled_answer_follows_from_seed_and_prompt_whatever_the_batch(answerer: Answerer, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"max_new_tokens": 8, "temperature": 2.0, "top_p": 1.0, "seed": 3}
    alone = of_file(answerer, tmp_path / "a.jsonl", 1, **wide)
    assert of_file(answerer, tmp_path / "b.jsonl", 4, **wide) == alone
    assert len({*alone}) == len(alone)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_each_sampling_flag_acts_on_a_file(answerer: Answerer, tmp_path: Path, narrow: dict[str, Any]) -> None:
    wide: dict[str, Any] = {"max_new_tokens": 8, "temperature": 30.0, "top_p": 1.0}
    greedy = of_file(answerer, tmp_path / "greedy.jsonl", max_new_tokens=8, temperature=0)
    assert of_file(answerer, tmp_path / "narrow.jsonl", **(wide | narrow)) == greedy
    assert of_file(answerer, tmp_path / "wide.jsonl", **wide) != greedy


def test_a_penalty_and_a_short_context_are_left_to_the_library(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: list[int] = []
    sample = generate_module.sample
    monkeypatch.setattr(generate_module, "sample", lambda *args, **kwargs: ours.append(1) or sample(*args, **kwargs))  # type: ignore[func-returns-value]
    long: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0}
    plain = of_file(answerer, tmp_path / "a.jsonl", **long)
    assert ours == [1]
    assert of_file(answerer, tmp_path / "b.jsonl", **long, repetition_penalty=1e6) != plain
    short = dataclasses.replace(answerer, context_tokens=max(len(encode_prompt(answerer.tokenizer, p)) for p in prompts()) + 2)
    of_file(short, tmp_path / "c.jsonl", 1, **long)
    assert [row["n_tokens"] <= 30 for row in rows(tmp_path / "c.jsonl")] == [True] * len(QUESTIONS)
    assert min(row["n_tokens"] for row in rows(tmp_path / "c.jsonl")) <= 2
    assert ours == [1]


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}],
    ids=str,
)  # fmt: skip
def test_each_sampling_flag_acts(answerer: Answerer, narrow: dict[str, Any]) -> None:
    """Narrowed to one choice, sampling is greedy; without, it is not."""
    ids = encode_prompt(answerer.tokenizer, prompts()[2])
    wide: dict[str, Any] = {"max_new_tokens": 8, "temperature": 30.0, "top_p": 1.0}
    greedy = answer(answerer, [ids], GREEDY)[0].ids
    torch.manual_seed(0)
    assert answer(answerer, [ids], flags.SamplingFlags(**(wide | narrow)))[0].ids == greedy
    assert answer(answerer, [ids], flags.SamplingFlags(**wide))[0].ids != greedy


def test_repetition_penalty_acts(answerer: Answerer) -> None:
    ids = encode_prompt(answerer.tokenizer, prompts()[0])
    long = {"max_new_tokens": 30, "temperature": 0}
    plain = answer(answerer, [ids], flags.SamplingFlags(**long))[0].ids
    penalised = answer(answerer, [ids], flags.SamplingFlags(**long, repetition_penalty=1e6))[0].ids
    assert len(set(plain)) < len(plain)
    assert len(set(penalised)) == len(penalised)


def test_settings_of_the_model_folder_do_not_leak_in(folder: str, tmp_path: Path, answerer: Answerer) -> None:
    import shutil

    other_folder = shutil.copytree(folder, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "eos_token_id": 2}
    (other_folder / "generation_config.json").write_text(json.dumps(settings))
    other = load_answerer(str(other_folder), dtype="float32")
    ids = encode_prompt(answerer.tokenizer, prompts()[0])
    long = flags.SamplingFlags(max_new_tokens=20, temperature=0)
    assert answer(other, [ids], long) == answer(answerer, [ids], long)


def test_context_limits_answer_and_prompt(answerer: Answerer, tmp_path: Path) -> None:
    ids = encode_prompt(answerer.tokenizer, prompts()[0])
    small = Answerer(answerer.model, answerer.tokenizer, len(ids) + 3)
    reply = answer(small, [ids], flags.SamplingFlags(max_new_tokens=50, temperature=0))[0]
    assert len(reply.ids) <= 3
    with pytest.raises(RowError, match=r"file:3:messages: \d+ tokens, and the model's context holds \d+"):
        generate(small, prompts(), str(tmp_path / "out.jsonl"), GREEDY, 2)
    assert not (tmp_path / "out.jsonl").exists()  # told before the first answer


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one?\n\ntwo?\n", encoding="utf-8")
    assert [p.messages for p in read_prompts(str(tmp_path / "p.txt"))] == [(Message("user", "one?"),), (Message("user", "two?"),)]
    lines = [
        {
            "messages": [
                {"role": "system", "content": "own"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"conversations": [{"from": "human", "value": "c"}]},
        {"instruction": "d", "output": "e"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = list(read_prompts(str(tmp_path / "p.jsonl"), system_prompt="flag"))
    assert [[(m.role, m.content) for m in p.messages] for p in found] == [
        [("system", "own"), ("user", "a")],
        [("system", "flag"), ("user", "c")],
        [("system", "flag"), ("user", "d")],
    ]
    assert found[1].source.endswith("p.jsonl:2")
    assert with_system([], None) == ()


def test_adapter_is_used_unmerged_with_its_tokenizer(folder: str, tmp_path: Path) -> None:
    from posttrain.model.adapter import Lora, attach_lora
    from posttrain.model.load import load_model, load_tokenizer

    adapted = attach_lora(load_model(folder, "float32"), Lora())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "doctor")
    tokenizer.save_pretrained(tmp_path / "adapter")
    both = load_answerer(folder, str(tmp_path / "adapter"), dtype="float32")
    alone = load_answerer(folder, dtype="float32")
    assert both.tokenizer.chat_template == tokenizer.chat_template
    assert alone.tokenizer.chat_template != tokenizer.chat_template
    assert not any(p.requires_grad for p in both.model.parameters())
    ids = encode_prompt(both.tokenizer, prompts()[0])
    assert answer(both, [ids], GREEDY)[0].ids == finished(both.tokenizer, greedy_by_hand(both, ids, 8), [2]).ids
    with torch.no_grad():
        expected = adapted(torch.tensor([ids])).logits
    torch.testing.assert_close(both.model(torch.tensor([ids])).logits, expected)


def test_command_line(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("the fox\ndog?\n", encoding="utf-8")
    command = ["generate", "--base_model", folder, "--data_file", str(tmp_path / "p.txt"),
               "--output_file", str(tmp_path / "deep" / "out.jsonl"), "--max_new_tokens", "4", "--temperature", "0"]  # fmt: skip
    assert main(command) == 0
    written = rows(tmp_path / "deep" / "out.jsonl")
    assert [row["messages"] for row in written] == [
        [{"role": "user", "content": "the fox"}],
        [{"role": "user", "content": "dog?"}],
    ]
    assert "2 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data_file": "absent.txt"}, "--data_file absent.txt: no such file"),
        ({"--output_file": "p.txt"}, "is --data_file itself"),
        ({"--output_file": "."}, "is a folder"),
        ({"--temperature": "-1"}, "--temperature -1.0: outside its range"),
        ({"--top_p": "0"}, "--top_p 0.0: outside its range"),
        ({"--max_new_tokens": "0"}, "--max_new_tokens 0: outside its range"),
        ({"--batch_size": "0"}, "--batch_size 0: must be at least 1"),
        ({"--data_file": "empty.txt"}, "holds no prompt|empty"),
    ],
)
def test_mistakes_end_in_one_line(
    folder: str, tmp_path: Path, changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import re

    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\n", encoding="utf-8")
    Path("empty.txt").write_text("", encoding="utf-8")
    options = {"--base_model": folder, "--data_file": "p.txt", "--output_file": "out.jsonl", **changes}
    assert main(["generate", *(word for pair in options.items() for word in pair)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("posttrain: ")
    assert re.search(message, line)


def test_vocabulary_that_does_not_belong(folder: str, tmp_path: Path) -> None:
    from posttrain.model.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="do not belong together"):
        load_answerer(folder, tokenizer_path=str(tmp_path))


@pytest.mark.slow
def test_real_model_answers_a_batch(tmp_path: Path) -> None:
    real = load_answerer("smollm2-135m-instruct")
    asked = [Prompt((Message("user", q),), "x:1") for q in ("What is the capital of France?", "Write 'yes'.", "What is 2+2?")]
    generate(real, asked, str(tmp_path / "out.jsonl"), flags.SamplingFlags(max_new_tokens=30, temperature=0), 3)
    written = rows(tmp_path / "out.jsonl")
    assert written[0]["output"] == "The capital of France is Paris."
    assert {row["stop_reason"] for row in written} == {"stop"}
