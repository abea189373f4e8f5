"""Probes of the flags of training: model, adapter, template and length, documents, run folder."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from flag_probes import Lab, Run, probe

# --- model ----------------------------------------------------------------------------------------------------------------


@probe("train", "model_name_or_path")
def model_name_or_path(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(model_name_or_path=lab.other_model)
    assert abs(one.logged(lab.measure)[0] - other.logged(lab.measure)[0]) > 1e-3
    assert other.read("run.json")["parents"]["base"]["name"] == str(lab.other_model)


@probe("train", "tokenizer_name_or_path")
def tokenizer_name_or_path(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(tokenizer_name_or_path=lab.other_model)
    assert "!" not in (one.folder / "chat_template.jinja").read_text()
    assert "!" in (other.folder / "chat_template.jinja").read_text()
    assert len(other.tokens()) > len(one.tokens())


@probe("train", "model_type")
def model_type(lab: Lab) -> None:
    assert "is a llama" in lab.fails("sft", model_type="qwen2")
    lab.sft(model_type="llama")


@probe("train", "model_revision")
def model_revision(lab: Lab) -> None:
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AutoConfig", "AutoTokenizer", "PreTrainedModel"):
            cls = getattr(transformers, name)

            def spy(of: Any, *args: Any, _load: Any = cls.from_pretrained.__func__, _name: str = name, **kwargs: Any) -> Any:
                asked.append((_name, kwargs.get("revision")))
                return _load(of, *args, **kwargs)

            patch.setattr(cls, "from_pretrained", classmethod(spy))
        lab.good("sft", model_revision="v2")
    assert {("AutoConfig", "v2"), ("AutoTokenizer", "v2"), ("PreTrainedModel", "v2")} <= set(asked)


@probe("train", "cache_dir")
def cache_dir(lab: Lab) -> None:
    cache = lab.path("cache")
    shutil.copytree(lab.other_model, cache / "models" / "smollm2-135m-instruct")  # where the embedded model is looked for
    run = lab.good("sft", cache_dir=cache, model_name_or_path="smollm2-135m-instruct")
    assert run.logged("loss") == lab.sft(model_name_or_path=lab.other_model).logged("loss")
    assert list((cache / "datasets").glob("*/rows.arrow"))


@probe("train", "dtype")
def dtype(lab: Lab) -> None:
    for name, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        run = lab.sft(dtype=name, use_peft=False, max_steps=1)
        saved = load_file(run.folder / "model.safetensors")
        assert {tensor.dtype for key, tensor in saved.items() if key != "score.weight"} == {
            expected
        }  # a score head is in float32


@probe("train", "trust_remote_code")
def trust_remote_code(lab: Lab) -> None:
    assert "--trust_remote_code" in lab.fails("sft", model_name_or_path=lab.coded_model)
    run = lab.good("sft", model_name_or_path=lab.coded_model, trust_remote_code=True)
    assert run.logged("loss") == pytest.approx(lab.sft().logged("loss"), abs=1e-6)


@probe("train", "padding_free")
def padding_free(lab: Lab) -> None:
    packed, padded = lab.sft(), lab.sft(padding_free=False)
    assert all(batch.segments is not None and batch.attention_mask_BT is None for batch in packed.batches)
    assert all(batch.segments is None and batch.attention_mask_BT is not None for batch in padded.batches)
    assert packed.logged("loss") == pytest.approx(padded.logged("loss"), abs=1e-5)


@probe("train", "fused")
def fused(lab: Lab) -> None:
    from posttrain.commands import train

    models: list[Any] = []
    build = train.build_model

    def spy(*args: Any) -> Any:
        models.append(build(*args))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", spy)
        runs = [lab.good("sft", fused=value) for value in (True, False)]
    forwards = [{getattr(module.forward, "__module__", "") for module in model.modules()} for model in models]
    assert ["posttrain.model.fused" in names for names in forwards] == [True, False]
    assert runs[0].logged("loss") == pytest.approx(runs[1].logged("loss"), abs=1e-5)


@probe("train", "forward_tokens")
def forward_tokens(lab: Lab) -> None:
    whole, cut = lab.sft(forward_tokens=0), lab.sft(forward_tokens=70)
    assert max(batch.n_tokens for batch in whole.batches) > 70 >= max(batch.n_tokens for batch in cut.batches)
    assert whole.logged("loss") == pytest.approx(cut.logged("loss"), abs=1e-5)


# --- adapter --------------------------------------------------------------------------------------------------------------


def settings(run: Run) -> dict[str, Any]:
    """The saved adapter's settings."""
    return dict(run.read("adapter_config.json"))


@probe("train", "use_peft")
def use_peft(lab: Lab) -> None:
    assert all("lora_" in name or "score" in name for name in lab.sft().weights)
    full = lab.sft(use_peft=False)
    assert not (full.folder / "adapter_config.json").exists()
    assert "model.embed_tokens.weight" in full.weights


@probe("train", "lora_rank")
def lora_rank(lab: Lab) -> None:
    for run, rank in ((lab.sft(), 8), (lab.sft(lora_rank=3), 3)):
        assert {tensor.shape[0] for name, tensor in run.weights.items() if "lora_A" in name} == {rank}


