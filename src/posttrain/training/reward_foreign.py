"""Scores by any sequence classifier of transformers that has a tokenizer of its own: it reads the text, not the policy's tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from posttrain.data.chat_render import RENDER_ERRORS, render
from posttrain.model.attention import evaluation
from posttrain.model.embedded import resolve_model
from posttrain.model.load import DType, hardware_dtype, read_weights
from posttrain.training.episodes import Episode
from posttrain.training.rewards import checked_scores
from posttrain.types import UserError

logger = logging.getLogger(__name__)

Encoding = Mapping[str, list[int]]


@dataclass(frozen=True)
class ForeignReward:
    """A classifier of one label: its logit. Of two labels: the log-odds of `label`."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    batch_rows: int
    pad_id: int | None  # which the model's code may look for; None: it reads the last token, whatever that is
    max_tokens: int
    label: int = 1
    bias: float = 0.0  # added to every score

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """Raises UserError where its template cannot render a dialogue and for a score that is no number."""
        encoded = [self.encode(episode) for episode in episodes]
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        found = []
        with evaluation(self.model):
            for start in range(0, len(order), self.batch_rows):
                inputs = self._padded([encoded[i] for i in order[start : start + self.batch_rows]])
                found.append(self._scores(self.model(**inputs).logits.float()))
        values = torch.cat(found).tolist() if found else []
        scores = [value for _, value in sorted(zip(order, values, strict=True))]
        return [score + self.bias for score in checked_scores(self.name, episodes, scores)]

    def encode(self, episode: Episode) -> Encoding:
        """The dialogue with the answer in the tokenizer's own template; where it has none, what was asked and the answer as a pair.

        A dialogue that is too long loses its beginning.
        """
        if not self.tokenizer.chat_template:
            asked = "\n\n".join(message.get("content") or "" for message in episode.messages)
            encoding: Encoding = self.tokenizer(asked, episode.answer, truncation="longest_first", max_length=self.max_tokens)
            return encoding
        turns = [*episode.messages, {"role": "assistant", "content": episode.answer}]
        try:
            text = render(self.tokenizer, turns, episode.tools, prompt=False)
        except RENDER_ERRORS as error:
            raise UserError(f"{self.name}: its chat template cannot render the dialogue of {episode.source}: {error}") from error
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids if len(ids) <= self.max_tokens else [ids[0], *ids[len(ids) - self.max_tokens + 1 :]]}

    def _padded(self, rows: Sequence[Encoding]) -> dict[str, Tensor]:
        """Rows padded on the right, with their mask."""
        longest = max(len(row["input_ids"]) for row in rows)
        pad_id = self.pad_id
        if pad_id is None:  # the model's code takes the last token that is not padding: so padding must end no row
            last = {row["input_ids"][-1] for row in rows}
            pad_id = next(token for token in range(len(last) + 1) if token not in last)
            self.model.config.get_text_config().pad_token_id = pad_id
        padded = {
            "input_ids": [row["input_ids"] + [pad_id] * (longest - len(row["input_ids"])) for row in rows],
            "attention_mask": [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows],
        }
        # Only a model with types: others would take them for tokens (GPT-2), and the tokenizer may give them all the same.
        if "token_type_ids" in rows[0] and getattr(self.model.config, "type_vocab_size", None):
            padded["token_type_ids"] = [row["token_type_ids"] + [0] * (longest - len(row["token_type_ids"])) for row in rows]
        return {name: torch.tensor(column, device=self.model.device) for name, column in padded.items()}

    def _scores(self, logits_SL: Tensor) -> Tensor:
        if logits_SL.shape[1] == 1:
            return logits_SL[:, 0]
        return logits_SL[:, self.label] - logits_SL[:, 1 - self.label]


def load_text_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """A tokenizer as it is: a classifier's needs no end token and is given its padding by us. Raises UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot load its tokenizer ({line.rstrip('.')})") from error


def load_classifier(name: str, config: Any, dtype: DType, trust_remote_code: bool = False) -> PreTrainedModel:
    """A classifier by transformers' own class. Raises UserError for missing weights and for more than two labels."""
    if config.num_labels > 2:
        raise UserError(
            f"{name}: is a classifier of {config.num_labels} labels; a reward model has one, or two to tell good from bad"
        )
    chosen = hardware_dtype() if dtype == "auto" else getattr(torch, dtype)
    model = read_weights(AutoModelForSequenceClassification, name, dtype=chosen, trust_remote_code=trust_remote_code)
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):  # a decoder's: scores rounded to 16 bits would tie close answers
        head.float().register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))
    return model


def padding_id(model: PreTrainedModel) -> int | None:
    """The padding that the model's config names; None where it names none that exists."""
    named = getattr(model.config.get_text_config(), "pad_token_id", None)
    return named if named is not None and 0 <= named < model.get_input_embeddings().weight.shape[0] else None


def longest_input_tokens(model: PreTrainedModel, tokenizer: Any) -> int:
    """What both the tokenizer and the model's positions allow."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), positions or int(tokenizer.model_max_length))
