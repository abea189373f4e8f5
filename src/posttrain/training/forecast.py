"""How much memory a device needs for a run, by arithmetic alone: numbers in, items in bytes out. `posttrain plan` prints them.

Every item says in which phases it is there; what a device needs is the largest sum of a phase. The formulas follow this package's own
passes: log-probs in chunks, parts of at most `forward_tokens`, the fused functions, on a CPU blocks of attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from posttrain.training.forecast_run import ALWAYS, BACKWARD, ROLLOUT, START, STEP, TRAINING, Item, Run

CPU_BLOCK_TOKENS, CPU_KEPT_KEYS = 128, 1024  # of model/block_attention.py; a test holds them equal
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, LEAST_CHUNK_TOKENS = 24 << 20, 512 << 20, 96  # of model/head.py, likewise
ROOM_TOKENS = 64  # of training/decode.py, likewise
PROBED_WEIGHTS = 200_000_000  # of model/attention.py, likewise
# oneDNN makes kernels for every new length of a part and keeps 1,024 of them. Measured on SmolLM2-135M: docs/results/plan.md.
KERNEL_BYTES_A_LENGTH, KERNEL_BYTES = 50 << 20, 600 << 20

# Bytes of state a trained weight by the optimizer's name; AdamW keeps two float32.
STATE_BYTES = {
    "sgd": 0.0, "adafactor": 0.0, "adagrad": 4.0, "rmsprop": 4.0, "rmsprop_bnb": 4.0, "rmsprop_bnb_32bit": 4.0, "rmsprop_bnb_8bit": 1.0,
    "lion_32bit": 4.0, "paged_lion_32bit": 4.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0, "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0, "ademamix": 12.0, "paged_ademamix_32bit": 12.0, "ademamix_8bit": 3.0, "paged_ademamix_8bit": 3.0,
}  # fmt: skip
ADAMW_BYTES = 8.0


def forecast(run: Run) -> list[Item]:
    """Every item of the run, empty ones left out."""
    makers: tuple[Callable[[Run], list[Item]], ...] = (
        _weights,
        _states,
        _engine_buffers,
        _activations,
        _head,
        _working,
        _rollout,
        _probe,
        _kernels,
    )
    return [item for make in makers for item in make(run) if item.size_bytes or item.host_bytes]


def by_phase(items: list[Item]) -> dict[str, float]:
    """Bytes of each phase, those alone in which something is there that is not always."""
    used = {phase for item in items if item.phases not in (ALWAYS, TRAINING) for phase in item.phases}
    return {phase: sum(item.size_bytes for item in items if phase in item.phases) for phase in ALWAYS if phase in used}


def peak_bytes(items: list[Item]) -> float:
    """What the device needs: the largest phase."""
    return max(by_phase(items).values())


def count(n: float) -> str:
    """A number of weights or tokens, in short."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if n >= limit:
            return f"{n / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{n:g}"


# --- what lies still ---------------------------------------------------------------------------------------------------------


def _weights(run: Run) -> list[Item]:
    shape, engine = run.shape, run.engine
    sharded = engine.kind in ("zero3", "fsdp2")
    linear = shape.linear_weights if run.bits else 0
    plain = shape.weights - linear
    # 4 bits: a float32 scale per 64 weights, or one byte and a float32 per 256 of them. 8 bits: a float32 a row, which is nothing.
    each = 0.0 if not run.bits else 1.0 if run.bits == 8 else 0.5 + ((1 / 64 + 4 / 64 / 256) if run.double else 4 / 64)
    stored = _stored_bytes(run)
    size, how = plain * stored + linear * each, f"{count(plain)} × {stored} B"
    if linear:
        how = f"{count(linear)} × {each:.3f} B + {how}"
    if run.cpu and run.bits and run.weight_bytes == 2:
        # What stays as it was read keeps the file mapped, and the pages that were read count as resident.
        size, how = size + linear * 2, f"{how} + {count(linear)} × 2 B of the mapped file (CPU)"
    models = 1 if run.lora else run.trained_models
    size, how = size * models, how if models == 1 else f"{models} × {how}"
    split = engine.share(sharded and not run.bits)
    device = 0.0 if engine.offload_weights and split > 1 else size / split
    host = size / split if engine.offload_weights and split > 1 else 0.0
    items = [Item("weights", how + _over(split), device, host_bytes=host)]
    if run.lora:
        n, share = run.trained_models * shape.adapter_weights, engine.share(sharded)
        items.append(
            Item("adapters, trained", f"{count(n)} × {_trained_bytes(run)} B{_over(share)}", n * _trained_bytes(run) / share)
        )
    copies = run.frozen_copies * shape.weights
    if copies:
        items.append(Item("reference model", f"{count(copies)} × {stored} B", copies * stored))
    frozen = run.frozen_adapters * shape.adapter_weights
    if frozen:
        items.append(Item("adapters, frozen", f"{count(frozen)} × 4 B", frozen * 4))
    if run.reward_weights:
        items.append(
            Item("reward model", f"{count(run.reward_weights)} × {run.weight_bytes} B", run.reward_weights * run.weight_bytes)
        )
    return items


