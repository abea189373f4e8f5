"""Flags: what is read, from where, and what a mistake is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import cli, config, flags
from posttrain.types import UserError

GROUPS = (flags.ModelFlags, flags.DataFlags, flags.ChatFlags, flags.PackFlags)


def parse(*argv: str) -> config.Config:
    return config.parse("sft", GROUPS, True, [*argv, "--model_name_or_path", "m"])


def test_origins_and_precedence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1.0e-4\nmax_steps: 7\nreport_to: [tensorboard, wandb]\n")
    got = parse("--config", str(recipe), "--learning_rate", "3e-4")
    assert (got["learning_rate"], got.values["learning_rate"].origin) == (3e-4, "flag")
    assert (got["max_steps"], got.values["max_steps"].origin) == (7, "file")
    assert got["report_to"] == ["tensorboard", "wandb"]
    assert got.values["model_max_length"].origin == "default"
    assert got.derive(max_steps=9, bf16=True)["max_steps"] == 7
    assert got.derive(bf16=True).values["bf16"].origin == "derived"


def test_forms_of_a_flag() -> None:
    got = parse("--packing", "--max_train_samples=-1", "--bad-rows", "skip", "--bf16", "False")
    assert got["packing"] is True
    assert got["max_train_samples"] == -1
    assert got["bad_rows"] == "skip"
    assert got["bf16"] is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--max_steps", "ten"], "--max_steps 'ten': expected a value of type int"),
        (["--bad_rows", "maybe"], "expected one of error, skip"),
        (["--bf16", "perhaps"], "expected True or False"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--max_steps", "1", "2"], "takes one value"),
        (["stray"], "'stray' is not a flag"),
        (["--label_smoothing_factor", "0.1"], "would do nothing here"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_one_clear_line(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_mistakes_name_file_and_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# a comment\nlearning_rate: 1.0e-4\nbatch_sise: 3\n")
    with pytest.raises(UserError, match=r"recipe.yaml:3:batch_sise is unknown"):
        parse("--config", str(recipe))
    recipe.write_text("max_steps: soon\n")
    with pytest.raises(UserError, match=r"recipe.yaml:1:max_steps 'soon'"):
        parse("--config", str(recipe))


def test_old_names_keep_working_and_say_so() -> None:
    got = parse(
        "--evaluation_strategy", "steps", "--warmup_ratio", "0.1", "--torch_dtype", "float32", "--group_by_length", "True"
    )
    assert (got["eval_strategy"], got["warmup_steps"], got["dtype"]) == ("steps", 0.1, "float32")
    assert len(got.notes) == 4
    assert any("--evaluation_strategy is now --eval_strategy" in note for note in got.notes)
    assert any("--group_by_length is not needed" in note for note in got.notes)


def test_missing_required_flag_is_named() -> None:
    with pytest.raises(UserError, match="--model_name_or_path"):
        config.parse("sft", GROUPS, True, [])


def test_secrets_are_not_saved() -> None:
    assert parse("--hub_token", "hf_secret").saved()["hub_token"] == "(hidden)"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["no-such-command"]) == 2
    assert capsys.readouterr().err.startswith("posttrain: unknown command")
    assert cli.main(["--help"]) == 0
    assert "supervised fine-tuning" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_lists_every_own_flag(name: str) -> None:
    text = cli.command_help(name)
    for cls in cli.COMMANDS[name].groups:
        for field in config.dataclasses.fields(cls):
            assert f"--{field.name}" in text


@pytest.mark.parametrize(("name", "listed"), [("show", True), ("chat", True), ("pt", False)])
def test_help_lists_the_templates(name: str, listed: bool) -> None:
    assert ("qwen3_nothink, starchat" in " ".join(cli.command_help(name).split())) == listed


def test_help_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, posttrain.cli as c; c.main(['--help']); c.main(['sft', '--help']);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    # The promise is 0.5 s on a quiet machine for one of the two; the bound here leaves room for a loaded one.
    assert time.monotonic() - began < 2.0
