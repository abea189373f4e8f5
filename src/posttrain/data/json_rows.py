"""The elements of a JSON array one by one, with the line each starts on, in memory of one element."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.types import RowError, UserError

_PIECE_CHARS = 1 << 18
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"

NOT_UTF8 = "not UTF-8; convert the file, for example iconv -f GB18030 -t UTF-8"


def json_values(stream: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element of an array, or of each of several values that follow one another.

    Raises RowError at file:line:column where the text is broken: nothing behind that point can be told apart.
    """
    text = _Text(stream, path)
    in_array = text.peek() == "["
    if in_array:
        text.at += 1
    while (char := text.peek()) not in ("", "]"):
        yield text.line, text.value()
        char = text.peek()
        if in_array and char == ",":
            text.at += 1
            if text.peek() == "]":
                raise text.broken(text.at, "a comma before the end of the array")
        elif in_array and char != "]":
            raise text.broken(text.at, "expected , or ] after an element" if char else "the array is not closed")
    if in_array:
        if char != "]":
            raise text.broken(text.at, "the array is not closed")
        text.at += 1
        char = text.peek()
    if char:
        raise text.broken(text.at, "text after the end of the value")


class _Text:
    """The undecoded rest of a stream; `at` is the reading position in `buffer`, `line` its line."""

    def __init__(self, stream: io.BufferedReader, path: Path):
        self.stream, self.path = stream, path
        self.buffer, self.at, self.line = "", 0, 1
        self.dropped_chars = 0  # of the line that the buffer starts in
        self.read_bytes = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> bool:
        """Read on, at least as much as is there (so that a long element costs linear time). False at the end."""
        piece = self.stream.read(max(_PIECE_CHARS, len(self.buffer) - self.at))
        pending_bytes = len(self.decoder.getstate()[0])
        try:
            new = self.decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset_bytes = self.read_bytes - pending_bytes + error.start
            raise UserError(f"{self.path}: byte {offset_bytes}: {NOT_UTF8}") from None
        if not piece:
            return False
        if self.read_bytes == 0:
            new = new.removeprefix("\ufeff")
        self.read_bytes += len(piece)
        taken = self.buffer[: self.at]
        newline = taken.rfind("\n")
        self.dropped_chars = len(taken) - newline - 1 if newline >= 0 else self.dropped_chars + len(taken)
        self.buffer, self.at = self.buffer[self.at :] + new, 0
        return True

    def peek(self) -> str:
        """The next character that is no space, at `at`; "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in _SPACE:
                self.line += self.buffer[self.at] == "\n"
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decode the value at `at` and go behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - 16  # 16: a cut escape or literal
                if cut and self.more():
                    continue
                raise self.broken(error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(self.at, str(error)) from None
            if end < len(self.buffer) or not self.more():  # a number at the very end may go on
                break
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end
        return value

    def broken(self, at: int, why: str) -> RowError:
        """The error at position `at` of the buffer."""
        line = self.line + self.buffer.count("\n", self.at, at)
        newline = self.buffer.rfind("\n", 0, at)
        column = at - newline if newline >= 0 else self.dropped_chars + at + 1
        return RowError(f"{self.path}:{line}", f"column {column}", f"broken JSON: {why}; nothing behind it can be read")
