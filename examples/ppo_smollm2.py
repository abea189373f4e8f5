"""PPO on a real model, from the command line: a weak SFT model, a reward model, and what PPO makes of the answers to held-out questions.

    python examples/ppo_smollm2.py --output_dir outputs/ppo-smollm2             # a GPU: minutes; a CPU: hours
    python examples/ppo_smollm2.py --output_dir outputs/ppo-quick --quick       # a few steps of everything: does it run

1. SFT on examples/sft, few steps: of some checkpoints the one is taken whose answers to training questions keep the house style nearest to
   --adherence_aim. A model that already keeps it always would leave PPO nothing to learn.
2. A reward model on examples/pairs, an adapter on the merged SFT model.
3. PPO from the SFT model, prompts of examples/sft: each of --variants with the same flags but for those of VARIANTS, at the same time on a GPU.
4. Answers to examples/heldout before and after, greedy and sampled as PPO samples, scored by the reward model.

Results: DIR/report.json (with the curves), DIR/answers.jsonl (every answer with its score) and DIR/page.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import AGAIN, MODEL, read_lines
from ppo_page import MODES, Summary, adherence, end_mean, nearest, page, summarise, verdicts

HERE = Path(os.path.relpath(Path(__file__).parent))
SOURCE = Path(__file__).parent.parent / "src"
RECIPES = Path(os.path.relpath(Path(__file__).parent.parent / "recipes"))
HELD_OUT = HERE / "heldout" / "heldout.jsonl"
ANSWER_TOKENS = 128  # the longest answer of examples/ has 116
EVALUATION_SECONDS = 75  # kept for what comes after PPO where --minutes sets a limit
CUT = -15  # exit code of a command that was ended for time
PPO: dict[str, Any] = {
    "max_source_length": 128, "max_target_length": ANSWER_TOKENS, "temperature": 1.0, "num_ppo_epochs": 2, "lora_rank": 16,
    "lora_alpha": 32, "value_learning_rate": 5e-4, "lr_scheduler_type": "constant", "adap_kl_ctrl": True, "kl_horizon": 640,
    "save_total_limit": 1, "report_to": "none",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "trunk": {"value_sharing": "trunk"},
    "fixed": {"adap_kl_ctrl": None, "kl_horizon": None, "init_kl_coef": 0.5},  # a larger weight of the KL penalty, that stays
}


# --- commands ---------------------------------------------------------------------------------------------------------------


@dataclass
class Shell:
    """Runs commands of the real CLI. What each says goes to a file of its name."""

    logs: Path
    at_once: int  # commands at the same time, of those that do not need one another
    commands: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, *words: Any, limit_seconds: float | None = None) -> int:
        """Exit code of one command, CUT when its time was up."""
        said = [str(word) for word in words]
        self.commands[name] = shlex.join(["posttrain", *said])
        print(f"$ {self.commands[name]}", flush=True)
        began = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
        with (self.logs / f"{name}.log").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "posttrain", *said], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                code = child.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                code = CUT
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"  {name}: {self.seconds[name]} s, exit code {code}", flush=True)
        return code

    def must(self, name: str, *words: Any) -> None:
        """A command without which there is no going on."""
        if self.run(name, *words):
            raise SystemExit(f"{name} failed:\n{self.end_of(name)}")

    def together(self, jobs: Mapping[str, Sequence[Any]]) -> None:
        """Commands that do not need one another."""
        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(lambda job: self.must(job[0], *job[1]), jobs.items()))

    def end_of(self, name: str, lines: int = 15) -> str:
        """What a command said last."""
        return "\n".join((self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """--name value, of those that have a value."""
    return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file."""
    file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return file


