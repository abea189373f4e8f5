"""Every flag of our own, grouped by who uses it. A flag, a YAML key and the name in the docs are the same word.

The classes are read by `config.py` (parsing, origins), by `--help` (grouped by the class docstring) and by the docs. The
order of fields is the order of the help. Fields of `transformers.TrainingArguments` are accepted beside them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

REQUIRED: Any = dataclasses.MISSING


def flag(default: Any, help: str) -> Any:
    """A field with its help string; `REQUIRED` marks a flag without a default."""
    if default is REQUIRED:
        return dataclasses.field(metadata={"help": help}, kw_only=True)
    return dataclasses.field(default=default, metadata={"help": help}, kw_only=True)


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    model_name_or_path: str = flag(REQUIRED, "Base model: a folder, a hub name, or smollm2-135m-instruct (needs no hub).")
    tokenizer_name_or_path: str | None = flag(None, "Tokenizer to use instead of the model's own.")
    model_type: str | None = flag(None, "Architecture the model must have (llama, qwen2, …); checked against its config.")
    model_revision: str | None = flag(None, "Branch, tag or commit of a hub model.")
    cache_dir: str | None = flag(
        None, "Folder for downloads and prepared data. [default: $POSTTRAIN_CACHE or ~/.cache/posttrain]"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Type of the loaded weights. auto: bfloat16 for a frozen base where the hardware has it, else float32."
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model. Off: such a model is refused.")
    padding_free: bool = flag(
        True, "Compute examples as segments of one row without padding, where the model allows it exactly. False: padded batches."
    )
    fused: bool = flag(
        True,
        "On a CPU: compute MLPs, norms and adapters in fewer passes over memory, where that gives the same. No effect elsewhere.",
    )
    forward_tokens: int = flag(
        -1,
        "Most tokens computed at once. A larger micro-batch is cut between examples: same update, less memory. 0: no cut."
        " -1: 1024 on a CPU, 16384 elsewhere.",
    )


@dataclass(frozen=True)
class AdapterFlags:
    """Adapter (LoRA)"""

    use_peft: bool = flag(True, "Train a LoRA adapter on the frozen base. False: train all weights.")
    lora_rank: int = flag(8, "Rank r of the adapter's matrices.")
    lora_alpha: float = flag(16.0, "Scale: the adapter's product is multiplied by alpha / r (alpha / sqrt(r) with --use_rslora).")
    lora_dropout: float = flag(0.0, "Dropout on the adapter's input, in [0, 1). 0: none, and the fused kernels can be used.")
    target_modules: str = flag("all", "Layers to adapt: all (every linear layer but the output head), or names a,b,c.")
    modules_to_save: str | None = flag(None, "Layers to train in full beside the adapter, e.g. embed_tokens,lm_head.")
    use_rslora: bool = flag(False, "Rank-stabilised scale alpha / sqrt(r) (arXiv 2312.03732).")
    use_dora: bool = flag(False, "Weight-decomposed adapter, DoRA (arXiv 2402.09353): slower, often better at low rank.")
    peft_path: str | None = flag(
        None, "Adapter to go on training from (weights only; --resume_from_checkpoint restores everything)."
    )


@dataclass(frozen=True)
class DataFlags:
    """Data"""

    train_file_dir: str | None = flag(None, "Training data: a file, a folder (read recursively), or several a,b,c.")
    dataset_name: str | None = flag(None, "Training data from a hub dataset or a local dataset folder.")
    dataset_config_name: str | None = flag(None, "Configuration of --dataset_name.")
    dataset_weights: str | None = flag(None, "Sampling weights of several datasets, in their order: 0.7,0.3.")
    data_format: str = flag("auto", "Format of the rows, or auto: detected row by row. `posttrain convert --help` lists them.")
    max_train_samples: int = flag(-1, "Use only the first n good training rows. -1: all.")
    bad_rows: Literal["error", "skip"] = flag(
        "error", "On a row that cannot be used: stop and name it, or skip, count and name it."
    )


@dataclass(frozen=True)
class PrepareFlags:
    """Held-out data and preparation"""

    validation_file_dir: str | None = flag(None, "Held-out data, named like --train_file_dir.")
    validation_split_percentage: float = flag(
        0.0, "Share of the training rows held out when no validation data is named, in percent."
    )
    max_eval_samples: int = flag(-1, "Use only the first n good held-out rows. -1: all.")
    preprocessing_num_workers: int = flag(1, "Processes that read and tokenize. The result does not depend on it.")
    overwrite_cache: bool = flag(False, "Prepare the data anew even if the same files were prepared before.")


@dataclass(frozen=True)
class TemplateFlags:
    """Template"""

    template_name: str | None = flag(
        None, "Chat template: a name (`posttrain show --help`), a .jinja file, or none: the tokenizer's own, else vicuna."
    )


@dataclass(frozen=True)
class ChatFlags:
    """Length"""

    model_max_length: int = flag(1024, "Longest example in tokens; longer ones are cut at a turn boundary and counted.")


@dataclass(frozen=True)
class PairFlags:
    """Lengths"""

    max_source_length: int = flag(
        1024, "Longest prompt in tokens; a longer one loses its oldest exchanges (the system turn stays), which is counted."
    )
    max_target_length: int = flag(512, "Longest answer in tokens; a longer one loses its end, which is counted.")


@dataclass(frozen=True)
class SharingFlags:
    """Computation"""

    prefix_sharing: bool = flag(
        True, "Compute a prompt once for both answers (same loss and gradients). False: each answer with a prompt of its own."
    )


@dataclass(frozen=True)
class RewardFlags:
    """Reward model"""

    center_rewards_coefficient: float = flag(
        0.0, "Weight of (chosen score + rejected score)^2, which keeps scores around 0 (arXiv 2312.09244). 0: off."
    )


@dataclass(frozen=True)
class DpoFlags:
    """Preference loss"""

    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "simpo", "orpo"] = flag(
        "sigmoid", "Loss of a pair (docs/preferences.md has the formulas). simpo and orpo need no reference log-probs."
    )
    beta: float | None = flag(
        None, "Strength of the preference against staying near the reference; in orpo its weight. [default: 0.1; simpo: 2.0]"
    )
    label_smoothing: float = flag(
        0.0, "Share of pairs whose label is taken to be wrong, in [0, 0.5). For sigmoid, robust, simpo."
    )
    sft_weight: float = flag(0.0, "Weight of the chosen answer's mean negative log-prob, added to the loss. 0: off.")
    simpo_gamma: float = flag(1.0, "Margin that simpo asks for between the answers.")


@dataclass(frozen=True)
class PackFlags:
    """Packing"""

    packing: bool = flag(
        False,
        "Fill rows of --model_max_length tokens with several examples (best fit); the batch size then counts rows, not examples.",
    )


@dataclass(frozen=True)
class TextFlags:
    """Documents"""

    block_size: int = flag(1024, "Row length in tokens: documents are split into pieces of at most this and packed (best fit).")
    streaming: bool = flag(False, "Read and tokenize while training, for corpora larger than memory. Needs --max_steps.")
    shuffle_buffer_rows: int = flag(1000, "Rows in the shuffle buffer of a stream. 0: the order of the files.")


@dataclass(frozen=True)
class PpoFlags:
    """PPO"""

    rollout_batch_size: int = flag(32, "Prompts of a rollout, over all processes.")
    num_generations: int = flag(1, "Answers sampled for each prompt; the prompt is computed once for all of them.")
    mini_batch_size: int = flag(16, "Episodes (answers) of an optimizer step, over all processes.")
    num_ppo_epochs: int = flag(2, "Passes over a rollout.")
    temperature: float = flag(1.0, "Of the sampled answers. The log-probs of the update are those at this temperature.")
    init_kl_coef: float = flag(
        0.05, "Weight β of the KL penalty in the reward; with --adap_kl_ctrl where it starts. 0: no reference."
    )
    adap_kl_ctrl: bool = flag(False, "Let β follow the measured KL towards --kl_target (arXiv 1909.08593).")
    kl_target: float = flag(6.0, "KL to the reference that β is steered to, in nats an answer. Also the mark of the KL guard.")
    kl_horizon: int = flag(10000, "Episodes over which β is steered.")
    early_stopping: bool = flag(
        False, "Skip the rest of a rollout's updates once the policy has moved too far from it: see --target_kl."
    )
    target_kl: float = flag(0.1, "Divergence from the rollout's policy that --early_stopping allows (× 1.5), in nats a token.")
    cliprange: float = flag(0.2, "The probability ratio counts within 1 ± this.")
    dual_clip: float | None = flag(
        None, "Bound of the loss of tokens with a negative advantage (arXiv 1912.09729); 3 is usual. Off by default."
    )
    cliprange_value: float = flag(0.2, "A value counts within ± this of what it was at the rollout.")
    vf_coef: float = flag(0.1, "Weight of the value loss.")
    entropy_coef: float = flag(0.0, "Weight of an entropy bonus.")
    kl_loss_coef: float = flag(
        0.0, "Weight of the divergence from the reference (k3) as a term of the loss, beside the penalty in the reward."
    )
    gamma: float = flag(1.0, "Discount of a reward one token later.")
    lam: float = flag(0.95, "λ of generalised advantage estimation (arXiv 1506.02438).")
    whiten_rewards: bool = flag(True, "Divide rewards by their standard deviation; their mean stays.")
    whiten_advantages: bool = flag(True, "Bring advantages to mean 0 and standard deviation 1.")
    missing_eos_penalty: float = flag(1.0, "Taken from the score of an answer that --max_target_length cut off.")
    reward_baseline: float = flag(0.0, "Taken from every score.")
    score_clip: float | None = flag(None, "Scores are clipped to ± this. Off by default.")
    value_sharing: Literal["adapter", "trunk"] = flag(
        "adapter",
        "adapter: values by an adapter of their own. trunk: by a head on the policy's hidden states, one pass for both.",
    )
    guards: bool = flag(
        True, "End the run, with a line, when KL, entropy, stop rate or length run away or a number is not finite."
    )


@dataclass(frozen=True)
class PromptFlags:
    """Prompts and answers"""

    max_source_length: int = flag(512, "Longest prompt in tokens; a longer one loses its oldest exchanges, which is counted.")
    max_target_length: int = flag(256, "Longest answer in tokens.")


@dataclass(frozen=True)
class LoopFlags:
    """Training"""

    output_dir: str = flag("outputs/ppo", "Run folder.")
    max_steps: int = flag(-1, "Rollouts. -1: as many as --num_train_epochs has.")
    num_train_epochs: float = flag(1.0, "Times that every prompt is used, with --max_steps -1.")
    learning_rate: float | None = flag(None, "Of the policy. [default: 1e-5 for an adapter, 1e-6 for all weights]")
    value_learning_rate: float | None = flag(None, "Of the value adapter and head. [default: ten times --learning_rate]")
    weight_decay: float = flag(0.0, "Of AdamW.")
    adam_beta1: float = flag(0.9, "Of AdamW.")
    adam_beta2: float = flag(0.95, "Of AdamW.")
    adam_epsilon: float = flag(1e-5, "Of AdamW: PPO's gradients are small, and 1e-8 makes the first steps wild.")
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.")
    lr_scheduler_type: str = flag("linear", "Schedule of the learning rate, as transformers names them.")
    warmup_steps: float = flag(0, "Optimizer steps of warm-up; a value below 1 is a share of all.")
    gradient_checkpointing: bool = flag(False, "Compute activations again in the backward pass: less memory, a third more time.")
    bf16: bool | None = flag(None, "Compute in bfloat16. [default: where the hardware has it]")
    use_cpu: bool = flag(False, "Train on the CPU even if there is an accelerator.")
    seed: int = flag(42, "Of the order of prompts, the samples, the minibatches and new weights.")
    logging_steps: int = flag(1, "Rollouts between two log lines.")
    eval_steps: int = flag(0, "Rollouts between two evaluations on the held-out prompts. 0: none.")
    save_steps: int = flag(0, "Rollouts between two checkpoints. 0: none.")
    save_total_limit: int | None = flag(None, "Keep only the newest n checkpoints.")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("tensorboard", "Where metrics go beside metrics.jsonl.")
    resume_from_checkpoint: str | None = flag(None, "auto (the last whole checkpoint if any), True (it must exist), or a folder.")


@dataclass(frozen=True)
class RewardSourceFlags:
    """Scores"""

    reward_model_name_or_path: str | None = flag(
        None,
        "Reward model in a folder of its own, or any classifier of one label, or of two, by folder or hub name. Made with the policy's"
        " tokenizer and template it reads the policy's tokens, else the text.",
    )
    reward_adapter: str | None = flag(None, "Adapter of a reward model on the policy's base: costs no second model.")
    reward_func: str | None = flag(
        None,
        "Function that scores answers, module:function or path/to/file.py:function, or several a,b. It is called with the columns that"
        " it names of prompts, answers, answer_ids, prompt_ids, tools, sources, stopped (**kwargs: all) and returns a number each.",
    )
    reward_weights: str | None = flag(
        None, "Weights of several scores, in the order adapter, model, functions: 1.0,0.5. [default: 1 each]"
    )
    reward_batch_size: int = flag(8, "Answers that a reward model in a folder of its own scores at once.")


@dataclass(frozen=True)
class RunFlags:
    """Run folder"""

    overwrite_output_dir: bool = flag(False, "Start over in an --output_dir that already holds a run. Its files are removed.")
    logging_dir: str | None = flag(None, "Folder of the TensorBoard logs. [default: logs under --output_dir]")
    audit: bool = flag(True, "After step 3, check that every trainable tensor moved and every frozen one did not.")


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
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")


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
class ConvertFlags:
    """Convert"""

    in_file: str = flag(REQUIRED, "File to convert.")
    out_file: str = flag(REQUIRED, "JSONL to write (ShareGPT conversations).")
    data_type: Literal["auto", "alpaca", "qa", "sharegpt", "openai", "hh", "text", "json2jsonl"] = flag(
        "auto", "Format of the rows."
    )
    file_type: Literal["auto", "json", "jsonl", "csv", "parquet", "txt"] = flag("auto", "Type of the file. auto: by its name.")
    bad_rows: Literal["error", "skip"] = flag("skip", "On a row that cannot be used: stop, or skip and count.")
