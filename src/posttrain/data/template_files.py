"""Named chat templates: the .jinja files of `templates/`, and files of the user's own.

A file may begin with a comment of `key: value` lines, which says what the Jinja itself cannot (all optional):

    family          the models that were trained with it
    aliases         other names
    stop            `eos_token`, or the mark that ends an answer
    eos             `unchanged`: the mark begins the next turn, so it does not become the tokenizer's end token
    special_tokens  marks that must be single tokens; a tokenizer that lacks one is given it
    bos             `as the tokenizer`: the template's bos_token is dropped where the tokenizer itself adds none
    system, tools, note    words for the table in docs/templates.md

`{#- include NAME -#}` is replaced by NAME.jinja, beside the file or of `templates/`: what a tokenizer is given stands alone.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.types import UserError

FOLDER = Path(__file__).parent / "templates"
DEFAULT = "vicuna"
OWN = "tokenizer's own template"  # or a file without a header, whose text does not tell
_HEADER = re.compile(r"\A\s*\{#-?(.*?)-?#\}\s*", re.DOTALL)
_INCLUDE = re.compile(r"\{#- include (\w+) -#\}")
_MARK = re.compile(r"\{#- posttrain template: (.*?) -#\}")
_KEYS = ("family", "aliases", "stop", "eos", "special_tokens", "bos", "system", "tools", "note")


@dataclass(frozen=True)
class Template:
    """A chat template and what a tokenizer needs to speak it."""

    name: str  # a named one, the path of a file, or "the tokenizer's own"
    chat_template: str | dict[str, str]  # Jinja; a tokenizer's own may be several, by purpose
    stop: str = "eos_token"  # `eos_token`, or the mark that ends an answer
    stop_becomes_eos: bool = False
    special_tokens: tuple[str, ...] = ()
    drops_foreign_bos: bool = False  # no bos_token where the tokenizer itself adds none
    aliases: tuple[str, ...] = ()
    family: str = ""
    system: str = ""
    tools: str = ""
    note: str = ""
    added_tokens: tuple[str, ...] = ()  # what the tokenizer had to be given; the model's embedding must grow by as many


@cache
def list_templates() -> tuple[str, ...]:
    """The names of all named templates, sorted; aliases are not among them."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.startswith("_")))


def load_template(name: str) -> Template:
    """A named template, or a file's when `name` is a path (it ends in .jinja or holds a slash). Raises UserError when unknown.

    Capitals, hyphens, dots and underscores do not matter in a name, and other names of a family are known (`aliases`).
    """
    if name.endswith((".jinja", ".jinja2", ".j2")) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"--template_name {name}: no such file")
        return _parse(name, _read(path))
    known = _named()
    if _plain(name) in known:
        return known[_plain(name)]
    near = difflib.get_close_matches(_plain(name), known, n=1)
    guess = f"did you mean {known[near[0]].name}? " if near else ""
    raise UserError(f"--template_name {name}: unknown; {guess}known: {', '.join(list_templates())}; or give a .jinja file")


@cache
def _named() -> dict[str, Template]:
    """Every named template, under its name and under its aliases."""
    templates = [_parse(name, _read(FOLDER / f"{name}.jinja")) for name in list_templates()]
    aliases = {_plain(alias): template for template in templates for alias in template.aliases}
    return aliases | {_plain(template.name): template for template in templates}


def label(chat_template: str | dict[str, str] | None) -> str:
    """How to name a tokenizer's template to the user."""
    found = _MARK.search(chat_template) if isinstance(chat_template, str) else None
    return f"template {found.group(1)}" if found else OWN


def _read(path: Path) -> str:
    """The file's text with its includes in place. Raises UserError when one is missing."""

    def included(found: re.Match[str]) -> str:
        name = f"{found.group(1)}.jinja"
        file = next((f for f in (path.parent / name, FOLDER / name) if f.is_file()), None)
        if file is None:
            raise UserError(f"{path}: includes {name}, which is neither beside it nor among {', '.join(list_templates())}")
        return _read(file).strip()

    return _INCLUDE.sub(included, path.read_text(encoding="utf-8"))


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def _parse(name: str, text: str) -> Template:
    header = _HEADER.match(text)
    lines = [line.partition(":") for line in header.group(1).splitlines() if ":" in line] if header else []
    told = {key.strip(): value.strip() for key, _, value in lines if key.strip() in _KEYS}
    # A file without a header is the user's finished template: not a character of it changes.
    mark = f"{{#- posttrain template: {Path(name).name} -#}}\n"
    chat_template = mark + text[header.end() :].rstrip() if header and told else text
    stop = told.get("stop", "eos_token")
    return Template(
        name=name,
        chat_template=chat_template,
        stop=stop,
        stop_becomes_eos=stop != "eos_token" and told.get("eos") != "unchanged",
        special_tokens=tuple(told.get("special_tokens", "").split()),
        drops_foreign_bos=told.get("bos") == "as the tokenizer",
        aliases=tuple(told.get("aliases", "").split()),
        family=told.get("family", ""),
        system=told.get("system", ""),
        tools=told.get("tools", "generic"),
        note=told.get("note", ""),
    )