def _zero(run: Run) -> bool:
    return run.engine.kind in ("zero1", "zero2", "zero3")


def _stored_bytes(run: Run) -> int:
    """DeepSpeed casts the module to the type of the products, and keeps float32 masters itself."""
    return run.compute_bytes if _zero(run) else run.weight_bytes


def _trained_bytes(run: Run) -> int:
    return run.compute_bytes if _zero(run) else 4


def _states(run: Run) -> list[Item]:
    engine, n = run.engine, run.trained
    each = STATE_BYTES.get(run.optimizer, ADAMW_BYTES) + (4 if _zero(run) else 0)
    share = engine.share(engine.kind in ("zero1", "zero2", "zero3", "fsdp2"))
    masters = " with float32 masters" if _zero(run) else ""
    size = n * each / share
    offloaded = engine.offload_optimizer or (engine.offload_weights and engine.kind == "fsdp2")
    states = Item(
        "optimizer states", f"{count(n)} × {each:g} B{masters}{_over(share)}", 0.0 if offloaded else size, TRAINING,
        size if offloaded else 0.0,
    )  # fmt: skip
    grad_share = engine.share(engine.kind in ("zero2", "zero3", "fsdp2"))
    grads = n * _trained_bytes(run) / grad_share
    # Where a step has several parts, those before have left gradients when the last begins its backward pass.
    phases = (BACKWARD, STEP) if run.load.parts > 1 else (STEP,)
    return [states, Item("gradients", f"{count(n)} × {_trained_bytes(run)} B{_over(grad_share)}", grads, phases)]


def _engine_buffers(run: Run) -> list[Item]:
    """What the engine holds beside: buckets on their way, and whole layers while they are computed."""
    engine, shape = run.engine, run.shape
    if engine.world == 1 and engine.kind in ("one", "ddp"):
        return []
    if engine.kind == "ddp":
        return [Item("DDP buckets", f"{count(run.trained)} × 4 B, the gradients once more", run.trained * 4)]
    if engine.kind in ("zero1", "zero2"):
        bucket = min(2 * shape.hidden**2, run.trained)
        return [Item("ZeRO buckets", f"2 × hidden² × {run.compute_bytes} B", bucket * run.compute_bytes, (BACKWARD, STEP))]
    if run.bits:
        return []
    # Two units at a time, the one that is computed and the next; embedding and head are a unit of their own.
    unit = max(2 * shape.layer_weights, (1 if shape.tied else 2) * shape.vocabulary * shape.hidden)
    how = f"2 layers, or embedding and head: {count(unit)} × {run.compute_bytes} B"
    items = [Item("gathered weights", how, unit * run.compute_bytes)]
    if not run.lora:
        items.append(Item("gradients before they are scattered", how, unit * run.compute_bytes, (BACKWARD, STEP)))
    return items


def _over(share: int) -> str:
    return f" / {share}" if share > 1 else ""


# --- what a pass keeps and needs ---------------------------------------------------------------------------------------------


