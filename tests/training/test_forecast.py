"""The arithmetic of `posttrain plan`: against published figures, against tensors that a pass really keeps, and its constants."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.data.pack import collate
from posttrain.model import attention, block_attention, head
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.logprobs import install_logprobs
from posttrain.model.skeleton import count_adapter, count_weights, skeleton
from posttrain.training import decode, forecast
from posttrain.training.forecast import by_phase, kept_scores, peak_bytes
from posttrain.training.forecast_run import ALWAYS, BACKWARD, STEP, Engine, Item, Load, Rollout, Run, Shape

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)


def shape(**changes: Any) -> Shape:
    """That of CONFIG, counted on a skeleton."""
    counts = count_weights(skeleton(CONFIG))
    known: dict[str, Any] = {
        "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 160, "vocabulary": 300,
        "weights": counts.weights, "linear_weights": counts.linear, "attention_weights": counts.attention,
        "layer_weights": counts.layer, "tied": False,
    }  # fmt: skip
    return Shape(**{**known, **changes})


def run_of(**changes: Any) -> Run:
    """A run of all weights on one GPU."""
    load = Load(tokens=100, targets=100, parts=1, sequences=((50, 0), (50, 0)))
    known: dict[str, Any] = {
        "stage": "sft", "shape": shape(), "load": load, "engine": Engine(), "weight_bytes": 4, "compute_bytes": 2,
    }  # fmt: skip
    return Run(**{**known, **changes})


def size(run: Run, *names: str) -> float:
    return sum(item.size_bytes for item in forecast.forecast(run) if item.name in names)


# --- published figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "expected_gb"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_zero_paper(kind: Any, expected_gb: float) -> None:
    """arXiv 1910.02054, figure 1: 7.5B weights on 64 devices, mixed precision with Adam."""
    run = run_of(shape=shape(weights=7_500_000_000), engine=Engine(kind, 64))
    assert size(run, "weights", "gradients", "optimizer states") / 1e9 == pytest.approx(expected_gb, abs=0.06)


def test_qlora_bits_a_weight() -> None:
    """arXiv 2305.14314, section 3: scales take 0.5 bits a weight, and 0.127 where they are quantised too."""
    base = shape(linear_weights=1_000_000, weights=1_000_000, adapter_weights=1)
    bits = [size(run_of(shape=base, bits=4, double=double), "weights") * 8 / 1e6 for double in (False, True)]
    assert bits == pytest.approx([4.5, 4.127], abs=1e-3)


# --- what a pass really keeps ------------------------------------------------------------------------------------------------


def kept_bytes(model: Any, dtype: torch.dtype | None, lengths: list[int]) -> int:
    """Bytes that autograd holds between forward and backward, parameters apart."""
    batch = collate([{"input_ids": list(range(n)), "trained": [1] * n} for n in lengths])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
    return sum(seen.values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("stored", "autocast"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)])
def test_activations_are_the_tensors_that_are_kept(
    stored: torch.dtype, autocast: torch.dtype | None, lora: bool, fused: bool
) -> None:
    if stored is torch.bfloat16 and not lora:
        pytest.skip("weights that are trained are in float32")
    model: Any = LlamaForCausalLM(CONFIG).to(stored)
    ranks = trained = 0
    if lora:
        trained, ranks = count_adapter(skeleton(CONFIG), Lora(rank=4))
        model = attach_lora(model, Lora(rank=4))
    assert enable_segments(model).packed
    install_logprobs(model)
    if fused:
        fuse(model)
    lengths = [150, 200, 150]
    run = run_of(
        shape=shape(adapter_weights=trained, adapter_columns=ranks // 3), cpu=True, fused=fused, weight_bytes=stored.itemsize,
        compute_bytes=2 if autocast else stored.itemsize,
        load=Load(tokens=500, targets=497, parts=1, sequences=tuple((n, 0) for n in lengths)),
    )  # fmt: skip
    names = ("activations", "attention weights (CPU)", "weights in the type of the products", "head, kept of targets")
    assert size(run, *names) == pytest.approx(kept_bytes(model, autocast, lengths), rel=0.06)


def test_liger_keeps_the_input_of_a_norm_and_no_activation() -> None:
    """A token of a layer in bfloat16: inputs of two norms, of the maps behind them and of the last two maps; q, k, v; gate and up; low rank."""
    run = run_of(
        shape=shape(adapter_weights=1000, adapter_columns=28), cpu=False, liger=True, weight_bytes=2, compute_bytes=2,
        load=Load(tokens=100, targets=99, parts=1, sequences=((100, 0),)),
    )  # fmt: skip
    hidden, heads, narrow, inner = 64, 4 * 16, 2 * 16, 160
    numbers = 2 * hidden + 2 * hidden + 2 * heads + 2 * narrow + 3 * inner + 28
    assert size(run, "activations") == 100 * 3 * (2 * numbers + 4 * 4)
    assert size(run, "activations") < size(dataclasses.replace(run, liger=False), "activations")


# --- counting ----------------------------------------------------------------------------------------------------------------


def test_a_skeleton_counts_what_the_model_has(model_folder: Path) -> None:
    real = LlamaForCausalLM(CONFIG)
    counts = count_weights(skeleton(CONFIG))
    assert counts.weights == sum(p.numel() for p in real.parameters())
    assert counts.layer == sum(p.numel() for p in real.model.layers[0].parameters())
    assert counts.linear == 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    assert counts.attention == 3 * (64 * 64 * 2 + 64 * 32 * 2)
    assert counts.head == 300 * 64
    adapted = attach_lora(real, Lora(rank=4, target_modules="q_proj,down_proj", modules_to_save="lm_head"))
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lora = Lora(rank=4, target_modules="q_proj,down_proj", modules_to_save="lm_head")
    assert count_adapter(skeleton(CONFIG), lora) == (expected, 3 * 2 * 4)
    assert all(p.is_meta for p in skeleton(CONFIG).parameters())


def test_kept_scores_by_hand() -> None:
    assert kept_scores(((100, 0),)) == 100 * 100
    assert kept_scores(((200, 50),)) == 128 * (50 + 128) + 72 * (50 + 200)
    assert kept_scores(((128, 1000),)) == 0  # sees more keys than are kept


# --- phases ------------------------------------------------------------------------------------------------------------------


def test_the_largest_phase_is_the_peak() -> None:
    items = [Item("a", "", 10.0, ALWAYS), Item("b", "", 5.0, (BACKWARD,)), Item("c", "", 7.0, (STEP,))]
    assert by_phase(items) == {BACKWARD: 15.0, STEP: 17.0}
    assert peak_bytes(items) == 17.0


def test_gradients_meet_activations_only_where_a_step_has_parts() -> None:
    one, two = (run_of(load=Load(100, 100, parts, ((100, 0),))) for parts in (1, 2))
    difference = by_phase(forecast.forecast(two))[BACKWARD] - by_phase(forecast.forecast(one))[BACKWARD]
    assert difference == size(one, "gradients") == 4 * shape().weights


def test_ppo_has_a_cache_and_two_passes() -> None:
    adapted = shape(adapter_weights=1000)
    ppo_run = run_of(stage="ppo", shape=adapted, rollout=Rollout(8, 30))
    assert size(ppo_run, "KV cache") == 8 * (30 + 64) * 3 * 2 * 2 * 16 * 2
    assert size(ppo_run, "activations") == size(run_of(shape=adapted), "activations")  # the passes take turns
    trunk = run_of(stage="ppo", shape=adapted, rollout=Rollout(8, 30), value_model=False)
    assert size(trunk, "adapters, trained") * 2 == size(ppo_run, "adapters, trained")
    beside = dataclasses.replace(ppo_run, engine=Engine("ddp", 2))  # their exchange sees both at once
    assert size(beside, "activations") == 2 * size(ppo_run, "activations")


def test_a_value_of_few_layers_has_less_to_train_and_keeps_what_goes_into_them() -> None:
    run = run_of(stage="ppo", shape=shape(adapter_weights=3000), rollout=Rollout(8, 30, kept_tokens=240), value_layers=1)
    assert run.trained == 3000 + 1000
    assert size(run, "states below the value's layers") == 240 * 64 * 2
    whole = run_of(stage="ppo", rollout=Rollout(8, 30), value_layers=1)
    s = whole.shape
    assert whole.trained == 2 * s.weights - 2 * s.layer_weights - s.vocabulary * s.hidden
    assert dataclasses.replace(whole, value_layers=None).trained == 2 * s.weights


def test_constants_are_those_of_the_code() -> None:
    assert (forecast.CPU_BLOCK_TOKENS, forecast.CPU_KEPT_KEYS) == (block_attention.BLOCK_TOKENS, block_attention.KEEP_TOKENS)
    assert (forecast.CPU_CHUNK_BYTES, forecast.GPU_CHUNK_BYTES) == (head.CPU_CHUNK_BYTES, head.CHUNK_BYTES)
    assert forecast.ROOM_TOKENS == decode.ROOM_TOKENS
    assert forecast.PROBED_WEIGHTS == attention.CHEAP_PARAMETERS
    for vocabulary, cpu in ((300, True), (151936, False), (10_000_000, True)):
        assert forecast.chunk_tokens(vocabulary, cpu) == head.chunk_tokens(vocabulary, torch.device("cpu" if cpu else "cuda"))
