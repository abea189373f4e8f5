"""Templates that tokenizers bring along, what is reported to the user, and real data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import make_tokenizer, written
from template_goldens import GOLDEN_CHAT, SKY, THINKING
from transformers import AutoTokenizer

from conftest import CHATML, SHARED
from posttrain.data.formats import parse
from posttrain.data.template import apply_template, encode_chat, encode_prompt, list_templates, stop_token_ids
from posttrain.types import Chat, Message, Prompt, RowError, ToolCall

NAMES = list_templates()
TALK = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye?"), Message("assistant", "Yes."))
CALLING = (
    Message("user", "Rome?"), Message("assistant", "", (ToolCall("sky", {"city": "Rome"}),)),
    Message("tool", "sunny"), Message("assistant", "Sun."),
)  # fmt: skip


def own(template: str, *special: str, kind: str = "byte_level") -> Any:
    """A tokenizer that came with a template of its own."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.chat_template = template
    apply_template(tokenizer, None)
    return tokenizer


def said(tokenizer: Any, chat: Chat) -> list[str]:
    return [written(tokenizer, row.input_ids[a:b]).decode() for row in encode_chat(tokenizer, chat) for a, b in row.turns]


# ---------------------------------------------------------------- templates that tokenizers bring along

PHI3_OWN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM_OWN = (
    "{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '\n' + m.tool_calls[0].function.arguments | tojson }}"
    "{% else %}{{ '\n' + m.content }}{% endif %}{% endfor %}{{ tools | tojson if tools }}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKS = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|end|>")


def test_end_of_text_after_the_last_turn_is_not_the_stop() -> None:
    tokenizer = own(PHI3_OWN, *MARKS)
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == ["<|end|>", "</s>"]
    assert said(tokenizer, Chat(TALK, "f:1")) == ["Hello.<|end|>", "Yes.<|end|>"]


def test_answer_that_ends_where_the_next_turn_begins() -> None:
    tokenizer = own(GLM_OWN, *MARKS)
    assert said(tokenizer, Chat(TALK, "f:1")) == ["\nHello.<|user|>", "\nYes.<|user|>"]
    assert len(encode_chat(tokenizer, Chat(TALK, "f:1"))) == 1
    tokenizer.chat_template = GLM_OWN.replace("{{ tools | tojson if tools }}", "").replace(
        "{% for", "{{ tools | tojson if tools }}{% for", 1
    )
    assert said(tokenizer, Chat(CALLING, "f:1", (SKY,))) == ['sky\n{"city": "Rome"}<|observation|>', "\nSun.<|user|>"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe"])
def test_template_without_any_end_is_closed_by_eos(kind: str) -> None:
    tokenizer = own(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}",
        kind=kind,
    )
    rows = encode_chat(tokenizer, Chat(TALK, "f:1"))
    assert len(rows) == 2  # the answers in the history have no end, those that are trained have
    assert [written(tokenizer, r.input_ids[r.turns[0][0] :]).decode() for r in rows] == [" Hello.\n</s>", " Yes.\n</s>"]


def test_system_text_that_moves_to_the_last_question() -> None:
    # Mistral's own way: the text stands before the last question, and only while that is the last turn.
    template = (
        "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
        "{%- for m in (messages[1:] if system else messages) -%}{%- if m.role == 'user' -%}"
        "{{- '[INST] ' + (system + '\n\n' if loop.last and system else '') + m.content + '[/INST]' -}}"
        "{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
    )
    tokenizer = own(template)
    rows = encode_chat(tokenizer, Chat(GOLDEN_CHAT, "f:1"))
    assert [written(tokenizer, row.input_ids).decode() for row in rows] == [
        "[INST] Be brief.\n\nHi[/INST] Hello.</s>",
        "[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nBye?[/INST] Yes.</s>",
    ]
    assert said(tokenizer, Chat(GOLDEN_CHAT, "f:1")) == [" Hello.</s>", " Yes.</s>"]


def test_prompt_that_opens_a_thought_the_turn_does_not_have() -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    tokenizer = own(template, *MARKS)
    with pytest.raises(RowError, match=r"f:7:messages\[1\]: the tokenizer's own template renders this turn in another way"):
        encode_chat(tokenizer, Chat(THINKING, "f:7"))


def test_a_chosen_file_is_named(tmp_path: Path) -> None:
    """Also from a process that has the tokenizer alone; and not once another template is taken."""
    file = tmp_path / "mute.jinja"
    file.write_text(CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"))
    tokenizer, chat = make_tokenizer("byte_level"), Chat((Message("system", "Be brief."), *TALK), "f:3")
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKS)})
    apply_template(tokenizer, str(file))
    for own_or_sent in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        with pytest.raises(RowError, match=rf"messages\[0\]: the template {file} leaves out 'Be brief.'"):
            encode_chat(own_or_sent, chat)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not any("mute.jinja" in saved.read_text() for saved in (tmp_path / "saved").iterdir())
    apply_template(tokenizer, None)
    with pytest.raises(RowError, match=r"the tokenizer's own template leaves out 'Be brief.'"):
        encode_chat(tokenizer, chat)


