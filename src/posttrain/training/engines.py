"""Who generates PPO's responses: the policy's own module, or vLLM on the same GPU with the policy's adapter sent over."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from posttrain.training.rollout import Response, RolloutFigures, Sampling, generate, through_stop
from posttrain.types import UserError

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allocates for; a smaller adapter fits


class RolloutEngine(Protocol):
    """Generates responses. `figures` is what it has done so far."""

    figures: RolloutFigures

    def sync(self) -> None:
        """Take over the policy as it is now. To be called after every update, and before the first generation."""
        ...

    def generate(self, prompts: Sequence[list[int]], settings: Sampling, seed: int, numbers: Sequence[int]) -> list[Response]:
        """As `posttrain.training.rollout.generate`."""
        ...


@dataclass
class TorchEngine:
    """The policy's own module; the adapter that is active speaks."""

    model: nn.Module
    figures: RolloutFigures = field(default_factory=RolloutFigures)

    def sync(self) -> None:
        """Nothing: the weights are the policy's."""

    def generate(self, prompts: Sequence[list[int]], settings: Sampling, seed: int, numbers: Sequence[int]) -> list[Response]:
        """Responses of the policy."""
        return generate(self.model, prompts, settings, seed, numbers=numbers, figures=self.figures)


class VllmEngine:
    """vLLM with the base model and, as of the last `sync`, the policy's adapter.

    vLLM computes in its own kernels: its samples follow the policy up to their rounding, and PPO's old log-probs are recomputed anyway.
    """

    def __init__(
        self, model: Any, adapter: str, base: str, context_tokens: int, *, gpu_share: float = 0.4, trust_remote_code: bool = False
    ) -> None:
        """`base`: folder or hub name; `context_tokens`: longest prompt and response; `gpu_share`: of the GPU's memory, for weights and cache.

        Raises UserError when vLLM or a GPU is missing or the policy is no adapter that vLLM takes.
        """
        rank = _adapter_rank(model, adapter)
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                f"--rollout_engine vllm: cannot import vllm ({error}); install it, or use --rollout_engine torch"
            ) from error
        if not torch.cuda.is_available():
            raise UserError("--rollout_engine vllm: needs a GPU and finds none; use --rollout_engine torch")
        self._model, self._adapter = model, adapter
        self._llm = self._vllm.LLM(
            model=base,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=context_tokens,
            gpu_memory_utilization=gpu_share,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(r for r in VLLM_RANKS if r >= rank),
            trust_remote_code=trust_remote_code,
            # Under torchrun every rank has an engine of its own on its GPU, and the launcher is not vLLM's.
            distributed_executor_backend="external_launcher" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        )
        self._request: Any = None
        self._version = 0
        self._folder = Path(tempfile.mkdtemp(prefix="posttrain-policy-"))
        self.figures = RolloutFigures()

    def sync(self) -> None:
        """Save the adapter under a new name and number: by the name vLLM caches prompts, by the number weights."""
        shutil.rmtree(self._folder / str(self._version), ignore_errors=True)
        self._version += 1
        target = self._folder / str(self._version)
        self._model.save_pretrained(str(target), selected_adapters=[self._adapter])
        if self._adapter != "default":  # peft gives every other adapter a folder of its own
            target /= self._adapter
        request = importlib.import_module("vllm.lora.request").LoRARequest
        self._request = request(f"policy-{self._version}", self._version, str(target))

    def generate(self, prompts: Sequence[list[int]], settings: Sampling, seed: int, numbers: Sequence[int]) -> list[Response]:
        """Responses of the policy as of the last `sync`; each prompt has a seed of its own, made of `seed` and its number."""
        assert self._request is not None, "sync first"
        started = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._parameters(settings, seed, number) for number in numbers],
            lora_request=self._request,
            use_tqdm=False,
        )
        responses = []
        for output in outputs:
            rows = [list(o.token_ids) for o in sorted(output.outputs, key=lambda o: o.index)]
            rows *= settings.num_generations // len(rows)  # greedy: one for all
            rows = [through_stop(ids, settings.stop_ids) for ids in rows]
            responses += [Response(ids, bool(ids) and ids[-1] in settings.stop_ids) for ids in rows]
        self.figures.responses += len(responses)
        self.figures.new_tokens += sum(len(response.ids) for response in responses)
        self.figures.prompt_tokens += sum(map(len, prompts))
        self.figures.seconds += time.perf_counter() - started
        return responses

    def close(self) -> None:
        """Remove the adapter's copies."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _parameters(self, settings: Sampling, seed: int, number: int) -> Any:
        sampled = settings.temperature > 0
        return self._vllm.SamplingParams(
            n=settings.num_generations if sampled else 1,  # vLLM refuses more of the same
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=True,  # the stop tokens are ours to name
            detokenize=False,
            seed=int(np.random.default_rng((seed, number)).integers(2**62)),  # generation g gets seed + g
        )


def _adapter_rank(model: Any, adapter: str) -> int:
    """The rank of the policy's adapter. Raises UserError where vLLM cannot take it."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        raise UserError(
            "--rollout_engine vllm: needs an adapter to send over (--use_peft True); a full policy generates with torch"
        )
    if config.modules_to_save or config.use_dora or config.target_parameters:
        raise UserError(
            "--rollout_engine vllm: takes plain LoRA only, no --modules_to_save, DoRA or experts; use --rollout_engine torch"
        )
    ranks = [config.r, *config.rank_pattern.values()]
    if max(ranks) > VLLM_RANKS[-1]:
        raise UserError(f"--lora_rank {max(ranks)}: vLLM takes at most {VLLM_RANKS[-1]}; lower it or use --rollout_engine torch")
    return max(ranks)