def _token_bytes(run: Run) -> tuple[float, str]:
    """What one layer keeps of one token for the backward pass, attention weights apart."""
    s, r, c = run.shape, run.weight_bytes, run.compute_bytes
    if _zero(run):
        r = c
    attention = (2 * s.heads + 2 * s.kv_heads) * s.head_dim * c  # queries, keys, values, and what comes out
    if not run.cpu:
        attention += 4 * s.heads  # the flash kernel's sums
    low = s.adapter_columns * c
    # A linear map keeps its input in the type of the products; one that is not in it is cast anew by each map that reads it.
    # On a CPU peft lifts the input of a quantised map to float32 and autocast brings it down again, for each map by itself.
    same = (r == c and not (run.bits and run.cpu)) or (run.fused and run.lora and not run.bits)
    inputs_attention = s.hidden * r if same else 3 * s.hidden * c
    if run.fused and not run.bits:
        norms, inputs_mlp, mlp = 2 * s.hidden * r, s.hidden * r, 2 * s.intermediate * c
    else:
        norms = 2 * s.hidden * (r if run.fused else 4)
        norms += 0 if run.fused or run.lora else 2 * s.hidden * r
        inputs_mlp = s.hidden * r if same else 2 * s.hidden * c
        mlp = 4 * s.intermediate * c
    if run.liger:  # a norm keeps its input alone, an MLP no activation
        norms, mlp = 2 * s.hidden * r, 3 * s.intermediate * c
    total = norms + inputs_attention + inputs_mlp + attention + mlp + low
    return total, f"{total / 1024:.1f} KiB a token and layer"


def kept_scores(sequences: tuple[tuple[int, int], ...], block_tokens: int = CPU_BLOCK_TOKENS) -> int:
    """Attention weights of one head that the CPU's blocks keep: those of a block of queries that sees few enough keys."""
    total = 0
    for queries, before in sequences:
        for start in range(0, queries, block_tokens):
            end = min(start + block_tokens, queries)
            keys = before + end
            total += (end - start) * keys if keys <= CPU_KEPT_KEYS else 0
    return total


def _activations(run: Run) -> list[Item]:
    shape, load = run.shape, run.load
    each, how = _token_bytes(run)
    passes = run.graphs
    twice = "" if passes == 1 else f" × {passes} passes"
    scores = 0.0
    if run.cpu:
        share = load.tokens / sum(queries for queries, _ in load.sequences)
        scores = share * kept_scores(load.sequences) * shape.heads * run.compute_bytes
    if load.checkpointing:
        r = run.compute_bytes if _zero(run) else run.weight_bytes
        inputs = load.tokens * shape.layers * shape.hidden * r * passes
        return [
            Item("activations, checkpoints", f"{count(load.tokens)} tokens × {shape.layers} layers × {shape.hidden} × {r} B{twice}", inputs, (BACKWARD,)),
            Item("activations, of one layer", f"{count(load.tokens)} tokens × {how}", load.tokens * each + scores, (BACKWARD,)),
        ]  # fmt: skip
    kept = load.tokens * shape.layers * each * passes
    return [
        Item("activations", f"{count(load.tokens)} tokens × {shape.layers} layers × {how}{twice}", kept, (BACKWARD,)),
        Item("attention weights (CPU)", f"{shape.layers} layers × {scores / 2**20:.1f} MiB{twice}", shape.layers * scores * passes, (BACKWARD,)),
    ]  # fmt: skip


