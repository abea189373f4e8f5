"""The guides are true: every command line in them parses, every flag exists, every example row is of its format."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from conftest import ROOT
from posttrain import cli, config, hf_flags
from posttrain.commands.table import understood
from posttrain.data.formats import FORMATS, detect, parse
from posttrain.types import Pair

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
NOT_OURS = {  # flags of vllm, torchrun, accelerate and the benchmarks that the guides show
    "tool-call-parser", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "multi_gpu", "num_processes",
    "num_machines", "mixed_precision", "dynamo_backend", "bytes_only", "max_restarts",
}  # fmt: skip
TABLES = "## Renamed and refused flags"  # the last section of docs/training.md
LOSSES = config.options_of(cli.COMMANDS["dpo"].groups, True)["loss_type"].choices
WORDS_OF_EVERY_COMMAND = {"config", "help", "all"}


def known_flags() -> set[str]:
    """Own, library, renamed and refused."""
    own = {name for command in cli.COMMANDS.values() for name in config.options_of(command.groups, command.training)}
    of_one = {word for table in (hf_flags.OF_COMMAND, hf_flags.REFUSED_BY) for words in table.values() for word in words}
    return own | of_one | set(hf_flags.library_flags()) | set(hf_flags.RENAMED) | set(hf_flags.REFUSED) | WORDS_OF_EVERY_COMMAND


def command_lines(text: str) -> list[str]:
    """`posttrain …` lines of code blocks and of inline code, without prompt, comment and what torchrun adds."""
    blocks = [line for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    inline = re.findall(r"`(posttrain [^`\n]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in [*blocks, *inline]:
        line = re.sub(r"^torchrun .*-m posttrain", "posttrain", line.removeprefix("$ "))
        if re.match(r"posttrain +[a-z]", line) and not re.match(r"posttrain +[a-z]+:", line):
            found.append(line)
    return found


def parse_line(line: str) -> None:
    """As `posttrain` would, except that files need not exist and what a shortened line leaves out may be missing."""
    name, *words = shlex.split(line, comments=True)[1:]
    if "--help" in words:
        return
    name, command, words = understood(name, words)
    options = config.options_of(command.groups, command.training)
    words = [word for word in words if word != "…"]
    missing = [o.name for o in options.values() if o.default is config.dataclasses.MISSING and f"--{o.name}" not in words]
    config.parse(name, command.groups, command.training, [*words, *(w for n in missing for w in (f"--{n}", "x"))])


@pytest.mark.parametrize("page", [*READMES, *GUIDES], ids=lambda page: page.name)
def test_every_command_line_parses(page: Path) -> None:
    lines = command_lines(page.read_text(encoding="utf-8"))
    assert lines
    for line in lines:
        parse_line(line)


def test_a_wrong_command_line_is_noticed() -> None:
    (line,) = command_lines("```\nposttrain sft --learning_rat 1  # comment\n```\n")
    with pytest.raises(config.UserError):
        parse_line(line)
    assert command_lines("Run `posttrain serve` now.") == ["posttrain serve"]
    with pytest.raises(KeyError):
        parse_line("posttrain serve")


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_flag_exists(page: Path) -> None:
    used = set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", page.read_text(encoding="utf-8")))
    assert used - known_flags() - NOT_OURS == set()


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    written = page.read_text(encoding="utf-8").partition(TABLES)[0]
    assert len(written.splitlines()) <= 150


@pytest.mark.parametrize("page", [*READMES, *GUIDES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def example_rows(page: str) -> list[tuple[str, dict[str, object]]]:
    """(format, row) of the table of formats in a guide; "…" goes on with the format above."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows, name = [], ""
    for named, example in re.findall(r"^\| (?:`(\w+)`|… [\w ]+) \| `(\{.*?\})`", text, re.M):
        name = named or name
        rows.append((name, json.loads(example)))
    return rows


