"""Every flag does what it says: the list of flags is frozen, and a probe per flag fails when the flag has no effect.

`python tests/test_flags.py --write` writes the list anew (flags_golden.txt); look at its diff.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import flag_probes_behaviour  # noqa: F401
import flag_probes_commands  # noqa: F401
import flag_probes_context  # noqa: F401
import flag_probes_data  # noqa: F401
import flag_probes_outside  # noqa: F401
import flag_probes_plan  # noqa: F401
import flag_probes_ppo  # noqa: F401
import flag_probes_ppo_shared  # noqa: F401
import flag_probes_preferences  # noqa: F401
import flag_probes_quantized  # noqa: F401
import flag_probes_run  # noqa: F401
import flag_probes_schedule  # noqa: F401
import flag_probes_score  # noqa: F401
import flag_probes_train  # noqa: F401
import flag_probes_vocabulary  # noqa: F401
from flag_probes import PROBES, Lab, family
from flag_probes_library import LIBRARY, Field
from posttrain import cli, config, hf_flags
from posttrain.training.resolve import resolve, training_arguments
from posttrain.types import UserError

GOLDEN = Path(__file__).with_name("flags_golden.txt")
PINNED = re.search(r"^transformers==(.+)$", (Path(__file__).parent.parent / "constraints.txt").read_text(), re.MULTILINE)
assert PINNED
AT_PINNED = transformers.__version__ == PINNED[1]
WRONG = (AssertionError, KeyError, ValueError, FileNotFoundError, pytest.fail.Exception)  # what a probe ends with


# --- the list -------------------------------------------------------------------------------------------------------------


def listed(library: bool) -> list[str]:
    """`command flag default` of every flag: our own, or the fields of TrainingArguments."""
    lines = []
    for name, command in cli.COMMANDS.items():
        for option in config.options_of(command.groups, command.training).values():
            if (option.owner == config.LIBRARY_OWNER) is library:
                default = "(required)" if option.default is dataclasses.MISSING else option.default
                lines.append(f"{name} {option.name} {default}")
    return lines


def golden_text() -> str:
    """The content of flags_golden.txt."""
    fields = f"# Fields of transformers.TrainingArguments {transformers.__version__}"
    return "\n".join(["# Flags of our own", *listed(False), "", fields, *listed(True)]) + "\n"


@pytest.mark.parametrize("library", [False, True], ids=["own", "library"])
def test_the_list_of_flags_is_frozen(library: bool) -> None:
    if library and not AT_PINNED:
        pytest.skip(f"transformers {transformers.__version__} may have other fields than {PINNED[1]}")
    frozen, now = GOLDEN.read_text().split("\n\n")[library].splitlines()[1:], listed(library)
    added, removed = sorted(set(now) - set(frozen)), sorted(set(frozen) - set(now))
    said = f"new: {added}; gone: {removed}. If that is meant: python tests/test_flags.py --write"
    assert now == frozen, said


def test_ours_are_few() -> None:
    training = {f.name for name in ("pt", "sft") for group in cli.COMMANDS[name].groups for f in dataclasses.fields(group)}
    assert len(training) <= 90


# --- a probe for each -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Lab]:
    """Runs are short, and the library collects garbage before each: what is alive by now is taken out of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        gc.collect()
        gc.freeze()
        yield Lab(tmp_path_factory.mktemp("lab"), model_folder)
        gc.unfreeze()


EACH = pytest.mark.parametrize(("of", "flag"), [pytest.param(*key, id="-".join(key)) for key in sorted(PROBES)])


@EACH
def test_flag_has_an_effect(of: str, flag: str, lab: Lab) -> None:
    PROBES[of, flag](lab)


@EACH
def test_probe_notices_a_flag_without_effect(of: str, flag: str, lab: Lab) -> None:
    with pytest.raises(WRONG):
        PROBES[of, flag](lab.muted(flag))


# The probes of training train an SFT adapter; here the same ones train on pairs. Those of long rows and noise need documents;
# pairs have tests of their own in tests/commands/test_context_flags.py.
LONG = {"rope_scaling", "rope_factor", "neft_alpha", "shift_attn", "shift_group_tokens"}
SHARED = {f.name for group in cli.COMMANDS["sft"].groups for f in dataclasses.fields(group)} - LONG
IN_PAIR_STAGES = [
    pytest.param(stage, f.name, id=f"{stage}-{f.name}")
    for stage in ("rm", "dpo")
    for group in cli.COMMANDS[stage].groups
    for f in dataclasses.fields(group)
    if f.name in SHARED
]


@pytest.fixture(scope="module")
def pair_labs(lab: Lab) -> dict[str, Lab]:
    return {stage: lab.of(stage) for stage in ("rm", "dpo")}


@pytest.mark.parametrize(("stage", "flag"), IN_PAIR_STAGES)
def test_shared_flag_has_its_effect_on_pairs(stage: str, flag: str, pair_labs: dict[str, Lab]) -> None:
    pair_labs[stage].used.clear()
    PROBES["train", flag](pair_labs[stage])
    assert stage in pair_labs[stage].used, "the probe runs another stage"


def test_every_own_flag_has_a_probe() -> None:
    own = {
        (family(name), field.name)
        for name, command in cli.COMMANDS.items()
        for group in command.groups
        for field in dataclasses.fields(group)
    }
    assert {key for key in PROBES if key[0] != "library"} == own
    assert {flag for of, flag in PROBES if of == "library"} <= set(LIBRARY)


# --- the library's fields -------------------------------------------------------------------------------------------------


def accepted() -> set[str]:
    """The fields of TrainingArguments that a training command takes."""
    options = config.options_of(cli.COMMANDS["sft"].groups, True).values()
    return {option.name for option in options if option.owner == config.LIBRARY_OWNER}


