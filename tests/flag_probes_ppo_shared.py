"""Probes in ppo of the flags that other stages have too: model, adapter, data, template. Where the probe of training fits, it is run on ppo."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

import flag_probes_data  # noqa: F401
import flag_probes_quantized  # noqa: F401
import flag_probes_train  # noqa: F401
from flag_probes import PROBES, Lab, Probe, probe
from flag_probes_data import ledger

SAME = (
    "model_name_or_path", "tokenizer_name_or_path", "model_type", "model_revision", "dtype", "use_peft", "lora_rank", "target_modules",
    "use_dora", "load_in_4bit", "load_in_8bit", "qlora", "train_file_dir", "dataset_name", "dataset_config_name", "dataset_weights",
    "data_format", "max_train_samples", "bad_rows", "validation_split_percentage", "preprocessing_num_workers", "overwrite_cache",
    "template_name",
)  # fmt: skip


def on_ppo(check: Probe) -> Probe:
    """The same check with ppo in the place of sft."""

    def checked(lab: Lab) -> None:
        twin = lab.on_ppo()
        check(twin)
        assert "ppo" in twin.used, "the probe runs another stage"

    return checked


for _flag in SAME:
    PROBES["ppo", _flag] = on_ppo(PROBES["train", _flag])


# --- model ----------------------------------------------------------------------------------------------------------------


@probe("ppo", "cache_dir")
def cache_dir(lab: Lab) -> None:
    cache = lab.path("cache")
    shutil.copytree(lab.other_model, cache / "models" / "smollm2-135m-instruct")  # where the embedded model is looked for
    run = lab.good("ppo", cache_dir=cache, model_name_or_path="smollm2-135m-instruct")
    assert run.logged("entropy_nats") == lab.ppo(model_name_or_path=lab.other_model).logged("entropy_nats")
    assert list((cache / "datasets").glob("*/rows.arrow"))


@probe("ppo", "trust_remote_code")
def trust_remote_code(lab: Lab) -> None:
    assert "--trust_remote_code" in lab.fails("ppo", model_name_or_path=lab.coded_model)
    run = lab.good("ppo", model_name_or_path=lab.coded_model, trust_remote_code=True)
    assert run.logged("entropy_nats") == pytest.approx(lab.ppo().logged("entropy_nats"), abs=1e-5)


@probe("ppo", "padding_free")
def padding_free(lab: Lab) -> None:
    packed, padded = lab.ppo(), lab.ppo(padding_free=False)
    assert all(batch.segments is not None and batch.attention_mask_BT is None for batch in packed.batches)
    assert all(batch.segments is None and batch.attention_mask_BT is not None for batch in padded.batches)
    assert packed.moved(padded) < 1e-3


@probe("ppo", "fused")
def fused(lab: Lab) -> None:
    from posttrain.commands import ppo

    seen: list[set[str]] = []
    build = ppo.build_actors

    def spy(*args: Any) -> Any:
        actors = build(*args)
        seen.append({getattr(module.forward, "__module__", "") for module in actors.trained.modules()})
        return actors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "build_actors", spy)
        runs = [lab.good("ppo", fused=value) for value in (True, False)]
    assert ["posttrain.model.fused" in names for names in seen] == [True, False]
    assert runs[0].moved(runs[1]) < 1e-3


@probe("ppo", "forward_tokens")
def forward_tokens(lab: Lab) -> None:
    whole, cut = lab.ppo(forward_tokens=0), lab.ppo(forward_tokens=70)
    assert max(batch.n_tokens for batch in whole.batches) > 70 >= max(batch.n_tokens for batch in cut.batches)
    assert whole.moved(cut) < 1e-3


# --- adapter --------------------------------------------------------------------------------------------------------------


@probe("ppo", "lora_alpha", "use_rslora")
def scale(lab: Lab) -> None:
    runs = [lab.ppo(), lab.ppo(lora_alpha=64), lab.ppo(use_rslora=True)]
    settings = [run.read("adapter_config.json") for run in runs]
    assert [(found["lora_alpha"], found["use_rslora"]) for found in settings] == [(16, False), (64, False), (16, True)]
    assert all(runs[0].logged("kl_nats")[1] != run.logged("kl_nats")[1] for run in runs[1:])


@probe("ppo", "lora_dropout")
def lora_dropout(lab: Lab) -> None:
    run = lab.ppo(lora_dropout=0.5)  # a flag of the guide's command line: it is said that it is 0
    assert "--lora_dropout 0.5 is 0 in ppo" in run.err
    assert run.moved(lab.ppo()) == 0


@probe("ppo", "modules_to_save")
def modules_to_save(lab: Lab) -> None:
    assert "the roles of PPO share the base's weights" in lab.fails("ppo", modules_to_save="lm_head")


@probe("ppo", "peft_path")
def peft_path(lab: Lab) -> None:
    run = lab.ppo(peft_path=lab.adapter)
    assert abs(run.logged("entropy_nats")[0] - lab.ppo().logged("entropy_nats")[0]) > 0.03
    assert run.logged("kl_nats")[0] == pytest.approx(0, abs=1e-4)  # the reference is the adapter that it starts from
    assert run.read("run.json")["parents"]["adapter"]["name"] == str(lab.adapter)


# --- held-out prompts -----------------------------------------------------------------------------------------------------


@probe("ppo", "validation_file_dir")
def validation_file_dir(lab: Lab) -> None:
    assert not lab.ppo().logged("eval_score")
    run = lab.ppo(validation_file_dir=lab.other_chats)
    assert len(run.logged("eval_score")) == 2
    assert ledger(run, "validation")["trained"] == 9


@probe("ppo", "max_eval_samples")
def max_eval_samples(lab: Lab) -> None:
    run = lab.ppo(validation_file_dir=lab.other_chats, max_eval_samples=4)
    assert ledger(run, "validation")["trained"] == 4
