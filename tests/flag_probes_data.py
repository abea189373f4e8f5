"""Probes of the data flags, of training and of `show`, and of what only `show` has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flag_probes import Lab, Run, probe


def ledger(run: Run, part: str = "train") -> dict[str, Any]:
    """The account of the rows."""
    return dict(run.read("ledger.json")[part])


def shown(run: Run) -> list[dict[str, Any]]:
    """The rows that `show` printed."""
    return [json.loads(line) for line in run.out.splitlines()]


def first(row: dict[str, Any]) -> str:
    """The text of a printed row's last turn."""
    return str(row["text"].split("assistant\n")[-1])


# --- which rows -----------------------------------------------------------------------------------------------------------


@probe("train", "train_file_dir")
def train_file_dir(lab: Lab) -> None:
    assert ledger(lab.sft())["trained"] == 17
    assert ledger(lab.sft(train_file_dir=lab.other_chats))["trained"] == 9


@probe("show", "train_file_dir")
def show_train_file_dir(lab: Lab) -> None:
    runs = [lab.good("show", train_file_dir=file) for file in (lab.chats, lab.other_chats)]
    assert [len(shown(run)) for run in runs] == [17, 9]


def saved_dataset(lab: Lab) -> Path:
    """A folder written by `datasets`, of five rows."""
    import datasets

    folder = lab.path("dataset")
    rows = [json.loads(line) for line in lab.other_chats.read_text().splitlines()[:5]]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


@probe("train", "dataset_name")
def dataset_name(lab: Lab) -> None:
    assert ledger(lab.sft(dataset_name=saved_dataset(lab), train_file_dir=None))["trained"] == 5


@probe("show", "dataset_name")
def show_dataset_name(lab: Lab) -> None:
    assert len(shown(lab.good("show", dataset_name=saved_dataset(lab), train_file_dir=None))) == 5


