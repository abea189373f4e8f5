"""Probes of what the library's fields do outside the training process: loader processes and the hub."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import pytest
from torch.utils.data import dataloader

from flag_probes import Lab, probe
from posttrain.types import UserError

# --- loading --------------------------------------------------------------------------------------------------------------


@probe("library", "dataloader_drop_last")
def dataloader_drop_last(lab: Lab) -> None:
    assert [len(lab.sft(max_steps=None, dataloader_drop_last=value).batches) for value in (False, True)] == [5, 4]


def worker_settings(lab: Lab, **flags: Any) -> Any:
    """The DataLoader that would start worker processes; None when none would be started."""
    found: list[Any] = []

    def spy(iterator: Any, loader: Any) -> None:
        found.append(loader)
        raise UserError("stopped before processes start")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader._MultiProcessingDataLoaderIter, "__init__", spy)
        patch.setattr(dataloader._MultiProcessingDataLoaderIter, "__del__", lambda _: None)
        lab.run("sft", **flags)
    return found[0] if found else None


@probe("library", "dataloader_num_workers")
def dataloader_num_workers(lab: Lab) -> None:
    assert worker_settings(lab) is None
    loader = worker_settings(lab, dataloader_num_workers=2)
    assert loader is not None
    assert loader.num_workers == 2
    assert lab.sft(dataloader_num_workers=1).logged("loss") == lab.sft().logged("loss")


@probe("library", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
def worker_flags(lab: Lab) -> None:
    loader = worker_settings(
        lab, dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_prefetch_factor=5,
        dataloader_multiprocessing_context="forkserver",
    )  # fmt: skip
    assert loader.persistent_workers is True
    assert loader.prefetch_factor == 5
    assert loader.multiprocessing_context is not None
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


@probe("library", "dataloader_in_order")
def dataloader_in_order(lab: Lab) -> None:
    assert [worker_settings(lab, dataloader_num_workers=1, dataloader_in_order=v).in_order for v in (True, False)] == [
        True,
        False,
    ]


# --- the hub --------------------------------------------------------------------------------------------------------------


def pushed(lab: Lab, **flags: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    """What would be asked of the hub: (method, its arguments)."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(api: Any, repo_id: str, **kwargs: Any) -> Any:
        calls.append(("create", {"repo_id": repo_id, **kwargs}))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(api: Any, **kwargs: Any) -> Future[None]:
        calls.append(("upload", kwargs))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
        patch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
        lab.good("sft", save_strategy="steps", save_steps=2, validation_file_dir=lab.other_chats, **flags)
    return calls


@probe("library", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
def push_to_hub(lab: Lab) -> None:
    assert not pushed(lab)
    named = {"hub_model_id": "a/b", "hub_token": "secret", "hub_private_repo": True, "hub_revision": "next"}
    calls = list(pushed(lab, push_to_hub=True, **named))
    (created,) = (asked for name, asked in calls if name == "create")
    assert (created["repo_id"], created["token"], created["private"]) == ("a/b", "secret", True)
    uploads = [asked for name, asked in calls if name == "upload"]
    assert len(uploads) > 1
    assert {(asked["repo_id"], asked["token"], asked["revision"]) for asked in uploads} == {("a/b", "secret", "next")}


@probe("library", "hub_strategy")
def hub_strategy(lab: Lab) -> None:
    at_end, every_save = (list(pushed(lab, push_to_hub=True, hub_model_id="a/b", hub_strategy=s)) for s in ("end", "every_save"))
    assert len(at_end) < len(every_save)


@probe("library", "hub_always_push")
def hub_always_push(lab: Lab) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.PushInProgress.is_done", lambda _: False)  # the first is still under way
        counts = [len(list(pushed(lab, push_to_hub=True, hub_model_id="a/b", hub_always_push=v))) for v in (False, True)]
    assert counts[0] < counts[1]
