"""PPO's checkpoints: what a run needs to go on exactly. Samples and orders follow from the step, so there is no sampler to save."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from posttrain.model.policy_value import POLICY, PolicyAndValue
from posttrain.training.ppo import Loop
from posttrain.training.resume import STATE_FILE, check_weights, follow_schedule
from posttrain.types import UserError

TRAINED_FILE = "trained.safetensors"  # every trainable tensor: policy, value and value head
SCHEDULE_FILE = "scheduler.pt"
_POLICY = "policy_model."


def save_checkpoint(loop: Loop, folder: Path, limit: int | None, tokenizer: Any) -> None:
    """Write `folder`/checkpoint-<step>, the oldest beyond `limit` go. One process writes, the others wait.

    It can be merged and served like the run's folder: what a run that a guard ended leaves behind.
    """
    target, main = folder / f"checkpoint-{loop.step}", loop.accelerator.is_main_process
    target.mkdir(parents=True, exist_ok=True)
    trainable = whole(loop)
    loop.engine.save_optimizer(target)
    if main:
        save_file(trainable, target / TRAINED_FILE)
        save_policy(loop.trained, trainable, target)
        tokenizer.save_pretrained(target)
        torch.save(loop.schedule.state_dict(), target / SCHEDULE_FILE)
        torch.save(torch.get_rng_state(), target / "rng_state.pth")
        state = {"global_step": loop.step, "kl": loop.kl.state_dict(), "guards": loop.guards and loop.guards.state_dict()}
        state |= {"layout": loop.engine.name, "max_steps": loop.plan.max_steps}
        (target / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if limit is not None:
            known = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            for old in known[: -max(limit, 1)]:
                shutil.rmtree(old)
    loop.accelerator.wait_for_everyone()


def load_checkpoint(loop: Loop, checkpoint: str) -> None:
    """Put the loop where it was. Raises UserError for a checkpoint of other weights, of another stage or another layout."""
    folder = Path(checkpoint)
    if not (folder / TRAINED_FILE).is_file():
        raise UserError(f"--resume_from_checkpoint {checkpoint}: is not a checkpoint of posttrain ppo (it has no {TRAINED_FILE})")
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if state["layout"] != loop.engine.name:
        here, there = loop.engine.name or "no DeepSpeed", state["layout"] or "no DeepSpeed"
        raise UserError(f"{checkpoint}: was written under {there}, this run has {here}: its optimizer can only go on as it was")
    if state["global_step"] > loop.plan.max_steps:
        raise UserError(
            f"--max_steps {loop.plan.max_steps}: {checkpoint} is beyond it; ask for more, or name an earlier checkpoint"
        )
    check_weights(checkpoint, loop.trained.policy_model)
    saved, own = load_file(folder / TRAINED_FILE), dict(_trainable(loop.trained))
    if saved.keys() != own.keys() or any(saved[name].shape != _shape(own[name]) for name in own):
        raise UserError(f"{checkpoint}: its weights are of another kind than this run's: use the flags that it was started with")
    for name, parameter in own.items():
        loop.engine.put(parameter, saved[name])
    loop.engine.load_optimizer(folder)
    loop.schedule.load_state_dict(torch.load(folder / SCHEDULE_FILE, weights_only=True))
    follow_schedule(loop.schedule, checkpoint, loop.plan.max_steps)
    torch.set_rng_state(torch.load(folder / "rng_state.pth", weights_only=True))
    loop.step = state["global_step"]
    loop.kl.load_state_dict(state["kl"])
    if loop.guards is not None and state["guards"] is not None:
        loop.guards.load_state_dict(state["guards"])


def save_policy(trained: PolicyAndValue, trainable: dict[str, Tensor], folder: Path) -> None:
    """The policy as any tool reads it: an adapter folder, or a whole model. `trainable`: as `whole` gives them."""
    model: Any = trained.policy_model
    state = {name.removeprefix(_POLICY): tensor for name, tensor in trainable.items() if name.startswith(_POLICY)}
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=[POLICY], state_dict=state)
    else:
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        model.save_pretrained(folder, state_dict={**buffers, **state} if _sharded(model) else None)


def save_value(trainable: dict[str, Tensor], folder: Path) -> None:
    """The value's tensors, for whoever goes on from this run."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in trainable.items() if not name.startswith(_POLICY) or ".value." in name}
    save_file(tensors, folder / "value.safetensors")


def whole(loop: Loop) -> dict[str, Tensor]:
    """Every trainable tensor, as one. A collective."""
    return {name: loop.engine.whole(parameter) for name, parameter in _trainable(loop.trained)}


def _trainable(trained: PolicyAndValue) -> list[tuple[str, Parameter]]:
    return [(name, parameter) for name, parameter in trained.named_parameters() if parameter.requires_grad]


def _shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter: ZeRO-3 leaves an empty one in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _sharded(model: Any) -> bool:
    return any(isinstance(p, DTensor) or hasattr(p, "ds_shape") for p in model.parameters())
