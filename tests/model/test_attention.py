"""A packed row gives what its sequences give apart: values, gradients, windows, branches; and what does not fit is padded."""

import copy
import pickle

import pytest
import torch
from families import WINDOW, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from posttrain.model import block_attention, kernels
from posttrain.model.attention import NAME, enable_segments
from posttrain.model.block_attention import BlockAttention, plan_blocks
from posttrain.model.kernels import attend_each, attend_varlen, gather, views
from posttrain.model.segments import Locality
from posttrain.types import Segment, SegmentTable

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma3_text",
    "phi3",
    "glm",
    "glm4",
    "gpt_neox",
    "cohere2",
    "olmo2",
    "starcoder2",
    "granite",
    "smollm3",
    "gpt2",
]
PADDED = {
    "bloom": "interface",
    "falcon": "interface",
    "gemma2": "softcap",
    "gpt_oss": "s_aux",
    "doge": "mask",
    "qwen3_next": "interface",
}
LENGTHS = (21, 9, 1, 13)


def ids_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 96, (1, n), generator=generator) for n in lengths]


def packed_inputs(rows: list[Tensor]) -> dict[str, object]:
    ends = torch.tensor([row.shape[1] for row in rows]).cumsum(0).tolist()
    table = SegmentTable(tuple(Segment(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)))
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    return {"input_ids": torch.cat(rows, 1), "position_ids": positions, "segments": table, "use_cache": False}


def shared_inputs(prompt: Tensor, branches: list[Tensor]) -> dict[str, object]:
    """A prompt and its branches in one row."""
    inputs = packed_inputs([prompt, *branches])
    table = inputs["segments"]
    assert isinstance(table, SegmentTable)
    inputs["segments"] = SegmentTable((table.segments[0], *(Segment(s.start, s.end, 0) for s in table.segments[1:])))
    n = prompt.shape[1]
    inputs["position_ids"] = torch.cat([torch.arange(n), *(torch.arange(n, n + b.shape[1]) for b in branches)])[None]
    return inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())  # a key's bias cancels: its gradient is small
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_apart(family: str) -> None:
    model = tiny(family).train()
    rows = ids_of(*LENGTHS)
    weights = torch.randn(sum(LENGTHS), 96, generator=torch.Generator().manual_seed(2))
    apart = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])
    (apart * weights).sum().backward()
    expected = gradients(model)

    attention = enable_segments(model)
    assert attention.packed, attention.reason
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        packed = model(**packed_inputs(rows)).logits[0]
        assert float((packed - apart).abs().max() / apart.abs().max()) <= 1e-6
        (packed * weights).sum().backward()
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mistral", "gemma3_text", "gpt_neox"])
def test_branches_share_their_prompt(family: str) -> None:
    model = tiny(family).train()
    prompt, first, second = ids_of(17, 12, 5)  # longer than the window
    apart = [model(input_ids=torch.cat([prompt, branch], 1), use_cache=False).logits[0, 17:] for branch in (first, second)]
    expected_logits = torch.cat(apart)
    weights = torch.randn(17, 96, generator=torch.Generator().manual_seed(2))
    (expected_logits * weights).sum().backward()
    expected = gradients(model)

    assert enable_segments(model).packed
    logits = model(**shared_inputs(prompt, [first, second])).logits[0, 17:]
    assert float((logits - expected_logits).abs().max() / expected_logits.abs().max()) <= 1e-6
    (logits * weights).sum().backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize(("family", "word"), PADDED.items())
def test_what_does_not_fit_is_padded(family: str, word: str) -> None:
    model = tiny(family)
    before = model.config._attn_implementation
    ids = ids_of(11)[0]
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    attention = enable_segments(model)
    assert not attention.packed
    assert word in attention.reason
    assert "\n" not in attention.reason
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


