"""Roles on one base: each computes what a model that carries its adapter alone computes, and gradients reach what is trained, only.

The other side of every comparison is plain: a copy of the base with the one adapter in its weights (W + s·B·A), one sequence at a time,
logits, log-softmax. Float32; the vocabulary is small, so that a log-probability has digits left.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from peft import PeftModel
from torch import Tensor, nn

from adapters import save_base, stir
from flag_probes_models import reward_adapter
from posttrain.commands.ppo_actors import set_mode
from posttrain.data.pack_branches import collate_apart, collate_branches, collate_branches_padded
from posttrain.model import lora_forward
from posttrain.model.adapter import Lora, attach_lora, load_adapter
from posttrain.model.attention import enable_segments, find_decoder, unwrap
from posttrain.model.fused import fuse
from posttrain.model.load import load_model
from posttrain.model.logprobs import install_logprobs
from posttrain.model.policy_value import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    PolicyAndValue,
    Role,
    active,
    reference_logprobs,
    reward_scores,
)
from posttrain.model.reward import load_reward_model
from posttrain.model.role_adapters import add_adapter, copy_adapter, is_of_adapter, train_only
from posttrain.training.rollout import Sampling, generate
from posttrain.types import PackedBatch, UserError

VOCAB = 96
FAMILIES = ["llama", "qwen3", "mistral", "mixtral", "phi3", "gemma3_text", "gpt_neox", "cohere2", "olmo2", "starcoder2"]
LIMIT = 2e-5


def groups() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts with one to three answers, some of a single token, some longer than the window of a sliding layer."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(7, (5, 3, 12)), (1, (4,)), (19, (1, 9))]
    return [
        (
            torch.randint(1, VOCAB, (prompt,), generator=generator).tolist(),
            [torch.randint(1, VOCAB, (answer,), generator=generator).tolist() for answer in answers],
        )
        for prompt, answers in lengths
    ]


def build(
    family: str = "llama", *, checkpointing: bool = False, fused: bool = False, sharing: str = "adapter", packed: bool = True
) -> tuple[PeftModel, PolicyAndValue]:
    """Four roles with matrices far from zero, as the command connects them."""
    model = attach_lora(tiny(family), Lora(rank=4))
    for name in (REWARD, VALUE):
        if name == REWARD or sharing == "adapter":
            add_adapter(model, name, None, trainable=False)
    train_only(model, (POLICY, VALUE, REWARD))
    stir(model, 0.1)
    copy_adapter(model, REFERENCE)
    stir(model, 0.05)  # the policy has moved away from where it started
    train_only(model, (POLICY, VALUE))
    lora_forward.install(model)
    assert not packed or enable_segments(model).packed
    install_logprobs(model)
    if fused:
        assert "LoRA linear" in fuse(model)
    torch.manual_seed(1)
    own_value = Role(model, VALUE) if sharing == "adapter" else None
    trained = PolicyAndValue(Role(model, POLICY), own_value, model.config.hidden_size)
    nn.init.normal_(trained.value_head.weight, std=0.3)
    set_mode(trained, checkpointing, packed)
    return model, trained


def alone(model: PeftModel, adapter: str | None) -> Any:
    """A plain model with one adapter as a parameter of each layer: y = W·x + s·B·(A·x), by hooks; nothing of peft in it."""
    plain = copy.deepcopy(model)
    found: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        module.__dict__.pop("forward", None)  # fused passes and the like
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            for which, matrices in (("A", module.lora_A), ("B", module.lora_B)):
                found[f"{name}.{which}"] = matrices[adapter].weight.detach().clone().requires_grad_()
            down, up, scale = found[f"{name}.A"], found[f"{name}.B"], module.scaling[adapter]
            module.forward = lambda x, b=module.base_layer, d=down, u=up, s=scale: b(x) + s * (x @ d.T) @ u.T
        elif hasattr(module, "lora_A"):
            module.forward = module.base_layer.forward
    core = unwrap(plain)
    core.set_attn_implementation("eager")
    core._tensors = found
    return core.eval()


def plain_pass(core: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs (N), hidden states where they are predicted (N, D), hidden states at last tokens (S, D)), sequence by sequence."""
    logprobs, hidden, last, entropy = [], [], [], []
    for prompt, answers in groups():
        for answer in answers:
            output = core(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False)
            distribution = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(distribution[torch.arange(len(answer)), torch.tensor(answer)])
            entropy.append(-(distribution.exp() * distribution).sum(-1))
            states = find_decoder(core)(input_ids=torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : -1])
            last.append(states[-1:])
    return torch.cat(logprobs), torch.cat(hidden), torch.cat(last), torch.cat(entropy)


