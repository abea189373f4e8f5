"""The terminal conversation: streamed text is the answer, turns are remembered, trimmed and cleared, Ctrl-C ends an answer only."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lively import save_lively
from posttrain import flags
from posttrain.cli import main
from posttrain.commands import chat
from posttrain.commands.chat import Conversation, Printer
from posttrain.commands.inference import Answer, Answerer, answer, load_answerer
from posttrain.data.template import encode_prompt
from posttrain.types import Message, Prompt

SAMPLING = flags.SamplingFlags(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return save_lively(tmp_path_factory.mktemp("lively"), tokenizer)


@pytest.fixture(scope="module")
def answerer(folder: str) -> Answerer:
    return load_answerer(folder, dtype="float32")


def lines(*given: str | type[BaseException]) -> Callable[[], str]:
    """A reader of these lines; an exception among them is raised."""
    waiting = iter(given)

    def read() -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def talk(answerer: Answerer, *given: str | type[BaseException], **options: Any) -> Conversation:
    settings: dict[str, Any] = {"sampling": SAMPLING, "system_prompt": None, "out": io.StringIO(), "notes": io.StringIO()}
    conversation = Conversation(answerer, **(settings | options))
    conversation.talk(lines(*given))
    return conversation


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answers "answer 1", "answer 2", … instead of a model's; the prompts' texts are kept in the returned list."""
    seen: list[str] = []

    def say(answerer: Answerer, prompts: list[list[int]], sampling: Any, streamer: Any) -> list[Answer]:
        seen.append(answerer.tokenizer.decode(prompts[0]))
        text = f"answer {len(seen)}"
        streamer.out.write(text)
        return [Answer([], text, "stop")]

    monkeypatch.setattr(chat, "answer", say)
    return seen


def test_streamed_text_is_the_answer(answerer: Answerer) -> None:
    out = io.StringIO()
    talk(answerer, "the fox", "dog?", out=out)
    first = [Message("user", "the fox")]
    expected = answer(answerer, [encode_prompt(answerer.tokenizer, Prompt(tuple(first), "x"))], SAMPLING)[0].text
    second = [*first, Message("assistant", expected), Message("user", "dog?")]
    expected_2 = answer(answerer, [encode_prompt(answerer.tokenizer, Prompt(tuple(second), "x"))], SAMPLING)[0].text
    assert out.getvalue() == f"{expected}\n{expected_2}\n"


def test_printer_holds_back_half_characters_and_stop_tokens(tokenizer: Any) -> None:
    out = io.StringIO()
    printer = Printer(tokenizer, out)
    printer.put(torch.tensor([[5, 6]]))  # the prompt
    written = []
    ids = [*tokenizer("a 你", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    for token in ids:
        printer.put(torch.tensor([token]))
        written.append(out.getvalue())
    printer.end()
    assert out.getvalue() == "a 你"
    assert all("\ufffd" not in text for text in written)
    assert written[0] == "a"  # as soon as it is there


def test_turns_are_remembered_and_cleared(answerer: Answerer, scripted: list[str]) -> None:
    conversation = talk(answerer, "one", "two", "/clear", "three")
    assert "one" in scripted[1]
    assert "answer 1" in scripted[1]
    assert "one" not in scripted[2]
    assert [m.content for m in conversation.messages] == ["three", "answer 3"]
    assert conversation.out.getvalue() == "answer 1\nanswer 2\nanswer 3\n"  # remarks go elsewhere


def test_system_prompt(answerer: Answerer, scripted: list[str]) -> None:
    talk(answerer, "one", "/system speak briefly", "two", "/system", "three", system_prompt="at first")
    assert ["at first" in text for text in scripted] == [True, False, False]
    assert ["speak briefly" in text for text in scripted] == [False, True, False]


def test_exit_and_unknown_commands(answerer: Answerer, scripted: list[str]) -> None:
    conversation = talk(answerer, "", "   ", "/nothing", "/help", "one", "/exit", "two")
    assert len(scripted) == 1
    assert "unknown command /nothing" in conversation.notes.getvalue()
    assert conversation.notes.getvalue().count("/clear forgets") == 2


def test_oldest_whole_turns_are_left_out_with_a_line(answerer: Answerer, scripted: list[str]) -> None:
    one_turn = len(encode_prompt(answerer.tokenizer, Prompt((Message("user", "x" * 20),), "x")))
    small = Answerer(answerer.model, answerer.tokenizer, 3 * one_turn + 2 * SAMPLING.max_new_tokens)
    conversation = talk(small, *(letter * 20 for letter in "abcdefg"), system_prompt="S")
    last = scripted[-1]
    assert "g" * 20 in last
    assert "a" * 20 not in last
    assert last.startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
    )  # system kept, and no answer without its question
    assert "turns left out" in conversation.notes.getvalue()
    assert len(encode_prompt(small.tokenizer, Prompt(tuple(conversation.messages[:-1]), "x"))) <= small.context_tokens
    assert [m.role for m in conversation.messages[:2]] == ["user", "assistant"]


def test_question_that_cannot_fit_is_told_and_forgotten(answerer: Answerer, scripted: list[str]) -> None:
    small = Answerer(answerer.model, answerer.tokenizer, 60)
    conversation = talk(small, "x" * 200, "short")
    assert "the question has" in conversation.notes.getvalue()
    assert len(scripted) == 1
    assert [m.content for m in conversation.messages] == ["short", "answer 1"]


class Interrupting(io.StringIO):
    """Ctrl-C while the n-th piece is written."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.count = at, 0

    def write(self, text: str) -> int:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_ends_the_answer_and_keeps_its_beginning(answerer: Answerer) -> None:
    whole = talk(answerer, "the fox").messages[1].content
    conversation = talk(answerer, "the fox", "dog?", out=Interrupting(at=4))
    assert len(conversation.messages) == 4
    begun = conversation.messages[1].content
    assert 0 < len(begun) < len(whole)
    assert whole.startswith(begun)
    assert "(stopped)" in conversation.notes.getvalue()


def test_ctrl_c_at_the_prompt_goes_on(answerer: Answerer, scripted: list[str]) -> None:
    talk(answerer, KeyboardInterrupt, "one")
    assert len(scripted) == 1


def test_command_line_in_a_pipe(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n/clear\nthe fox\n/exit\nnever\n"))
    assert main(["chat", "--base_model", folder, "--max_new_tokens", "4", "--temperature", "0", "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    half = len(captured.out) // 2
    assert captured.out[:half] == captured.out[half:] != ""  # the same question, forgotten in between
    assert "(forgotten)" in captured.err
    assert main(["chat", "--base_model", folder, "--top_k", "-2"]) == 2
