"""`posttrain inference`: the guide's inference.py. Talks in the terminal, or answers a file or a few questions of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from posttrain import flags
from posttrain.commands import chat
from posttrain.commands.generate import check_files, generate, read_prompts
from posttrain.commands.inference import answerer_of, check_sampling, with_system
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.training.artifacts import json_lines
from posttrain.types import Message, Prompt, UserError

QUESTIONS = ("Introduce Beijing in three sentences.", "乙肝和丙肝的区别？")


def run(config: Config) -> None:
    """Talk, or answer and say where the answers are."""
    quiet_libraries()
    model, asked = config.group(flags.InferenceFlags), config.group(flags.AskFlags)
    sampling = config.group(flags.SamplingFlags)
    check_sampling(sampling)
    check(config)
    answerer = answerer_of(model)
    if asked.interactive:
        chat.talk(answerer, sampling, model.system_prompt, remember=not asked.single_turn)
        return
    prompts = read_prompts(asked.data_file, model.system_prompt) if asked.data_file else built_in(model.system_prompt)
    n_answers, _ = generate(answerer, prompts, asked.output_file, sampling, asked.batch_size)
    if not asked.data_file:
        for _, row in json_lines(Path(asked.output_file)):
            sys.stdout.write(f"Input: {row['messages'][-1]['content']}\nOutput: {row['output']}\n\n")
    say(f"{n_answers:,} answers: {asked.output_file}")


def check(config: Config) -> None:
    """Raises UserError for a flag that would do nothing, and for files that cannot be used, before a model is loaded."""
    for name in ("data_file", "output_file", "batch_size"):
        if config["interactive"] and config.given(name):
            raise UserError(f"--{name} does nothing with --interactive: answers go to the terminal")
    if config["single_turn"] and not config["interactive"]:
        raise UserError("--single_turn does nothing without --interactive: every prompt of a file stands alone")
    if not config["interactive"]:
        check_files(config["data_file"] or str(Path.cwd()), config["output_file"])


def built_in(system_prompt: str | None) -> Iterator[Prompt]:
    """The questions that are answered where none is named."""
    for number, question in enumerate(QUESTIONS, start=1):
        yield Prompt(with_system([Message("user", question)], system_prompt), f"built-in:{number}")
