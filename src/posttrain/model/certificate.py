"""The merge certificate: a written model folder answers like the base with its adapter on.

The folder is read back by plain transformers and its logits on fixed texts are compared with those of base + adapter, both in
float32 arithmetic, so that the difference is that of the rounded weights and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.model.load import read_weights
from posttrain.model.router import is_mixture

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "Question: I have had a dry cough for three days. What should I do?\nAnswer: In short:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + ",
    "1 + 1 = 2, 12 * 12 = 144, 2024 - 1999 =",
    "糖尿病患者平时应该注意什么？\n首先，",
)
# The arithmetic is proved before rounding: float32 sums in another order differ by a mean KL of about 1e-11 nats a token.
SUM_KL_NATS = 1e-7
# The file is proved after rounding. Measured on the embedded model: 1e-11 in float32, 2e-6 in float16, 3e-5 to 4e-4 in bfloat16
# (the more trained, the more); a lost layer or a head gone astray lies orders above. Rounding noise is relative, so the bound on
# single logits is in units of their standard deviation over the vocabulary, at the token where they vary most.
KL_NATS = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 2e-2}
LOGIT_SPREADS = {"float32": 1e-3, "float16": 0.2, "bfloat16": 1.0}
# Rounding may tip a router's choice where two experts are all but equal, and that token then goes another way: of 288 tokens of a tiny
# Mixtral one was beyond in bfloat16, none of any other family tried. So this share of a mixture's tokens may be.
REROUTED = {"float32": 0.0, "float16": 0.05, "bfloat16": 0.05}


@dataclass(frozen=True)
class Certificate:
    """What was compared. `base` and `adapter` are the folders; differences are merged against base + adapter."""

    base: str
    adapter: str
    dtype: str
    n_tokens: int
    sum_kl_nats: float  # mean KL of the float32 sum, before rounding: the proof of the arithmetic
    max_abs_logit: float  # the largest difference of a logit
    max_abs_logit_allowed: float
    n_beyond: int  # tokens with a larger one
    n_beyond_allowed: int  # 0, but for mixtures of experts
    mean_kl_nats: float
    mean_kl_nats_allowed: float
    max_kl_nats: float
    argmax_agreement: float
    adapter_kl_nats: float  # mean KL of base + adapter against the base alone: what the adapter does
    tied_head: bool
    tokenizer_equal: bool
    template_equal: bool

    @property
    def ok(self) -> bool:
        """Whether the merged model may be used. Written so that a NaN fails."""
        close = self.n_beyond <= self.n_beyond_allowed and self.mean_kl_nats <= self.mean_kl_nats_allowed
        exact = self.sum_kl_nats <= SUM_KL_NATS
        return exact and close and self.tokenizer_equal and self.template_equal

    @property
    def kept(self) -> float:
        """The share of the adapter's effect that survived rounding, as 1 − KL(merged) / KL(adapter's own effect)."""
        return 1 - self.mean_kl_nats / self.adapter_kl_nats if self.adapter_kl_nats > 0 else 1.0

    def __str__(self) -> str:
        rerouted = f"; {self.n_beyond} of {self.n_beyond_allowed} tokens that may be beyond" if self.n_beyond_allowed else ""
        return "\n".join(
            [
                f"merge certificate: {'passed' if self.ok else 'FAILED'} ({self.dtype}, {self.n_tokens} tokens of {len(PROMPTS)} texts)",
                f"  mean KL before rounding   {self.sum_kl_nats:.2e}  (allowed {SUM_KL_NATS:.2e})",
                f"  largest logit difference  {self.max_abs_logit:.2e}  (allowed {self.max_abs_logit_allowed:.2e}{rerouted})",
                f"  mean KL divergence        {self.mean_kl_nats:.2e}  (allowed {self.mean_kl_nats_allowed:.2e}; largest {self.max_kl_nats:.2e})",
                f"  same first choice         {100 * self.argmax_agreement:.1f} % of tokens",
                f"  the adapter itself        {self.adapter_kl_nats:.2e} KL against the base; {100 * self.kept:.1f} % of it kept",
                f"  head {'tied' if self.tied_head else 'untied'}; tokenizer {as_trained(self.tokenizer_equal)};"
                f" chat template {as_trained(self.template_equal)}",
            ]
        )


def as_trained(same: bool) -> str:
    """How a line of the certificate says whether something came out unchanged."""
    return "as trained" if same else "CHANGED"


@dataclass(frozen=True)
class References:
    """Logits (tokens, V) or scores (tokens,) in float32: of base + adapter, of the base alone, of the float32 sum before it is rounded."""

    expected: Tensor
    base_alone: Tensor
    merged: Tensor


def certify(
    folder: Path,
    names: tuple[str, str, str],
    tokenizer: Any,
    ids: list[Tensor],
    references: References,
    trust_remote_code: bool = False,
) -> Certificate:
    """Read the folder back as any user of transformers would and compare.

    `names`: base, adapter and the written type. `ids`: the texts' token ids, each (1, T). `references`: what it must equal.
    """
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    model = read_weights(AutoModelForCausalLM, str(folder), **options).eval()
    return compare(names, (tokenizer, again), references, logits(model, ids), model)


def has_tied_head(model: Any) -> bool:
    """Whether output head and embedding are one tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def compare(
    names: tuple[str, str, str], tokenizers: tuple[Any, Any], references: References, actual: Tensor, model: Any
) -> Certificate:
    """The certificate of what was read back: `model` with its `actual` logits (tokens, V), and of `tokenizers` the second."""
    base, adapter, dtype = names
    tokenizer, again = tokenizers
    expected = references.expected
    kl = kl_nats(expected, actual)
    allowed = LOGIT_SPREADS[dtype] * expected.std(-1).max().item()
    largest = (expected - actual).abs().amax(-1)
    return Certificate(
        base=base,
        adapter=adapter,
        dtype=dtype,
        n_tokens=len(expected),
        sum_kl_nats=kl_nats(expected, references.merged).mean().item(),
        max_abs_logit=largest.max().item(),
        max_abs_logit_allowed=allowed,
        n_beyond=n_beyond(largest, allowed),
        n_beyond_allowed=may_be_beyond(model, dtype, len(expected)),
        mean_kl_nats=kl.mean().item(),
        mean_kl_nats_allowed=KL_NATS[dtype],
        max_kl_nats=kl.max().item(),
        argmax_agreement=(expected.argmax(-1) == actual.argmax(-1)).float().mean().item(),
        adapter_kl_nats=kl_nats(expected, references.base_alone).mean().item(),
        tied_head=has_tied_head(model),
        tokenizer_equal=same_tokenizer(tokenizer, again),
        template_equal=tokenizer.chat_template == again.chat_template,
    )


