"""Flags of `posttrain ppo` that no other command has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.flags.base import flag


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
    value_layers: int = flag(
        0,
        "Layers, the last ones, that train for the value; those below stay as they begin and are computed once a rollout. 0: all.",
    )
    rollout_engine: Literal["torch", "vllm"] = flag(
        "torch", "What samples the answers: the policy itself, or vLLM (needs a GPU, the package and --use_peft True)."
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
    fsdp: bool = flag(False, "Shard the trained module and its base over the processes of torchrun (FSDP2).")
    deepspeed: str | None = flag(None, "The same by DeepSpeed: its JSON file; of it, ZeRO's settings count.")
    ddp_timeout: int = flag(1800, "Seconds that a process waits for the others, in each exchange, before it takes them for lost.")
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
        " it names of prompts, answers, answer_ids, prompt_ids, tools, sources, stopped and of the prompt's row, a gold answer say"
        " (**kwargs: all), and returns a number each.",
    )
    reward_weights: str | None = flag(
        None, "Weights of several scores, in the order adapter, model, functions: 1.0,0.5. [default: 1 each]"
    )
    reward_batch_size: int = flag(8, "Answers that a reward model in a folder of its own scores at once.")
