"""What PPO's parts are worth on the toy task of examples/ppo_tiny.py: each is switched off in turn, over several seeds.

    python benchmarks/ppo_ablation.py --seeds 42 1 2 --output_file outputs/ppo_ablation.md

Score and KL are means over the last ten rollouts of a run, then mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "src")]

LAST = 10  # rollouts
LEARNED = 0.9
# A weight of 0 would leave the reference out, and the KL could not be measured: so small a weight changes no reward.
NO_KL = 1e-9
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no KL penalty (`--init_kl_coef` 1e-9)": {"init_kl_coef": NO_KL},
    "rewards not whitened (`--whiten_rewards False`)": {"whiten_rewards": False},
    "advantages not whitened (`--whiten_advantages False`)": {"whiten_advantages": False},
    "neither whitened": {"whiten_rewards": False, "whiten_advantages": False},
    "value head off (`--vf_coef 0`)": {"vf_coef": 0, "audit": False},
    "value on the policy's hidden states (`--value_sharing trunk`)": {"value_sharing": "trunk"},
    "the value's last layer alone trains (`--value_layers 1`, of 2)": {"value_layers": 1},
    "no entropy bonus (`--entropy_coef 0`)": {"entropy_coef": 0},
    "strong KL penalty (`--init_kl_coef 0.05`)": {"init_kl_coef": 0.05},
    "one pass over a rollout (`--num_ppo_epochs 1`)": {"num_ppo_epochs": 1},
}


def measure(folder: Path, seed: int, changes: dict[str, Any]) -> dict[str, float]:
    """Score, KL and entropy at the end of one run, and the step at which the mean score of ten rollouts first reached the mark."""
    import ppo_tiny

    from posttrain.cli import main as posttrain

    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = posttrain(ppo_tiny.command_line(folder, seed=seed, **changes))
    if code != 0:
        raise SystemExit(said.getvalue().strip().splitlines()[-1])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines]
    means = [statistics.fmean(scores[i - LAST : i]) for i in range(LAST, len(scores) + 1)]
    found = {name: statistics.fmean(line[name] for line in lines[-LAST:]) for name in ("score", "kl_nats", "entropy_nats")}
    return found | {"learned_step": next((i + LAST for i, mean in enumerate(means) if mean >= LEARNED), math.inf)}


def row(name: str, runs: list[dict[str, float]]) -> str:
    """A line of the table."""

    def spread(metric: str) -> str:
        values = [run[metric] for run in runs]
        return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"

    learned = ", ".join("never" if math.isinf(run["learned_step"]) else str(int(run["learned_step"])) for run in runs)
    return f"| {name} | {spread('score')} | {spread('kl_nats')} | {spread('entropy_nats')} | {learned} |"


def main() -> None:
    """Run all variants and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--output_file", type=Path, default=None)
    chosen = parser.parse_args()
    lines = [
        f"| variant | score, last {LAST} rollouts | KL, nats an answer | entropy, nats a token | rollouts until {LEARNED} (each seed) |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, changes) in enumerate(VARIANTS.items()):
            runs = [measure(Path(folder, f"{number}-{seed}"), seed, changes) for seed in chosen.seeds]
            lines.append(row(name, runs))
            print(lines[-1], file=sys.stderr, flush=True)
    table = "\n".join(lines)
    print(table)
    if chosen.output_file is not None:
        chosen.output_file.parent.mkdir(parents=True, exist_ok=True)
        seeds = " ".join(map(str, chosen.seeds))
        chosen.output_file.write_text(f"<!-- python benchmarks/ppo_ablation.py --seeds {seeds} -->\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