def n_beyond(differences: Tensor, allowed: float) -> int:
    """How many are larger; a NaN is."""
    return int((~(differences <= allowed)).sum())


def may_be_beyond(model: Any, dtype: str, n_tokens: int) -> int:
    """How many tokens of a model may be, written in a type."""
    return int(REROUTED[dtype] * n_tokens) if is_mixture(model.config) else 0


def kl_nats(expected: Tensor, actual: Tensor) -> Tensor:
    """KL(expected ‖ actual) per token from logits (T, V). Sums in float64: in float32 the noise floor is 1e-7 × ln V."""
    rows = []
    for p, q in zip(expected.split(16), actual.split(16), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    return torch.cat(rows)


def same_tokenizer(tokenizer: Any, again: Any) -> bool:
    """Whether two tokenizers have the same vocabulary, marks and ids for the fixed texts."""
    same_ids = all(tokenizer(prompt)["input_ids"] == again(prompt)["input_ids"] for prompt in PROMPTS)
    same_marks = (tokenizer.eos_token_id, tokenizer.pad_token_id) == (again.eos_token_id, again.pad_token_id)
    return same_ids and same_marks and tokenizer.get_vocab() == again.get_vocab()


@torch.no_grad()
def logits(model: Any, ids: list[Tensor]) -> Tensor:
    """Logits of all texts, one after the other, each by itself: shape (tokens, V), float32."""
    return torch.cat([model(input_ids=text_ids, use_cache=False, return_dict=True).logits[0].float() for text_ids in ids])
