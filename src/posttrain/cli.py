"""The command line: `posttrain <command> --flag value …`. Only the chosen command's module is imported."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING

from posttrain import __version__, config
from posttrain.commands.report import first_to_say, say
from posttrain.commands.table import COMMANDS, understood
from posttrain.commands.threads import set_waiting
from posttrain.data.template_files import list_templates
from posttrain.model.own_code import MISFITS, misfit_line
from posttrain.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0, or 2 with one line on standard error for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        if first_to_say(str(error)):
            print(f"posttrain: {error}", file=sys.stderr, flush=True)
        return 2
    except MISFITS as error:  # a model's own code, that another transformers was meant to run; any other of them is our bug
        line = misfit_line(error)
        if line is None:
            raise
        if first_to_say(line):
            print(f"posttrain: {line}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # the reader of our output has gone: `posttrain show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if first_to_say("interrupted"):
            print("posttrain: interrupted", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"posttrain {__version__}")
        return 0
    name = words.pop(0)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if "-h" in words or "--help" in words:
        print(command_help(name, everything="--all" in words))
        return 0
    whose, command, words = understood(name, words)
    parsed = config.parse(whose, command.groups, command.training, words)
    for note in parsed.notes:
        say(f"note: {note}")
    if "cache_dir" in parsed.values and parsed["cache_dir"]:
        _use_cache(parsed["cache_dir"])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of a kernel that it does without as soon as it is imported
    if name != "run":  # which computes nothing itself, and whose commands look for themselves
        set_waiting()
    importlib.import_module(f"posttrain.commands.{command.module}").run(parsed)
    return 0


def _use_cache(folder: str) -> None:
    """Send downloads to `folder`: the embedded model's and the hub's. The hub's libraries read this when they are imported."""
    root = os.path.abspath(os.path.expanduser(folder))
    os.environ |= {"POSTTRAIN_CACHE": root, "HF_HUB_CACHE": f"{root}/hub", "HF_DATASETS_CACHE": f"{root}/hub_datasets"}


def overview() -> str:
    """The text of `posttrain --help`."""
    lines = ["usage: posttrain <command> [--config FILE.yaml] [--flag value …]", "", "commands:"]
    lines += [f"  {name:<12} {command.purpose}" for name, command in COMMANDS.items()]
    lines += ["", "posttrain <command> --help   the flags of one command, grouped by purpose"]
    lines += ["posttrain --version          the version"]
    return "\n".join(lines)


def command_help(name: str, everything: bool = False) -> str:
    """The text of `posttrain <name> --help`; `everything` adds the library's fields one by one."""
    command = COMMANDS[name]
    lines = [f"usage: posttrain {name} [--config FILE.yaml] [--flag value …]", "", command.purpose]
    owner = ""
    library: list[str] = []
    options = config.options_of(command.groups, command.training)
    for option in options.values():
        if option.owner == config.LIBRARY_OWNER and not everything:
            library.append(option.name)
            continue
        if option.owner != owner:
            owner = option.owner
            lines += ["", f"{owner}:"]
        lines.append(_option_line(option))
    if "template_name" in options:
        lines += ["", *textwrap.wrap(f"templates: {', '.join(list_templates())}", 110, subsequent_indent="  ")]
    if library:
        text = f"every field of {config.LIBRARY_OWNER} ({len(library)}): {', '.join(library)}. `--help --all` explains each."
        lines += ["", "Training:", *textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _option_line(option: config.Option) -> str:
    value = "|".join(option.choices) or {"bool": "True|False", "many": "a b …"}.get(option.takes, "")
    head = f"  --{option.name} {value}".rstrip()
    default = "required" if option.default is MISSING else f"default: {option.default}"
    show_default = option.default is not None and "[default:" not in option.help
    text = option.help + (f" [{default}]" if show_default else "")
    body = textwrap.wrap(text, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([head, *body])


if __name__ == "__main__":
    sys.exit(main())
