"""The main job, end to end, through the command line: PT, merge, SFT, merge, and answers before and after.

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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model: str, name: str, out: Path) -> list[dict]:
    """Greedy answers of a model to the held-out questions."""
    file = out / f"answers_{name}.jsonl"
    heldout = str(HERE / "heldout")
    posttrain(
        "generate", "--base_model", model, "--data_file", f"{heldout}/heldout.jsonl", "--output_file", str(file),
        "--max_new_tokens", "160", "--temperature", "0", "--batch_size", "20",
    )  # fmt: skip
    return read_lines(file)


def run(out: Path) -> dict:
    """All stages; returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    pt, pt_merged, sft, sft_merged = (str(out / name) for name in ("pt", "pt-merged", "sft", "sft-merged"))
    again = ("--overwrite_output_dir", "True")
    posttrain("pt", "--config", str(RECIPES / "demo_pt.yaml"), "--model_name_or_path", MODEL, "--output_dir", pt, *again)
    posttrain("merge", "--base_model", MODEL, "--lora_model", pt, "--output_dir", pt_merged, *again)
    posttrain("sft", "--config", str(RECIPES / "demo_sft.yaml"), "--model_name_or_path", pt_merged, "--output_dir", sft, *again)
    posttrain("merge", "--base_model", pt_merged, "--lora_model", sft, "--output_dir", sft_merged, *again)
    before, after = answers(pt_merged, "before", out), answers(sft_merged, "after", out)
    pt_log, sft_log = read_lines(out / "pt" / "metrics.jsonl"), read_lines(out / "sft" / "metrics.jsonl")
    questions = [row["conversations"][0]["value"] for row in read_lines(HERE / "heldout" / "heldout.jsonl")]
    evaluated = [row["eval_loss"] for row in sft_log if "eval_loss" in row]
    return {
        "model": MODEL,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "pt": {"loss_first": pt_log[0]["loss"], "loss_last": [row["loss"] for row in pt_log if "loss" in row][-1]},
        "sft": {
            "loss_before": evaluated[0],
            "loss_after": evaluated[-1],
            "adherence_before": sum(follows_style(row["output"]) for row in before) / len(before),
            "adherence_after": sum(follows_style(row["output"]) for row in after) / len(after),
        },
        "curves": {
            "pt": [(row["step"], row["loss"]) for row in pt_log if "loss" in row],
            "sft": [(row["step"], row["loss"]) for row in sft_log if "loss" in row],
            "sft held out": [(row["step"], row["eval_loss"]) for row in sft_log if "eval_loss" in row],
        },
        "answers": [
            {"question": q, "before": b["output"], "after": a["output"]}
            for q, b, a in list(zip(questions, before, after, strict=True))[:3]
        ],
    }


def show(report: dict) -> None:
    """The result in the terminal."""
    for sample in report["answers"]:
        print(f"\n=== {sample['question']}")
        for when in ("before", "after"):
            print(f"--- {when}\n{sample[when].strip()}")
    sft = report["sft"]
    print(f"\nheld-out loss    {sft['loss_before']:.3f} -> {sft['loss_after']:.3f} nats per token")
    print(f"style adherence  {sft['adherence_before']:.0%} -> {sft['adherence_after']:.0%} of 40 held-out questions")
    print(f"took {report['minutes']:.1f} minutes")


def main() -> None:
    """Parse the one flag, run, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    out = parser.parse_args().output_dir
    report = run(out)
    show(report)
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(report, out / "report.html")
    print(f"report: {out / 'report.json'} and {out / 'report.html'}")


if __name__ == "__main__":
    main()
