"""`posttrain chat`: talk to a model in the terminal. Works in a pipe too, one question a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from posttrain import flags
from posttrain.commands.inference import Answerer, answer, answerer_of, check_sampling, finished, with_system
from posttrain.commands.report import quiet_libraries
from posttrain.config import Config
from posttrain.data.template import encode_prompt, stop_token_ids
from posttrain.types import Message, Prompt, RowError

HELP = "/clear forgets the conversation, /system TEXT sets the system prompt (alone: removes it), /exit or Ctrl-D leaves"
SOURCE = "chat"  # what errors name instead of file:line


def run(config: Config) -> None:
    """Load, then talk until the input ends."""
    quiet_libraries()
    model, sampling = config.group(flags.InferenceFlags), config.group(flags.SamplingFlags)
    check_sampling(sampling)
    answerer = answerer_of(model)
    talk(answerer, sampling, model.system_prompt)


def talk(answerer: Answerer, sampling: flags.SamplingFlags, system_prompt: str | None, *, remember: bool = True) -> None:
    """Answer what comes from the terminal or a pipe. `remember` False: every question is put alone."""
    read = _terminal_reader() if sys.stdin.isatty() else _pipe_reader(sys.stdin)
    conversation = Conversation(answerer, sampling, system_prompt, sys.stdout, sys.stderr)
    conversation.remember = remember
    conversation.talk(read)


def _terminal_reader() -> Callable[[], str]:
    import readline  # noqa: F401 (its import gives `input` line editing and history)

    print(HELP)
    return lambda: input("\nyou: ")


def _pipe_reader(stream: TextIO) -> Callable[[], str]:
    def read() -> str:
        line = stream.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read


class Conversation:
    """Turns so far, and where answers (`out`) and remarks (`notes`) are written: in a pipe only answers go on."""

    def __init__(self, answerer: Answerer, sampling: flags.SamplingFlags, system_prompt: str | None, out: TextIO, notes: TextIO):
        self.answerer, self.sampling, self.system_prompt, self.out, self.notes = answerer, sampling, system_prompt, out, notes
        self.messages: list[Message] = []
        self.remember = True
        torch.manual_seed(sampling.seed)

    def talk(self, read: Callable[[], str]) -> None:
        """Answer line after line until `read` raises EOFError or /exit comes. Ctrl-C ends an answer, not the program."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note(f"({HELP})")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self.ask(line)

    def ask(self, question: str) -> None:
        """Stream the answer and remember both turns. A question that cannot be put is forgotten, with a line that says why."""
        if not self.remember:
            self.messages.clear()
        self.messages.append(Message("user", question))
        try:
            ids = self._fit()
        except RowError as error:
            self.messages.pop()
            self._note(f"({error.reason})")
            return
        printer = Printer(self.answerer.tokenizer, self.out)
        try:
            text = answer(self.answerer, [ids], self.sampling, printer)[0].text
        except KeyboardInterrupt:
            text = finished(self.answerer.tokenizer, printer.ids, printer.stops).text
            self._note("\n(stopped)")
        self.out.write("\n")
        self.out.flush()
        self.messages.append(Message("assistant", text))

    def _fit(self) -> list[int]:
        """Ids of the conversation, its oldest whole turns left out until prompt and answer fit the context.

        Half of a small context is kept for the answer at most. Raises RowError when the last question alone is too long.
        """
        context_tokens = self.answerer.context_tokens
        limit_tokens = context_tokens - min(self.sampling.max_new_tokens, context_tokens // 2)
        dropped = 0
        while True:
            ids = encode_prompt(self.answerer.tokenizer, Prompt(with_system(self.messages, self.system_prompt), SOURCE))
            if len(ids) <= limit_tokens:
                break
            later = [i for i, message in enumerate(self.messages) if message.role == "user" and i > 0]
            if not later:
                raise RowError(SOURCE, "question", f"the question has {len(ids)} tokens; the context has room for {limit_tokens}")
            del self.messages[: later[0]]
            dropped += 1
        if dropped:
            self._note(f"(the first {dropped} of the turns left out: the context holds {context_tokens} tokens)")
        return ids

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/clear":
            self.messages.clear()
            self._note("(forgotten)")
        elif name == "/system":
            self.system_prompt = rest.strip() or None
            self._note("(system prompt set)" if self.system_prompt else "(no system prompt)")
        else:
            self._note(f"({HELP})" if name == "/help" else f"(unknown command {name}; {HELP})")

    def _note(self, text: str) -> None:
        self.notes.write(text + "\n")
        self.notes.flush()


class Printer(BaseStreamer):
    """Writes tokens as they come: all that surely is text, so a character of several tokens waits for its last one."""

    def __init__(self, tokenizer: Any, out: TextIO):
        self.tokenizer, self.out = tokenizer, out
        self.stops = stop_token_ids(tokenizer)
        self.ids: list[int] = []
        self._printed = 0  # characters
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one token at a time (transformers' protocol)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._print(final=False)

    def end(self) -> None:
        """No more tokens come."""
        self._print(final=True)

    def _print(self, final: bool) -> None:
        # Decoded whole each time: a piece by itself may lose its leading space.
        text = finished(self.tokenizer, self.ids, self.stops).text
        if final or not text.endswith("\ufffd"):
            self.out.write(text[self._printed :])
            self.out.flush()
            self._printed = len(text)