def asked_before(prompts: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> list[str]:
    """Held-out questions that are prompts too."""
    known = {turn["value"] for row in prompts for turn in row["conversations"] if turn["from"] == "human"}
    return [row["conversations"][0]["value"] for row in held_out if row["conversations"][0]["value"] in known]


# --- the stages -------------------------------------------------------------------------------------------------------------


def training_rows() -> list[dict[str, Any]]:
    """Of SFT; their questions are PPO's prompts."""
    return [row for file in sorted((HERE / "sft").glob("*.jsonl")) for row in read_lines(file)]


def weak_sft(shell: Shell, chosen: argparse.Namespace) -> tuple[str, dict[int, float]]:
    """The merged SFT model, and the share of sampled answers in the house style after each number of steps that was looked at."""
    out, counts, base = chosen.output_dir, sorted(chosen.sft_steps), chosen.model_name_or_path
    shell.must(
        "sft", "sft", "--config", RECIPES / "demo_sft.yaml", "--model_name_or_path", base, "--output_dir", out / "sft",
        "--max_steps", counts[-1], "--learning_rate", chosen.sft_learning_rate, "--lr_scheduler_type", "constant",
        "--eval_on_start", False, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", math.gcd(*counts), *AGAIN,
    )  # fmt: skip
    rows = training_rows()
    asked = write_rows(out / "questions_chosen_by.jsonl", rows[:: len(rows) // chosen.asked][: chosen.asked])
    files = {steps: out / f"answers_sft_{steps}.jsonl" for steps in counts}
    shell.together(
        {
            f"generate-sft-{steps}": generation(base, out / "sft" / f"checkpoint-{steps}", asked, file, "sampled")
            for steps, file in files.items()
        }
    )
    found = {steps: adherence(read_lines(file)) for steps, file in files.items()}
    best = nearest(found, chosen.adherence_aim)
    print(f"  in the house style after SFT steps: {found}; {best} steps are taken", flush=True)
    adapter = out / "sft" / f"checkpoint-{best}"
    shell.must("merge", "merge", "--base_model", base, "--lora_model", adapter, "--output_dir", out / "sft-merged", *AGAIN)
    return str(out / "sft-merged"), found


def generation(model: Any, adapter: Path | None, asked: Path, file: Path, mode: str) -> list[Any]:
    """Words of the command that answers questions. Sampled: as PPO samples, from the whole distribution at its temperature."""
    how = ["--temperature", 0] if mode == "greedy" else ["--temperature", PPO["temperature"], "--top_p", 1.0]
    on_top = ["--lora_model", adapter] if adapter else []
    return [
        "generate", "--base_model", model, *on_top, "--data_file", asked, "--output_file", file, "--max_new_tokens", ANSWER_TOKENS,
        "--batch_size", 200, *how,
    ]  # fmt: skip


def on_pairs(stage: str, sft: str, chosen: argparse.Namespace) -> list[Any]:
    """Words of the command that trains the reward model, or DPO, on all pairs."""
    return [
        stage, "--config", RECIPES / f"demo_{stage}.yaml", "--model_name_or_path", sft, "--output_dir", chosen.output_dir / stage,
        "--max_train_samples", -1, *(["--max_steps", 2] if chosen.quick else ["--num_train_epochs", chosen.pair_epochs]), *AGAIN,
    ]  # fmt: skip


def ppo_words(sft: str, name: str, chosen: argparse.Namespace) -> list[Any]:
    """Words of the command of one variant."""
    flags = PPO | {
        "max_steps": chosen.rollouts, "rollout_batch_size": chosen.prompts, "num_generations": chosen.num_generations,
        "mini_batch_size": chosen.mini_batch_size, "learning_rate": chosen.learning_rate, "init_kl_coef": chosen.init_kl_coef,
        "kl_target": chosen.kl_target, "eval_steps": chosen.every, "save_steps": chosen.every,
    }  # fmt: skip
    return [
        "ppo", "--model_name_or_path", sft, "--train_file_dir", HERE / "sft", "--validation_file_dir", HERE / "heldout",
        "--reward_adapter", chosen.reward_adapter or chosen.output_dir / "rm", "--output_dir", chosen.output_dir / f"ppo-{name}",
        *as_words(flags | VARIANTS[name]), *AGAIN,
    ]  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run of PPO: the adapter that it left and the log up to it."""

    adapter: Path
    rollouts: int
    log: list[dict[str, Any]]
    ended: str  # "all rollouts", "time", "before this run", or the line of what ended it


def train_policies(shell: Shell, sft: str, chosen: argparse.Namespace, began: float) -> dict[str, Trained]:
    """All variants. One that is ended by a guard or for time counts with its last checkpoint."""
    limit = None if chosen.minutes is None else max(chosen.minutes * 60 - (time.monotonic() - began) - EVALUATION_SECONDS, 30)

    def one(name: str) -> Trained:
        folder = chosen.output_dir / f"ppo-{name}"
        if chosen.trained:
            found = read_lines(folder / "metrics.jsonl")
            return Trained(folder, found[-1]["step"], found, "before this run")
        code = shell.run(f"ppo-{name}", *ppo_words(sft, name, chosen), limit_seconds=limit)
        log = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        if code == 0:
            return Trained(folder, chosen.rollouts, log, "all rollouts")
        # A checkpoint's state is written last: what has one is whole.
        whole = [int(file.parent.name.rpartition("-")[2]) for file in folder.glob("checkpoint-*/trainer_state.json")]
        if not whole:
            raise SystemExit(f"ppo-{name} left no checkpoint:\n{shell.end_of(f'ppo-{name}')}")
        why = "time" if code == CUT else shell.end_of(f"ppo-{name}", 1)
        return Trained(folder / f"checkpoint-{max(whole)}", max(whole), [line for line in log if line["step"] <= max(whole)], why)

    with ThreadPoolExecutor(shell.at_once) as pool:
        return dict(zip(chosen.variants, pool.map(one, chosen.variants), strict=True))


def answer_all(models: Mapping[str, tuple[str, Path | None]], chosen: argparse.Namespace) -> dict[str, list[Any]]:
    """Words by name of the commands that answer the held-out questions in both ways."""
    rows = read_lines(HELD_OUT)[: chosen.asked] if chosen.quick else read_lines(HELD_OUT)
    out = chosen.output_dir
    asked = {
        "greedy": write_rows(out / "questions_greedy.jsonl", rows),
        "sampled": write_rows(out / "questions_sampled.jsonl", rows * chosen.samples),
    }
    return {
        f"generate-{name}-{mode}": generation(*models[name], asked[mode], out / f"answers_{name}_{mode}.jsonl", mode)
        for name in models
        for mode in MODES
    }


def rate(shell: Shell, sft: str, reward: Path, names: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Every answer of every model with its score; an empty answer has none."""
    rows = [
        {"model": name, "mode": mode, **row}
        for name in names
        for mode in MODES
        for row in read_lines(out / f"answers_{name}_{mode}.jsonl")
    ]
    scored = [row for row in rows if row["output"].strip()]
    chats = [{"messages": [*row["messages"], {"role": "assistant", "content": row["output"]}]} for row in scored]
    file = write_rows(out / "chats.jsonl", chats)
    shell.must("score", "score", "--base_model", sft, "--lora_model", reward, "--data_file", file,
               "--output_file", out / "scores.jsonl", "--batch_size", 32)  # fmt: skip
    for row, line in zip(scored, read_lines(out / "scores.jsonl"), strict=True):
        row["score"] = line["score"]
    write_rows(out / "answers.jsonl", rows)
    return rows


# --- the report ------------------------------------------------------------------------------------------------------------


def describe(run: Trained, answers: Mapping[str, Mapping[str, Summary]], name: str, kl_target: float) -> dict[str, Any]:
    """A variant's part of the report."""
    parts = ("seconds_rollout", "seconds_score", "seconds_measure", "seconds_update")
    times = [end_mean(run.log, part) for part in parts]
    kl = end_mean(run.log, "kl_nats")
    return {
        "ended": run.ended, "rollouts": run.rollouts, "score": end_mean(run.log, "score"), "kl_nats": kl,
        "explained_variance": end_mean(run.log, "explained_variance"),
        "seconds": sum(t for t in times if t is not None), "log": run.log,
        "verdicts": {mode: verdicts(answers["sft"][mode], answers[name][mode], kl, kl_target) for mode in MODES},
    }  # fmt: skip


def run(chosen: argparse.Namespace, device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All stages; returns the report and the answers."""
    began, out = time.monotonic(), chosen.output_dir
    if known := asked_before(training_rows(), read_lines(HELD_OUT)):
        raise SystemExit(f"a held-out question is a prompt of PPO: {known[0]}")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    shell = Shell(out / "logs", chosen.at_once)
    sft, found = (chosen.sft_model, {}) if chosen.sft_model else weak_sft(shell, chosen)
    reward = chosen.reward_adapter or out / "rm"
    stages = [*([] if chosen.reward_adapter else ["rm"]), *(["dpo"] if chosen.dpo else [])]
    shell.together({stage: on_pairs(stage, sft, chosen) for stage in stages} | answer_all({"sft": (sft, None)}, chosen))
    trained = train_policies(shell, sft, chosen, began)
    models = {f"ppo-{name}": (sft, one.adapter) for name, one in trained.items()}
    models |= {"dpo": (sft, out / "dpo")} if chosen.dpo else {}
    shell.together(answer_all(models, chosen))
    rows = rate(shell, sft, reward, ["sft", *models], out)
    answers = {
        name: {mode: summarise([row for row in rows if row["model"] == name and row["mode"] == mode]) for mode in MODES}
        for name in ("sft", *models)
    }
    log = read_lines(reward / "metrics.jsonl") if (reward / "metrics.jsonl").is_file() else []
    accuracy = [line["eval_accuracy"] for line in log if "eval_accuracy" in line]
    report = {
        "model": chosen.model_name_or_path, "device": device, "command": shlex.join(["python", *sys.argv]), "every": chosen.every,
        "minutes": round((time.monotonic() - began) / 60, 1), "sft": found, "rm_accuracy": accuracy[-1] if accuracy else None,
        "kl_target": chosen.kl_target,
        "answers": {name: {mode: dataclasses.asdict(s) for mode, s in of.items()} for name, of in answers.items()},
        "runs": {name: describe(one, answers, f"ppo-{name}", chosen.kl_target) for name, one in trained.items()},
        "commands": shell.commands, "seconds": shell.seconds,
    }  # fmt: skip
    return report, rows


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags. --quick changes the defaults of the sizes, and does not learn anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/ppo-smollm2"))
    add("--model_name_or_path", default=MODEL)
    add("--sft_model", default=None, help="merged SFT model that is there already: no SFT")
    add("--reward_adapter", type=Path, default=None, help="reward model that is there already, an adapter on --sft_model")
    add("--trained", action="store_true", help="PPO's runs are in --output_dir already: only look at what they answer")
    add("--quick", action="store_true", help="a few steps of everything")
    add("--variants", nargs="+", choices=[*VARIANTS], default=["adapter", "trunk"])
    add("--dpo", action="store_true", help="DPO on the same pairs beside PPO")
    add(
        "--minutes",
        type=float,
        default=None,
        help="PPO is ended so that all of it takes about so long; its last checkpoint counts",
    )
    add("--at_once", type=int, default=None, help="commands at the same time [default: 6 on a GPU, 1 without]")
    add("--sft_steps", type=int, nargs="+", default=[4, 6, 8, 10, 12, 16], help="checkpoints that are looked at")
    add("--sft_learning_rate", type=float, default=1e-3)
    add("--adherence_aim", type=float, default=0.2, help="wanted share of sampled answers of the SFT model in the house style")
    add("--pair_epochs", type=int, default=2, help="of the reward model, and of DPO")
    add("--rollouts", type=int, default=60)
    add("--prompts", type=int, default=32, help="of a rollout")
    add("--num_generations", type=int, default=2)
    add("--mini_batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=1e-4)
    add("--init_kl_coef", type=float, default=0.3)
    add("--kl_target", type=float, default=10.0, help="nats an answer")
    add("--every", type=int, default=5, help="rollouts between two evaluations, checkpoints and lines of the page")
    add("--samples", type=int, default=5, help="sampled answers to each held-out question")
    add("--asked", type=int, default=60, help="training questions by which the SFT checkpoint is chosen")
    if parser.parse_known_args(words)[0].quick:
        parser.set_defaults(sft_steps=[8], rollouts=2, prompts=4, mini_batch_size=4, every=1, samples=1, asked=4)
    chosen = parser.parse_args(words)
    if chosen.reward_adapter and not chosen.sft_model:
        parser.error("--reward_adapter is an adapter on --sft_model: name that too")
    if chosen.trained and not chosen.reward_adapter:
        parser.error("--trained needs what PPO was trained from: --sft_model and --reward_adapter")
    return chosen


def main() -> None:
    """Run all of it, write the results and print the page."""
    import torch

    chosen = parse()
    on_gpu = torch.cuda.is_available()
    chosen.at_once = chosen.at_once or (6 if on_gpu else 1)
    device = torch.cuda.get_device_name() if on_gpu else f"a CPU with {os.cpu_count()} cores"
    report, rows = run(chosen, device)
    out = chosen.output_dir
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page(report, rows)
    (out / "page.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"seconds: {report['seconds']}\nwritten: {out / 'report.json'}, {out / 'answers.jsonl'}, {out / 'page.md'}")


if __name__ == "__main__":
    main()
