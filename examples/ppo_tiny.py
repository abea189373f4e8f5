"""PPO learns a toy task in a quarter of a minute: a random model of two layers is asked for a letter and learns to answer with it.

    python examples/ppo_tiny.py --output_dir outputs/ppo-tiny

Writes the model and the prompts, runs `posttrain ppo` on them (the command line is printed) and shows the curve.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
ALPHABET = [*string.ascii_lowercase, " ", "\n"]
STOP = SPECIAL.index("<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = "abcd"
FLAGS: dict[str, Any] = {
    "max_steps": 100, "rollout_batch_size": 16, "num_generations": 4, "mini_batch_size": 32, "max_target_length": 4,
    "use_peft": False, "learning_rate": 5e-3, "value_learning_rate": 5e-3, "init_kl_coef": 0.002,
    "entropy_coef": 0.05, "missing_eos_penalty": 0,
    "guards": False,  # the best answers are always the same, so the guard against a collapse of the entropy would be right elsewhere
    "bf16": False, "report_to": "none",
}  # fmt: skip


def asked_letter(prompts: Sequence[list[dict[str, Any]]], answers: Sequence[str]) -> list[float]:
    """The share of an answer's letters that are the one that was asked for, the question's last: by chance about 1 in 30."""
    return [
        answer.count(prompt[-1]["content"][-1]) / max(len(answer), 1) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def letter_tokenizer(**changes: Any) -> Any:
    """One token a letter, ChatML's marks, and a template."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}, []))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "model_max_length": 512, **changes}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    made.chat_template = CHATML
    return made


def save_speaker(folder: Path, tokenizer: Any = None, scale: float = 1.0, seed: int = 0, **changes: Any) -> Path:
    """A random llama of two layers over letters, with its tokenizer. `scale` of its matrices: large ones make it say likelier things."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or letter_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": STOP, "pad_token_id": SPECIAL.index("<|pad|>"),
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(file: Path, asked: Sequence[str]) -> Path:
    """Prompts of a user's turn each."""
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in asked))
    return file


def command_line(folder: Path, **changes: Any) -> list[str]:
    """Write the task into a folder and return the words of the command that learns it."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = {
        "model_name_or_path": save_speaker(folder / "model", scale=4),
        "train_file_dir": write_prompts(folder / "prompts.jsonl", [f"say {letter}" for letter in LETTERS]),
        "reward_func": f"{os.path.relpath(__file__)}:asked_letter",
        "output_dir": folder / "run",
        **FLAGS,
        **changes,
    }
    return ["ppo", *(str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value))]


def curve(run: Path, every: int = 10) -> str:
    """A Markdown table of a run's log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = ["| step | score | KL, nats an answer | entropy, nats a token | explained variance |", "|---|---|---|---|---|"]
    for line in lines:
        if line["step"] % every == 0 or line["step"] == 1:
            values = [line.get(name) for name in ("score", "kl_nats", "entropy_nats", "explained_variance")]
            shown = ["" if value is None else f"{value:.3f}" for value in values]
            table.append(f"| {' | '.join([str(line['step']), *shown])} |")
    return "\n".join(table)


def main() -> int:
    """Run the task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ppo-tiny"))
    words = command_line(parser.parse_args().output_dir, overwrite_output_dir=True)
    print(f"posttrain {' '.join(words)}")
    from posttrain.cli import main as posttrain

    code = posttrain(words)
    if code == 0:
        print(curve(Path(words[words.index("--output_dir") + 1])))
    return code


if __name__ == "__main__":
    sys.exit(main())
