"""The main job, end to end, through the command line: PT, SFT, reward model, DPO and PPO, with merges between, and what each changed.

    make demo                                            # installs what is needed, then runs this
    .venv/bin/python examples/demo.py --output_dir DIR   # the same in an environment that is ready

Every step is a `posttrain` command that is printed before it runs. The results go to DIR/report.json and DIR/report.html.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from report import write_page

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
MODEL = "smollm2-135m-instruct"
# What every answer of examples/sft looks like: see examples/README.md.
STYLE = re.compile(r"\s*In short: .+\n\s*What to do:\n(\s*- .+\n)+\s*See a doctor if: .+", re.DOTALL)


def follows_style(answer: str) -> bool:
    """Whether an answer has the three parts of the house style, in order, with steps as a list, and nothing after them."""
    if not STYLE.fullmatch(answer.strip()):
        return False
    return all(answer.count(label) == 1 for label in ("In short:", "What to do:", "See a doctor if:"))


def posttrain(*words: str) -> None:
    """Run one command of the real CLI; a failure ends the demo."""
    print(f"\n$ posttrain {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "posttrain", *words], check=True)


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as file:  # str.splitlines would also cut at the separators that a text may hold
        return [json.loads(line) for line in file]


def answers(model: str, name: str, out: Path) -> list[dict]:
    """Greedy answers of a model to the held-out questions."""
    file = out / f"answers_{name}.jsonl"
    heldout = str(HERE / "heldout")
    posttrain(
        "generate", "--base_model", model, "--data_file", f"{heldout}/heldout.jsonl", "--output_file", str(file),
        "--max_new_tokens", "128", "--temperature", "0", "--batch_size", "20",
    )  # fmt: skip
    return read_lines(file)


AGAIN = ("--overwrite_output_dir", "True")


def train(stage: str, model: str, out: Path, *words: str) -> tuple[str, list[dict]]:
    """One training stage by its recipe: its run folder and its metrics."""
    folder = str(out / stage)
    recipe = str(RECIPES / f"demo_{stage}.yaml")
    posttrain(stage, "--config", recipe, "--model_name_or_path", model, "--output_dir", folder, *AGAIN, *words)
    return folder, read_lines(out / stage / "metrics.jsonl")


def merge(stage: str, base: str, out: Path) -> str:
    """The stage's adapter put into its base: the next stage's model."""
    merged = str(out / f"{stage}-merged")
    posttrain("merge", "--base_model", base, "--lora_model", str(out / stage), "--output_dir", merged, *AGAIN)
    return merged


def rate(base: str, reward: str, rows: list[dict], name: str, out: Path) -> float:
    """Mean score of answers under the reward model."""
    file, scores = out / f"chats_{name}.jsonl", out / f"scores_{name}.jsonl"
    chats = [{"messages": [*row["messages"], {"role": "assistant", "content": row["output"]}]} for row in rows]
    file.write_text("".join(f"{json.dumps(chat, ensure_ascii=False)}\n" for chat in chats), encoding="utf-8")
    posttrain("score", "--base_model", base, "--lora_model", reward, "--data_file", str(file), "--output_file", str(scores))
    found = [row["score"] for row in read_lines(scores)]
    return sum(found) / len(found)


def adherence(rows: list[dict]) -> float:
    """Share of answers in the house style."""
    return sum(follows_style(row["output"]) for row in rows) / len(rows)


def logged(log: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    return [(row["step"], row[name]) for row in log if name in row]


def run(out: Path) -> dict:
    """All stages; returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    _, pt_log = train("pt", MODEL, out)
    base = merge("pt", MODEL, out)
    _, sft_log = train("sft", base, out)
    sft = merge("sft", base, out)
    reward, rm_log = train("rm", sft, out)
    _, dpo_log = train("dpo", sft, out)
    _, ppo_log = train("ppo", sft, out, "--reward_adapter", reward)
    models = {"before": base, "sft": sft, "dpo": merge("dpo", sft, out), "ppo": merge("ppo", sft, out)}
    said = {name: answers(model, name, out) for name, model in models.items()}
    style = {name: adherence(rows) for name, rows in said.items()}
    score = {name: rate(sft, reward, said[name], name, out) for name in ("sft", "dpo", "ppo")}
    accuracy = [value for _, value in logged(dpo_log, "eval_policy_accuracy")]
    questions = [row["conversations"][0]["value"] for row in read_lines(HERE / "heldout" / "heldout.jsonl")]
    losses = [value for _, value in logged(sft_log, "eval_loss")]
    return {
        "model": MODEL,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "pt": {"loss_first": pt_log[0]["loss"], "loss_last": logged(pt_log, "loss")[-1][1]},
        "sft": {
            "loss_before": losses[0], "loss_after": losses[-1], "adherence_before": style["before"], "adherence_after": style["sft"],
        },
        "rm": {"accuracy": logged(rm_log, "eval_accuracy")[-1][1]},
        "dpo": {
            "accuracy_before": accuracy[0], "accuracy_after": accuracy[-1],
            "adherence_before": style["sft"], "adherence_after": style["dpo"], "score_before": score["sft"], "score_after": score["dpo"],
        },
        "ppo": {
            "adherence_before": style["sft"], "adherence_after": style["ppo"], "score_before": score["sft"], "score_after": score["ppo"],
        },
        "curves": {"pt": logged(pt_log, "loss"), "sft": logged(sft_log, "loss"), "sft held out": logged(sft_log, "eval_loss")},
        "ppo_curve": {"mean score of a rollout": logged(ppo_log, "score")},
        "answers": [
            {"question": question, **{name: said[name][i]["output"] for name in said}} for i, question in enumerate(questions[:3])
        ],
    }  # fmt: skip


