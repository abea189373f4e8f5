"""How PPO's trained module is laid over the processes: whole on each (DDP), or sharded by FSDP2 or DeepSpeed.

A rollout wants whole weights, an update sharded ones: `gathered` brings all weights together once, for as many passes as the rollout
takes, token by token. Everything that leaves an engine (weights, optimizer state) is whole, so what is saved knows nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.types import UserError

OPTIMIZER_FILE = "optimizer.pt"
DEEPSPEED_FOLDER = "deepspeed"

Optimize = Callable[[], torch.optim.Optimizer]  # over the module's parameters as they are when it is called


class Engine(Protocol):
    """The trained module as its processes hold it. Gradients are means over the processes."""

    name: str  # of the layout: a checkpoint that is not whole names it
    wrapped: Any  # what a pass with gradients calls
    optimizer: torch.optim.Optimizer  # whose learning rates the schedule sets
    lockstep: bool  # every process must run as many passes as the others

    def gathered(self) -> AbstractContextManager[None]:
        """All weights whole on this process, for passes without gradients. A collective."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of a step; gradients are exchanged with the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of a part."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient before `step`. A collective."""
        ...

    def step(self, look: Callable[[], None]) -> Tensor:
        """Clip, `look` at the gradients, update, forget them. Returns their norm before clipping."""
        ...

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter as one tensor. A collective."""
        ...

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Overwrite a parameter by its whole value. A collective."""
        ...

    def save_optimizer(self, folder: Path) -> None:
        """Write the optimizer's state. A collective."""
        ...

    def load_optimizer(self, folder: Path) -> None:
        """Read it back. A collective."""
        ...


