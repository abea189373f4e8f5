"""`posttrain run`: what a pipeline makes of its stages, what it does twice and what not, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from conftest import ROOT
from flag_probes import untouched
from posttrain.cli import main
from posttrain.commands import run as command
from posttrain.commands.pipeline_file import read_pipeline
from posttrain.commands.pipeline_steps import Step, build_steps
from posttrain.training import artifacts
from posttrain.types import UserError
from vocabularies import domain_lines

CHATS = [
    {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"the fox {i} rests"}]}
    for i in range(6)
]
PAIRS = [{"conversations": chat["conversations"][:1], "chosen": "the fox rests", "rejected": "a lazy dog"} for chat in CHATS]
FILE = """output_dir: {here}/out
model_name_or_path: {model}
flags:
  max_steps: 1
  bf16: false
  report_to: none
  save_strategy: "no"
  learning_rate: 0.01
  max_target_length: 8
stages:
  - {{stage: pt, train_file_dir: {here}/text.txt, block_size: 32}}
  - {{stage: sft, train_file_dir: {here}/chats.jsonl}}
  - {{stage: rm, train_file_dir: {here}/pairs.jsonl}}
  - stage: ppo
    train_file_dir: {here}/chats.jsonl
    batch_size: 4
  - stage: dpo
    from: sft
    train_file_dir: {here}/pairs.jsonl
"""


@pytest.fixture
def pipeline(tmp_path: Path, model_folder: Path) -> Path:
    """A file of five stages over tiny rows."""
    for name, rows in (("chats", CHATS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    file = tmp_path / "pipeline.yaml"
    file.write_text(FILE.format(here=tmp_path, model=model_folder))
    return file


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Steps run here, because a process takes seconds to start; what was run is remembered."""
    done: list[list[str]] = []

    def start(words: list[str]) -> int:
        assert words[1:3] == ["-m", "posttrain"]
        done.append(list(words[3:]))
        with untouched():
            return main(words[3:])

    monkeypatch.setattr(command, "start", start)
    return done


def short(words: list[str]) -> str:
    """A step by its command, its folder, and what was added to go on or to start over."""
    name = Path(words[words.index("--output_dir") + 1]).name
    extra = [word for word in words if word in ("--resume_from_checkpoint", "--overwrite_output_dir")]
    return " ".join([name, *extra])


def shorts(done: list[list[str]]) -> list[str]:
    """All that ran since the last call."""
    found = [short(words) for words in done]
    done.clear()
    return found


ALL = ["pt", "pt-merged", "sft", "sft-merged", "rm", "ppo", "ppo-merged", "dpo", "dpo-merged"]