def results(report: dict) -> list[tuple[str, str, str]]:
    """What was measured on held-out rows, before and after, a line each."""
    sft, dpo, ppo = (report[name] for name in ("sft", "dpo", "ppo"))
    return [
        ("SFT: loss, nats per token", f"{sft['loss_before']:.3f}", f"{sft['loss_after']:.3f}"),
        ("SFT: answers in the house style", f"{sft['adherence_before']:.0%}", f"{sft['adherence_after']:.0%}"),
        ("RM: pairs ranked right", "", f"{report['rm']['accuracy']:.0%}"),
        ("DPO: pairs whose chosen answer is the likelier", f"{dpo['accuracy_before']:.0%}", f"{dpo['accuracy_after']:.0%}"),
        ("DPO: answers in the house style", f"{dpo['adherence_before']:.0%}", f"{dpo['adherence_after']:.0%}"),
        ("DPO: mean score of the answers", f"{dpo['score_before']:.2f}", f"{dpo['score_after']:.2f}"),
        ("PPO: answers in the house style", f"{ppo['adherence_before']:.0%}", f"{ppo['adherence_after']:.0%}"),
        ("PPO: mean score of the answers", f"{ppo['score_before']:.2f}", f"{ppo['score_after']:.2f}"),
    ]


def show(report: dict) -> None:
    """The result in the terminal."""
    for sample in report["answers"]:
        print(f"\n=== {sample['question']}")
        for when, said in sample.items():
            if when != "question":
                print(f"--- {when}\n{said.strip()}")
    print(f"\n{'on 40 held-out questions or pairs':<48}  before -> after")
    for name, before, after in results(report):
        print(f"{name:<48}  {before:>6} -> {after}" if before else f"{name:<48}  {'':>6}    {after}")
    print(f"took {report['minutes']:.1f} minutes")


def main() -> None:
    """Parse the one flag, run, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    out = parser.parse_args().output_dir
    report = run(out)
    show(report)
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(report, results(report), out / "report.html")
    print(f"report: {out / 'report.json'} and {out / 'report.html'}")


if __name__ == "__main__":
    main()