def forward(trained: PolicyAndValue, batch: PackedBatch, **more: Any) -> Any:
    tokens = {"predict_N": batch.predict_N, "targets_N": batch.targets_N, "last_S": batch.last_S()}
    return trained(**batch.model_inputs(), **tokens, **more)


def gradients(trained: PolicyAndValue, batch: PackedBatch) -> dict[str, Tensor]:
    """Of a loss that asks different things of policy and value."""
    trained.zero_grad()
    output = forward(trained, batch)
    weights = torch.linspace(-1, 1, len(batch.targets_N))
    ((output.logprobs_N * weights).sum() + (output.values_N * weights.flip(0)).sum()).backward()
    return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = LIMIT) -> None:
    """As a share of the length of the role's whole gradient."""
    assert one.keys() == other.keys()
    for of_value in (False, True):
        names = [name for name in one if (f".{VALUE}." in name or name.startswith("value_head")) is of_value]
        length = torch.cat([one[name].flatten() for name in names] or [torch.ones(1)]).norm()
        assert float(length) > 0.1
        for name in names:
            assert float((one[name] - other[name]).norm() / length) <= limit, name


# --- what each role computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_role_computes_what_its_adapter_alone_computes(family: str, fused: bool) -> None:
    if fused and family not in ("llama", "qwen3"):
        pytest.skip("the passes are the same for all families")
    model, trained = build(family, fused=fused)
    batch = collate_branches(groups())
    with torch.no_grad():
        output = forward(trained, batch, entropy=True)
        logprobs_N, _, _, entropy_N = plain_pass(alone(model, POLICY))
        _, hidden_ND, last_SD, _ = plain_pass(alone(model, VALUE))
    torch.testing.assert_close(output.logprobs_N, logprobs_N, atol=LIMIT, rtol=LIMIT)
    torch.testing.assert_close(output.entropy_N, entropy_N, atol=LIMIT, rtol=LIMIT)
    torch.testing.assert_close(output.values_N, trained.value_head(hidden_ND).squeeze(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.last_values_S, trained.value_head(last_SD).squeeze(-1), atol=1e-4, rtol=1e-4)
    head = nn.Linear(model.config.hidden_size, 1, bias=False)
    with torch.no_grad():
        by_adapter = {name: plain_pass(alone(model, name)) for name in (None, REFERENCE, REWARD)}
        scores_S = head(by_adapter[REWARD][2]).squeeze(-1)
    for name in (None, REFERENCE):
        reference_N = reference_logprobs(Role(model, name), batch, 1.0)
        torch.testing.assert_close(reference_N, by_adapter[name][0], atol=LIMIT, rtol=LIMIT)
    torch.testing.assert_close(reward_scores(Role(model, REWARD), head, batch), scores_S, atol=1e-4, rtol=1e-4)
    # The five passes differ, so a role that computed another's would have been seen.
    passes = [logprobs_N, *(found[0] for found in by_adapter.values())]
    assert all(float((a - b).abs().max()) > 0.05 for i, a in enumerate(passes) for b in passes[:i])


def test_values_by_the_policys_own_hidden_states() -> None:
    model, trained = build(sharing="trunk")
    batch = collate_branches(groups())
    output = forward(trained, batch)
    logprobs_N, hidden_ND, last_SD, _ = plain_pass(alone(model, POLICY))
    torch.testing.assert_close(output.logprobs_N, logprobs_N, atol=LIMIT, rtol=LIMIT)
    torch.testing.assert_close(output.values_N, trained.value_head(hidden_ND).squeeze(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.last_values_S, trained.value_head(last_SD).squeeze(-1), atol=1e-4, rtol=1e-4)
    assert VALUE not in model.peft_config


def test_the_policys_adapter_is_on_between_passes() -> None:
    """What generation and saving expect, whatever was computed before: also a backward pass under checkpointing."""
    model, trained = build(checkpointing=True)
    expected = alone(model, POLICY)(input_ids=torch.tensor([[5, 6, 7]])).logits
    for leave in (lambda: gradients(trained, collate_branches(groups())), lambda: active(Role(model, None)).__enter__()):
        leave()
        with active(trained.policy):
            torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]])).logits, expected, atol=LIMIT, rtol=LIMIT)
    with pytest.raises(ZeroDivisionError), active(Role(model, VALUE)):
        raise ZeroDivisionError
    torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]])).logits, expected, atol=LIMIT, rtol=LIMIT)