def test_a_whole_pipeline(
    pipeline: Path, tmp_path: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    done, out = in_this_process, tmp_path / "out"
    assert main(["run", str(pipeline)]) == 0, capsys.readouterr().err
    assert shorts(done) == ALL
    said = capsys.readouterr().err
    assert f"$ posttrain sft --model_name_or_path {out}/pt-merged " in said
    parents = {name: json.loads((out / name / "run.json").read_text())["parents"] for name in ALL}
    assert parents["sft"]["base"]["hash"] == artifacts.content_hash(out / "pt-merged")
    assert parents["ppo"]["reward_adapter"]["hash"] == artifacts.content_hash(out / "rm")
    assert parents["rm"]["base"] == parents["dpo"]["base"] == parents["sft-merged"]["base"] | {
        "name": f"{out}/sft-merged", "hash": artifacts.content_hash(out / "sft-merged"),
    }  # fmt: skip

    # A second time nothing is left to do.
    assert main(["run", str(pipeline)]) == 0
    assert shorts(done) == []
    assert capsys.readouterr().err.count("finished before") == len(ALL)

    # Other flags of rm: it starts over, and ppo, which it scores; dpo does not start from it.
    pipeline.write_text(pipeline.read_text().replace("pairs.jsonl}", "pairs.jsonl, seed: 7}"))
    assert main(["run", str(pipeline), "--dry_run", "True"]) == 0
    dry = capsys.readouterr().err
    assert "rm: starts over, its flags have changed: --seed" in dry
    assert "ppo: starts over, " in dry
    assert shorts(done) == []
    assert main(["run", str(pipeline)]) == 0
    assert shorts(done) == [f"{name} --overwrite_output_dir" for name in ("rm", "ppo", "ppo-merged")]
    assert f"ppo: starts over, {out}/rm has changed since" in capsys.readouterr().err

    # Other rows of dpo.
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:5]))
    assert main(["run", str(pipeline), "--only", "dpo"]) == 0
    assert shorts(done) == ["dpo --overwrite_output_dir", "dpo-merged --overwrite_output_dir"]
    assert "dpo: starts over, its rows have changed" in capsys.readouterr().err

    # From a stage on.
    assert main(["run", str(pipeline), "--from", "ppo"]) == 0
    assert shorts(done) == [f"{name} --overwrite_output_dir" for name in ("rm", *ALL[5:])]  # rm's rows have changed too

    # A folder that somebody else changed is not thrown away.
    (out / "sft-merged" / "config.json").write_text((out / "sft-merged" / "config.json").read_text() + " ")
    assert main(["run", str(pipeline)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith("sft-merged was changed after this pipeline filled it: --from_stage sft makes it anew")


def test_an_interrupted_stage_goes_on(
    pipeline: Path, tmp_path: Path, in_this_process: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    text = pipeline.read_text().replace("max_steps: 1\n", "max_steps: 4\n").replace('save_strategy: "no"', "save_steps: 2")
    text = text.replace("  max_target_length: 8\n", "")
    pipeline.write_text(text.partition("  - {stage: rm")[0])
    from posttrain.training.trainer import ObjectiveTrainer

    save = ObjectiveTrainer._save_checkpoint

    def crash(trainer: ObjectiveTrainer, *args: object, **kwargs: object) -> None:
        save(trainer, *args, **kwargs)
        if trainer.state.global_step == 2 and "sft" in str(trainer.args.output_dir):
            raise UserError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "_save_checkpoint", crash)
        assert main(["run", str(pipeline)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"posttrain: {pipeline}:11: sft ended with exit code 2")
    assert shorts(in_this_process) == ALL[:3]
    assert main(["run", str(pipeline)]) == 0
    assert shorts(in_this_process) == ["sft --resume_from_checkpoint", "sft-merged"]
    assert json.loads((tmp_path / "out" / "sft" / "run.json").read_text())["resumed_from"].endswith("checkpoint-2")
    # An interrupted merge has nothing to go on from.
    state = tmp_path / "out" / "pipeline.json"
    state.write_text(state.read_text().rpartition('"finished": true')[0] + '"finished": false}}')
    assert main(["run", str(pipeline)]) == 0
    assert shorts(in_this_process) == ["sft-merged --overwrite_output_dir"]


def test_a_vocabulary_grows_before_the_first_stage(
    pipeline: Path, tmp_path: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Then pt trains the new rows, and what is merged has them."""
    (tmp_path / "domain.txt").write_text("\n".join(domain_lines()), encoding="utf-8")
    grow = (
        f"  - {{stage: extend-vocab, train_file_dir: {tmp_path}/domain.txt, vocab_size: 20}}\n"
        "  - {stage: pt, modules_to_save: [embed_tokens, lm_head],"
    )
    text = pipeline.read_text().partition("  - {stage: sft")[0].replace("  - {stage: pt,", grow)
    text = text.replace("  max_target_length: 8\n", "")
    pipeline.write_text(text.replace("\nflags:", "\nlauncher: torchrun --nproc_per_node 2\nflags:"))
    found = {step.name: step for step in build_steps(read_pipeline(str(pipeline)))}
    assert list(found) == ["extend-vocab", "pt", "pt-merged"]
    assert "torchrun" not in " ".join(command.command_line(found["extend-vocab"], ()))
    pipeline.write_text(text)
    assert main(["run", str(pipeline)]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert shorts(in_this_process) == ["extend-vocab", "pt", "pt-merged"]
    rows = [AutoConfig.from_pretrained(out / name).vocab_size for name in ("extend-vocab", "pt-merged")]
    assert rows == [len(AutoTokenizer.from_pretrained(out / "pt-merged"))] * 2
    parents = json.loads((out / "pt" / "run.json").read_text())["parents"]
    assert parents["base"]["hash"] == artifacts.content_hash(out / "extend-vocab")
    assert main(["run", str(pipeline)]) == 0
    assert shorts(in_this_process) == []
    # An interrupted growth has no checkpoint; other text makes it, and what stands behind it, anew.
    (tmp_path / "domain.txt").write_text("\n".join(domain_lines(40)), encoding="utf-8")
    assert main(["run", str(pipeline)]) == 0
    assert shorts(in_this_process) == [f"{name} --overwrite_output_dir" for name in found]
    assert "extend-vocab: starts over, its rows have changed" in capsys.readouterr().err


# --- what the steps are ---------------------------------------------------------------------------------------------------


def steps(pipeline: Path, text: str) -> dict[str, Step]:
    """The steps of a changed file by name."""
    pipeline.write_text(text)
    return {step.name: step for step in build_steps(read_pipeline(str(pipeline)))}


def flag(step: Step, name: str) -> str | None:
    """The value of a flag on a step's command line."""
    return step.words[step.words.index(f"--{name}") + 1] if f"--{name}" in step.words else None


def test_full_training_needs_no_merge(pipeline: Path, tmp_path: Path) -> None:
    found = steps(pipeline, pipeline.read_text().replace("  max_steps: 1\n", "  max_steps: 1\n  use_peft: false\n"))
    assert list(found) == ["pt", "sft", "rm", "ppo", "dpo"]
    assert flag(found["sft"], "model_name_or_path") == str(tmp_path / "out" / "pt")
    assert flag(found["ppo"], "reward_model_name_or_path") == str(tmp_path / "out" / "rm")


def test_a_reward_model_on_another_base_is_merged(pipeline: Path, tmp_path: Path) -> None:
    found = steps(pipeline, pipeline.read_text().replace("  - stage: ppo\n", "  - stage: ppo\n    from: pt\n"))
    assert flag(found["ppo"], "reward_model_name_or_path") == str(tmp_path / "out" / "rm-merged")
    assert flag(found["ppo"], "reward_adapter") is None
    assert flag(found["rm-merged"], "base_model") == str(tmp_path / "out" / "sft-merged")


def test_merge_flags_names_and_launcher(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pipeline.read_text().replace(
        "stage: sft,", "stage: sft, name: chat, merge: {dtype: float32}, launcher: torchrun --nproc_per_node 2,"
    )
    found = steps(pipeline, text.replace("from: sft", "from: chat\n    merge: false"))
    assert list(found) == ["pt", "pt-merged", "chat", "chat-merged", "rm", "ppo", "ppo-merged", "dpo"]
    assert flag(found["chat-merged"], "dtype") == "float32"
    started = command.command_line(found["chat"], ("--resume_from_checkpoint", "auto"))
    assert started[0].endswith("torchrun")
    assert started[1:6] == ["--nproc_per_node", "2", "-m", "posttrain", "sft"]
    assert "torchrun" not in " ".join(command.command_line(found["chat-merged"], ()))


def test_a_recipe_and_flags_that_win_over_it(pipeline: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("block_size: 64\nmax_steps: 9\n")
    text = pipeline.read_text().replace("block_size: 32", f"config: {recipe}")
    found = steps(pipeline, text)
    assert found["pt"].words[1:3] == ("--config", str(recipe))
    assert flag(found["pt"], "max_steps") == "1"
    assert str(recipe) in found["pt"].data


@pytest.mark.parametrize("recipe", ["pipeline_demo", "medical_qwen"])
def test_recipes_are_whole(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a recipe but its data and its model, which are looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("pretrain", "finetune", "reward"):
        (tmp_path / "data" / name).mkdir(parents=True)
    found = [step.name for step in build_steps(read_pipeline(f"recipes/{recipe}.yaml"))]
    assert sorted(found) == sorted([*ALL])
    assert len((ROOT / "recipes" / f"{recipe}.yaml").read_text().splitlines()) <= 25


# --- mistakes -------------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("output_dir: {here}/out\n", "", ":1: a pipeline needs output_dir"),
    ("model_name_or_path: {model}\n", "modle: x\n", ":2:modle is unknown: expected one of output_dir"),
    ("model_name_or_path: {model}\n", "", ":10: pt has no model: model_name_or_path at the top"),
    ("model_name_or_path: {model}\n", "model_name_or_path: ./nowhere\n", "./nowhere: no such model folder"),
    ("  learning_rate: 0.01", "  learning_rat: 0.01", ":8:learning_rat is unknown: did you mean --learning_rate?"),
    ("  learning_rate: 0.01", "  learning_rate: fast", ":8:learning_rate 'fast': expected a value of type float"),
    ("  learning_rate: 0.01", "  output_dir: x", ":8:output_dir: the pipeline sets it"),
    ("  learning_rate: 0.01", "  model_name_or_path: x", ":8:model_name_or_path: model_name_or_path stands at the top"),
    ("  learning_rate: 0.01", "  max_steps: 3", ":8:max_steps: written twice"),
    ("block_size: 32", "blok_size: 32", ":11:blok_size is unknown: did you mean --block_size?"),
    ("train_file_dir: {here}/text.txt", "train_file_dir: {here}/txt", ":11:train_file_dir {here}/txt: no such file or folder"),
    ("train_file_dir: {here}/text.txt, ", "", ":11: pt needs training data"),
    ("stage: pt,", "stage: tp,", ":11:stage 'tp': expected one of extend-vocab, pt, sft, rm, ppo, dpo"),
    ("stage: pt, train_file_dir: {here}/text.txt, block_size: 32", "stage: extend-vocab, train_file_dir: {here}/text.txt, vocab_size: 0",
     ":11: --vocab_size 0: expected how many pieces"),
    ("stage: pt, train_file_dir: {here}/text.txt, block_size: 32", "stage: extend-vocab, train_file_dir: {here}/text.txt, merge: false",
     ":11:merge: does nothing in extend-vocab, which does not train"),
    ("stage: pt,", "", ":11: a stage begins with `stage:`"),
    ("stage: rm,", "stage: sft,", ":13: a second stage 'sft'"),
    ("from: sft", "from: stf", ":17: from 'stf': expected a stage before it"),
    ("from: sft", "from: rm", ":17: from 'rm': a reward model is no model to go on from"),
    ("stage: sft,", "stage: sft, merge: false,", ":13: rm starts from sft, which `merge: false` leaves unmerged"),
    ("stage: sft,", "stage: sft, merge: maybe,", ":12:merge: expected true, false or flags"),
    ("stage: sft,", "stage: sft, merge: {{dtyp: float32}},", ":12:dtyp is unknown: did you mean --dtype?"),
    ("stage: sft,", "stage: sft, packing: true, model_max_length: 1,", ":12: --model_max_length 1: must be at least 2 tokens"),
    ("stage: sft,", "stage: sft, config: nowhere.yaml,", ":12: --config nowhere.yaml: no such file"),
    ("  - {{stage: rm, train_file_dir: {here}/pairs.jsonl}}\n", "", ":13: ppo needs scores: an rm stage before it"),
    ("stages:\n", "stages: {{\n", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES)
def test_a_mistake_has_a_line(
    old: str, new: str, said: str, pipeline: Path, model_folder: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    here = pipeline.parent
    assert old in FILE
    pipeline.write_text(FILE.replace(old, new, 1).format(here=here, model=model_folder))
    assert main(["run", str(pipeline)]) == 2
    *notes, line = capsys.readouterr().err.strip().splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert line.startswith(f"posttrain: {pipeline}:")
    assert said.format(here=here) in line
    assert in_this_process == []


def test_mistakes_on_the_command_line(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["nowhere.yaml"], "nowhere.yaml: no such pipeline file"),
        ([str(pipeline), "--from_stage", "stf"], "--from_stage stf: "),
        (
            [str(pipeline), "--only", "sft"],
            f"--only sft: sft starts from {tmp_path}/out/pt-merged, which stage pt has not made yet",
        ),
        ([], "posttrain run needs --pipeline"),
    ):
        assert main(["run", *words]) == 2
        *notes, line = capsys.readouterr().err.strip().splitlines()
        assert said in line
        assert all(note.startswith("note: ") for note in notes)


def test_a_folder_of_somebody_else_is_kept(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "out" / "pt" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main(["run", str(pipeline)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith("out/pt holds what this pipeline did not make: move it away; --from_stage pt overwrites it")
    assert mine.read_text() == "mine"


def test_a_step_is_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real way of starting one, which the other tests leave out."""
    monkeypatch.undo()
    import sys

    assert command.start([sys.executable, "-c", "raise SystemExit(5)"]) == 5
