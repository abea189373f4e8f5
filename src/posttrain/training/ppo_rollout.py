"""One rollout of PPO: sampled answers, their scores, and what the update needs of them on the flat axis of response tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from torch import Tensor

from posttrain.data.pack_branches import Branches
from posttrain.model.policy_value import PolicyAndValue, Role, reference_logprobs
from posttrain.objectives.advantages import Reduce, gae, shaped_scores, token_rewards, whiten
from posttrain.training.episodes import Episode
from posttrain.types import PackedBatch

Collate = Callable[[Sequence[Branches]], PackedBatch]


@dataclass(frozen=True)
class Cutter:
    """How groups (a prompt and its answers) become micro-batches of at most `forward_tokens` (0: no limit) on a device."""

    collate: Collate
    forward_tokens: int
    device: torch.device
    padded: bool = False  # each answer has a row of its own with its prompt, all as long as the longest
    measure_tokens: int = 0  # the limit of passes without gradients, which keep the activations of one layer alone

    def parts(self, groups: Sequence[Branches], indices: Sequence[int], limit: int | None = None) -> Iterator[list[int]]:
        """`indices` in order, cut where the next group would not fit into `limit` [default: forward_tokens]."""
        limit = self.forward_tokens if limit is None else limit
        part: list[int] = []
        for index in indices:
            if part and 0 < limit < self._tokens(groups, [*part, index]):
                yield part
                part = []
            part.append(index)
        if part:
            yield part

    def _tokens(self, groups: Sequence[Branches], indices: Sequence[int]) -> int:
        """What is computed of the groups, padding included."""
        chosen = [groups[index] for index in indices]
        if self.padded:
            lengths = [len(prompt) + len(answer) for prompt, answers in chosen for answer in answers]
            return len(lengths) * max(lengths)
        return sum(len(prompt) + sum(map(len, answers)) for prompt, answers in chosen)

    def batch(self, groups: Sequence[Branches], indices: Sequence[int]) -> PackedBatch:
        """The groups as one micro-batch."""
        return self.collate([groups[index] for index in indices]).to(self.device)


@dataclass
class Rollout:
    """The episodes of one process, group by group. Columns over N: every token of every answer, in that order."""

    groups: list[Branches]
    episodes: list[Episode]
    scores_S: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    value_states: list[Tensor] = field(
        default_factory=list
    )  # (tokens of a group, D) where the value's trained layers begin, if kept

    @property
    def sequence_N(self) -> Tensor:  # noqa: N802 - an axis suffix
        """The episode that a token belongs to."""
        counts = torch.tensor([len(episode.answer_ids) for episode in self.episodes])
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.scores_S.device)

    @property
    def stopped_S(self) -> Tensor:  # noqa: N802
        """Whether an episode ended by a stop token."""
        return torch.tensor([episode.stopped for episode in self.episodes], device=self.scores_S.device)

    def group_ends(self) -> list[int]:
        """Where the tokens of each group end on the axis N."""
        ends, end = [], 0
        for _, answers in self.groups:
            end += sum(len(answer) for answer in answers)
            ends.append(end)
        return ends

    def minibatch(self, cutter: Cutter, indices: Sequence[int]) -> PackedBatch:
        """Groups with the columns of their tokens as extras."""
        ends = self.group_ends()
        tokens_N = torch.cat([torch.arange(ends[i - 1] if i else 0, ends[i]) for i in indices]).to(cutter.device)
        extras = {name: column[tokens_N] for name, column in self.columns.items() if name.endswith("_N")}
        return dataclasses.replace(cutter.batch(self.groups, indices), extras=extras)


def group_episodes(episodes: Sequence[Episode], num_generations: int) -> list[Branches]:
    """Episodes of one prompt stand next to each other: one group a prompt."""
    starts = range(0, len(episodes), num_generations)
    return [(episodes[i].prompt_ids, [e.answer_ids for e in episodes[i : i + num_generations]]) for i in starts]


@torch.no_grad()
def measure(rollout: Rollout, trained: PolicyAndValue, reference: Role | None, cutter: Cutter, temperature: float) -> None:
    """Columns by the very forward that the update uses: old_logprobs_N, old_values_N, entropy_N, last_values_S and, where there is a
    reference, reference_N."""
    found: dict[str, list[Tensor]] = {}
    for part in cutter.parts(rollout.groups, range(len(rollout.groups)), cutter.measure_tokens):
        batch = cutter.batch(rollout.groups, part)
        tokens = {"predict_N": batch.predict_N, "targets_N": batch.targets_N, "last_S": batch.last_S()}
        output = trained(**batch.model_inputs(), **tokens, temperature=temperature, entropy=True)
        columns = {
            "old_logprobs_N": output.logprobs_N, "old_values_N": output.values_N, "entropy_N": output.entropy_N,
            "last_values_S": output.last_values_S,
        }  # fmt: skip
        if reference is not None:
            columns["reference_N"] = reference_logprobs(reference, batch, temperature)
        for name, column in columns.items():
            found.setdefault(name, []).append(column)
    rollout.columns |= {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class RewardShape:
    """From scores to advantages; see objectives/advantages.py."""

    gamma: float = 1.0
    lam: float = 0.95
    missing_eos_penalty: float = 0.0
    reward_baseline: float = 0.0
    score_clip: float | None = None
    whiten_rewards: bool = True
    whiten_advantages: bool = True


def add_advantages(rollout: Rollout, shape: RewardShape, kl_coef: float, reduce: Reduce) -> Tensor:
    """Add advantages_N and returns_N; returns the rewards before whitening, (N). A collective over the ranks."""
    columns, sequence_N, stopped_S = rollout.columns, rollout.sequence_N, rollout.stopped_S
    scores_S = shaped_scores(
        rollout.scores_S, stopped_S, missing_eos_penalty=shape.missing_eos_penalty, reward_baseline=shape.reward_baseline,
        score_clip=shape.score_clip,
    )  # fmt: skip
    plain_N = token_rewards(scores_S, columns["old_logprobs_N"], columns.get("reference_N"), sequence_N, kl_coef)
    rewards_N = whiten(plain_N, zero_mean=False, reduce=reduce) if shape.whiten_rewards else plain_N
    advantages_N, columns["returns_N"] = gae(
        rewards_N, columns["old_values_N"], sequence_N, stopped_S, columns["last_values_S"], gamma=shape.gamma, lam=shape.lam
    )
    columns["advantages_N"] = whiten(advantages_N, zero_mean=True, reduce=reduce) if shape.whiten_advantages else advantages_N
    return plain_N


def share(rollout: Rollout) -> Rollout:
    """The groups of all processes with their columns over N, in the order of their prompts, on every process. A collective.

    Process r of w holds the groups r, r + w, r + 2w …. So the minibatches of an update do not depend on the number of processes.
    """
    device, ends = rollout.scores_S.device, rollout.group_ends()
    own = [
        (group, {name: column[start:end].cpu() for name, column in rollout.columns.items() if name.endswith("_N")})
        for group, start, end in zip(rollout.groups, [0, *ends], ends, strict=False)
    ]
    by_process = gather_object([own])
    ordered = [pair for row in zip(*by_process, strict=True) for pair in row]
    columns = {name: torch.cat([part[name] for _, part in ordered]).to(device) for name in ordered[0][1]}
    return Rollout([group for group, _ in ordered], [], rollout.scores_S.new_zeros(0), columns)