def test_a_model_that_leaks_is_padded() -> None:
    """A convolution over the row, as state-space hybrids have it: the probe must see it."""

    class Leaky(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
            out = self.inner(hidden, *args, **kwargs)
            return out + 0.01 * out.roll(1, 1)

    model = tiny("llama")
    model.model.layers[1].mlp = Leaky(model.model.layers[1].mlp)
    attention = enable_segments(model)
    assert not attention.packed
    assert "differ" in attention.reason


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_without_a_table_it_is_sdpa(family: str) -> None:
    plain, ours = tiny(family, attn_implementation="sdpa").eval(), tiny(family).eval()
    assert enable_segments(ours).packed
    ids = torch.cat(ids_of(14, 14), 0)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding, as in generation
    assert torch.equal(
        plain(input_ids=ids, attention_mask=mask).logits[:, 5:], ours(input_ids=ids, attention_mask=mask).logits[:, 5:]
    )
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(plain.generate(ids, **settings), ours.generate(ids, **settings))
    # Rows that restart their positions without a table still get transformers' own packed mask.
    inputs = {k: v for k, v in packed_inputs(ids_of(6, 5)).items() if k != "segments"}
    assert torch.equal(plain(**inputs).logits, ours(**inputs).logits)


def test_no_mask_of_the_row_is_built() -> None:
    """A row of 4,096 tokens in segments of 8: nothing of T×T elements appears."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            sizes = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
            largest = max([largest, *sizes])
            return out

    model = tiny("llama", max_position_embeddings=4096).eval()
    assert enable_segments(model).packed
    inputs = packed_inputs(ids_of(*[8] * 512))
    with torch.no_grad(), Largest():
        model.model(**inputs)
    assert largest < 4096 * 4096 / 16


def test_the_probe_leaves_no_trace() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert enable_segments(model).packed
    assert enable_segments(model).packed  # again: still one hook
    assert len(model.model._forward_pre_hooks) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_half_precision_is_probed() -> None:
    model = tiny("llama").to(torch.bfloat16)
    assert enable_segments(model).packed
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert not enable_segments(tiny("gemma2").to(torch.bfloat16)).packed


def test_through_peft_and_back() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False))
    assert enable_segments(model).packed
    rows = ids_of(*LENGTHS)
    model.eval()
    apart = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(model(**packed_inputs(rows)).logits[0], apart, rtol=1e-5, atol=1e-5)


def test_the_choice_survives_copies_and_is_not_saved(tmp_path) -> None:
    model = tiny("llama").eval()
    assert enable_segments(model).packed
    inputs = packed_inputs(ids_of(*LENGTHS))
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_table_and_padding_mask_exclude_each_other() -> None:
    model = tiny("llama")
    assert enable_segments(model).packed
    inputs = packed_inputs(ids_of(4, 5))
    with pytest.raises(ValueError, match="not both"):
        model(**inputs, attention_mask=torch.ones(1, 9))


def test_dropout_of_attention_in_training_only() -> None:
    model = tiny("llama", attention_dropout=0.5)
    assert enable_segments(model).packed
    inputs = packed_inputs(ids_of(*LENGTHS))
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_trunk_of_trunks() -> None:
    """A segment sees its grandparent too, and a prompt that is not next to it."""
    model = tiny("llama").eval()
    a, b, c, d, e = ids_of(5, 4, 3, 6, 2)  # d continues a; e continues a, b
    apart = [[a, b, c], [a, d], [a, b, e]]
    expected = [model(input_ids=torch.cat(rows, 1)).logits[0, -rows[-1].shape[1] :] for rows in apart]
    assert enable_segments(model).packed
    spans = [(0, 5, None), (5, 9, 0), (9, 12, 1), (12, 18, 0), (18, 20, 1)]
    positions = [*range(5), *range(5, 9), *range(9, 12), *range(5, 11), *range(9, 11)]
    table = SegmentTable(tuple(Segment(*span) for span in spans))
    row = torch.cat([a, b, c, d, e], 1)
    logits = model(input_ids=row, position_ids=torch.tensor([positions]), segments=table, use_cache=False).logits[0]
    torch.testing.assert_close(torch.cat([logits[9:12], logits[12:18], logits[18:20]]), torch.cat(expected), rtol=1e-5, atol=1e-5)


def emulated_varlen(query, key, value, cu_query, cu_key, max_query, max_key, *, scale, window_size) -> Tensor:
    """What the variable-length kernel computes, from its definition: (T, H, D), bottom-right causal, window (left, 0)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.empty_like(query)
    bounds = zip(cu_query[:-1], cu_query[1:], cu_key[:-1], cu_key[1:], strict=True)
    for q0, q1, k0, k1 in (tuple(int(x) for x in b) for b in bounds):
        assert q1 - q0 <= max_query
        assert k1 - k0 <= max_key
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)[None]
        hidden = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value[k0:k1])
    return out


