"""Probes of extend-vocab."""

from __future__ import annotations

import shutil
from typing import Any

from transformers import AutoTokenizer

from flag_probes import Lab, Run, probe
from vocabularies import domain_lines, sentencepiece_model

EXTEND = "extend-vocab"


def facts(run: Run) -> dict[str, Any]:
    """What run.json says of the vocabulary and of held-out text."""
    content = run.read("run.json")
    return {**content["vocabulary"], **content["held_out"], **run.read("ledger.json")}


def extend(lab: Lab, **flags: Any) -> dict[str, Any]:
    """The facts of a run that succeeds."""
    return facts(lab.good(EXTEND, **flags))


def texts(lab: Lab, name: str, lines: list[str]) -> Any:
    """A JSONL file of documents."""
    return lab.jsonl(name, [{"text": line} for line in lines])


@probe(EXTEND, "model_name_or_path", "trust_remote_code")
def model(lab: Lab) -> None:
    assert "--trust_remote_code" in lab.fails(EXTEND, model_name_or_path=lab.coded_model)
    run = lab.good(EXTEND, model_name_or_path=lab.coded_model, trust_remote_code=True)
    assert (run.folder / "coded.py").is_file()


@probe(EXTEND, "output_dir")
def output_dir(lab: Lab) -> None:
    target = lab.path("elsewhere")
    lab.good(EXTEND, output_dir=target)
    assert (target / "tokenizer.json").is_file()


@probe(EXTEND, "overwrite_output_dir")
def overwrite_output_dir(lab: Lab) -> None:
    folder = lab.path()
    folder.mkdir()
    (folder / "x").write_text("x")
    assert "is not empty" in lab.fails(EXTEND, output_dir=folder)
    lab.good(EXTEND, output_dir=folder, overwrite_output_dir=True)


@probe(EXTEND, "vocab_size")
def vocab_size(lab: Lab) -> None:
    assert [extend(lab, vocab_size=n)["pieces"] for n in (3, 5)] == [3, 5]


@probe(EXTEND, "min_frequency")
def min_frequency(lab: Lab) -> None:
    few, many = (extend(lab, min_frequency=n, vocab_size=500)["pieces"] for n in (15, 2))
    assert 0 < few < many


@probe(EXTEND, "domain_sp_model")
def domain_sp_model(lab: Lab) -> None:
    file = sentencepiece_model(lab.root, domain_lines(), 420, lab.path("domain").name)
    folders = [lab.model, lab.good(EXTEND, domain_sp_model=file, vocab_size=100).folder]
    before, after = (len(AutoTokenizer.from_pretrained(folder)("感染")["input_ids"]) for folder in folders)
    assert after < before


@probe(EXTEND, "validation_file_dir")
def validation_file_dir(lab: Lab) -> None:
    file = texts(lab, "held.jsonl", ["a fox", "a dog"])
    assert extend(lab, validation_file_dir=file)["before"]["characters"] == 10


@probe(EXTEND, "validation_split_percentage")
def validation_split_percentage(lab: Lab) -> None:
    assert [extend(lab, validation_split_percentage=n)["held_out"] for n in (25, 50)] == [6, 12]


@probe(EXTEND, "max_eval_samples")
def max_eval_samples(lab: Lab) -> None:
    none, one, all_rows = (extend(lab, max_eval_samples=n, validation_split_percentage=25)["before"] for n in (0, 1, -1))
    assert none["nats"] is None
    assert 0 < one["loss_characters"] < all_rows["loss_characters"] == all_rows["characters"]


@probe(EXTEND, "cache_dir")
def cache_dir(lab: Lab) -> None:
    cache = lab.path("cache")
    shutil.copytree(lab.model, cache / "models" / "smollm2-135m-instruct")  # where the embedded model is looked for
    extend(lab, model_name_or_path="smollm2-135m-instruct", cache_dir=cache)
    assert list(cache.glob("datasets/*/rows.arrow"))


@probe(EXTEND, "train_file_dir")
def train_file_dir(lab: Lab) -> None:
    counts = [extend(lab, train_file_dir=texts(lab, f"t{n}.jsonl", domain_lines(n)))["rows_in"] for n in (30, 40)]
    assert counts == [30, 40]


@probe(EXTEND, "dataset_name")
def dataset_name(lab: Lab) -> None:
    from datasets import Dataset

    folder = lab.path("saved")
    Dataset.from_list([{"text": line} for line in domain_lines(20)]).save_to_disk(folder)
    assert extend(lab, dataset_name=folder, train_file_dir=None)["rows_in"] == 20


@probe(EXTEND, "dataset_config_name")
def dataset_config_name(lab: Lab) -> None:
    folder = lab.path("configured")
    folder.mkdir()
    for name, n in (("one", 20), ("two", 30)):
        shutil.copy(texts(lab, f"{name}.jsonl", domain_lines(n)), folder / f"{name}.jsonl")
    parts = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    named = {"dataset_name": folder, "train_file_dir": None, "cache_dir": lab.path("cache")}
    assert [extend(lab, **named, dataset_config_name=name)["rows_in"] for name in ("one", "two")] == [20, 30]


@probe(EXTEND, "dataset_weights")
def dataset_weights(lab: Lab) -> None:
    files = [texts(lab, f"w{i}.jsonl", [f"{line}{i}" for line in domain_lines(50)]) for i in range(2)]
    for weights, more in (("0.9,0.1", files[0]), ("0.1,0.9", files[1])):
        parts = extend(lab, train_file_dir=f"{files[0]},{files[1]}", dataset_weights=weights)["datasets"]
        taken = {name: part["trained"] + part["held_out"] for name, part in parts.items()}
        assert max(taken, key=lambda name: taken[name]) == str(more)
        assert min(taken.values()) < 40


@probe(EXTEND, "data_format")
def data_format(lab: Lab) -> None:
    file = texts(lab, "format.jsonl", domain_lines(30))
    assert extend(lab, train_file_dir=file, data_format="text")["rows_in"] == 30
    assert "a row of format alpaca" in lab.fails(EXTEND, train_file_dir=file, data_format="alpaca")


@probe(EXTEND, "max_train_samples")
def max_train_samples(lab: Lab) -> None:
    assert extend(lab, max_train_samples=6)["trained"] == 6


@probe(EXTEND, "bad_rows")
def bad_rows(lab: Lab) -> None:
    file = lab.jsonl("bad_texts.jsonl", [{"text": line} for line in domain_lines(30)] + [{"text": 5}])
    assert "bad_texts.jsonl:31:" in lab.fails(EXTEND, train_file_dir=file)
    assert extend(lab, train_file_dir=file, bad_rows="skip")["dropped"] == 1