def configured_dataset(lab: Lab) -> dict[str, Any]:
    """A dataset folder with two configurations, of 17 and of 9 rows."""
    folder = lab.path("configured")
    folder.mkdir()
    shutil.copy(lab.chats, folder / "foxes.jsonl")
    shutil.copy(lab.other_chats, folder / "dogs.jsonl")
    parts = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("foxes", "dogs"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    return {"dataset_name": folder, "train_file_dir": None}


@probe("train", "dataset_config_name")
def dataset_config_name(lab: Lab) -> None:
    named, cache = configured_dataset(lab), lab.path("cache")
    counts = [ledger(lab.good("sft", **named, dataset_config_name=name, cache_dir=cache)) for name in ("foxes", "dogs")]
    assert [count["trained"] for count in counts] == [17, 9]


@probe("show", "dataset_config_name")
def show_dataset_config_name(lab: Lab) -> None:
    named = configured_dataset(lab)
    runs = [lab.good("show", **named, dataset_config_name=name) for name in ("foxes", "dogs")]
    assert [len(shown(run)) for run in runs] == [17, 9]


@probe("train", "dataset_weights")
def dataset_weights(lab: Lab) -> None:
    files = {"train_file_dir": f"{lab.chats},{lab.other_chats}"}
    assert ledger(lab.sft(**files))["trained"] == 26
    for weights, more in (("0.9,0.1", lab.chats), ("0.1,0.9", lab.other_chats)):
        taken = {name: part["trained"] for name, part in ledger(lab.sft(**files, dataset_weights=weights))["datasets"].items()}
        assert max(taken, key=lambda name: taken[name]) == str(more)


@probe("show", "dataset_weights")
def show_dataset_weights(lab: Lab) -> None:
    files = {"train_file_dir": f"{lab.chats},{lab.other_chats}"}
    for weights, word in (("0.95,0.05", "fox"), ("0.05,0.95", "dog")):
        texts = [first(row) for row in shown(lab.good("show", **files, dataset_weights=weights))[:8]]
        assert sum(word in text for text in texts) > 5


@probe("train", "data_format")
def data_format(lab: Lab) -> None:
    lab.sft(data_format="sharegpt")
    assert "chats.jsonl:1" in lab.fails("sft", data_format="alpaca")


@probe("show", "data_format")
def show_data_format(lab: Lab) -> None:
    assert len(shown(lab.good("show", data_format="sharegpt"))) == 17
    assert "chats.jsonl:1" in lab.fails("show", data_format="alpaca")


@probe("train", "max_train_samples")
def max_train_samples(lab: Lab) -> None:
    assert ledger(lab.sft(max_train_samples=6))["trained"] == 6


@probe("show", "max_train_samples")
def show_max_train_samples(lab: Lab) -> None:
    assert len(shown(lab.good("show", max_train_samples=6))) == 6


@probe("train", "bad_rows")
def bad_rows(lab: Lab) -> None:
    assert "bad.jsonl:6:" in lab.fails("sft", train_file_dir=lab.bad)
    assert ledger(lab.sft(train_file_dir=lab.bad, bad_rows="skip"))["trained"] == 8


@probe("show", "bad_rows")
def show_bad_rows(lab: Lab) -> None:
    assert "bad.jsonl:6:" in lab.fails("show", train_file_dir=lab.bad)
    assert len(shown(lab.good("show", train_file_dir=lab.bad, bad_rows="skip"))) == 8


# --- held-out rows and preparation ----------------------------------------------------------------------------------------


@probe("train", "validation_file_dir")
def validation_file_dir(lab: Lab) -> None:
    assert not lab.sft().logged("eval_loss")
    run = lab.sft(validation_file_dir=lab.other_chats)
    assert len(run.logged("eval_loss")) == 1
    assert ledger(run, "validation")["trained"] == 9


@probe("train", "validation_split_percentage")
def validation_split_percentage(lab: Lab) -> None:
    run = lab.sft(validation_split_percentage=30)
    assert (ledger(run)["trained"], ledger(run)["held_out"], ledger(run, "validation")["trained"]) == (12, 5, 5)


@probe("train", "max_eval_samples")
def max_eval_samples(lab: Lab) -> None:
    run = lab.sft(validation_file_dir=lab.other_chats, max_eval_samples=4)
    assert ledger(run, "validation")["trained"] == 4
    assert run.logged("eval_loss") != lab.sft(validation_file_dir=lab.other_chats).logged("eval_loss")


@probe("train", "preprocessing_num_workers")
def preprocessing_num_workers(lab: Lab) -> None:
    from posttrain.data import work

    pools: list[int] = []

    class Pool(work.ProcessPoolExecutor):
        def __init__(self, workers: int, **options: Any):
            pools.append(workers)
            super().__init__(workers, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "ProcessPoolExecutor", Pool)
        run = lab.good("sft", preprocessing_num_workers=2, cache_dir=lab.path("cache"))
        lab.good("sft", preprocessing_num_workers=1, cache_dir=lab.path("cache"))
    assert pools == [2]
    assert run.logged("loss") == lab.sft().logged("loss")


@probe("train", "overwrite_cache")
def overwrite_cache(lab: Lab) -> None:
    cache = lab.path("cache")

    def prepared(**flags: Any) -> int:
        lab.good("sft", cache_dir=cache, max_steps=1, **flags)
        (rows,) = cache.glob("datasets/*/rows.arrow")
        return rows.stat().st_mtime_ns

    before = prepared()
    assert prepared() == before
    assert prepared(overwrite_cache=True) > before


# --- show only ------------------------------------------------------------------------------------------------------------


@probe("show", "stage")
def show_stage(lab: Lab) -> None:
    texts = shown(lab.good("show", stage="pt", train_file_dir=lab.corpus))[0]["text"]
    assert texts.startswith("the quick brown fox")
    assert "corpus.txt:1" in lab.fails("show", stage="sft", train_file_dir=lab.corpus)
    for stage in ("rm", "dpo"):
        row = shown(lab.good("show", stage=stage, train_file_dir=lab.pairs))[0]
        assert (row["chosen"], row["rejected"]) == ("the fox number 0 rests<|im_end|>", "no idea, what is 0?<|im_end|>")
    cut = [shown(lab.good("show", stage=s, train_file_dir=lab.pairs, max_target_length=5))[0]["chosen"] for s in ("rm", "dpo")]
    assert [text.endswith("<|im_end|>") for text in cut] == [True, False]  # a reward model reads its score there


@probe("show", "rows")
def show_rows(lab: Lab) -> None:
    assert [len(shown(lab.good("show", rows=n))) for n in (2, 5)] == [2, 5]


@probe("show", "output_format")
def show_output_format(lab: Lab) -> None:
    assert set(shown(lab.good("show"))[0]) == {"source", "input_ids", "trained", "text"}
    assert "lengths of 17 rows" in lab.good("show", output_format="text").out


@probe("show", "model_name_or_path", "tokenizer_name_or_path")
def show_tokenizer(lab: Lab) -> None:
    assert "!" not in shown(lab.good("show"))[0]["text"]
    for flag in ("model_name_or_path", "tokenizer_name_or_path"):
        assert "!" in shown(lab.good("show", **{flag: lab.other_model}))[0]["text"]


@probe("show", "trust_remote_code")
def show_trust_remote_code(lab: Lab) -> None:
    assert "--trust_remote_code" in lab.fails("show", model_name_or_path=lab.coded_model)
    assert shown(lab.good("show", model_name_or_path=lab.coded_model, trust_remote_code=True))


@probe("show", "cache_dir")
def show_cache_dir(lab: Lab) -> None:
    for model, marked in ((lab.model, False), (lab.other_model, True)):
        cache = lab.path("cache")
        shutil.copytree(model, cache / "models" / "smollm2-135m-instruct")  # where the embedded model is looked for
        run = lab.good("show", model_name_or_path=None, cache_dir=cache)
        assert ("!" in shown(run)[0]["text"]) is marked


@probe("show", "template_name")
def show_template_name(lab: Lab) -> None:
    assert "<|im_start|>" in shown(lab.good("show"))[0]["text"]
    assert "### Instruction" in shown(lab.good("show", template_name="alpaca"))[0]["text"]


@probe("show", "model_max_length")
def show_model_max_length(lab: Lab) -> None:
    assert max(len(row["input_ids"]) for row in shown(lab.good("show"))) > 30
    assert max(len(row["input_ids"]) for row in shown(lab.good("show", model_max_length=30))) <= 30


@probe("show", "block_size")
def show_block_size(lab: Lab) -> None:
    flags = {"stage": "pt", "train_file_dir": lab.corpus}
    small, large = (shown(lab.good("show", **flags, block_size=n)) for n in (16, 1024))
    assert max(len(row["input_ids"]) for row in small) <= 16 < max(len(row["input_ids"]) for row in large)
