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

from posttrain.model.policy_value import POLICY, PolicyAndValue
from posttrain.training.ppo import Loop
from posttrain.types import UserError

TRAINED_FILE = "trained.safetensors"  # every trainable tensor: policy, value and value head
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer_state.json"  # written last: what marks a checkpoint as whole


def save_checkpoint(loop: Loop, folder: Path, limit: int | None, tokenizer: Any) -> None:
    """Write `folder`/checkpoint-<step>, the oldest beyond `limit` go. One process writes, the others wait.

    It can be merged and served like the run's folder: what a run that a guard ended leaves behind.
    """
    target = folder / f"checkpoint-{loop.step}"
    if loop.accelerator.is_main_process:
        target.mkdir(parents=True, exist_ok=True)
        save_file(_trainable(loop.trained), target / TRAINED_FILE)
        save_policy(loop.trained, target)
        tokenizer.save_pretrained(target)
        torch.save({"optimizer": loop.optimizer.state_dict(), "schedule": loop.schedule.state_dict()}, target / OPTIMIZER_FILE)
        torch.save(torch.get_rng_state(), target / "rng_state.pth")
        state = {"global_step": loop.step, "kl": loop.kl.state_dict(), "guards": loop.guards and loop.guards.state_dict()}
        (target / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if limit is not None:
            known = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            for old in known[: -max(limit, 1)]:
                shutil.rmtree(old)
    loop.accelerator.wait_for_everyone()


def load_checkpoint(loop: Loop, checkpoint: str) -> None:
    """Put the loop where it was. Raises UserError for a checkpoint of other weights, or of another stage."""
    folder = Path(checkpoint)
    if not (folder / TRAINED_FILE).is_file():
        raise UserError(f"--resume_from_checkpoint {checkpoint}: is not a checkpoint of posttrain ppo (it has no {TRAINED_FILE})")
    saved, own = load_file(folder / TRAINED_FILE), _trainable(loop.trained)
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise UserError(f"{checkpoint}: its weights are of another kind than this run's: use the flags that it was started with")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    states = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
    loop.optimizer.load_state_dict(states["optimizer"])
    loop.schedule.load_state_dict(states["schedule"])
    torch.set_rng_state(torch.load(folder / "rng_state.pth", weights_only=True))
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    loop.step = state["global_step"]
    loop.kl.load_state_dict(state["kl"])
    if loop.guards is not None and state["guards"] is not None:
        loop.guards.load_state_dict(state["guards"])


def save_policy(trained: PolicyAndValue, folder: Path) -> None:
    """The policy as any tool reads it: an adapter folder, or a whole model."""
    model: Any = trained.policy_model
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=[POLICY])
    else:
        model.save_pretrained(folder)


def save_value(trained: PolicyAndValue, folder: Path) -> None:
    """The value's tensors, for whoever goes on from this run."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor for name, tensor in _trainable(trained).items() if not name.startswith("policy_model.") or ".value." in name
    }
    save_file(tensors, folder / "value.safetensors")


def _trainable(trained: PolicyAndValue) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in trained.named_parameters() if parameter.requires_grad}
