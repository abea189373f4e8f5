"""Log-probabilities from inside the forward equal those of the full logits, in value and gradient, and no N×V tensor is alive."""

import copy
import inspect
import itertools

import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from posttrain.model import head as head_module
from posttrain.model.head import Projection, head_logprobs, select_logprobs
from posttrain.model.logprobs import TokenLogprobs, install_logprobs

V, D, N = 37, 12, 23


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """From the definitions, in float64."""
    z = logits.double() / temperature
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    return p[torch.arange(len(z)), targets].log(), -(p * p.log()).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(head_module, "chunk_tokens", lambda n_logits, device: 5)


def problem(bias: bool, train_head: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).to(dtype).requires_grad_(train_head)
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    return hidden, head, torch.randint(V, (N,)), torch.randn(N), torch.randn(N)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("projection", [Projection(), Projection(0.5), Projection(1.0, 2.0), Projection(0.5, 2.0)])
@pytest.mark.parametrize(("bias", "train_head"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients(bias: bool, train_head: bool, projection: Projection, temperature: float, entropy: bool) -> None:
    hidden, head, targets, g_logprob, g_entropy = problem(bias, train_head)
    leaves = [hidden, *head.parameters()] if train_head else [hidden]
    z = head(hidden).double() * projection.scale
    z = z if projection.softcap is None else projection.softcap * (z / projection.softcap).tanh()
    expected, expected_entropy = reference(z, targets, temperature)
    total = (expected * g_logprob).sum() + ((expected_entropy * g_entropy).sum() if entropy else 0)
    expected_grads = torch.autograd.grad(total, leaves)

    logprobs, entropies = head_logprobs(hidden, head, targets, projection, temperature, entropy)
    assert logprobs.dtype is torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    total = (logprobs * g_logprob).sum()
    if entropy:
        assert entropies is not None
        torch.testing.assert_close(entropies.double(), expected_entropy, rtol=1e-6, atol=1e-6)
        total = total + (entropies * g_entropy).sum()
    else:
        assert entropies is None
    for got, want in zip(torch.autograd.grad(total, leaves), expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_only_entropy_or_nothing_has_a_gradient() -> None:
    for train_head in (False, True):
        hidden, head, targets, _, g = problem(False, train_head)
        want = torch.autograd.grad((reference(head(hidden), targets)[1] * g).sum(), hidden)[0]
        _, entropies = head_logprobs(hidden, head, targets, Projection(), 1.0, True)
        torch.testing.assert_close(torch.autograd.grad((entropies * g).sum(), hidden)[0], want, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            logprobs, _ = head_logprobs(hidden, head, targets, Projection(), 1.0, False)
        assert not logprobs.requires_grad


def test_chunks_do_not_matter(monkeypatch) -> None:
    results = []
    for size in (1, 7, 1000):
        monkeypatch.setattr(head_module, "chunk_tokens", lambda n_logits, device, size=size: size)
        hidden, head, targets, g, _ = problem(True, True)
        logprobs, _ = head_logprobs(hidden, head, targets, Projection(), 1.0, False)
        (logprobs * g).sum().backward()
        results.append((logprobs, hidden.grad, head.weight.grad, head.bias.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train_head", [False, True])
def test_bfloat16(train_head: bool) -> None:
    """Within the rounding of bfloat16 logits; gradients in the parameters' type."""
    hidden, head, targets, g, _ = problem(False, train_head, torch.bfloat16)
    expected, _ = reference((hidden.double() @ head.weight.double().T), targets)
    logprobs, _ = head_logprobs(hidden, head, targets, Projection(), 1.0, False)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-2)
    want = torch.autograd.grad((expected * g).sum(), hidden)[0]
    (logprobs * g).sum().backward()
    assert hidden.grad.dtype is torch.bfloat16
    torch.testing.assert_close(hidden.grad, want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("train_head", [False, True])
def test_no_targets(train_head: bool) -> None:
    """A micro-batch without targets still gives every trainable tensor a gradient (zero), or DDP would wait."""
    hidden, head, _, _, _ = problem(True, train_head)
    logprobs, _ = head_logprobs(hidden[:0], head, torch.empty(0, dtype=torch.long), Projection(), 1.0, False)
    logprobs.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters() if train_head)


class Wrapped(nn.Module):
    """A head that is not a plain matrix (adapter, quantisation): must be called, not read."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) * 2


def test_a_wrapped_head_is_called() -> None:
    hidden, inner, targets, g, _ = problem(True, True)
    expected, entropy = reference(inner(hidden) * 2, targets)
    want = torch.autograd.grad((expected * g + entropy).sum(), [hidden, *inner.parameters()])
    logprobs, entropies = head_logprobs(hidden, Wrapped(inner), targets, Projection(), 1.0, True)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad((logprobs * g + entropies).sum(), [hidden, *inner.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    empty, _ = head_logprobs(hidden[:0], Wrapped(inner), targets[:0], Projection(), 1.0, False)
    assert empty.shape == (0,)
    empty.sum().backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("kind", ["frozen", "trained", "wrapped"])
def test_no_tensor_of_all_logits(kind: str) -> None:
    n, v = 200, 400
    head: nn.Module = nn.Linear(4, v).requires_grad_(kind != "frozen")
    if kind == "wrapped":
        head = Wrapped(head)
    hidden = torch.randn(n, 4, requires_grad=True)
    with Largest() as largest:
        logprobs, entropies = head_logprobs(hidden, head, torch.randint(v, (n,)), Projection(), 1.0, True)
        (logprobs + entropies).sum().backward()
    assert largest.numel <= 4 * 5 * v < n * v


# The forward of whole models.
IDS = torch.randint(1, 96, (2, 14), generator=torch.Generator().manual_seed(3))
PREDICT = torch.tensor([0, 5, 5, 12, 20, 14, 5])  # 5: a prompt's last token predicts the first of each branch
TARGETS = torch.tensor([3, 1, 4, 15, 92, 65, 35])
FAMILIES = ["llama", "qwen2", "gemma3_text", "cohere2", "granite", "gpt_neox", "phi3", "mixtral", "glm4", "bloom", "gemma2"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tied: bool) -> None:
    extra = {"logits_scaling": 3.0} if family == "granite" else {"logit_scale": 0.25} if family == "cohere2" else {}
    if family in ("gemma2", "gemma3_text"):
        extra = {"final_logit_softcapping": 5.0}
    model = tiny(family, tie_word_embeddings=tied, **extra)
    weights = torch.randn(2, len(PREDICT), generator=torch.Generator().manual_seed(4))
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[PREDICT]
    expected, entropy = reference(logits, TARGETS, 0.8)
    (expected @ weights[0].double() + entropy @ weights[1].double()).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    how = install_logprobs(model)
    assert how.projection is not None, how.reason
    result = model(input_ids=IDS, use_cache=False, predict_N=PREDICT, targets_N=TARGETS, temperature=0.8, entropy=True)
    assert isinstance(result, TokenLogprobs)
    torch.testing.assert_close(result.logprobs_N.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.entropy_N.double(), entropy, rtol=1e-6, atol=1e-6)
    (result.logprobs_N @ weights[0] + result.entropy_N @ weights[1]).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


def test_without_the_keywords_nothing_changes() -> None:
    model = tiny("llama").eval()
    signature, expected = inspect.signature(model.forward), model(input_ids=IDS).logits
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    install_logprobs(model)
    assert install_logprobs(model).projection is not None  # again: not wrapped twice
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), generated)


def test_copies_use_their_own_weights() -> None:
    model = tiny("llama").eval()
    install_logprobs(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    ask = {"input_ids": IDS, "predict_N": PREDICT, "targets_N": TARGETS}
    assert not torch.equal(other(**ask).logprobs_N, model(**ask).logprobs_N)
    torch.testing.assert_close(
        other(**ask).logprobs_N, select_logprobs(other(IDS).logits.flatten(0, 1)[PREDICT], TARGETS, False)[0]
    )


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("before", [True, False])
def test_with_peft(before: bool, saved: list[str] | None) -> None:
    """Installed before or after the adapter; a trained head is wrapped by PEFT and must be called."""
    model = tiny("llama", tie_word_embeddings=False)
    if before:
        install_logprobs(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False))
    if not before:
        install_logprobs(adapted)
    expected, _ = reference(adapted(input_ids=IDS).logits.flatten(0, 1)[PREDICT], TARGETS)
    result = adapted(input_ids=IDS, predict_N=PREDICT, targets_N=TARGETS)
    torch.testing.assert_close(result.logprobs_N.double(), expected, rtol=1e-5, atol=1e-6)
    result.logprobs_N.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())


def test_a_model_with_logits_of_its_own() -> None:
    """What the head alone does not give comes from the model's own forward, and a line says so."""
    model = tiny("llama")
    inner = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            output = inner(self, *args, **kwargs)
            output.logits = output.logits + torch.arange(96) * 0.1
            return output

    model.__class__ = Shifted
    how = install_logprobs(model)
    assert how.projection is None
    assert "slower" in how.reason
    expected, _ = reference(model(input_ids=IDS).logits.flatten(0, 1)[PREDICT], TARGETS, 0.5)
    result = model(input_ids=IDS, predict_N=PREDICT, targets_N=TARGETS, temperature=0.5)
    torch.testing.assert_close(result.logprobs_N.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_router_loss_is_kept(family: str) -> None:
    model = tiny(family, output_router_logits=True, router_aux_loss_coef=0.5)
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    expected = 0.5 * model(input_ids=IDS, attention_mask=mask).aux_loss
    install_logprobs(model)
    result = model(input_ids=IDS, attention_mask=mask, predict_N=PREDICT, targets_N=TARGETS)
    torch.testing.assert_close(result.router_loss, expected)
    result.router_loss.backward()
    assert any("gate" in name and p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters())
    model.config.output_router_logits = False
    assert model(input_ids=IDS, predict_N=PREDICT, targets_N=TARGETS).router_loss is None


def test_under_autocast() -> None:
    """float32 weights under bfloat16 autocast: the head computes in bfloat16 as the rest does, gradients come back in float32."""
    model = tiny("llama")
    install_logprobs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = reference(model(input_ids=IDS).logits.flatten(0, 1)[PREDICT], TARGETS)
        result = model(input_ids=IDS, predict_N=PREDICT, targets_N=TARGETS)
    torch.testing.assert_close(result.logprobs_N.double(), expected, rtol=0, atol=2e-2)
    result.logprobs_N.sum().backward()
    assert model.lm_head.weight.grad.dtype is torch.float32


def test_inside_a_checkpoint() -> None:
    hidden, head, targets, g, _ = problem(False, False)
    want = torch.autograd.grad((head_logprobs(hidden, head, targets, Projection(), 1.0, False)[0] * g).sum(), hidden)[0]
    again = checkpoint(lambda h: head_logprobs(h, head, targets, Projection(), 1.0, False)[0], hidden, use_reentrant=False)
    assert torch.equal(torch.autograd.grad((again * g).sum(), hidden)[0], want)