def test_generation_is_the_policys() -> None:
    model, trained = build()
    sampling = Sampling(max_new_tokens=6, stop_ids=(), pad_id=0, temperature=0)
    forward(trained, collate_branches(groups()))
    (answer,) = generate(trained.policy_model, [[5, 6, 7]], sampling, seed=0)
    core, ids = alone(model, POLICY), [5, 6, 7]
    for _ in range(6):
        ids.append(int(core(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.ids == ids[3:]


# --- gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_two_models_and_reach_nothing_else() -> None:
    model, trained = build()
    found = gradients(trained, collate_branches(groups()))
    trainable = {name for name, p in trained.named_parameters() if p.requires_grad}
    expected = {name for name, _ in trained.named_parameters() if is_of_adapter(name, POLICY) or is_of_adapter(name, VALUE)}
    assert found.keys() == trainable == expected | {"value_head.weight", "value_head.bias"}
    policy, value = alone(model, POLICY), alone(model, VALUE)
    weights = torch.linspace(-1, 1, sum(len(a) for _, answers in groups() for a in answers))
    values_N = trained.value_head(plain_pass(value)[1]).squeeze(-1)
    ((plain_pass(policy)[0] * weights).sum() + (values_N * weights.flip(0)).sum()).backward()
    by_hand = {
        f"policy_model.{name[:-2]}.lora_{name[-1]}.{adapter}.weight": tensor.grad
        for adapter, core in ((POLICY, policy), (VALUE, value))
        for name, tensor in core._tensors.items()
    }
    assert_same_gradients({name: found[name] for name in by_hand}, by_hand)
    assert len(by_hand) == len(expected)


def test_gradients_of_a_shared_trunk() -> None:
    model, trained = build(sharing="trunk")
    found = gradients(trained, collate_branches(groups()))
    core = alone(model, POLICY)
    logprobs_N, hidden_ND, _, _ = plain_pass(core)
    weights = torch.linspace(-1, 1, len(logprobs_N))
    ((logprobs_N * weights).sum() + (trained.value_head(hidden_ND).squeeze(-1) * weights.flip(0)).sum()).backward()
    by_hand = {f"policy_model.{n[:-2]}.lora_{n[-1]}.{POLICY}.weight": tensor.grad for n, tensor in core._tensors.items()}
    assert found.keys() == by_hand.keys() | {"value_head.weight", "value_head.bias"}
    assert_same_gradients({name: found[name] for name in by_hand}, by_hand)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_recomputes_with_the_right_adapter(family: str) -> None:
    """In the backward pass of the policy the value's adapter was the last to be on, and the other way round."""
    batch = collate_branches(groups())
    plain = gradients(build(family)[1], batch)
    _, trained = build(family, checkpointing=True)
    calls: list[str | None] = []
    layer = next(m for m in trained.modules() if hasattr(m, "lora_A"))
    layer.base_layer.register_forward_pre_hook(lambda *_: calls.append(layer.active_adapters[0]))
    assert_same_gradients(plain, gradients(trained, batch))
    assert sorted(calls) == [POLICY, POLICY, VALUE, VALUE], "the layers were not computed again"


@pytest.mark.parametrize("sharing", ["adapter", "trunk"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_passes_give_the_same_gradients(checkpointing: bool, sharing: str) -> None:
    batch = collate_branches(groups())
    plain = gradients(build(sharing=sharing)[1], batch)
    assert_same_gradients(plain, gradients(build(sharing=sharing, checkpointing=checkpointing, fused=True)[1], batch))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_a_shared_prompt_changes_no_gradient(family: str) -> None:
    _, trained = build(family)
    shared, apart = (gradients(trained, collate(groups())) for collate in (collate_branches, collate_apart))
    assert_same_gradients(shared, apart, 5e-6)
    _, padded = build(family, packed=False)
    assert_same_gradients(shared, gradients(padded, collate_branches_padded(groups())))


def test_checkpointing_needs_packed_rows() -> None:
    with pytest.raises(UserError, match="needs packed rows"):
        build(checkpointing=True, packed=False)


def test_no_dropout_while_layers_are_checkpointed() -> None:
    _, trained = build("llama", checkpointing=True)
    dropouts = [m for m in trained.modules() if isinstance(m, nn.Dropout)]
    assert not any(m.training or m.p for m in dropouts)
    model = attach_lora(tiny("llama", attention_dropout=0.3), Lora(rank=4, dropout=0.3))
    add_adapter(model, VALUE, None, trainable=True)
    train_only(model, (POLICY, VALUE))
    enable_segments(model)
    install_logprobs(model)
    trained = PolicyAndValue(Role(model, POLICY), Role(model, VALUE), model.config.hidden_size)
    set_mode(trained, checkpointing=True, packed=True)
    stir(model, 0.2)
    one, other = (forward(trained, collate_branches(groups())).logprobs_N for _ in range(2))
    assert torch.equal(one, other)


# --- adapters from folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer)


def test_the_scores_of_a_reward_adapter_are_those_of_its_reward_model(base: str, tmp_path: Path) -> None:
    folder = str(reward_adapter(Path(base), tmp_path / "rm"))
    model = attach_lora(load_model(base, "float32"), Lora(rank=4))
    head = add_adapter(model, REWARD, folder, trainable=False)
    assert head is not None
    enable_segments(model)
    batch = collate_branches(groups())
    own = load_adapter(load_reward_model(base, "float32"), folder, trainable=False).eval()
    expected = []
    for prompt, answers in groups():
        for answer in answers:  # transformers' own class, one sequence at a time
            expected.append(own(input_ids=torch.tensor([prompt + answer])).logits[0, 0])
    torch.testing.assert_close(reward_scores(Role(model, REWARD), head, batch), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert not any(
        p.requires_grad for p in [*head.parameters(), *(p for n, p in model.named_parameters() if is_of_adapter(n, REWARD))]
    )


def test_the_value_starts_as_the_reward_adapter_under_a_head_of_zeros(base: str, tmp_path: Path) -> None:
    folder = str(reward_adapter(Path(base), tmp_path / "rm"))
    model = attach_lora(load_model(base, "float32"), Lora(rank=4))
    for name in (REWARD, VALUE):
        add_adapter(model, name, folder, trainable=name == VALUE)
    tensors = dict(model.named_parameters())
    copies = [name for name in tensors if is_of_adapter(name, VALUE)]
    assert copies
    assert all(torch.equal(tensors[name], tensors[name.replace(f".{VALUE}.", f".{REWARD}.")]) for name in copies)
    enable_segments(model)
    install_logprobs(model)
    trained = PolicyAndValue(Role(model, POLICY), Role(model, VALUE), model.config.hidden_size)
    assert not forward(trained, collate_branches(groups())).values_N.any()
    assert trained.value_head.weight.dtype == torch.float32


def test_a_new_adapter_computes_nothing_yet(base: str) -> None:
    model = attach_lora(load_model(base, "float32"), Lora(rank=4))
    add_adapter(model, VALUE, None, trainable=True)
    enable_segments(model)
    install_logprobs(model)
    batch = collate_branches(groups())
    plain, new = (reference_logprobs(Role(model, name), batch, 1.0) for name in (None, VALUE))
    torch.testing.assert_close(plain, new, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [Lora(rank=3, rslora=True), Lora(rank=3, dora=True), Lora(target_modules="q_proj,down_proj")])
def test_copies_keep_the_kind_of_the_adapter(lora: Lora, base: str) -> None:
    model = attach_lora(load_model(base, "float32"), lora)
    stir(model, 0.2)
    copy_adapter(model, REFERENCE)
    add_adapter(model, VALUE, None, trainable=True)
    enable_segments(model)
    install_logprobs(model)
    batch = collate_branches(groups())
    found = {name: reference_logprobs(Role(model, name), batch, 1.0) for name in (POLICY, REFERENCE, VALUE, None)}
    assert torch.equal(found[POLICY], found[REFERENCE])
    assert float((found[POLICY] - found[None]).abs().max()) > 1e-2
    torch.testing.assert_close(found[VALUE], found[None], atol=1e-5, rtol=0)
    assert len([n for n, _ in model.named_parameters() if is_of_adapter(n, VALUE)]) == len(
        [n for n, _ in model.named_parameters() if is_of_adapter(n, POLICY)]
    )


def test_an_adapter_that_does_not_fit_is_refused(base: str, tmp_path: Path, tokenizer: Any) -> None:
    def add(folder: Any) -> None:
        add_adapter(attach_lora(load_model(base, "float32"), Lora(rank=4)), REWARD, str(folder), trainable=False)

    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        add(tmp_path)
    whole = attach_lora(load_model(base, "float32"), Lora(rank=4, modules_to_save="embed_tokens"))
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"layers that are trained whole \(embed_tokens.*merge it first"):
        add(tmp_path / "whole")
    other = save_base(tmp_path / "wide", tokenizer, hidden_size=64)
    attach_lora(load_model(other, "float32"), Lora(rank=4)).save_pretrained(tmp_path / "of-wide")
    with pytest.raises(UserError, match="does not fit the policy's base"):
        add(tmp_path / "of-wide")
    folder = reward_adapter(Path(base), tmp_path / "rm")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    dropped = next(name for name in weights if "lora_B" in name)
    save_file({n: t for n, t in weights.items() if n != dropped}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights of the adapter it describes"):
        add(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        add(folder)


def test_names_of_a_role_are_not_taken_for_layers() -> None:
    assert is_of_adapter("base_model.model.layers.0.self_attn.v_proj.lora_A.value.weight", VALUE)
    assert is_of_adapter("model.embed_tokens.lora_embedding_A.value", VALUE)
    assert not is_of_adapter("model.layers.0.attention.value.lora_A.default.weight", VALUE)
    assert not is_of_adapter("model.layers.0.attention.value.weight", VALUE)
