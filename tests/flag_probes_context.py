"""Probes of the flags of long rows and of noise."""

from __future__ import annotations

from typing import Any

from flag_probes import Lab, Run, probe

KINDS = ("linear", "dynamic", "yarn", "llama3")
ROWS = {"per_device_train_batch_size": 1, "block_size": 64}


def stretched(run: Run) -> Any:
    """How the adapter says that its base's positions are stretched."""
    return run.read("adapter_config.json")["auto_mapping"]["rope_scaling"]


@probe("train", "rope_scaling")
def rope_scaling(lab: Lab) -> None:
    plain = lab.pt(**ROWS)
    assert stretched(plain) is None
    for kind in KINDS:
        run = lab.pt(**ROWS, rope_scaling=kind, rope_factor=4)
        assert stretched(run) == {"rope_type": kind, "factor": 4.0}
        # Positions within the trained length: dynamic leaves them alone, the others move at least the slow dimensions.
        assert (run.logged("loss")[0] == plain.logged("loss")[0]) is (kind == "dynamic")
    merged = lab.good("merge", lora_model=lab.pt(**ROWS, rope_scaling="linear", rope_factor=4).folder)
    assert merged.read("config.json")["max_position_embeddings"] == 4 * 512


@probe("train", "rope_factor")
def rope_factor(lab: Lab) -> None:
    assert stretched(lab.pt(rope_scaling="yarn", block_size=1100))["factor"] == 3  # 512 are read already
    assert stretched(lab.pt(rope_scaling="yarn", block_size=1100, rope_factor=5))["factor"] == 5
    assert "--rope_scaling" in lab.fails("sft", rope_factor=2)


@probe("train", "neft_alpha")
def neft_alpha(lab: Lab) -> None:
    flags = {"validation_file_dir": lab.corpus, "eval_on_start": True, "learning_rate": 1e-30, "audit": False}
    plain, noisy, double = (lab.pt(**ROWS, **flags, neft_alpha=alpha) for alpha in (0, 5, 10))
    assert plain.logged("loss")[0] == lab.pt(**ROWS, **flags).logged("loss")[0]
    assert noisy.logged("loss")[0] not in (plain.logged("loss")[0], double.logged("loss")[0])
    assert noisy.logged("eval_loss") == plain.logged("eval_loss")


@probe("train", "shift_attn")
def shift_attn(lab: Lab) -> None:
    flags = {"validation_file_dir": lab.corpus, "learning_rate": 1e-30, "audit": False, "eval_on_start": True}
    whole, shifted = lab.pt(**ROWS, **flags), lab.pt(**ROWS, **flags, shift_attn=True)
    assert whole.logged("loss")[0] != shifted.logged("loss")[0]
    assert whole.logged("eval_loss") == shifted.logged("eval_loss")
    assert "--padding_free" in lab.fails("pt", shift_attn=True, padding_free=False)


@probe("train", "shift_group_tokens")
def shift_group_tokens(lab: Lab) -> None:
    quarter, same, other = (lab.pt(**ROWS, shift_attn=True, shift_group_tokens=n) for n in (None, 16, 4))
    assert quarter.logged("loss")[0] == same.logged("loss")[0]
    assert other.logged("loss")[0] != same.logged("loss")[0]
    assert "--shift_attn" in lab.fails("pt", shift_group_tokens=16)


@probe("train", "flash_attn")
def flash_attn(lab: Lab) -> None:
    run = lab.good("sft", flash_attn=True)
    assert "attention: blocks of queries (our kernel for the CPU); FlashAttention needs a CUDA device" in run.err
    assert "attention:" not in lab.good("sft").err
