"""`posttrain merge`: an adapter and its base become one folder that any server loads."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from posttrain import flags
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.data.template import stop_token_ids
from posttrain.model.certificate import Certificate
from posttrain.model.embedded import resolve_model
from posttrain.model.load import DType, check_tokenizer, load_tokenizer
from posttrain.model.merge import WriteOptions, merge_adapter, merge_tokenizer_folder
from posttrain.model.score_certificate import ScoreCertificate
from posttrain.training import artifacts
from posttrain.training.token_scores import BIAS_FILE

WEAK = 0.9  # share of the adapter's effect below which the user is told


def run(config: Config) -> None:
    """Merge, print the certificate, name the parents in `run.json`."""
    quiet_libraries()
    chosen = config.group(flags.MergeFlags)
    write = WriteOptions(chosen.max_shard_size, chosen.overwrite_output_dir, chosen.trust_remote_code)
    certificate = merge(
        chosen.base_model, chosen.lora_model, chosen.output_dir, chosen.tokenizer_path, resize_emb=chosen.resize_emb,
        dtype=chosen.dtype, write=write,
    )  # fmt: skip
    parents = {
        "base": artifacts.parent(chosen.base_model, resolve_model(chosen.base_model)),
        "adapter": artifacts.parent(chosen.lora_model, chosen.lora_model),
    }
    artifacts.write_run(Path(chosen.output_dir), "merge", config.saved(), parents=parents)
    bias = Path(chosen.lora_model, BIAS_FILE)
    if bias.is_file():
        shutil.copyfile(bias, Path(chosen.output_dir, BIAS_FILE))  # a reward model's scores are centred by it in PPO
    if certificate.kept < WEAK:
        say("note: rounding ate a part of this weak adapter; --dtype float32 keeps all of it")
    say(f"{certificate}\nmerged model: {chosen.output_dir}")


def merge(
    base_model: str,
    lora_model: str,
    output_dir: str,
    tokenizer_path: str | None = None,
    *,
    resize_emb: bool = False,
    dtype: DType = "auto",
    write: WriteOptions = WriteOptions(),  # noqa: B008 (frozen)
) -> Certificate | ScoreCertificate:
    """Write the merged folder. The tokenizer and its template are those that the adapter was trained with."""
    folder = merge_tokenizer_folder(base_model, lora_model, tokenizer_path)
    tokenizer = load_tokenizer(folder, trust_remote_code=write.trust_remote_code)
    if tokenizer_path:
        check_tokenizer(tokenizer, tokenizer_path, "--tokenizer_path", base_model, trust_remote_code=write.trust_remote_code)
    if tokenizer.chat_template:
        write = dataclasses.replace(write, stop_token_ids=tuple(stop_token_ids(tokenizer)))
    return merge_adapter(base_model, lora_model, Path(output_dir), tokenizer, resize_emb=resize_emb, dtype=dtype, write=write)