def chunk_tokens(vocabulary: int, cpu: bool) -> int:
    """Tokens whose logits are alive at a time."""
    return max(LEAST_CHUNK_TOKENS, (CPU_CHUNK_BYTES if cpu else GPU_CHUNK_BYTES) // (4 * vocabulary))


def _head(run: Run) -> list[Item]:
    """Logits of a chunk, and what is kept of every target."""
    s, c, load = run.shape, run.compute_bytes, run.load
    if run.stage == "rm":
        return []
    stored = run.weight_bytes if not _zero(run) else c
    cast = s.vocabulary * s.hidden * c if stored != c else 0  # the matrix in the type of the products
    whole = not run.lora
    chunk = min(load.targets, chunk_tokens(s.vocabulary, run.cpu) * (4 if whole else 1))
    # Frozen: logits as they come and in float32, then probabilities cast. Trained: logits, probabilities, gradient, and its cast.
    each = 12 + (c if c != 4 else 0) if whole else 4 + c
    kept = load.targets * s.hidden * c
    items = [
        Item("logits, of a chunk", f"{count(chunk)} tokens × {count(s.vocabulary)} × {each} B", chunk * s.vocabulary * each + cast, (BACKWARD,)),
        Item("head, kept of targets", f"{count(load.targets)} × {s.hidden} × {c} B", kept, (BACKWARD,)),
    ]  # fmt: skip
    if whole:
        sums = s.vocabulary * s.hidden * (4 + c)
        items.append(
            Item("head, gradient while it is summed", f"{count(s.vocabulary * s.hidden)} × {4 + c} B", sums, (BACKWARD,))
        )
    return items


def _working(run: Run) -> list[Item]:
    """Casts that live through the pass, and gradients on the way."""
    s, c, load = run.shape, run.compute_bytes, run.load
    items = []
    if run.weight_bytes != c and not run.bits and not _zero(run) and run.engine.kind != "fsdp2":
        n = (0 if run.lora else s.attention_weights) if run.fused else s.linear_weights
        n *= 1 if run.lora else run.graphs
        items.append(Item("weights in the type of the products", f"{count(n)} × {c} B", n * c, (BACKWARD,)))
    each = 4 * s.hidden * max(c, run.weight_bytes) + 3 * s.intermediate * c * (not run.fused)
    items.append(Item("gradients on their way", f"{count(load.tokens)} tokens × {each:,} B", load.tokens * each, (BACKWARD,)))
    if run.bits:
        n = math.ceil(s.intermediate * s.hidden)
        items.append(Item("a matrix taken back from its bits", f"{count(n)} × {c} B", n * c, (BACKWARD,)))
    return items


def _rollout(run: Run) -> list[Item]:
    """Keys and values of the answers, and the logits they are drawn from."""
    if run.rollout is None:
        return []
    s, c, rollout = run.shape, run.compute_bytes, run.rollout
    each, tokens, kept = 2 * s.kv_heads * s.head_dim * c, rollout.tokens + ROOM_TOKENS, rollout.kept_tokens
    cache = rollout.rows * tokens * s.layers * each
    draw = c + 4 + 4 + 8  # logits as they come and in float32, probabilities, cumulated in float64
    return [
        Item("states below the value's layers", f"{count(kept)} tokens × {s.hidden} × {c} B", kept * s.hidden * c, TRAINING),
        Item("KV cache", f"{rollout.rows} answers × {tokens} tokens × {s.layers} layers × {each} B", cache, (ROLLOUT,)),
        Item("logits, of a sampled token", f"{rollout.rows} × {count(s.vocabulary)} × {draw} B", rollout.rows * s.vocabulary * draw, (ROLLOUT,)),
    ]  # fmt: skip


def _probe(run: Run) -> list[Item]:
    """A small model in half precision is proved in float32, from a copy of its decoder's weights."""
    n = run.shape.weights - (0 if run.shape.tied else run.shape.vocabulary * run.shape.hidden)
    if run.weight_bytes == 4 or run.bits or not run.packed or n > PROBED_WEIGHTS:
        return []
    return [Item("float32 copy for the packing proof", f"{count(n)} × 4 B", n * 4, (START,))]


def _kernels(run: Run) -> list[Item]:
    """What is no tensor: compiled products, on a CPU in half precision."""
    if not run.cpu or run.compute_bytes == 4:
        return []
    lengths = run.load.lengths
    size = KERNEL_BYTES if lengths is None else min(KERNEL_BYTES, lengths * KERNEL_BYTES_A_LENGTH)
    how = "very many lengths of parts" if lengths is None else f"{lengths} lengths of parts"
    return [Item("oneDNN kernels (CPU)", f"{how}, at most {KERNEL_BYTES >> 20} MiB", size, TRAINING)]
