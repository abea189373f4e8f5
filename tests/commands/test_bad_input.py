"""What users get wrong: one line on standard error that says what, where and what to do; exit code 2; no traceback, nothing trained."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, PreTrainedConfig

from conftest import ROOT, tiny_llama
from flag_probes import untouched
from flag_probes_models import other_model, reward_adapter
from posttrain.cli import main
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.load import load_model
from vocabularies import domain_lines, unigram_base

CHATS = [
    {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"the fox {i} rests"}]}
    for i in range(6)
]
PAIRS = [{"conversations": chat["conversations"][:1], "chosen": "the fox rests", "rejected": "a lazy dog"} for chat in CHATS]
STAGES = ("pt", "sft", "rm", "dpo", "ppo")


@dataclass(frozen=True)
class Things:
    """Good inputs, and what is made of them."""

    root: Path
    model: Path
    tokenizer: Any
    adapter: Path
    other: Path
    reward: Path

    def folder(self, name: str) -> Path:
        """A new empty folder."""
        (self.root / name).mkdir()
        return self.root / name

    def write(self, name: str, text: str) -> Path:
        """A file."""
        (self.root / name).write_text(text)
        return self.root / name

    def flags(self, command: str) -> dict[str, Any]:
        """What a command that works is given."""
        rows = self.root / {"pt": "text.txt", "rm": "pairs.jsonl", "dpo": "pairs.jsonl"}.get(command, "chats.jsonl")
        answers = {"data_file": rows, "output_file": self.root / "out.jsonl"}
        if command in STAGES:
            quick = {"max_steps": 1, "bf16": False, "report_to": "none"} | (
                {"reward_adapter": self.reward} if command == "ppo" else {}
            )
            return {"model_name_or_path": self.model, "train_file_dir": rows, "output_dir": self.root / "out", **quick}
        if command == "run":
            stage = f"{{stage: pt, train_file_dir: {self.root / 'text.txt'}}}"
            text = f"output_dir: {self.root / 'out'}\nmodel_name_or_path: {self.model}\nstages:\n  - {stage}\n"
            return {"pipeline": self.write("pipeline.yaml", text)}
        return {
            "merge": {"base_model": self.model, "lora_model": self.adapter, "output_dir": self.root / "out"},
            "show": {"model_name_or_path": self.model, "train_file_dir": rows},
            "extend-vocab": {
                "model_name_or_path": self.model,
                "train_file_dir": self.root / "text.txt",
                "output_dir": self.root / "out",
            },
            "convert": {"in_file": rows, "out_file": self.root / "out.jsonl"},
            "chat": {"base_model": self.model},
            "score": {"base_model": self.model, "lora_model": self.reward, **answers},
        }.get(command, {"base_model": self.model, **answers})


@pytest.fixture
def things(tmp_path: Path, model_folder: Path, tokenizer: Any) -> Things:
    """All that the cases are made of."""
    for name, rows in (("chats", CHATS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    other = other_model(model_folder, tmp_path / "other-model")
    attach_lora(load_model(str(model_folder), "float32"), Lora()).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    reward = reward_adapter(model_folder, tmp_path / "reward")
    return Things(tmp_path, model_folder, tokenizer, tmp_path / "adapter", other, reward)


def line_of(command: str, flags: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> str:
    """The last line of a command that must end with 2; nothing like a traceback stands before it."""
    argv = [command, *(str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value))]
    capfd.readouterr()
    with untouched():
        code = main(argv)
    said = capfd.readouterr().err.strip().splitlines()
    assert code == 2, said[-3:]
    assert not any("Traceback" in line for line in said)
    assert said[-1].startswith("posttrain: ")
    return said[-1]


Case = tuple[str, Callable[[Things], dict[str, Any]], str]


def broken_model(things: Things, change: Callable[[Path], None]) -> Path:
    """A copy of the model with something wrong."""
    folder = things.root / "broken"
    shutil.copytree(things.model, folder)
    change(folder)
    return folder


def narrower(folder: Path) -> None:
    """A config that is not that of the weights."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 48'))