class Replicated:
    """The whole module on every process: one process, or DDP."""

    name, lockstep = "", False

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimize: Optimize, max_norm: float) -> None:
        self._accelerator, self._module, self._max_norm = accelerator, module, max_norm or math.inf
        self.wrapped, self.optimizer = accelerator.prepare(module, optimize())

    def gathered(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """DDP exchanges with the last part."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Plain."""
        self._accelerator.backward(loss)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Its own."""
        return parameter.grad

    def step(self, look: Callable[[], None]) -> Tensor:
        """Clip, update, forget."""
        norm: Tensor = self._accelerator.clip_grad_norm_(self._module.parameters(), self._max_norm)
        look()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.detach()

    def whole(self, parameter: Tensor) -> Tensor:
        """As it is."""
        return parameter.detach()

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """In place."""
        parameter.detach().copy_(value)

    def save_optimizer(self, folder: Path) -> None:
        """One file."""
        if self._accelerator.is_main_process:
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_FILE)

    def load_optimizer(self, folder: Path) -> None:
        """From one file."""
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, weights_only=True))


class FullyShard:
    """FSDP2 (torch's fully_shard): every decoder layer's parameters are sharded as one, the rest with the root."""

    name, lockstep = "", True  # what it saves is whole

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimize: Optimize, max_norm: float) -> None:
        self._main, self._max_norm = accelerator.is_main_process, max_norm or math.inf
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in self._layers:
            fully_shard(layer, mesh=mesh)
        self.wrapped: Any = fully_shard(module, mesh=mesh)
        self.optimizer = optimize()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Every group of parameters unsharded once and kept."""
        self.wrapped._get_fsdp_state()._lazy_init()  # else the first layer that is called would take itself for the root
        modules = [module for module in self.wrapped.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.unshard()
        self._keep(True)
        yield
        self._keep(False)
        for module in modules:
            module.reshard()

    def _keep(self, gathered: bool) -> None:
        for layer in self._layers:
            layer.set_reshard_after_forward(not gathered, recurse=False)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients stay whole until the last part."""
        self.wrapped.set_is_last_backward(last)
        self.wrapped.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Plain."""
        loss.backward()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Put together."""
        return None if parameter.grad is None else self.whole(parameter.grad)

    def step(self, look: Callable[[], None]) -> Tensor:
        """Clip, update, forget."""
        norm = nn.utils.clip_grad_norm_(self.wrapped.parameters(), self._max_norm)
        look()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.whole(norm)

    def whole(self, parameter: Tensor) -> Tensor:
        """Put together."""
        plain = parameter.detach()
        return plain.full_tensor() if isinstance(plain, DTensor) else plain

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Every process keeps its part."""
        parameter.detach().copy_(_like(value, parameter))

    def save_optimizer(self, folder: Path) -> None:
        """One file, as without shards."""
        state = self.optimizer.state_dict()
        whole = {i: {name: self.whole(x).cpu() for name, x in values.items()} for i, values in state["state"].items()}
        if self._main:
            torch.save({**state, "state": whole}, folder / OPTIMIZER_FILE)

    def load_optimizer(self, folder: Path) -> None:
        """From one file, wherever it was written."""
        saved = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parts = {
            i: {name: _like(x, parameters[i]) if x.ndim else x for name, x in values.items()}
            for i, values in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": parts})


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value laid out as a parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


class DeepSpeed:
    """ZeRO, as its JSON file says. The optimizer, the sizes of a step and the precision are PPO's own."""

    lockstep = True
    OURS = ("optimizer", "scheduler", "train_batch_size", "fp16", "bf16", "amp", "torch_autocast")

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, optimize: Optimize, max_norm: float, settings: dict[str, Any]
    ) -> None:
        self._deepspeed: Any = importlib.import_module("deepspeed")
        self._zero: Any = importlib.import_module("deepspeed.runtime.zero")
        self.optimizer = optimize()
        config = {name: value for name, value in settings.items() if name not in self.OURS} | {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        config = {name: value for name, value in config.items() if value != "auto"}
        config["zero_optimization"] = {k: v for k, v in settings.get("zero_optimization", {}).items() if v != "auto"}
        self.stage = int(config["zero_optimization"].get("stage", 0))
        self.name = f"DeepSpeed ZeRO-{self.stage} over {accelerator.num_processes} processes"
        try:
            self.wrapped, *_ = self._deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        except (ValueError, AssertionError, TypeError) as error:
            raise UserError(f"--deepspeed: {' '.join(str(error).split())}") from error

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """ZeRO-3 gathers all parameters once; the other stages have them whole."""
        if self.stage < 3:
            yield
            return
        hooks = getattr(self.wrapped.optimizer, "parameter_offload", self.wrapped.optimizer)
        with self._zero.unwrap_model_for_generation(self.wrapped):
            # Left there, it compares at every pass what the processes did before, and waits for those that have fewer answers to pass.
            hooks.fwd_pre_hook.remove()
            yield
        hooks.fwd_pre_hook = hooks.module.register_forward_pre_hook(
            lambda *_: hooks.get_param_coordinator().reset_step(), prepend=True
        )

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """The engine's own boundary."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """The engine's."""
        self.wrapped.backward(loss)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Put together."""
        found: Tensor | None = self._deepspeed.utils.safe_get_full_grad(parameter)
        return found

    def step(self, look: Callable[[], None]) -> Tensor:
        """The engine's, which clips by itself."""
        look()
        self.wrapped.step()
        return torch.as_tensor(self.wrapped.get_global_grad_norm() or 0.0, device=self.wrapped.device)

    def whole(self, parameter: Tensor) -> Tensor:
        """Put together where it is in parts."""
        if self.stage < 3:
            return parameter.detach()
        with self._zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Nothing: `load_optimizer` brings the weights along, whose float32 copies are the optimizer's."""

    def save_optimizer(self, folder: Path) -> None:
        """The engine's own files, one a process."""
        self.wrapped.save_checkpoint(str(folder / DEEPSPEED_FOLDER), tag="state", exclude_frozen_parameters=True)

    def load_optimizer(self, folder: Path) -> None:
        """Weights, too."""
        self.wrapped.load_checkpoint(str(folder / DEEPSPEED_FOLDER), tag="state", load_module_strict=False)
