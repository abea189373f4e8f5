"""Choosing a template, and what it does to a tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import make_tokenizer, written
from template_goldens import GOLDEN_CHAT, GOLDENS, stop_text
from transformers import AutoTokenizer, GenerationConfig

from conftest import CHATML, ROOT
from posttrain.data.template import (
    apply_template,
    encode_chat,
    encode_prompt,
    list_templates,
    load_template,
    set_stop_tokens,
    stop_token_ids,
)  # fmt: skip
from posttrain.types import Chat, Message, Prompt, UserError

NAMES = list_templates()
TALK = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye?"), Message("assistant", "Yes."))


def said(tokenizer: Any, chat: Chat) -> list[str]:
    return [written(tokenizer, row.input_ids[a:b]).decode() for row in encode_chat(tokenizer, chat) for a, b in row.turns]


# ---------------------------------------------------------------- what a named template does to a tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_saved_tokenizer_renders_and_stops_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    template = apply_template(tokenizer, name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = apply_template(loaded, None)
    assert (again.name, again.added_tokens) == (name, ())
    assert loaded.chat_template == tokenizer.chat_template == template.chat_template
    assert stop_token_ids(loaded) == stop_token_ids(tokenizer)
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    chat = Chat(GOLDEN_CHAT, "f:1")
    assert encode_chat(loaded, chat) == encode_chat(tokenizer, chat)


@pytest.mark.parametrize("name", NAMES)
def test_stop_tokens_are_those_of_the_family(name: str) -> None:
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    assert stops == list(dict.fromkeys([stop_text(name), stop_text(name, is_call=True), tokenizer.eos_token]))
    assert tokenizer.eos_token == ("</s>" if stop_text(name) == "<|user|>" else stop_text(name))
    config = GenerationConfig()
    set_stop_tokens(tokenizer, config)
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids) == stops
    assert config.pad_token_id == tokenizer.convert_tokens_to_ids("</s>")


def test_marks_become_single_tokens_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer("sentencepiece_bpe")
    before = len(tokenizer)
    template = apply_template(tokenizer, "chatml")
    assert template.added_tokens == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == before + 2
    assert "gains 2 special tokens" in caplog.text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "</s>")
    assert apply_template(tokenizer, "chatml").added_tokens == ()


def test_a_mark_that_is_a_plain_piece_keeps_its_id() -> None:
    tokenizer = make_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    model["model"]["vocab"]["<eoa>"] = size = len(tokenizer)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)), bos_token="<s>", eos_token="</s>")
    assert apply_template(old, "internlm").added_tokens == ("<eoh>",)
    assert old.eos_token_id == size
    assert said(old, Chat(TALK, "f:1")) == ["Hello.<eoa>", "Yes.<eoa>"]


def test_bos_only_where_the_tokenizer_or_the_family_has_it() -> None:
    question = Prompt((Message("user", "Hi"),), "f:1")
    for name, adds, expected in [("vicuna", True, True), ("vicuna", False, False), ("llama2", False, True)]:
        tokenizer = make_tokenizer(adds_bos=adds)
        apply_template(tokenizer, name)
        ids = encode_prompt(tokenizer, question)
        assert ids.count(tokenizer.bos_token_id) == int(expected)


# ---------------------------------------------------------------- choosing


def test_aliases_and_spelling() -> None:
    assert load_template("Llama-3.1").name == "llama3"
    assert load_template("intern").name == "internlm"
    aliases = [alias for name in list_templates() for alias in load_template(name).aliases]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(NAMES)


def test_base_model_gets_vicuna_and_a_line(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    with caplog.at_level(logging.WARNING):
        assert apply_template(tokenizer, None).name == "vicuna"
    assert "no chat template: taking vicuna" in caplog.text
    assert said(tokenizer, Chat(GOLDEN_CHAT, "f:1"))[-1] == GOLDENS["vicuna"][1]


def test_name_overrides_the_tokenizers_own() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    assert apply_template(tokenizer, "zephyr").name == "zephyr"
    assert "<|im_start|>" not in tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "words"),
    [("vicunna", "did you mean vicuna"), ("nothing-like-it", "known: alpaca"), ("missing/file.jinja", "no such file")],
)
def test_unknown_name(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        apply_template(make_tokenizer(), name)


def test_file_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{#-\nstop: <|over|>\nspecial_tokens: <|over|>\n-#}\n{#- include _turns -#}\n"
        "{{- ns.system -}}{%- for t in ns.turns -%}{{- '<' + t.role + '>' + t.content + '<|over|>' -}}{%- endfor -%}"
        "{{- '<assistant>' if add_generation_prompt else '' -}}"
    )
    tokenizer = make_tokenizer()
    template = apply_template(tokenizer, str(file))
    assert template.added_tokens == ("<|over|>",)
    assert tokenizer.eos_token == "<|over|>"
    assert said(tokenizer, Chat(TALK, "f:1")) == ["Hello.<|over|>", "Yes.<|over|>"]
    assert str(tmp_path) not in tokenizer.chat_template


def test_file_without_a_header_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text("{# mine: not a header #}\n" + CHATML)
    tokenizer = make_tokenizer()
    apply_template(tokenizer, str(file))
    assert tokenizer.chat_template == file.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one\n{% for m in messages %}", r"broken.jinja: line 2"),
        ("{{ raise_exception('not today') }}", "cannot render a single question: not today"),
        ("{#- include nowhere -#}", "includes nowhere.jinja"),
    ],
)
def test_broken_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "broken.jinja").write_text(text)
    with pytest.raises(UserError, match=words):
        apply_template(make_tokenizer(), str(tmp_path / "broken.jinja"))


def test_every_template_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    for name in NAMES:
        template = load_template(name)
        row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` ")), "")
        for told in (template.family, template.stop, template.system, template.tools, template.note, *template.aliases):
            assert told.replace("|", "\\|") in row, f"{name}: {told}"