def bigger_tokenizer(things: Things) -> Path:
    """A tokenizer with ids that the model has no rows for."""
    grown = copy.deepcopy(things.tokenizer)
    grown.add_tokens([f"<word{i}>" for i in range(30)])
    grown.save_pretrained(things.root / "grown")
    return things.root / "grown"


def foreign_tokenizer(things: Things) -> Path:
    """A smaller tokenizer of another kind, whose ids the model has rows for."""
    unigram_base(things.root / "foreign").save_pretrained(things.root / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(things.root / "foreign")
    tokenizer.chat_template = things.tokenizer.chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(things.root / "foreign")
    return things.root / "foreign"


def score_file(things: Things) -> str:
    """A function that scores."""
    return f"{things.write('scores.py', 'def f(answers): return [1.0 for _ in answers]')}:f"


def ill_matched(things: Things) -> Path:
    """A model in one folder with such a tokenizer."""
    shutil.copytree(things.model, things.root / "ill-matched")
    shutil.copytree(bigger_tokenizer(things), things.root / "ill-matched", dirs_exist_ok=True)
    return things.root / "ill-matched"


def without_system(things: Things) -> Path:
    """A template that leaves system turns out."""
    text = things.tokenizer.chat_template.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    return things.write("no_system.jinja", text)


def with_system(things: Things) -> Path:
    """A chat with a system turn."""
    said = (("system", "be brief"), ("user", "who?"), ("assistant", "me"))
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    return things.write("system.jsonl", json.dumps(row) + "\n")


def larger_adapter(things: Things) -> Path:
    """An adapter of a wider model."""
    folder = things.root / "wide"
    tiny_llama(vocab=400, hidden_size=64).save_pretrained(folder)
    things.tokenizer.save_pretrained(folder)
    attach_lora(load_model(str(folder), "float32"), Lora()).save_pretrained(things.root / "wide-adapter")
    return things.root / "wide-adapter"


def moved_adapter(things: Things) -> Path:
    """The adapter, as if it had been trained on the other model."""
    attach_lora(load_model(str(things.other), "float32"), Lora()).save_pretrained(things.root / "moved")
    return things.root / "moved"


def family(things: Things, config: PreTrainedConfig) -> Path:
    """A tiny model of another family with the same tokenizer."""
    folder = things.root / config.model_type
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    things.tokenizer.save_pretrained(folder)
    return folder


def capped(things: Things) -> Path:
    """A model whose attention caps its scores, so that rows of segments cannot hold it."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    return family(things, Gemma2Config(vocab_size=len(things.tokenizer), num_key_value_heads=1, **small))


def unrotated(things: Things) -> Path:
    """A model without rotary positions."""
    return family(things, GPT2Config(vocab_size=len(things.tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=512))


CASES: list[Case] = [
    # contradictory flags
    ("sft", lambda t: {"use_peft": False, "lora_rank": 4}, "--lora_rank belongs to LoRA, but --use_peft is False"),
    ("sft", lambda t: {"use_peft": False, "fp16": True}, "--fp16 cannot train all weights"),
    ("sft", lambda t: {"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
    ("sft", lambda t: {"dataset_name": "some/set"}, "--train_file_dir and --dataset_name both name the training data"),
    ("sft", lambda t: {"train_file_dir": None}, "--train_file_dir or --dataset_name"),
    ("pt", lambda t: {"streaming": True, "max_steps": None}, "--max_steps"),
    ("rm", lambda t: {"validation_split_percentage": 10, "validation_file_dir": t.root / "pairs.jsonl"}, "give one"),
    ("dpo", lambda t: {"loss_type": "ipo", "simpo_gamma": 1}, "--simpo_gamma does nothing without --loss_type simpo"),
    ("ppo", lambda t: {"use_peft": False}, "--reward_adapter shares the policy's base"),
    ("ppo", lambda t: {"reward_adapter": None}, "--reward_"),
    ("generate", lambda t: {"temperature": -1}, "--temperature -1.0: outside its range"),
    ("inference", lambda t: {"interactive": True}, "--data_file does nothing with --interactive"),
    ("sft", lambda t: {"fsdp": True}, "--fsdp shards over processes: start them with torchrun"),
    ("sft", lambda t: {"deepspeed": ROOT / "scripts" / "deepspeed_zero_stage2_config.json"}, "--deepspeed "),  # needs torchrun, and the package
    ("sft", lambda t: {"qlora": True, "load_in_8bit": True}, "--qlora True loads the base in 4 bits, --load_in_8bit True in 8: give one"),
    ("sft", lambda t: {"qlora": True, "load_in_4bit": False}, "which --load_in_4bit False forbids"),
    *((stage, lambda t: {"load_in_4bit": True, "load_in_8bit": True}, "exclude each other") for stage in (*STAGES, "generate", "chat")),
    *((stage, lambda t: {"load_in_4bit": True, "use_peft": False}, "quantised weights cannot be trained") for stage in STAGES[:4]),
    *((stage, lambda t: {"rope_factor": 2}, "--rope_factor does nothing without --rope_scaling") for stage in STAGES[:4]),
    *((stage, lambda t: {"shift_group_tokens": 8}, "--shift_group_tokens does nothing without --shift_attn True") for stage in STAGES[:3]),
    *((stage, lambda t: {"shift_attn": True, "padding_free": False}, "it needs --padding_free True") for stage in STAGES[:3]),
    ("dpo", lambda t: {"shift_attn": True}, "--shift_attn cannot be used here"),
    ("ppo", lambda t: {"shift_attn": True}, "--shift_attn cannot be used here"),
    ("ppo", lambda t: {"rope_scaling": "linear"}, "--rope_scaling cannot be used here"),
    ("ppo", lambda t: {"neft_alpha": 5}, "--neft_alpha cannot be used here"),
    ("sft", lambda t: {"fp16": True, "use_cpu": True}, "--fp16 needs a GPU"),
    ("sft", lambda t: {"modules_to_save": "lm_hea"}, "did you mean 'lm_head'?"),
    ("sft", lambda t: {"target_modules": "q_prj"}, "did you mean 'q_proj'?"),
    ("sft", lambda t: {"resume_from_checkpoint": True, "overwrite_output_dir": True}, "--resume_from_checkpoint"),
    ("extend-vocab", lambda t: {"validation_split_percentage": 0}, "--validation_split_percentage 0.0: "),
    ("run", lambda t: {"only": "nothing"}, "--only nothing: "),
    # a model without support
    *((stage, lambda t: {"shift_attn": True, "model_name_or_path": capped(t)}, "--shift_attn True: cannot be used with this model: Gemma2")
      for stage in STAGES[:3]),
    *((stage, lambda t: {"rope_scaling": "linear", "rope_factor": 2, "model_name_or_path": unrotated(t)}, "gpt2 has no rotary position")
      for stage in STAGES[:4]),
    ("sft", lambda t: {"rope_scaling": "linear", "model_max_length": 300}, "already reads 512 tokens"),
    # missing files
    ("extend-vocab", lambda t: {"train_file_dir": t.root / "nowhere"}, "--train_file_dir"),
    ("extend-vocab", lambda t: {"domain_sp_model": t.root / "nowhere"}, "--domain_sp_model"),
    ("extend-vocab", lambda t: {"model_name_or_path": t.root / "nowhere"}, "nowhere: no such model folder"),
    ("run", lambda t: {"pipeline": t.root / "nowhere.yaml"}, "nowhere.yaml: no such pipeline file"),
    *((stage, lambda t: {"train_file_dir": t.root / "nowhere"}, "--train_file_dir") for stage in STAGES),
    *((stage, lambda t: {"validation_file_dir": t.root / "nowhere"}, "--validation_file_dir") for stage in STAGES),
    *((stage, lambda t: {"model_name_or_path": t.root / "nowhere"}, "nowhere: no such model folder") for stage in STAGES),
    *((stage, lambda t: {"peft_path": t.root / "nowhere"}, "nowhere: no such adapter folder") for stage in STAGES),
    *((stage, lambda t: {"tokenizer_name_or_path": t.root / "nowhere"}, "nowhere") for stage in STAGES),
    *((stage, lambda t: {"resume_from_checkpoint": t.root / "nowhere"}, "--resume_from_checkpoint") for stage in STAGES),
    *((stage, lambda t: {"config": t.root / "nowhere.yaml"}, "nowhere.yaml: no such file") for stage in STAGES),
    ("sft", lambda t: {"template_name": "nowhere.jinja"}, "nowhere.jinja"),
    ("sft", lambda t: {"deepspeed": t.root / "nowhere.json"}, "--deepspeed"),
    ("ppo", lambda t: {"reward_adapter": t.root / "nowhere"}, "nowhere"),
    ("ppo", lambda t: {"reward_adapter": None, "reward_model_name_or_path": t.root / "nowhere"}, "nowhere"),
    ("ppo", lambda t: {"reward_adapter": None, "reward_func": t.root / "nowhere.py:f"}, "nowhere.py"),
    ("merge", lambda t: {"lora_model": t.root / "nowhere"}, "nowhere"),
    ("merge", lambda t: {"tokenizer_path": t.root / "nowhere"}, "nowhere"),
    *((c, lambda t: {"base_model": t.root / "nowhere"}, "nowhere") for c in ("merge", "generate", "chat", "score", "inference")),
    *((c, lambda t: {"data_file": t.root / "nowhere"}, "--data_file") for c in ("generate", "score", "inference")),
    *((c, lambda t: {"lora_model": t.root / "nowhere"}, "no such adapter folder") for c in ("generate", "chat", "score", "inference")),
    ("convert", lambda t: {"in_file": t.root / "nowhere"}, "--in_file"),
    ("show", lambda t: {"train_file_dir": t.root / "nowhere"}, "--train_file_dir"),
    # wrong folders
    *((stage, lambda t: {"train_file_dir": t.folder("empty")}, "empty") for stage in STAGES),
    *((stage, lambda t: {"model_name_or_path": t.folder("empty")}, "cannot load a tokenizer (there is none") for stage in STAGES),
    *((stage, lambda t: {"peft_path": t.folder("empty")}, "empty") for stage in STAGES),
    *((stage, lambda t: {"peft_path": t.model}, "adapter_config.json") for stage in STAGES),
    *((stage, lambda t: {"model_name_or_path": t.adapter}, "adapter") for stage in STAGES),
    *((stage, lambda t: {"model_name_or_path": t.root / "chats.jsonl"}, "is a file; a model is a folder") for stage in STAGES),
    *((stage, lambda t: {"output_dir": t.root / "text.txt"}, "is a file") for stage in STAGES),
    ("sft", lambda t: {"output_dir": t.write("run.json", "{}").parent, "overwrite_output_dir": True}, "would delete --train_file_dir"),
    ("sft", lambda t: {"output_dir": t.write("run.json", "{}").parent}, "already holds a run: go on with --resume_from_checkpoint auto"),
    *((c, lambda t: {"lora_model": t.model}, "adapter_config.json") for c in ("merge", "generate", "chat", "score", "inference")),
    *((c, lambda t: {"base_model": t.adapter}, "adapter") for c in ("merge", "generate", "chat", "score", "inference")),
    *((c, lambda t: {"output_file": t.root}, "is a folder") for c in ("generate", "score", "inference")),
    ("merge", lambda t: {"output_dir": t.model}, "--output_dir"),
    ("merge", lambda t: {"lora_model": t.write("adapter/adapter_config.json", "{").parent}, "adapter_config.json: not JSON"),
    ("convert", lambda t: {"out_file": t.root}, "is a folder"),
    ("sft", lambda t: {"train_file_dir": t.root / "text.txt"}, "text.txt:1"),
    ("dpo", lambda t: {"train_file_dir": t.root / "chats.jsonl"}, "chats.jsonl:1"),
    ("pt", lambda t: {"train_file_dir": t.model / "model.safetensors"}, "model.safetensors"),
    ("sft", lambda t: {"model_name_or_path": broken_model(t, lambda f: (f / "model.safetensors").unlink())}, "broken"),
    ("sft", lambda t: {"model_name_or_path": broken_model(t, lambda f: (f / "config.json").write_text("{"))}, "broken"),
    ("sft", lambda t: {"model_name_or_path": broken_model(t, lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")])}, "tokenizer"),
    ("sft", lambda t: {"model_name_or_path": broken_model(t, lambda f: (f / "model.safetensors").write_bytes(b"half"))}, "broken"),
    ("sft", lambda t: {"model_name_or_path": broken_model(t, narrower)}, "its weights do not have the shapes that its config.json says"),
    # a tokenizer that does not fit the model
    ("pt", lambda t: {"tokenizer_name_or_path": bigger_tokenizer(t)}, "tokenizer"),
    *((stage, lambda t: {"tokenizer_name_or_path": foreign_tokenizer(t)}, "foreign: does not fit") for stage in STAGES[:4]),
    ("ppo", lambda t: {"tokenizer_name_or_path": foreign_tokenizer(t), "reward_adapter": None, "reward_func": score_file(t)}, "foreign: does not fit"),
    ("merge", lambda t: {"tokenizer_path": foreign_tokenizer(t)}, "foreign: does not fit"),
    *((c, lambda t: {"tokenizer_path": foreign_tokenizer(t)}, "foreign: does not fit") for c in ("generate", "chat", "inference", "score")),
    ("extend-vocab", lambda t: {"model_name_or_path": ill_matched(t), "train_file_dir": t.write("domain.txt", "\n".join(domain_lines()))}, "they do not belong together"),
    ("merge", lambda t: {"tokenizer_path": bigger_tokenizer(t)}, "--resize_emb"),
    *((c, lambda t: {"tokenizer_path": bigger_tokenizer(t), "lora_model": None}, "tokenizer") for c in ("generate", "chat", "inference")),
    ("sft", lambda t: {"model_type": "qwen2"}, "--model_type qwen2: "),
    # an adapter for another base
    *((stage, lambda t: {"peft_path": moved_adapter(t)}, "another base") for stage in ("pt", "sft", "dpo", "ppo")),
    *((stage, lambda t: {"peft_path": moved_adapter(t), "load_in_4bit": True}, "another base") for stage in ("pt", "sft", "dpo")),
    *((c, lambda t: {"lora_model": moved_adapter(t)}, "another base") for c in ("merge", "generate", "chat", "inference")),
    *((stage, lambda t: {"peft_path": larger_adapter(t)}, "wide-adapter") for stage in ("pt", "sft", "dpo", "ppo")),
    *((c, lambda t: {"lora_model": larger_adapter(t)}, "wide-adapter") for c in ("merge", "generate", "chat", "inference")),
    ("ppo", lambda t: {"reward_adapter": t.adapter}, "adapter"),
    ("score", lambda t: {"lora_model": t.adapter}, "score head"),
    # a template that drops the system turn
    *((stage, lambda t: {"train_file_dir": with_system(t), "template_name": without_system(t)}, "system") for stage in ("sft", "ppo", "show")),
    *((c, lambda t: {"data_file": with_system(t), "template_name": without_system(t)}, "system") for c in ("generate", "inference")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "change", "said"), CASES, ids=[f"{i}-{case[0]}-{case[2][:30]}" for i, case in enumerate(CASES)]
)
def test_a_mistake_is_one_line(
    command: str, change: Callable[[Things], dict[str, Any]], said: str, things: Things, capfd: pytest.CaptureFixture[str]
) -> None:
    line = line_of(command, {**things.flags(command), **change(things)}, capfd)
    assert said in line