@pytest.mark.parametrize("window", [None, 6])
def test_the_gather_for_the_variable_length_kernel(window: int | None) -> None:
    """The CUDA path's indices, with the kernel replaced by its definition, against one SDPA call per segment."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    spans = [(0, 7, None), (7, 15, None), (15, 20, 1), (20, 26, 1), (26, 30, 3)]
    table = SegmentTable(tuple(Segment(*span) for span in spans))
    cpu = torch.device("cpu")
    got = attend_varlen(emulated_varlen, query, key, value, gather(table, cpu), 0.3, window)
    expected = attend_each(query, key, value, views(table, Locality(window), cpu), 0.3, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_kernel_of_the_installed_torch_takes_our_call(monkeypatch) -> None:
    """Names and order of the arguments, against the installed signature."""
    import inspect

    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)
    calls = []

    def recorded(*args, **kwargs) -> Tensor:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return args[0]

    recorded.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    query, key = torch.randn(1, 4, 6, 8, dtype=torch.bfloat16), torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    attend = kernels._varlen_function(query, key, key, None)
    assert attend is not None
    table = SegmentTable((Segment(0, 4), Segment(4, 6)))
    attend_varlen(attend, query, key, key, gather(table, torch.device("cpu")), 0.3, 5)
    assert calls[0]["window_size"] == (4, 0)
    assert calls[0]["scale"] == 0.3
    assert calls[0].get("enable_gqa", True)
    assert kernels._varlen_function(query.float(), key, key, None) is None  # the kernel takes half precision only


def test_windows_and_chunks() -> None:
    cpu = torch.device("cpu")
    window = Locality(window_tokens=2).visible(range(2, 4), range(4), cpu)
    chunk = Locality(chunk_tokens=2).visible(range(1, 4), range(4), cpu)
    assert window.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert chunk.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert not Locality(window_tokens=WINDOW).cuts(WINDOW)
    assert Locality(window_tokens=WINDOW).cuts(WINDOW + 1)


SPANS = [(0, 300, None), (300, 401, None), (401, 560, 1), (560, 563, 1), (563, 700, 2)]  # blocks of 128 do not divide them


@pytest.mark.parametrize(
    "locality", [Locality(), Locality(window_tokens=37), Locality(window_tokens=200), Locality(chunk_tokens=64)]
)
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 8)])
def test_blocks_equal_one_call_per_segment(locality: Locality, heads: tuple[int, int, int], monkeypatch) -> None:
    """Values and gradients of the blocked attention against SDPA with a mask, in float64; values narrower than keys."""
    monkeypatch.setattr(block_attention, "KEEP_TOKENS", 200)  # some blocks keep their probabilities, some do not
    torch.manual_seed(0)
    n_query, n_key, width = heads
    shapes = [(n_query, 16), (n_key, 16), (n_key, width)]
    tensors = [torch.randn(1, 700, h, d, dtype=torch.float64).transpose(1, 2).requires_grad_() for h, d in shapes]
    table = SegmentTable(tuple(Segment(*span) for span in SPANS))
    expected = attend_each(*tensors, views(table, locality, torch.device("cpu")), 0.4, 0.0)
    got = BlockAttention.apply(*tensors, plan_blocks(table, locality, torch.float64), 0.4)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, tensors, weights), torch.autograd.grad(expected, tensors, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_in_bfloat16() -> None:
    """No further from float64 than bfloat16 rounds, and no further than a few times torch's own kernel."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 400, h, 64).bfloat16().transpose(1, 2) for h in (6, 2, 2)]
    table = SegmentTable((Segment(0, 400),))
    exact = attend_each(*(x.double() for x in tensors), views(table, Locality(), torch.device("cpu")), 0.125, 0.0)
    got = BlockAttention.apply(*tensors, plan_blocks(table, Locality(), torch.bfloat16), 0.125)
    assert float((got - exact).norm() / exact.norm()) < 2**-8


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_under_autocast(family: str) -> None:
    """float32 weights under bfloat16 autocast: packed and apart agree as far as bfloat16 allows, gradients arrive in float32."""
    model = tiny(family).train()
    rows = ids_of(*LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        apart = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows]).float()
        assert enable_segments(model).packed
        packed = model(**packed_inputs(rows)).logits[0].float()
    assert float((packed - apart).norm() / apart.norm()) < 2e-2
    packed.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters() if p.grad is not None)
