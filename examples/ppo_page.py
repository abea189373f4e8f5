"""What examples/ppo_smollm2.py makes of its results: summaries, verdicts and a Markdown page. Nothing here trains or reads a file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from demo import follows_style

LAST = 10  # rollouts whose means stand for the end of a run
MODES = ("greedy", "sampled")


def adherence(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of answers in the house style."""
    return sum(follows_style(row["output"]) for row in rows) / len(rows)


def nearest(found: Mapping[int, float], aim: float) -> int:
    """The number of steps whose share is nearest to the aim, the smaller number of two."""
    return min(found, key=lambda steps: (abs(found[steps] - aim), steps))


@dataclass(frozen=True)
class Summary:
    """Answers of a model. `std` is that of the scores over all these answers (questions × samples)."""

    answers: int
    empty: int  # without a score
    mean: float
    std: float
    style: float
    stopped: float
    tokens: float


def summarise(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Of rows with output, n_tokens, stop_reason and, where the answer is not empty, score. Without any score mean and std are NaN."""
    scores = [row["score"] for row in rows if "score" in row]
    mean, std = (statistics.fmean(scores), statistics.pstdev(scores)) if scores else (math.nan, math.nan)
    return Summary(
        len(rows), len(rows) - len(scores), mean, std, adherence(rows),
        sum(row["stop_reason"] == "stop" for row in rows) / len(rows), statistics.fmean(row["n_tokens"] for row in rows),
    )  # fmt: skip


def end_mean(log: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric over the last rollouts."""
    values = [line[name] for line in log if name in line][-LAST:]
    return statistics.fmean(values) if values else None


def verdicts(before: Summary, after: Summary, kl_nats: float | None, kl_target: float) -> list[tuple[str, str, bool]]:
    """(criterion, what was measured, whether it holds)."""
    gain = after.mean - before.mean
    return [
        ("mean score up by at least 1 standard deviation of the SFT model's scores",
         f"{before.mean:.2f} → {after.mean:.2f}: {gain:+.2f} = {gain / before.std:+.2f} standard deviations of {before.std:.2f}"
         if before.std else f"{gain:+.2f}, and the scores before do not vary", before.std > 0 and gain >= before.std),
        ("answers in the house style: not fewer", f"{before.style:.0%} → {after.style:.0%}", after.style >= before.style),
        (f"KL to the SFT model at most {kl_target:g} nats an answer",
         "not measured" if kl_nats is None else f"{kl_nats:.2f}", kl_nats is not None and kl_nats <= kl_target),
    ]  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def curve(log: Sequence[Mapping[str, Any]], every: int) -> str:
    """A run's log, a line every few rollouts. The held-out scores are of greedy answers."""
    held_out = {line["step"]: line for line in log if "eval_score" in line}
    steps = [line for line in log if "score" in line and (line["step"] % every == 0 or line["step"] == 1)]
    names = ("score", "score_std", "kl_nats", "kl_coef", "explained_variance", "entropy_nats", "stop_rate", "response_tokens")
    rows = [
        [line["step"], *(f"{line[name]:.3g}" if name in line else "" for name in names),
         f"{held_out[line['step']]['eval_score']:.3g}" if line["step"] in held_out else ""]
        for line in steps
    ]  # fmt: skip
    head = ["rollout", "score", "its std", "KL, nats an answer", "β", "explained variance", "entropy, nats a token",
            "stopped", "tokens", "held-out score, greedy"]  # fmt: skip
    return table(head, rows)


def before_and_after(summaries: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Sequence[str]) -> str:
    """Every model's answers to the held-out questions, in both ways."""
    rows = []
    for mode in MODES:
        for name in names:
            s = summaries[name][mode]
            rows.append([mode, name, s["answers"], f"{s['mean']:.2f}", f"{s['std']:.2f}", f"{s['style']:.0%}",
                         f"{s['stopped']:.0%}", f"{s['tokens']:.0f}", s["empty"]])  # fmt: skip
    head = ["answers", "model", "number", "mean score", "standard deviation", "in the house style", "stopped", "tokens", "empty"]
    return table(head, rows)


def samples(rows: Sequence[Mapping[str, Any]], names: Sequence[str], questions: int = 3) -> str:
    """Greedy answers of every model to the first questions, and the sampled answers with the highest and the lowest score."""
    parts = []
    greedy = {name: [row for row in rows if row["model"] == name and row["mode"] == "greedy"] for name in names}
    for i in range(min(questions, len(greedy[names[0]]))):
        parts.append(f"### {greedy[names[0]][i]['messages'][-1]['content']}")
        parts += [quoted(f"{name}, greedy", greedy[name][i]) for name in names]
    for name in names:
        own = [row for row in rows if row["model"] == name and row["mode"] == "sampled" and "score" in row]
        scored = sorted(own, key=lambda row: row["score"])
        parts.append(f"### {name}, sampled: the highest and the lowest score")
        parts += [f"{row['messages'][-1]['content']}\n\n{quoted(name, row)}" for row in [*scored[-1:], *scored[:1]]]
    return "\n\n".join(parts)


def quoted(name: str, row: Mapping[str, Any]) -> str:
    """An answer as it was given."""
    score = f"score {row['score']:.2f}" if "score" in row else "no score"
    return f"{name}, {score}, {'stopped' if row['stop_reason'] == 'stop' else 'cut'}:\n\n~~~text\n{row['output'].strip()}\n~~~"


def page(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The result in Markdown."""
    names = list(report["answers"])
    parts = [
        f"# PPO from a weak SFT model of {report['model']}",
        f"`{report['command']}` on {report['device']}, {report['minutes']} minutes.",
    ]
    for name, run in report["runs"].items():
        parts.append(f"## {name}: does it learn\n\nEnded by: {run['ended']}; {run['rollouts']} rollouts.")
        for mode in MODES:
            lines = [[text, measured, "holds" if holds else "DOES NOT HOLD"] for text, measured, holds in run["verdicts"][mode]]
            parts.append(table([f"{mode} answers to held-out questions", "measured", ""], lines))
    parts.append(f"## Before and after\n\n{before_and_after(report['answers'], names)}")
    head = ["variant", "score", "KL, nats an answer", "explained variance", "seconds a rollout"]
    ends = [[name, *("" if run[key] is None else f"{run[key]:.3f}" for key in ("score", "kl_nats", "explained_variance", "seconds"))]
            for name, run in report["runs"].items()]  # fmt: skip
    parts.append(f"## The variants, means over the last {LAST} rollouts\n\n{table(head, ends)}")
    parts += [f"### {name}\n\n{curve(run['log'], report['every'])}" for name, run in report["runs"].items()]
    ranked = (
        ""
        if report["rm_accuracy"] is None
        else f" The reward model ranks {report['rm_accuracy']:.0%} of the held-out pairs right."
    )
    steps = ", ".join(f"{share:.0%} after {count} steps" for count, share in report["sft"].items())
    shares = f"Sampled answers to training questions in the house style: {steps}." if steps else "Made before this run."
    parts.append(f"## The SFT model and the reward model\n\n{shares}{ranked}")
    parts.append("## Commands\n\n```\n" + "\n".join(report["commands"].values()) + "\n```")
    parts.append(f"## Answers\n\n{samples(rows, names)}")
    return "\n\n".join(parts) + "\n"
