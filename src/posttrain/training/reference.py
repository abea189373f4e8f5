"""Reference log-probs of preference pairs: computed once by the policy as it starts, kept as columns, cached by content hash.

The reference of DPO is the policy before step 1, so no second model is loaded, with an adapter or without one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.numpy import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from posttrain.data.cache import cache_root
from posttrain.data.pack_pairs import ANSWERS, REFERENCES
from posttrain.types import PackedBatch

_VERSION = 1  # counts up when the same key would give other numbers
PADDED_PAIRS = 8  # computed at once where batches are padded

Logprobs = list[list[np.ndarray]]  # by pair: chosen, rejected


@dataclass(frozen=True)
class ReferencePass:
    """How to compute: the model as it starts, the collation and size of its micro-batches, and what the model is made from."""

    model: nn.Module
    collate: Callable[[Sequence[Any]], PackedBatch]
    packed: bool
    forward_tokens: int  # of a packed micro-batch
    parents: Sequence[str]  # content hashes of base and adapter, types, …: whatever changes the numbers
    cache_dir: str | None = None
    progress: bool = False

    def add_columns(self, rows: Any, args: TrainingArguments) -> tuple[Any, str]:
        """(rows with `reference_chosen` and `reference_rejected`, a line for the log). A collective over the ranks."""
        began = time.monotonic()
        file = cache_root(self.cache_dir) / "reference" / f"{self._key(rows)}.safetensors"
        known = all(gather_object([file.is_file()]))
        found = _read(file, rows) if known else self._compute(rows, args)
        if not known and args.local_process_index == 0:
            _write(file, found)
        for index, name in enumerate(REFERENCES):
            rows = rows.add_column(name, [pair[index] for pair in found])
        how = "from the cache" if known else f"computed in {time.monotonic() - began:.1f} s"
        return rows, f"reference log-probs: {len(rows):,} pairs, {how}"

    def _key(self, rows: Any) -> str:
        digest = hashlib.blake2b(repr([_VERSION, *self.parents]).encode(), digest_size=16)
        for row in rows:
            for name in ("prompt_ids", *ANSWERS):
                ids = np.asarray(row[name], dtype=np.int32)
                digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return digest.hexdigest()

    def _compute(self, rows: Any, args: TrainingArguments) -> Logprobs:
        """Every rank computes its share of the micro-batches, and all get all."""
        lengths = [sum(len(row[name]) for name in ("prompt_ids", *ANSWERS)) for row in rows]
        batches = list(self._batches(lengths))[args.process_index :: args.world_size]
        own: dict[int, list[np.ndarray]] = {}
        bar = tqdm(total=sum(map(len, batches)), desc="reference log-probs", unit=" pairs", disable=not self.progress)
        self.model.to(args.device).eval()
        for indices in batches:
            batch = self.collate([rows[index] for index in indices]).to(args.device)
            with torch.no_grad(), torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.bf16):
                output = self.model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
            counts = torch.bincount(batch.sequence_N, minlength=batch.n_sequences).tolist()
            parts = [part.numpy() for part in output.logprobs_N.float().cpu().split(counts)]
            own |= {index: parts[2 * i : 2 * i + 2] for i, index in enumerate(indices)}
            bar.update(len(indices))
        bar.close()
        everything: dict[int, list[np.ndarray]] = {}
        for share in gather_object([own]):
            everything |= share
        return [everything[index] for index in range(len(rows))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Pairs of like length together, longest first: what does not fit into memory fails at once."""
        batch: list[int] = []
        tokens = 0
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full = tokens + lengths[index] > self.forward_tokens > 0 if self.packed else len(batch) == PADDED_PAIRS
            if batch and full:
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += lengths[index]
        if batch:
            yield batch


def _write(file: Path, found: Logprobs) -> None:
    """Whole or not at all: another run may read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({"logprobs_nats": np.concatenate([part for pair in found for part in pair])}, unfinished)
    os.replace(unfinished, file)


def _read(file: Path, rows: Any) -> Logprobs:
    ends = np.cumsum([len(row[name]) for row in rows for name in ANSWERS])
    parts = np.split(load_file(file)["logprobs_nats"], ends[:-1])
    return [parts[i : i + 2] for i in range(0, len(parts), 2)]
