"""How a flag is written down."""

from __future__ import annotations

import dataclasses
from typing import Any

REQUIRED: Any = dataclasses.MISSING


def flag(default: Any, help: str) -> Any:
    """A field with its help string; `REQUIRED` marks a flag without a default."""
    if default is REQUIRED:
        return dataclasses.field(metadata={"help": help}, kw_only=True)
    return dataclasses.field(default=default, metadata={"help": help}, kw_only=True)
