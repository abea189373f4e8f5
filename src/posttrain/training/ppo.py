"""PPO, the whole loop (arXiv 1707.06347, 1909.08593): prompts → answers → scores → log-probs and values → advantages → updates.

Explicit on Accelerate. A step's prompts, its samples and the order of its minibatches follow from (seed, step) alone, so a resumed run
needs no random state. All statistics are sums over the ranks, and no minibatch depends on their number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.model.policy_value import PolicyAndValue, Role
from posttrain.objectives.advantages import explained_variance
from posttrain.objectives.guards import Guards, early_stop
from posttrain.objectives.kl import KlController, kl_estimate
from posttrain.objectives.ppo import PpoLoss
from posttrain.training.audit import AUDIT_STEPS, Audit
from posttrain.training.episodes import Episode
from posttrain.training.ppo_rollout import Cutter, RewardShape, Rollout, add_advantages, group_episodes, measure, share
from posttrain.training.rollout import Sampling
from posttrain.training.sharding import Engine
from posttrain.training.sums import Sums, averages
from posttrain.types import Half

Score = Callable[[Sequence[Episode]], tuple[list[float], dict[str, list[float]]]]  # scores, and those of each source
Answer = Callable[[Sequence[dict[str, Any]], Sampling, int, Sequence[int]], list[Episode]]


@dataclass(frozen=True)
class Plan:
    """The sizes of the loop, all over all processes."""

    max_steps: int  # rollouts
    rollout_batch_size: int  # prompts a rollout
    mini_batch_size: int  # episodes an optimizer step
    num_ppo_epochs: int  # passes over a rollout
    seed: int
    logging_steps: int = 1
    save_steps: int = 0
    eval_steps: int = 0  # 0: before the first step and after the last only
    early_stop_nats: float | None = None  # of the divergence from the rollout's policy: the rest of its updates is skipped

    def optimizer_steps(self, num_generations: int) -> int:
        """Of the whole run, for the schedule of the learning rate."""
        return self.max_steps * self.num_ppo_epochs * (self.rollout_batch_size * num_generations // self.mini_batch_size)


@dataclass
class Loop:
    """What the loop works with."""

    accelerator: Accelerator
    trained: PolicyAndValue
    engine: Engine  # how the processes hold it
    reference: Role | None
    schedule: Any
    prompts: Any  # rows of EncodePrompt
    held_out: Any | None
    answer: Answer
    score: Score
    sampling: Sampling
    cutter: Cutter
    objective: PpoLoss
    shape: RewardShape
    kl: KlController
    guards: Guards | None
    plan: Plan
    on_log: Callable[[int, dict[str, float], Rollout | None], None]
    on_save: Callable[[Loop], None]
    audit: Audit | None = None  # of the first rollouts after a start
    on_audit: Callable[[str], None] = print
    half: bool = False  # compute in bfloat16
    in_turn: bool = False  # the value's pass begins when the policy's graph is gone
    step: int = 0  # rollouts done

    def autocast(self) -> torch.autocast:
        """The type that passes compute in."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.half)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks."""
        moved = tensor.to(self.accelerator.device)
        return self.accelerator.reduce(moved, "sum") if self.accelerator.num_processes > 1 else moved


def train(loop: Loop) -> str | None:
    """Run to `max_steps`. Returns the line of a guard that ended the run before, else None."""
    plan, first = loop.plan, loop.step
    if loop.held_out is not None and loop.step == 0:
        loop.on_log(0, evaluate(loop), None)
    if loop.audit is not None and loop.step < plan.max_steps:
        loop.audit.begin(loop.trained)
    while loop.step < plan.max_steps:
        clock = Clock()
        rollout = collect(loop, clock)
        with clock.time("measure"):
            plain_N = add_advantages(rollout, loop.shape, loop.kl.coef, loop.reduce)
        sums = rollout_sums(loop, rollout, plain_N)
        coef = loop.kl.coef
        with clock.time("update"):
            early = update(loop, rollout, sums)
        loop.step += 1
        last = loop.step == plan.max_steps
        metrics = step_metrics(loop, rollout, sums, clock) | {"kl_coef": coef, "early_stop": float(early)}
        if "kl_nats" in metrics:
            loop.kl.update(metrics["kl_nats"], plan.rollout_batch_size * loop.sampling.num_generations)
        objection = loop.guards.check(loop.step, metrics) if loop.guards is not None else None
        if loop.step % plan.logging_steps == 0 or objection or last:
            loop.on_log(loop.step, metrics, rollout)
        if objection:
            return objection  # nothing is saved over the last good checkpoint
        if loop.audit is not None and (loop.step == first + AUDIT_STEPS or (last and loop.step < first + AUDIT_STEPS)):
            loop.on_audit(loop.audit.compare(loop.trained))
        if loop.held_out is not None and (last or (plan.eval_steps and loop.step % plan.eval_steps == 0)):
            loop.on_log(loop.step, evaluate(loop), None)
        if plan.save_steps and loop.step % plan.save_steps == 0:
            loop.on_save(loop)
    return None