def test_example_rows_are_of_their_format() -> None:
    rows = example_rows("data.md")
    for name, row in rows:
        assert detect(row) == name
        parse(row, "docs/data.md:1")
    assert {name for name, _ in rows} == set(FORMATS)


def test_example_pairs_are_pairs() -> None:
    rows = example_rows("preferences.md")
    assert [name for name, _ in rows] == ["sharegpt", "sharegpt", "openai", "qa", "qa", "hh", "hh"]
    for name, row in rows:
        assert detect(row) == name
        pair = parse(row, "docs/preferences.md:1", "pair")
        assert isinstance(pair, Pair)
        assert pair.prompt[-1].role == "user"


def test_the_guide_names_every_loss() -> None:
    text = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    table = text.partition("| `--loss_type` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == [*LOSSES]


def own_flags() -> dict[str, set[str]]:
    """Flag of our own → its commands, from the golden list."""
    golden = (ROOT / "tests" / "flags_golden.txt").read_text(encoding="utf-8").partition("\n# Fields of transformers")[0]
    found: dict[str, set[str]] = defaultdict(set)
    for line in golden.splitlines()[1:]:
        command, name = line.split()[:2]
        found[name].add(command)
    return found


def test_the_page_of_options_names_every_flag() -> None:
    """In its tables, where a cost and a use stand beside it."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    named = {name for row in rows for name in re.findall(r"--(\w+)", row.split(" | ")[0])}
    assert len(own_flags()) > 100
    assert set(own_flags()) - named == set()
    assert all(len(row.split(" | ")) == 4 and all(cell.strip("| ") for cell in row.split(" | ")) for row in rows)


def flag_tables() -> str:
    """What docs/training.md says about renamed and refused flags, from the tables that the code itself follows."""

    def grouped(pairs: list[tuple[str, str]]) -> list[str]:
        by_reason = defaultdict(list)
        for name, reason in pairs:
            by_reason[reason].append(f"`--{name}`")
        return [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]

    renamed = [f"`--{old}` → `--{new}`" + (f" ({why})" if why else "") for old, (new, why) in hf_flags.RENAMED.items() if new]
    lines = textwrap.wrap(f"Renamed: {', '.join(renamed)}.", 140, break_on_hyphens=False)
    lines += ["", "| needed no more: a line says so, and the run goes on | why |", "|---|---|"]
    lines += grouped([(old, why) for old, (new, why) in hf_flags.RENAMED.items() if new is None])
    lines += ["", "| refused: would do nothing here | why |", "|---|---|"]
    lines += grouped(list(hf_flags.REFUSED.items()))
    for command, words in hf_flags.OF_COMMAND.items():
        new = [f"`--{old}` → `--{name}`" + (f" ({why})" if why else "") for old, (name, why) in words.items() if name]
        lines += ["", *textwrap.wrap(f"In `{command}` also: {', '.join(new)}.", 140, break_on_hyphens=False)] if new else []
        lines += ["", f"| `{command}` alone: needed no more, or refused | why |", "|---|---|"]
        lines += grouped(
            [*((old, why) for old, (name, why) in words.items() if name is None), *hf_flags.REFUSED_BY.get(command, {}).items()]
        )
    return "\n".join(lines) + "\n"


def test_tables_of_flags_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.partition(f"{TABLES}\n\n")[2]
    assert shown == flag_tables(), f"docs/training.md, last section, must be:\n{flag_tables()}"


def test_readmes_show_the_same_blocks_and_sections() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in READMES)
    assert re.findall(r"^```.*?^```", english, re.M | re.S) == re.findall(r"^```.*?^```", chinese, re.M | re.S)
    assert len(re.findall(r"^## ", english, re.M)) == len(re.findall(r"^## ", chinese, re.M))
    assert set(re.findall(r"\]\((docs/[^)]*)\)", english)) == set(re.findall(r"\]\((docs/[^)]*)\)", chinese))