def settings(field: str, entry: Field) -> Any:
    """TrainingArguments as a user's command line makes them."""
    given = {"model_name_or_path": "m", "train_file_dir": "d", "bf16": False, **entry.beside, field: entry.value}
    argv = [word for name, value in given.items() for word in (f"--{name}", *([value] if not isinstance(value, list) else value))]
    return training_arguments(resolve(config.parse("sft", cli.COMMANDS["sft"].groups, True, [str(word) for word in argv])))


def test_every_accepted_field_has_an_owner() -> None:
    if AT_PINNED:
        assert set(LIBRARY) == accepted()
    assert not set(LIBRARY) & set(hf_flags.REFUSED)
    assert all(entry.unbuilt or entry.value is not None for entry in LIBRARY.values())


@pytest.mark.parametrize("field", [name for name, entry in LIBRARY.items() if not entry.unbuilt and name in accepted()])
def test_a_given_value_reaches_the_library(field: str) -> None:
    entry = LIBRARY[field]
    expected = entry.value if entry.becomes is None else entry.becomes
    assert getattr(settings(field, entry), field) == expected
    # The value is not what is there without it (but for a CPU, which is always used here).
    options = config.options_of(cli.COMMANDS["sft"].groups, True)
    assert options[field].default != expected


@pytest.mark.parametrize("word", sorted(hf_flags.REFUSED))
def test_a_refused_field_says_why(word: str) -> None:
    with pytest.raises(UserError, match=re.escape(hf_flags.REFUSED[word])):
        config.parse("sft", cli.COMMANDS["sft"].groups, True, [f"--{word}", "1"])


# --- old words ------------------------------------------------------------------------------------------------------------


def commands_of_old_word(word: str) -> list[str]:
    """The commands that take it and have something to say about it."""
    found = []
    for name, command in cli.COMMANDS.items():
        options = config.options_of(command.groups, command.training)
        if word in options:
            continue
        new = newest(word, options, name)
        loads_model = "base_model" in options or "model_name_or_path" in options
        taken = "learning_rate" in options or (loads_model and word in hf_flags.ABOUT_MODELS)
        if new in options or (new is None and (taken or word in hf_flags.OF_COMMAND.get(name, {}))):
            found.append(name)
    return found


def newest(word: str, options: dict[str, config.Option], command: str) -> str | None:
    """What an old word is called in a command."""
    renamed = hf_flags.renamed(command)
    new = renamed[word][0] if word in renamed else ""
    return newest(new, options, command) if new is not None and new not in options and new in renamed else new


@pytest.mark.parametrize("word", sorted({*hf_flags.RENAMED, *(word for words in hf_flags.OF_COMMAND.values() for word in words)}))
def test_an_old_word_is_taken_where_it_makes_sense(word: str) -> None:
    takers = commands_of_old_word(word)
    assert takers
    for name, command in cli.COMMANDS.items():
        options = config.options_of(command.groups, command.training)
        if word in options:
            continue
        new = newest(word, options, name)
        value = sample(options[new]) if new in options else "1"
        required = {o: "x" for o, option in options.items() if option.default is dataclasses.MISSING and o != new}
        argv = [text for option, text in {**required, word: value}.items() for text in (f"--{option}", text)]
        if name not in takers:
            with pytest.raises(UserError, match=f"--{word} (is unknown|would do nothing|cannot be used)"):
                config.parse(name, command.groups, command.training, argv)
            continue
        got = config.parse(name, command.groups, command.training, argv)
        (note,) = got.notes
        assert note.startswith(f"--{word} is not needed: " if new is None else f"--{word} is now --{new}")
        if new is not None:
            assert got.given(new)


def test_the_commands_of_some_old_words() -> None:
    """Written out, so that the rule above is seen at work."""
    trained = ["pt", "sft", "rm", "dpo", "ppo"]
    asked = ["generate", "score", "inference", "chat"]
    assert commands_of_old_word("group_by_length") == trained
    assert commands_of_old_word("torch_dtype") == [*trained, "merge", *asked]
    assert commands_of_old_word("batch_size") == ["ppo"]
    assert commands_of_old_word("eval_batch_size") == ["ppo", *asked[:3]]
    assert commands_of_old_word("max_seq_length") == ["pt", "sft", "show"]
    assert commands_of_old_word("model_max_length") == ["pt"]
    assert commands_of_old_word("model_type") == ["merge", *asked, "show", "extend-vocab"]
    got = config.parse("pt", cli.COMMANDS["pt"].groups, True, ["--model_name_or_path", "m", "--cutoff_len", "77"])
    assert got["block_size"] == 77


@pytest.mark.parametrize(("command", "word"), [(name, word) for name, words in hf_flags.REFUSED_BY.items() for word in words])
def test_a_command_says_why_it_refuses_a_word(command: str, word: str) -> None:
    with pytest.raises(UserError, match=re.escape(hf_flags.REFUSED_BY[command][word])):
        config.parse(command, cli.COMMANDS[command].groups, False, [f"--{word}", "1"])


def sample(option: config.Option) -> str:
    """A text that the option takes."""
    if option.choices:
        return option.choices[-1]
    return "{}" if option.read.__name__ == "_read_dict" else "1"


def test_an_unknown_word_is_answered_with_words_of_the_command() -> None:
    with pytest.raises(UserError) as caught:
        config.parse("convert", cli.COMMANDS["convert"].groups, False, ["--lora_rang", "5"])
    assert "lora_r" not in str(caught.value).replace("--lora_rang", "")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_flags.py --write")
    if not AT_PINNED:
        sys.exit(f"write it with transformers {PINNED[1]}, which constraints.txt pins")
    GOLDEN.write_text(golden_text())
