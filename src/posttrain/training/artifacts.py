"""The run folder: what a run was made from, with what settings, and what came out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.types import UserError

RUN_FILE = "run.json"
WHOLE_FILE_BYTES = 256 << 20
SAMPLE_BYTES = 1 << 20
SAMPLES = 64
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
CONTENT = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
NOT_CONTENT = {RUN_FILE, "ledger.json", "metrics.jsonl", "trainer_state.json", "training_args.bin", "merge_certificate.json"}


def json_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line with its end, its object) of a JSONL file that a run appends to; a last line that a killed process left unfinished is no line.

    str.splitlines would also cut at U+2028 and the like, which texts may hold.
    """
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [(line, json.loads(line)) for line in lines if line.endswith("\n")]


def open_run_folder(folder: Path, overwrite: bool, resuming: bool, sources: Mapping[str, str | None] | None = None) -> None:
    """Make `folder` where there is none. UserError when it already holds a run and the user neither resumes nor overwrites it.

    Nothing is deleted yet: see `remove_run`.
    sources  flag → what the run is made from (several: a,b,c); overwriting never deletes one of them
    """
    if folder.is_file():
        raise UserError(f"--output_dir {folder}: is a file")
    if holds_run(folder) and not resuming:
        if not overwrite:
            raise UserError(
                f"--output_dir {folder} already holds a run: go on with --resume_from_checkpoint auto, start over with"
                " --overwrite_output_dir True, or name another folder"
            )
        _check_sources(folder, sources or {})
    folder.mkdir(parents=True, exist_ok=True)


def remove_run(folder: Path) -> None:
    """Delete a folder that holds a run, and make it anew."""
    if holds_run(folder):
        shutil.rmtree(folder)
        folder.mkdir(parents=True)


def holds_run(folder: Path) -> bool:
    """Whether a run has written into the folder."""
    return any((folder / name).exists() for name in (RUN_FILE, "metrics.jsonl", "trainer_state.json")) or any(
        folder.glob("checkpoint-*")
    )


def _check_sources(folder: Path, sources: Mapping[str, str | None]) -> None:
    for flag, names in sources.items():
        for name in (names or "").split(","):
            path = Path(name.strip()).expanduser()
            there = path.exists() or flag == "--cache_dir"  # which this run would make
            if name.strip() and there and path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"--overwrite_output_dir would delete {flag} {name.strip()}: name another --output_dir")


def resumes(wanted: str | None) -> bool:
    """Whether --resume_from_checkpoint asks to go on: it may say False."""
    return wanted is not None and wanted.lower() != "false"


def find_checkpoint(folder: Path, wanted: str | None) -> str | None:
    """The checkpoint to go on from. `auto`: the last whole one if there is any; `True`: it must exist; else a path."""
    if wanted is None or not resumes(wanted):
        return None
    if wanted.lower() not in ("auto", "true"):
        _check_no_run(folder, wanted)
        if not Path(wanted, "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {wanted}: not a checkpoint folder (it has no trainer_state.json)")
        return _with_state(wanted)
    whole = whole_checkpoints(folder)
    if not whole and wanted.lower() == "true":
        raise UserError(f"--resume_from_checkpoint True: no whole checkpoint in {folder}")
    return _with_state(str(whole[max(whole)])) if whole else None


def _check_no_run(folder: Path, wanted: str) -> None:
    """UserError where the folder that is to be gone on from is that of a run."""
    named = Path(wanted)
    if not (named / RUN_FILE).is_file() and not any(named.glob("checkpoint-*")):
        return
    whole = whole_checkpoints(named)
    what = "it has no whole checkpoint, so there is nothing to go on from"
    if whole:
        auto = ", or give auto" if named.resolve() == folder.resolve() else ""
        what = f"name its last checkpoint, {whole[max(whole)]}{auto}"
    raise UserError(f"--resume_from_checkpoint {wanted}: is the folder of a run, not a checkpoint; {what}")


def whole_checkpoints(folder: Path) -> dict[int, Path]:
    """By step. trainer_state.json is written last, so a checkpoint that a crash cut short is passed over."""
    return {int(c.name.rpartition("-")[2]): c for c in folder.glob("checkpoint-*") if (c / "trainer_state.json").is_file()}


def cut_short(folder: Path) -> list[str]:
    """Names of the checkpoints that a crash left unfinished."""
    return sorted(c.name for c in folder.glob("checkpoint-*") if not (c / "trainer_state.json").is_file())


def _with_state(checkpoint: str) -> str:
    """The checkpoint; UserError when it holds weights only, from which the library would go on without a word."""
    if not any(Path(checkpoint).glob("rng_state*")):
        raise UserError(
            f"{checkpoint} was saved with --save_only_model: it has no optimizer to resume; start a new run from its weights"
            " (--peft_path, or --model_name_or_path for a full model)"
        )
    return checkpoint


def content_hash(path: Path) -> str:
    """Hash of a model or adapter folder's content (weights, config, tokenizer, template), independent of where it lies.

    Files up to 256 MiB are read whole, larger ones at 64 evenly spaced places of 1 MiB, with their sizes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and file.suffix in CONTENT and file.name not in NOT_CONTENT:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}\n".encode())
            with file.open("rb") as stream:
                if size <= WHOLE_FILE_BYTES:
                    digest.update(stream.read())
                    continue
                for sample in range(SAMPLES):
                    stream.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def parent(name: str, folder: str) -> dict[str, str]:
    """How a run names what it was made from: the user's word and the content's hash (a hub name has no folder to hash)."""
    return {"name": name, "hash": content_hash(Path(folder)) if Path(folder).is_dir() else f"hub:{folder}"}


def versions() -> dict[str, str]:
    """Versions of posttrain, Python and the libraries that make up the numbers."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"posttrain": __version__, "python": platform.python_version(), **found}


def write_run(folder: Path, stage: str, config: Mapping[str, Any], **facts: Any) -> None:
    """`run.json`: the resolved config, versions, parents and whatever else the stage knows."""
    content = {"stage": stage, "config": dict(config), "versions": versions(), **facts}
    (folder / RUN_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_results(folder: Path, name: str, metrics: Mapping[str, Any]) -> None:
    """`<name>_results.txt`, a line `name = value` each, in the order of the names."""
    text = "".join(f"{key} = {metrics[key]}\n" for key in sorted(metrics))
    (folder / f"{name}_results.txt").write_text(text, encoding="utf-8")