def prompt_indices(n_rows: int, first: int, count: int, seed: int) -> list[int]:
    """Rows number `first` … `first + count − 1` of an endless stream of permutations, each drawn from (seed, epoch)."""
    found = []
    permutations: dict[int, list[int]] = {}
    for number in range(first, first + count):
        epoch, place = divmod(number, n_rows)
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutations[epoch] = torch.randperm(n_rows, generator=generator).tolist()
        found.append(permutations[epoch][place])
    return found


def collect(loop: Loop, clock: Clock) -> Rollout:
    """This process's share of a rollout: answers, their scores, and what the passes of the update start from."""
    size, rank, world = loop.plan.rollout_batch_size, loop.accelerator.process_index, loop.accelerator.num_processes
    first = loop.step * size
    rows = prompt_indices(len(loop.prompts), first, size, loop.plan.seed)[rank::world]
    numbers = list(range(first, first + size))[rank::world]
    device = loop.accelerator.device
    loop.trained.forget_states()
    with gathered(loop, clock), loop.autocast():
        with clock.time("rollout"):
            episodes = loop.answer([loop.prompts[row] for row in rows], loop.sampling, loop.plan.seed, numbers)
        with clock.time("score"):
            scores, by_source = loop.score(episodes)
        rollout = Rollout(group_episodes(episodes, loop.sampling.num_generations), episodes, torch.tensor(scores, device=device))
        rollout.columns |= {f"score_{name}": torch.tensor(values, device=device) for name, values in by_source.items()}
        with clock.time("measure"):
            measure(rollout, loop.trained, loop.reference, loop.cutter, loop.sampling.temperature)
    return rollout


@contextlib.contextmanager
def gathered(loop: Loop, clock: Clock) -> Iterator[None]:
    """All weights on every process. They come together once for all passes inside."""
    began = time.perf_counter()
    with loop.engine.gathered():
        clock.seconds["gather"] = time.perf_counter() - began
        yield


def update(loop: Loop, rollout: Rollout, sums: Sums) -> bool:
    """K passes of clipped updates over the rollout of all processes. Returns whether they ended early."""
    plan = loop.plan
    whole = share(rollout) if loop.accelerator.num_processes > 1 else rollout
    groups_a_step = plan.mini_batch_size // loop.sampling.num_generations
    for epoch in range(plan.num_ppo_epochs):
        generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + loop.step) * 1_009 + epoch)
        order = torch.randperm(len(whole.groups), generator=generator).tolist()
        for start in range(0, len(order), groups_a_step):
            divergence = update_once(loop, whole, order[start : start + groups_a_step], sums)
            if plan.early_stop_nats is not None and early_stop(divergence(), plan.early_stop_nats):
                return True
    return False


def update_once(loop: Loop, rollout: Rollout, indices: Sequence[int], sums: Sums) -> Callable[[], float]:
    """One optimizer step on some groups, this process's share of them in parts that fit.

    Returns a function, a collective: how far the policy was from the rollout's (k3, nats a token).
    """
    rank, world = loop.accelerator.process_index, loop.accelerator.num_processes

    def cut(process: int) -> list[Any]:
        return list(loop.cutter.parts(rollout.groups, indices[process::world]))

    parts = cut(rank)
    passes = max(len(cut(process)) for process in range(world)) if loop.engine.lockstep else len(parts)
    tokens = sum(len(answer) for index in indices for answer in rollout.groups[index][1])
    own = Sums(loop.reduce)
    halves: tuple[Half | None, ...] = ("policy", "value") if loop.in_turn else (None,)
    for number in range(passes):
        batch = rollout.minibatch(loop.cutter, parts[min(number, len(parts) - 1)])
        for only in halves:
            with loop.engine.accumulating(last=number == passes - 1):
                with loop.autocast():
                    loss = loop.objective(loop.engine.wrapped, batch, only)
                # The engine averages over ranks: multiply that away, so that the gradient is Σ / the response tokens of all ranks.
                # A pass beyond this process's parts only keeps step with the others.
                loop.engine.backward(loss.total * (world / tokens if number < len(parts) else 0.0))
            for name, (total, count) in loss.metrics.items() if number < len(parts) else ():
                sums.add(name, total, count)
                own.add(name, total, count)
    sums.add("grad_norm", loop.engine.step(partial(audit_gradients, loop)), 1.0)
    loop.schedule.step()
    return lambda: averages(own.totals())["approx_kl_nats"]