def test_no_template_stops_at_eos() -> None:
    tokenizer = make_tokenizer()
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_several_templates_by_purpose() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    apply_template(tokenizer, None)
    assert said(tokenizer, Chat(TALK, "f:1", (SKY,))) == ["Hello.<|im_end|>", "Yes.<|im_end|>"]
    assert "What the sky looks like" in written(tokenizer, encode_prompt(tokenizer, Prompt(TALK[:1], "f:1", (SKY,)))).decode()


# ---------------------------------------------------------------- nothing is lost in silence


@pytest.mark.parametrize(
    ("template", "chat", "words"),
    [
        (
            CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
            Chat(GOLDEN_CHAT, "f:3"),
            r"f:3:messages\[0\]: the tokenizer's own template leaves out 'Be brief.'",
        ),
        (CHATML, Chat(TALK, "f:3", (SKY,)), r"f:3:tools\[0\]: the tokenizer's own template leaves out 'sky'"),
        (CHATML, Chat(CALLING, "f:3"), r"f:3:messages\[1\]: the tokenizer's own template leaves out 'sky'"),
        (
            CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
            Chat(THINKING, "f:3"),
            r"f:3:messages\[1\]: .* leaves out '<think> easy </think> 2'",
        ),
        (
            CHATML.replace("{{ m['role'] }}", "{{ raise_exception('no system, please') if m.role == 'system' else m.role }}"),
            Chat(GOLDEN_CHAT, "f:3"),
            r"f:3:messages\[2\]: .* cannot render the chat up to here: no system, please",
        ),
        (CHATML, Chat(GOLDEN_CHAT[:2], "f:3"), "f:3:messages: no assistant turn to train on"),
        (CHATML, Chat(GOLDEN_CHAT[2:], "f:3"), r"f:3:messages\[0\]: the assistant speaks first"),
        (
            CHATML,
            Chat((Message("user", "x"), Message("assistant", "a<|im_end|>b")), "f:3"),
            r"f:3:messages\[1\]: holds the stop token <\|im_end\|>",
        ),
    ],
)
def test_what_a_template_cannot_say_is_reported(template: str, chat: Chat, words: str) -> None:
    tokenizer = own(template, "<|im_start|>", "<|im_end|>")
    with pytest.raises(RowError, match=words):
        encode_chat(tokenizer, chat)


def test_prompts_are_checked_too() -> None:
    tokenizer = own(CHATML, "<|im_start|>", "<|im_end|>")
    with pytest.raises(RowError, match="leaves out 'sky'"):
        encode_prompt(tokenizer, Prompt(TALK[:1], "f:3", (SKY,)))


@pytest.mark.parametrize("name", ["llama2", "gemma", "vicuna", "mistral"])
def test_turns_must_alternate_where_the_family_says_so(name: str) -> None:
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    with pytest.raises(RowError, match=rf"f:3:messages\[2\]: the template {name} cannot .* must alternate"):
        encode_chat(tokenizer, Chat((TALK[0], TALK[2], TALK[3]), "f:3"))


def test_results_and_descriptions_may_be_escaped() -> None:
    tokenizer = own(GLM_OWN.replace("'\n' + m.content", "'\n' + (m.content | tojson if m.role == 'tool' else m.content)"), *MARKS)
    turns = (*CALLING[:2], Message("tool", 'a "quoted"\nline 天'), CALLING[3])
    assert said(tokenizer, Chat(turns, "f:1", ()))[-1] == "\nSun.<|user|>"


# ---------------------------------------------------------------- real things


@pytest.mark.parametrize("name", NAMES)
def test_real_tool_calls_train_under_every_template(name: str) -> None:
    file = SHARED / "sft" / "glaive_toolcall_zh_half.jsonl"
    if not file.exists():
        pytest.skip("no shared data")
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    lines = file.read_text(encoding="utf-8").splitlines()
    for i in (0, 1, 2, 3, 40, 41):
        chat = parse(json.loads(lines[i]), f"glaive:{i + 1}")
        assert isinstance(chat, Chat)
        assert len(said(tokenizer, chat)) == sum(m.role == "assistant" for m in chat.messages)


@pytest.mark.slow
def test_smollm2_own_template() -> None:
    from posttrain.model.embedded import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct"))
    apply_template(tokenizer, None)
    (row,) = encode_chat(tokenizer, Chat(TALK, "f:1"))
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in row.turns] == ["Hello.<|im_end|>", "Yes.<|im_end|>"]
    assert tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
