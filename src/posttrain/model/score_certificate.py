"""The merge certificate of a reward model: a written folder scores like the base with its adapter on, at every token of fixed texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.model.attention import find_decoder, unwrap
from posttrain.model.certificate import PROMPTS, References, as_trained, may_be_beyond, n_beyond, same_tokenizer
from posttrain.model.reward import library_class, load_reward_model, score_head

# In units of the scores' standard deviation over the tokens. Measured on the embedded model with a trained head: 8e-6 for the float32
# sum, after rounding 5e-3 at most and 8e-4 on average in float16, 3e-2 and 1e-2 in bfloat16. A single token may lie far off in a model
# that is hardly trained, hence the wide bound on the largest. The head itself is written in float32.
SUM_SPREADS = 1e-4
LARGEST_SPREADS = {"float32": 1e-4, "float16": 0.2, "bfloat16": 1.0}
MEAN_SPREADS = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True)
class ScoreCertificate:
    """What was compared. `base` and `adapter` are the folders; differences of scores are merged against base + adapter."""

    base: str
    adapter: str
    dtype: str
    n_tokens: int
    sum_max_abs: float  # of the float32 sum, before rounding: the proof of the arithmetic
    sum_max_abs_allowed: float
    max_abs: float
    max_abs_allowed: float
    n_beyond: int  # tokens with a larger one
    n_beyond_allowed: int  # 0, but for mixtures of experts (certificate.py)
    mean_abs: float
    mean_abs_allowed: float
    same_order: float  # share of the pairs of tokens whose scores are in the same order
    adapter_mean_abs: float  # base + adapter against the base alone under the trained head: what the low-rank matrices do
    read_by: str  # the class that read the folder back
    tokenizer_equal: bool
    template_equal: bool

    @property
    def ok(self) -> bool:
        """Whether the merged model may be used. Written so that a NaN fails."""
        exact = self.sum_max_abs <= self.sum_max_abs_allowed
        close = self.n_beyond <= self.n_beyond_allowed and self.mean_abs <= self.mean_abs_allowed
        return exact and close and self.tokenizer_equal and self.template_equal

    @property
    def kept(self) -> float:
        """The share of the adapter's effect that survived rounding, as 1 − difference / adapter's own effect."""
        return 1 - self.mean_abs / self.adapter_mean_abs if self.adapter_mean_abs > 0 else 1.0

    def __str__(self) -> str:
        verdict = "passed" if self.ok else "FAILED"
        rerouted = f"; {self.n_beyond} of {self.n_beyond_allowed} tokens that may be beyond" if self.n_beyond_allowed else ""
        return "\n".join(
            [
                f"merge certificate: {verdict} ({self.dtype}, scores at {self.n_tokens} tokens of {len(PROMPTS)} texts)",
                f"  before rounding           {self.sum_max_abs:.2e}  (largest difference; allowed {self.sum_max_abs_allowed:.2e})",
                f"  largest score difference  {self.max_abs:.2e}  (allowed {self.max_abs_allowed:.2e}{rerouted})",
                f"  mean score difference     {self.mean_abs:.2e}  (allowed {self.mean_abs_allowed:.2e})",
                f"  same order                {100 * self.same_order:.1f} % of pairs of tokens",
                f"  the adapter itself        {self.adapter_mean_abs:.2e} mean change of a score; {100 * self.kept:.1f} % of it kept",
                f"  read by {self.read_by}; tokenizer {as_trained(self.tokenizer_equal)};"
                f" chat template {as_trained(self.template_equal)}",
            ]
        )


def certify_scores(
    folder: Path,
    names: tuple[str, str, str],
    tokenizer: Any,
    ids: list[Tensor],
    references: References,
    trust_remote_code: bool = False,
) -> ScoreCertificate:
    """Read the folder back, by plain transformers where it has the class, and compare.

    `names`: base, adapter and the written type. `ids`: the texts' token ids, each (1, T). `references`: scores (tokens,) it must equal.
    """
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model: Any = load_reward_model(str(folder), "float32", trust_remote_code=trust_remote_code).eval()
    theirs = library_class(model)
    if theirs is not None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return compare_scores(names, (tokenizer, again), references, token_scores(model, ids), model, theirs)


def compare_scores(
    names: tuple[str, str, str],
    tokenizers: tuple[Any, Any],
    references: References,
    actual: Tensor,
    model: Any,
    theirs: type | None,
) -> ScoreCertificate:
    """The certificate of what was read back: `model` with its `actual` scores (tokens,), of `tokenizers` the second. `theirs`: the
    class of transformers that it is of."""
    base, adapter, dtype = names
    tokenizer, again = tokenizers
    expected = references.expected
    spread, difference = expected.std().item(), (expected - actual).abs()
    return ScoreCertificate(
        base=base,
        adapter=adapter,
        dtype=dtype,
        n_tokens=len(expected),
        sum_max_abs=(expected - references.merged).abs().max().item(),
        sum_max_abs_allowed=SUM_SPREADS * spread,
        max_abs=difference.max().item(),
        max_abs_allowed=LARGEST_SPREADS[dtype] * spread,
        n_beyond=n_beyond(difference, LARGEST_SPREADS[dtype] * spread),
        n_beyond_allowed=may_be_beyond(model, dtype, len(expected)),
        mean_abs=difference.mean().item(),
        mean_abs_allowed=MEAN_SPREADS[dtype] * spread,
        same_order=same_order(expected, actual),
        adapter_mean_abs=(expected - references.base_alone).abs().mean().item(),
        read_by="posttrain (transformers has no such class)" if theirs is None else f"transformers' {theirs.__name__}",
        tokenizer_equal=same_tokenizer(tokenizer, again),
        template_equal=tokenizer.chat_template == again.chat_template,
    )


def same_order(expected: Tensor, actual: Tensor) -> float:
    """The share of the pairs of different scores that both order alike."""
    above, also_above = expected[:, None] > expected, actual[:, None] > actual
    return ((above & also_above).sum() / above.sum().clamp(min=1)).item()


@torch.no_grad()
def token_scores(model: Any, ids: list[Tensor], weight: Tensor | None = None) -> Tensor:
    """The score at every token of all texts, one after the other, each by itself: shape (tokens,), float32.

    `weight` (1, D): a head to take in place of the model's own.
    """
    head = score_head(model).weight if weight is None else weight
    decoder = find_decoder(unwrap(model))
    return torch.cat(
        [decoder(input_ids=text_ids, use_cache=False).last_hidden_state[0].float() @ head[0].float() for text_ids in ids]
    )