@probe("train", "lora_alpha")
def lora_alpha(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(lora_alpha=64)
    assert settings(other)["lora_alpha"] == 64
    assert one.logged("loss")[0] == other.logged("loss")[0]  # B is still zero
    assert one.logged("loss")[2] != other.logged("loss")[2]


@probe("train", "lora_dropout")
def lora_dropout(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(lora_dropout=0.5)
    assert settings(other)["lora_dropout"] == 0.5
    assert one.logged("loss")[2] != other.logged("loss")[2]


@probe("train", "target_modules")
def target_modules(lab: Lab) -> None:
    def layers(run: Run) -> set[str]:
        return {name.split(".")[-3] for name in run.weights if "lora_" in name}

    assert layers(lab.sft(target_modules="q_proj,down_proj")) == {"q_proj", "down_proj"}
    assert len(layers(lab.sft())) == 7


@probe("train", "modules_to_save")
def modules_to_save(lab: Lab) -> None:
    run = lab.sft(modules_to_save="embed_tokens")
    before = load_file(lab.model / "model.safetensors")["model.embed_tokens.weight"]
    (after,) = (tensor for name, tensor in run.weights.items() if "embed_tokens" in name)
    assert not torch.equal(before, after)
    assert not any("embed_tokens" in name for name in lab.sft().weights)


@probe("train", "use_rslora")
def use_rslora(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(use_rslora=True)
    assert settings(other)["use_rslora"] is True
    assert one.logged("loss")[2] != other.logged("loss")[2]


@probe("train", "use_dora")
def use_dora(lab: Lab) -> None:
    assert any("lora_magnitude_vector" in name for name in lab.sft(use_dora=True).weights)
    assert not any("lora_magnitude_vector" in name for name in lab.sft().weights)


@probe("train", "peft_path")
def peft_path(lab: Lab) -> None:
    run = lab.sft(peft_path=lab.adapter)
    assert abs(run.logged(lab.measure)[0] - lab.sft().logged(lab.measure)[0]) > 0.03
    assert run.read("run.json")["parents"]["adapter"]["name"] == str(lab.adapter)


# --- template, length, packing, documents ---------------------------------------------------------------------------------


@probe("train", "template_name")
def template_name(lab: Lab) -> None:
    one, other = lab.sft(), lab.sft(template_name="alpaca")
    templates = [(run.folder / "chat_template.jinja").read_text() for run in (one, other)]
    assert templates[0] != templates[1]
    assert one.tokens() != other.tokens()


@probe("train", "model_max_length")
def model_max_length(lab: Lab) -> None:
    def longest(run: Run) -> int:
        return max(s.end - s.start for batch in run.batches for s in batch.segments.segments)  # type: ignore[union-attr]

    assert longest(lab.sft()) > 30 >= longest(lab.sft(model_max_length=30))


@probe("train", "packing")
def packing(lab: Lab) -> None:
    flags = {"model_max_length": 100, "per_device_train_batch_size": 1}
    apart, packed = lab.sft(**flags), lab.sft(**flags, packing=True)
    assert max(batch.n_sequences for batch in apart.batches) == 1
    assert max(batch.n_sequences for batch in packed.batches) > 1
    assert max(batch.n_tokens for batch in packed.batches) <= 100


@probe("train", "block_size")
def block_size(lab: Lab) -> None:
    flags = {"per_device_train_batch_size": 1}
    small, large = lab.pt(**flags, block_size=16), lab.pt(**flags)
    assert max(batch.n_tokens for batch in small.batches) <= 16 < max(batch.n_tokens for batch in large.batches)


@probe("train", "streaming")
def streaming(lab: Lab) -> None:
    for stream in (False, True):
        cache = lab.path("cache")
        lab.good("pt", streaming=stream, cache_dir=cache)
        assert bool(list(cache.glob("datasets/*"))) is not stream  # a stream prepares nothing
    assert "--max_steps" in lab.fails("pt", streaming=True, max_steps=None)


@probe("train", "shuffle_buffer_rows")
def shuffle_buffer_rows(lab: Lab) -> None:
    flags = {"streaming": True, "block_size": 64, "seed": 5}
    in_order, shuffled = lab.pt(**flags, shuffle_buffer_rows=0), lab.pt(**flags, shuffle_buffer_rows=24)
    assert in_order.tokens() != shuffled.tokens()
    assert in_order.tokens() == lab.pt(**{**flags, "seed": 6}, shuffle_buffer_rows=0).tokens()


# --- run folder -----------------------------------------------------------------------------------------------------------


@probe("train", "overwrite_output_dir")
def overwrite_output_dir(lab: Lab) -> None:
    folder = lab.good("sft", max_steps=1).folder
    (folder / "checkpoint-7").mkdir()
    assert "already holds a run" in lab.fails("sft", output_dir=folder)
    run = lab.good("sft", output_dir=folder, overwrite_output_dir=True)
    assert len(run.logged("loss")) == 3
    assert run.checkpoints() == []


@probe("train", "logging_dir")
def logging_dir(lab: Lab) -> None:
    elsewhere = lab.path("logs")
    run = lab.sft(logging_dir=elsewhere, report_to="tensorboard")
    assert list(elsewhere.glob("events.*"))
    assert not (run.folder / "logs").exists()


@probe("train", "audit")
def audit(lab: Lab) -> None:
    unmoved = {"optim": "sgd", "learning_rate": 1e-30, "max_steps": 4}
    assert "did not move" in lab.fails("sft", **unmoved)
    assert "audit" not in lab.sft(**unmoved, audit=False).err.replace("  audit ", "")
