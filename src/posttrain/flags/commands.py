"""Flags of the commands that do not train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.flags.base import REQUIRED, flag


@dataclass(frozen=True)
class MergeFlags:
    """Merge"""

    base_model: str = flag(REQUIRED, "The model the adapter was trained on: a folder, a hub name, or smollm2-135m-instruct.")
    lora_model: str = flag(REQUIRED, "Folder of the trained adapter.")
    output_dir: str = flag(REQUIRED, "Folder to write the merged model to.")
    tokenizer_path: str | None = flag(None, "Tokenizer to save with it. [default: the adapter's own, else the base's]")
    resize_emb: bool = flag(False, "Resize the base's embeddings to the tokenizer before merging.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "Type of the written weights. auto: the base's.")
    max_shard_size: str = flag("5GB", "Largest weight file.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    overwrite_output_dir: bool = flag(False, "Write into an --output_dir that is not empty.")


@dataclass(frozen=True)
class InferenceFlags:
    """Model"""

    base_model: str = flag(REQUIRED, "Model to run: a folder, a hub name, or smollm2-135m-instruct.")
    lora_model: str | None = flag(None, "Adapter to put on it, unmerged.")
    tokenizer_path: str | None = flag(None, "Tokenizer to use. [default: the adapter's own, else the model's]")
    template_name: str | None = flag(None, "Chat template. [default: the tokenizer's own: what it was trained with]")
    system_prompt: str | None = flag(None, "System turn put before every conversation that has none.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "Type of the loaded weights.")
    load_in_4bit: bool = flag(False, "Load the model in 4 bits (NF4, its scales in 8 bits), fused experts too.")
    load_in_8bit: bool = flag(False, "Load the model's linear layers in 8 bits (LLM.int8()).")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = flag(
        None,
        "Stretch rotary positions of a model that was trained without. dynamic needs no training for it. Needs --rope_factor.",
    )
    rope_factor: float | None = flag(None, "By how much --rope_scaling stretches.")


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling"""

    max_new_tokens: int = flag(512, "Longest answer in tokens.")
    temperature: float = flag(0.7, "0: always the likeliest token. Higher: more varied.")
    top_p: float = flag(0.9, "Sample from the likeliest tokens that together hold this probability.")
    top_k: int = flag(0, "Sample from the k likeliest tokens. 0: no limit.")
    repetition_penalty: float = flag(1.0, "Above 1: tokens that occurred become less likely (arXiv 1909.05858).")
    seed: int = flag(42, "Seed of the sampling.")


@dataclass(frozen=True)
class GenerateFlags:
    """Files"""

    data_file: str = flag(REQUIRED, "Prompts: plain text (one a line) or JSONL in any chat format.")
    output_file: str = flag(REQUIRED, "JSONL to write, one object a prompt, in the prompts' order.")
    batch_size: int = flag(8, "Prompts generated together.")


@dataclass(frozen=True)
class AskFlags:
    """Questions"""

    interactive: bool = flag(False, "Talk in the terminal, as `posttrain chat` does.")
    single_turn: bool = flag(False, "With --interactive: every question is put alone, without the turns before it.")
    data_file: str | None = flag(
        None, "Prompts: plain text (one a line) or JSONL in any chat format. [default: two built-in questions]"
    )
    output_file: str = flag("predictions_result.jsonl", "JSONL to write without --interactive, one object a prompt.")
    batch_size: int = flag(8, "Prompts generated together.")


@dataclass(frozen=True)
class PipelineFlags:
    """Pipeline"""

    pipeline: str = flag(REQUIRED, "YAML file of the stages: docs/pipeline.md. The word after `posttrain run`.")
    from_stage: str | None = flag(None, "Run this stage and those behind it from the start, even if they are finished.")
    only: str | None = flag(None, "Run only these stages, a,b; what they start from must be there.")
    dry_run: bool = flag(False, "Print what would be run and why, and run nothing.")


