"""Rollout engines: ours is the policy's module; vLLM, played by a fake of its documented interface, is asked the right things."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import stir
from conftest import tiny_llama
from posttrain.model.adapter import Lora, attach_lora
from posttrain.training.engines import RolloutEngine, TorchEngine, VllmEngine
from posttrain.training.rollout import Response, Sampling, generate
from posttrain.types import UserError

SETTINGS = Sampling(5, (7, 8), 0, num_generations=2, top_k=3)
PROMPTS = [[5, 6, 9], [4], [10, 11]]


class FakeLlm:
    """Answers with the prompt's length, the generation's index and a stop token, and notes what it was asked."""

    made: list[FakeLlm] = []  # noqa: RUF012

    def __init__(self, **settings: Any):
        self.settings, self.calls = settings, []
        FakeLlm.made.append(self)

    def generate(self, prompts: Any, sampling_params: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        folder = Path(lora_request.path)
        weights = load_file(folder / "adapter_model.safetensors")  # vLLM reads it on first use
        self.calls.append(
            (prompts, sampling_params, lora_request, weights, json.loads((folder / "adapter_config.json").read_text()))
        )
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(index=g, token_ids=(len(prompt["prompt_token_ids"]), g, 7))
                    for g in reversed(range(parameters.n))
                ]
            )
            for prompt, parameters in zip(prompts, sampling_params, strict=True)
        ]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.LLM = FakeLlm  # type: ignore[attr-defined]
    vllm.SamplingParams = lambda **settings: SimpleNamespace(**settings)  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(FakeLlm, "made", [])


def policy(**changes: Any) -> Any:
    model = attach_lora(tiny_llama(vocab=96), Lora(rank=4, **changes))
    model.add_adapter("policy", model.peft_config["default"])
    stir(model)
    return model


def test_ours_is_the_policys_own_module() -> None:
    model = policy()
    engine: RolloutEngine = TorchEngine(model)
    engine.sync()
    got = engine.generate(PROMPTS, SETTINGS, 3, range(3))
    assert got == generate(model, PROMPTS, SETTINGS, 3)
    assert engine.figures.responses == 6
    engine.generate(PROMPTS, SETTINGS, 3, range(3))
    assert engine.figures.responses == 12


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("adapter", ["default", "policy"])
def test_vllm_is_sent_each_version_of_the_adapter(adapter: str) -> None:
    model = policy()
    engine = VllmEngine(model, adapter, "base", 128)
    weights = []
    for _ in range(2):
        engine.sync()
        engine.generate(PROMPTS, SETTINGS, 0, range(3))
        parameter = model.get_parameter(f"base_model.model.model.layers.0.self_attn.q_proj.lora_B.{adapter}.weight")
        weights.append(parameter.detach().clone())
        with torch.no_grad():
            parameter += 1
    calls = FakeLlm.made[0].calls
    assert len({request.name for _, _, request, _, _ in calls}) == 2, "vLLM keeps prompts by the name"
    assert [request.number for _, _, request, _, _ in calls] == [1, 2]
    for (_, _, _, saved, config), expected in zip(calls, weights, strict=True):
        assert config["r"] == 4
        assert torch.equal(next(w for name, w in saved.items() if "layers.0.self_attn.q_proj.lora_B" in name), expected)
    old, new = (Path(request.path) for _, _, request, _, _ in calls)
    assert new.exists()
    assert not old.exists(), "only the last version is kept"
    engine.close()
    assert not new.exists()


@pytest.mark.usefixtures("fake_vllm")
def test_vllm_is_asked_for_what_the_settings_say() -> None:
    engine = VllmEngine(policy(), "policy", "base", 128, gpu_share=0.3)
    engine.sync()
    got = engine.generate(PROMPTS, SETTINGS, 0, [10, 11, 12])
    assert got == [Response([len(p), g, 7], True) for p in PROMPTS for g in (0, 1)]
    llm = FakeLlm.made[0]
    assert {k: llm.settings[k] for k in ("model", "dtype", "max_model_len", "gpu_memory_utilization", "enable_lora")} == {
        "model": "base", "dtype": "float32", "max_model_len": 128, "gpu_memory_utilization": 0.3, "enable_lora": True,
    }  # fmt: skip
    assert llm.settings["max_lora_rank"] == 8
    assert llm.settings["distributed_executor_backend"] is None
    prompts, parameters = llm.calls[0][:2]
    assert prompts == [{"prompt_token_ids": p} for p in PROMPTS]
    asked = dict(vars(parameters[0]))
    assert asked.pop("seed") != parameters[1].seed
    assert asked == {
        "n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 3, "max_tokens": 5, "stop_token_ids": [7, 8], "ignore_eos": True,
        "detokenize": False,
    }  # fmt: skip
    again = [p.seed for p in parameters]
    engine.generate(PROMPTS[1:], SETTINGS, 0, [11, 12])
    assert [p.seed for p in llm.calls[1][1]] == again[1:], "a prompt's seed hangs on its number alone"
    assert engine.figures.responses == 10
    assert engine.figures.new_tokens == 30
    engine.close()


@pytest.mark.usefixtures("fake_vllm")
def test_greedy_is_asked_once_and_told_for_all() -> None:
    engine = VllmEngine(policy(), "policy", "base", 128)
    engine.sync()
    got = engine.generate(PROMPTS, Sampling(5, (), 0, temperature=0, num_generations=2), 0, range(3))
    assert got == [Response([len(p), 0, 7], False) for p in PROMPTS for _ in range(2)]
    assert {p.n for p in FakeLlm.made[0].calls[0][1]} == {1}
    assert {p.top_k for p in FakeLlm.made[0].calls[0][1]} == {-1}
    engine.close()


@pytest.mark.usefixtures("fake_vllm")
def test_every_rank_has_an_engine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    VllmEngine(policy(), "policy", "base", 128).close()
    assert FakeLlm.made[0].settings["distributed_executor_backend"] == "external_launcher"


def test_without_vllm_or_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="cannot import vllm"):
        VllmEngine(policy(), "policy", "base", 128)
    request.getfixturevalue("fake_vllm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        VllmEngine(policy(), "policy", "base", 128)


@pytest.mark.usefixtures("fake_vllm")
def test_what_vllm_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match="needs an adapter"):
        VllmEngine(tiny_llama(), "policy", "base", 128)
    for changes in ({"dora": True}, {"modules_to_save": "lm_head"}):
        with pytest.raises(UserError, match="plain LoRA only"):
            VllmEngine(policy(**changes), "default", "base", 128)
    model = policy()
    model.peft_config["policy"].r = 1024
    with pytest.raises(UserError, match="--lora_rank 1024"):
        VllmEngine(model, "policy", "base", 128)
    assert FakeLlm.made == []