def audit_gradients(loop: Loop) -> None:
    """Let the audit see the gradients that a step is about to use."""
    if loop.audit is not None:
        loop.audit.before_step(loop.trained, loop.schedule.get_last_lr()[0], loop.engine.gradient)


# --- metrics ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add what happens inside to a part."""
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def rollout_sums(loop: Loop, rollout: Rollout, plain_N: Tensor | None) -> Sums:
    """Sums over the rollout's episodes and tokens; `kl_nats` is the mean over episodes of Σ_t log π/π_ref (k1)."""
    sums = Sums(loop.reduce)
    columns, episodes = rollout.columns, float(len(rollout.episodes))
    tokens = float(len(columns["old_logprobs_N"]))
    sums.add("score", rollout.scores_S.sum(), episodes)
    sums.add("_score_squared", rollout.scores_S.double().square().sum(), episodes)
    for name in [name for name in columns if name.startswith("score_")]:
        sums.add(name, columns[name].sum(), episodes)
    sums.add("stop_rate", rollout.stopped_S.sum(), episodes)
    sums.add("response_tokens", tokens, episodes)
    sums.add("entropy_nats", columns["entropy_N"].sum(), tokens)
    if plain_N is not None:
        sums.add("reward", plain_N.sum(), episodes)
    if "reference_N" in columns:
        log_ratio_N = columns["old_logprobs_N"] - columns["reference_N"]
        sums.add("kl_nats", log_ratio_N.sum(), episodes)
        sums.add("kl_k3_nats", kl_estimate(columns["old_logprobs_N"], columns["reference_N"], "k3").sum(), tokens)
    return sums


def step_metrics(loop: Loop, rollout: Rollout, sums: Sums, clock: Clock) -> dict[str, float]:
    """What is logged of a step. `explained_variance` is that of the values before the update."""
    columns = rollout.columns
    explained = explained_variance(columns["returns_N"], columns["old_values_N"], loop.reduce)
    tokens = float(len(columns["old_logprobs_N"]))
    sums.add("_rollout_tokens", tokens, 1.0)
    totals = sums.totals()
    metrics = averages(totals)
    metrics["score_std"] = _deviation(totals)
    if explained == explained:  # not a number where the returns do not vary
        metrics["explained_variance"] = explained
    metrics["rollout_tokens_per_second"] = totals["_rollout_tokens"][0] / max(clock.seconds["rollout"], 1e-9)
    metrics["update_tokens_per_second"] = totals["policy_loss"][1] / max(clock.seconds["update"], 1e-9)
    metrics |= {f"seconds_{part}": seconds for part, seconds in clock.seconds.items()}
    metrics["learning_rate"] = loop.schedule.get_last_lr()[0]
    return metrics


def evaluate(loop: Loop) -> dict[str, float]:
    """The likeliest answer to every held-out prompt, scored. `kl_nats` is that of these answers, not an estimate of the divergence."""
    assert loop.held_out is not None
    rows = list(loop.held_out)[loop.accelerator.process_index :: loop.accelerator.num_processes]
    greedy = dataclasses.replace(loop.sampling, temperature=0.0, top_p=1.0, top_k=0, num_generations=1)
    with loop.engine.gathered(), loop.autocast():
        episodes = loop.answer(rows, greedy, loop.plan.seed, range(len(rows)))
        scores, _ = loop.score(episodes)
        rollout = Rollout(group_episodes(episodes, 1), episodes, torch.tensor(scores, device=loop.accelerator.device))
        measure(rollout, loop.trained, loop.reference, loop.cutter, 1.0)
    loop.trained.forget_states()
    totals = rollout_sums(loop, rollout, None).totals()
    metrics = averages(totals) | {"score_std": _deviation(totals)}
    return {f"eval_{name}": value for name, value in metrics.items() if name != "entropy_nats"}


def _deviation(totals: dict[str, tuple[float, float]]) -> float:
    """Standard deviation of the scores."""
    (total, count), squares = totals["score"], totals["_score_squared"][0]
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5