@dataclass(frozen=True)
class PlanFlags:
    """Plan"""

    stage: str = flag(
        REQUIRED,
        "Whose run is planned: pt, sft, rm, dpo or ppo. The word after `posttrain plan`; all flags of that stage may follow.",
    )
    num_processes: int = flag(1, "Processes of the run, one a device, over all machines.")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "What the run computes on. auto: what this machine has.")
    device_memory_gib: float | None = flag(None, "Memory of a device in GiB: a line says whether the run fits.")
    example_tokens: int | None = flag(
        None, "Length of an example in pt and sft where it is below the longest that the flags allow. [default: the longest]"
    )


@dataclass(frozen=True)
class ScoreFlags:
    """Files"""

    data_file: str = flag(REQUIRED, "Rows to rate: chats that end in an answer, in any chat format, or preference pairs.")
    output_file: str = flag(REQUIRED, "JSONL to write, one object a row, in the rows' order.")
    batch_size: int = flag(8, "Rows computed together. The scores do not depend on it.")


@dataclass(frozen=True)
class ShowFlags:
    """What to show"""

    stage: Literal["pt", "sft", "rm", "dpo"] = flag("sft", "Whose rows to show. rm, dpo: prompt, chosen and rejected answer.")
    rows: int = flag(3, "How many rows to print. -1: all.")
    output_format: Literal["text", "jsonl"] = flag(
        "text",
        "text: trained tokens in colour, and a histogram of lengths. jsonl: an object a row, with source, input_ids, trained and text;"
        " of a pair with prompt_ids, chosen_ids, rejected_ids, margin, and prompt, chosen and rejected as text.",
    )


@dataclass(frozen=True)
class ShowModelFlags:
    """Tokenizer"""

    model_name_or_path: str = flag("smollm2-135m-instruct", "Model whose tokenizer and template are used.")
    tokenizer_name_or_path: str | None = flag(None, "Tokenizer to use instead of the model's own.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the tokenizer.")
    cache_dir: str | None = flag(None, "Folder for downloads. [default: $POSTTRAIN_CACHE or ~/.cache/posttrain]")


@dataclass(frozen=True)
class ShowTextFlags:
    """Documents"""

    block_size: int = flag(1024, "Row length in tokens with --stage pt.")


@dataclass(frozen=True)
class VocabularyFlags:
    """Vocabulary"""

    model_name_or_path: str = flag(REQUIRED, "Base model: a folder, a hub name, or smollm2-135m-instruct.")
    output_dir: str = flag(REQUIRED, "Folder to write the model with the grown vocabulary to.")
    vocab_size: int = flag(8000, "New pieces at most.")
    min_frequency: int = flag(2, "A new piece occurs at least so often in the corpus.")
    domain_sp_model: str | None = flag(
        None, "SentencePiece .model trained before: its pieces are added, in its order, in place of pieces trained on the corpus."
    )
    validation_file_dir: str | None = flag(None, "Held-out text that the gain is measured on, named like --train_file_dir.")
    validation_split_percentage: float = flag(5.0, "Share of the corpus held out when no held-out text is named, in percent.")
    max_eval_samples: int = flag(
        50, "Held-out rows for the loss before and after. -1: all; 0: no loss. Tokens are counted on all."
    )
    cache_dir: str | None = flag(
        None, "Folder for downloads and prepared data. [default: $POSTTRAIN_CACHE or ~/.cache/posttrain]"
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    overwrite_output_dir: bool = flag(False, "Replace an --output_dir that is not empty.")


@dataclass(frozen=True)
class ConvertFlags:
    """Convert"""

    in_file: str = flag(REQUIRED, "File to convert.")
    out_file: str = flag(REQUIRED, "JSONL to write (ShareGPT conversations).")
    data_type: Literal["auto", "alpaca", "qa", "sharegpt", "openai", "hh", "text", "json2jsonl"] = flag(
        "auto", "Format of the rows."
    )
    file_type: Literal["auto", "json", "jsonl", "csv", "parquet", "txt"] = flag("auto", "Type of the file. auto: by its name.")
    bad_rows: Literal["error", "skip"] = flag("skip", "On a row that cannot be used: stop, or skip and count.")
