"""Flags of the training commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.flags.base import REQUIRED, flag


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    model_name_or_path: str = flag(REQUIRED, "Base model: a folder, a hub name, or smollm2-135m-instruct (needs no hub).")
    tokenizer_name_or_path: str | None = flag(None, "Tokenizer to use instead of the model's own.")
    model_type: str | None = flag(
        None, "Architecture the model must have (llama, qwen2, …), checked against its config; auto: any."
    )
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
        "Where that gives the same: compute MLPs, norms and adapters in fewer passes over memory on a CPU; on CUDA adapters in fewer"
        " kernels, and with liger-kernel installed norms, MLPs and rotary positions, too. No effect elsewhere.",
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
class ContextFlags:
    """Long context"""

    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = flag(
        None,
        "Stretch rotary positions, so that the model reads more than it was trained on. Saved with the model or the adapter."
        " linear, yarn, llama3: train with it; dynamic: for use without training.",
    )
    rope_factor: float | None = flag(
        None, "By how much --rope_scaling stretches. [default: as much as the longest row of this run needs, rounded up]"
    )
    flash_attn: bool = flag(
        False, "On a GPU: use an installed flash-attn package in place of torch's own kernels. A line says what runs."
    )


@dataclass(frozen=True)
class ShiftFlags:
    """Long context in training"""

    shift_attn: bool = flag(
        False, "Train with shifted sparse attention, LongLoRA's S2-Attn (arXiv 2309.12307): in groups, half of the heads shifted."
    )
    shift_group_tokens: int | None = flag(
        None, "Group of --shift_attn; shorter examples are not grouped. [default: a quarter of the longest row]"
    )


@dataclass(frozen=True)
class NoiseFlags:
    """Regularisation"""

    neft_alpha: float = flag(
        0.0, "NEFTune (arXiv 2310.05914): uniform noise of alpha / sqrt(length x width) on the embeddings in training. 0: none."
    )


@dataclass(frozen=True)
class QuantizeFlags:
    """Quantised base"""

    load_in_4bit: bool = flag(
        False, "Load the base in 4 bits (NF4, fused experts too): a quarter of the memory of bfloat16. Needs --use_peft True."
    )
    load_in_8bit: bool = flag(False, "Load the base's linear layers in 8 bits (LLM.int8()). Needs --use_peft True.")
    qlora: bool = flag(False, "QLoRA (arXiv 2305.14314): --load_in_4bit True, with the scales of the weights in 8 bits too.")


@dataclass(frozen=True)
class RouterFlags:
    """Mixture of experts"""

    router_aux_loss_coef: float | None = flag(
        None, "Weight of the router's load balancing loss in training. 0: off. [default: the model's own]"
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
class RunFlags:
    """Run folder"""

    overwrite_output_dir: bool = flag(
        False,
        "Start over in an --output_dir that already holds a run. Its files are removed once the new one's model and rows are loaded.",
    )
    logging_dir: str | None = flag(None, "Folder of the TensorBoard logs. [default: logs under --output_dir]")
    audit: bool = flag(True, "After step 3, check that every trainable tensor moved and every frozen one did not.")
