"""The loop of PPO, piece by piece, as the command connects it: the details that decide whether it learns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flag_probes_models import reward_adapter
from posttrain.commands import ppo as command
from posttrain.model.boundary import Boundary, StateCache, decoder_layers
from posttrain.model.policy_value import reference_logprobs
from posttrain.objectives import ppo as objective
from posttrain.training import ppo as training
from posttrain.training.ppo import Clock, Loop, collect, prompt_indices, train, update
from posttrain.training.ppo_rollout import Rollout, add_advantages, measure
from posttrain.training.sums import Sums
from ppo_runs import STOP, letter_tokenizer, run, save_speaker, write_prompts

ASKED = ["what is this", "no", "a long question about nothing", "why", "say it again", "hm"]
Make = Callable[..., Loop]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker") / "model", scale=8)


@pytest.fixture
def make(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The loop of a command line, before its first step."""

    def build(**flags: Any) -> Loop:
        found: list[Loop] = []

        def stop(loop: Loop) -> None:
            found.append(loop)

        prompts = write_prompts(tmp_path / "prompts.jsonl", ASKED)
        with monkeypatch.context() as patch:
            patch.setattr(command, "train", stop)
            patch.setattr(command, "finish", lambda *_: None)
            patch.setattr("posttrain.commands.ppo_report.Reporter.results", lambda _: None)
            out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
            run(out, **{"model_name_or_path": speaker, "train_file_dir": prompts, "dtype": "float32", **flags})
        return found[0]

    return build


def rolled(loop: Loop) -> Rollout:
    """A rollout with everything that the update needs."""
    rollout = collect(loop, Clock())
    measure(rollout, loop.trained, loop.reference, loop.cutter, loop.sampling.temperature)
    add_advantages(rollout, loop.shape, loop.kl.coef, loop.reduce)
    return rollout


def ratios(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The probability ratios of one rollout's updates: by optimizer step, by micro-batch."""
    found: list[list[Tensor]] = [[]]
    terms, step = objective.policy_terms, training.update_once

    def seen(*args: Any) -> Any:
        found[-1].append(terms(*args).ratio_N.detach())
        return terms(*args)

    def next_step(*args: Any) -> Any:
        done = step(*args)
        found.append([])
        return done

    with monkeypatch.context() as patch:
        patch.setattr(objective, "policy_terms", seen)
        patch.setattr(training, "update_once", next_step)
        update(loop, rolled(loop), Sums(loop.reduce))
    return found[:-1]


# --- ratios, masks, dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"temperature": 0.6, "num_generations": 2, "forward_tokens": 60},
        {"padding_free": False, "forward_tokens": 150},
        {"gradient_checkpointing": True},
        {"fused": False, "value_sharing": "trunk", "temperature": 1.7},
        {"use_peft": False},
        {"use_dora": True, "padding_free": False},
    ],
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_ratios_are_one_until_the_first_step(flags: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling, the pass of the old log-probs and that of the update agree: on temperature, masks, adapters, dropout."""
    loop = make(**flags)
    for _ in range(2):  # the second rollout's policy has moved
        steps = ratios(loop, monkeypatch)
        assert len(steps) == 2 * 8 * flags.get("num_generations", 1) // 4
        assert float((torch.cat(steps[0]) - 1).abs().max()) <= 1e-5
        assert float((torch.cat(steps[1]) - 1).abs().max()) > 1e-3
        if "forward_tokens" in flags:
            assert len(steps[0]) > 1
        loop.step += 1


def test_dropout_of_the_base_is_off(speaker: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_speaker(tmp_path / "dropping", scale=8, attention_dropout=0.5)
    for flags in ({}, {"gradient_checkpointing": True}, {"padding_free": False}):
        steps = ratios(make(model_name_or_path=folder, **flags), monkeypatch)
        assert float((torch.cat(steps[0]) - 1).abs().max()) <= 1e-5


def test_sampled_tokens_are_as_likely_as_they_were_drawn(make: Make) -> None:
    """The old log-probs are those of the distribution that was sampled: over many tokens, mean −log p is the entropy."""
    loop = make(rollout_batch_size=256, mini_batch_size=256, temperature=0.7)
    rollout = rolled(loop)
    surprise_N, entropy_N = -rollout.columns["old_logprobs_N"], rollout.columns["entropy_N"]
    error = (surprise_N - entropy_N).mean() / ((surprise_N - entropy_N).std() / len(surprise_N) ** 0.5)
    assert len(surprise_N) > 1000
    assert abs(float(error)) < 4
    again = rolled(make(rollout_batch_size=256, mini_batch_size=256))
    assert float(again.columns["entropy_N"].mean()) > float(entropy_N.mean()) + 0.2


@pytest.mark.parametrize("padding_free", [True, False])
def test_padding_may_be_the_stop_token(padding_free: bool, make: Make, tmp_path: Path) -> None:
    """No decision looks at a padding id: with pad = eos, all is as with a padding token of its own."""
    rollouts = []
    for pad in ("<|pad|>", "<|im_end|>"):
        folder = save_speaker(tmp_path / pad.strip("<|>"), letter_tokenizer(pad_token=pad), scale=8)
        loop = make(model_name_or_path=folder, padding_free=padding_free)
        assert (loop.sampling.pad_id == STOP) is (pad == "<|im_end|>")
        rollouts.append(rolled(loop))
    one, other = rollouts
    assert one.groups == other.groups
    assert {episode.stopped for episode in one.episodes} == {True, False}
    assert all(torch.equal(column, other.columns[name]) for name, column in one.columns.items())


def test_an_answer_ends_with_its_stop_token_or_at_the_limit(make: Make) -> None:
    rollout = rolled(make(rollout_batch_size=32, mini_batch_size=32))
    tokenizer = letter_tokenizer()
    for episode in rollout.episodes:
        assert STOP not in episode.answer_ids[:-1]
        assert episode.stopped is (episode.answer_ids[-1] == STOP)
        assert episode.stopped or len(episode.answer_ids) == 12
        assert episode.answer == tokenizer.decode(episode.answer_ids, skip_special_tokens=True)
        expected = tokenizer.apply_chat_template(episode.messages, add_generation_prompt=True)["input_ids"]
        assert episode.prompt_ids == expected
    assert 0 < sum(episode.stopped for episode in rollout.episodes) < 32


# --- scores and rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_reward_adapter_scores_the_stop_token_and_nothing_else(
    padding_free: bool, speaker: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reward_adapter(speaker, tmp_path / "rm")
    loop = make(reward_adapter=folder, reward_func=None, padding_free=padding_free, num_generations=2, mini_batch_size=4)
    rows: list[int] = []
    forward = torch.nn.Linear.forward

    def spy(module: Any, x: Tensor) -> Tensor:
        if module.out_features == 1:
            rows.append(x.shape[0])
        return forward(module, x)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", spy)
        rollout = collect(loop, Clock())
    # The reward head reads a state an answer; the other narrow head is the value's, which reads an answer's tokens and where it begins,
    # micro-batch by micro-batch.
    assert rows[0] == 16
    assert sum(rows[1:]) == sum(len(episode.answer_ids) + 1 for episode in rollout.episodes)
    assert len(rollout.episodes) == 16
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(speaker, num_labels=1, dtype=torch.float32), folder
    )
    core, expected = plain.get_base_model().eval(), []
    for episode in rollout.episodes:  # its own forward would pass over a pad token that was sampled
        with torch.no_grad():
            states = core.model(input_ids=torch.tensor([episode.prompt_ids + episode.answer_ids])).last_hidden_state
            expected.append(float(core.score(states[0, -1:])))
    torch.testing.assert_close(rollout.scores_S, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_rewards_of_tokens(make: Make) -> None:
    """−β·(log π − log π_ref) at every token, and at the last one of an answer its score, less what was asked to be taken off."""
    flags = {"missing_eos_penalty": 0.7, "reward_baseline": 0.1, "score_clip": 0.5, "init_kl_coef": 0.3}
    loop = make(**flags, whiten_rewards=False)
    update(loop, rolled(loop), Sums(loop.reduce))  # the policy leaves its reference
    loop.step += 1
    rollout = collect(loop, Clock())
    measure(rollout, loop.trained, loop.reference, loop.cutter, 1.0)
    rewards_N = add_advantages(rollout, loop.shape, loop.kl.coef, loop.reduce)
    expected, start = [], 0
    assert {episode.stopped for episode in rollout.episodes} == {True, False}
    for episode in rollout.episodes:
        end = start + len(episode.answer_ids)
        kl = (rollout.columns["old_logprobs_N"] - rollout.columns["reference_N"])[start:end]
        assert float(kl.abs().max()) > 1e-3
        vowels = sum(letter in "aeiou" for letter in episode.answer) / max(len(episode.answer), 1)
        rewards = -0.3 * kl
        rewards[-1] += min(max(vowels - 0.7 * (not episode.stopped) - 0.1, -0.5), 0.5)
        expected.append(rewards)
        start = end
    torch.testing.assert_close(rewards_N, torch.cat(expected), atol=1e-6, rtol=1e-5)


def test_advantages_have_mean_0_and_standard_deviation_1_over_the_rollout(make: Make) -> None:
    rollout = rolled(make(num_generations=2))
    advantages_N = rollout.columns["advantages_N"]
    assert float(advantages_N.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages_N.std()) == pytest.approx(1, abs=1e-4)
    plain = rolled(make(num_generations=2, whiten_advantages=False, whiten_rewards=False, init_kl_coef=0))
    assert "reference_N" not in plain.columns
    # Values are 0 under a new head, so the advantage of a stopped answer's last token is its score alone.
    ends = torch.tensor([len(e.answer_ids) for e in plain.episodes]).cumsum(0) - 1
    stopped_S = plain.stopped_S
    torch.testing.assert_close(plain.columns["advantages_N"][ends][stopped_S], plain.scores_S[stopped_S], atol=1e-6, rtol=0)


# --- the update -----------------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_sum_over_tokens_by_their_number(make: Make) -> None:
    """Written out for one minibatch: clipped policy loss plus vf_coef · value loss, summed, by the response tokens of the step."""
    loop = make(max_grad_norm=0, forward_tokens=70, vf_coef=0.3, mini_batch_size=8)
    rollout = rolled(loop)
    c = rollout.columns
    batch = loop.cutter.batch(rollout.groups, range(8))
    output = loop.trained(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
    ratio = torch.exp(output.logprobs_N - c["old_logprobs_N"])
    policy = -torch.minimum(c["advantages_N"] * ratio, c["advantages_N"] * ratio.clamp(0.8, 1.2)).sum()
    value = 0.5 * (output.values_N - c["returns_N"]).square().sum()
    ((policy + 0.3 * value) / len(c["old_logprobs_N"])).backward()
    trainable = {n: p for n, p in loop.trained.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in trainable.items()}
    loop.trained.zero_grad()
    taken: dict[str, Tensor] = {}
    loop.schedule.step = lambda: None
    loop.engine.optimizer.step = lambda: taken.update({name: p.grad.clone() for name, p in trainable.items()})
    training.update_once(loop, rollout, [3, 1, 7, 0, 2, 6, 5, 4], Sums(loop.reduce))
    assert len(list(loop.cutter.parts(rollout.groups, range(8)))) > 2
    length = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert float(length) > 1e-3
    for name, gradient in expected.items():
        assert float((gradient - taken[name]).norm() / length) < 1e-5, name


def gradients(loop: Loop, rollout: Rollout) -> dict[str, Tensor]:
    """Those that one optimizer step over the whole rollout is about to use."""
    taken: dict[str, Tensor] = {}
    trainable = {n: p for n, p in loop.trained.named_parameters() if p.requires_grad}
    loop.schedule.step = lambda: None
    loop.engine.optimizer.step = lambda: taken.update({n: p.grad.clone() for n, p in trainable.items() if p.grad is not None})
    training.update_once(loop, rollout, range(len(rollout.groups)), Sums(loop.reduce))
    return taken


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    length = torch.cat([g.flatten() for g in one.values()]).norm()
    assert one.keys() == other.keys()
    assert float(length) > 1e-3
    for name, gradient in one.items():
        assert float((gradient - other[name]).norm() / length) < 1e-5, name


def test_policy_and_value_in_turn_give_the_gradients_of_both_at_once(make: Make) -> None:
    loop = make(max_grad_norm=0, forward_tokens=70, mini_batch_size=8, entropy_coef=0.1, kl_loss_coef=0.1)
    assert loop.in_turn
    train(loop)  # values and ratios that are none of the start
    rollout = rolled(loop)
    asked: list[Any] = []
    forward = loop.trained.forward
    loop.trained.forward = lambda **inputs: asked.append(inputs["only"]) or forward(**inputs)  # type: ignore[method-assign]
    in_turn = gradients(loop, rollout)
    assert set(asked) == {"policy", "value"}
    loop.in_turn, asked[:] = False, []
    assert_same_gradients(gradients(loop, rollout), in_turn)
    assert set(asked) == {None}


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}, {"use_peft": False}], ids=lambda flags: "-".join(flags))
def test_values_start_from_the_states_below_their_layers(
    flags: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --value_layers 1 the layer below is computed as the rollout is measured, never in an update, and the gradients are those of
    whole passes."""
    loop = make(max_grad_norm=0, forward_tokens=70, mini_batch_size=8, value_layers=1, num_generations=2, **flags)
    train(loop)
    rollout = collect(loop, Clock())
    add_advantages(rollout, loop.shape, loop.kl.coef, loop.reduce)
    lower, upper = decoder_layers(loop.trained.value_model)
    calls = {"lower": 0, "upper": 0}
    for name, layer in (("lower", lower), ("upper", upper)):
        monkeypatch.setattr(layer.self_attn, "forward", counted(layer.self_attn.forward, calls, name))
    from_states = gradients(loop, rollout)
    trained_passes = calls["upper"] if "use_peft" in flags else calls["upper"] - calls["lower"]
    assert trained_passes >= len(list(loop.cutter.parts(rollout.groups, range(len(rollout.groups))))) > 1
    assert calls["lower"] == 0 or "use_peft" not in flags  # the policy, on the same layers, needs both
    assert not any(".layers.0." in name and (".value." in name or name.startswith("value_model")) for name in from_states)
    assert any(".layers.1." in name and (".value." in name or name.startswith("value_model")) for name in from_states)
    loop.trained.states = None
    before = dict(calls)
    assert_same_gradients(gradients(loop, rollout), from_states)
    assert calls["lower"] - before["lower"] > before["lower"]  # the states were worth passes


def test_the_reward_models_pass_leaves_the_states_for_the_values(
    speaker: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value starts as the reward adapter: below its trained layers they are one, and the pass that scores is not taken twice."""
    folder = reward_adapter(speaker, tmp_path / "rm")
    loop = make(reward_adapter=folder, reward_func=None, value_layers=1, num_generations=2, mini_batch_size=4)
    given: list[bool] = []
    begin = StateCache.begin

    def seen(self: StateCache, inputs: dict[str, Any]) -> Boundary:
        boundary = begin(self, inputs)
        given.append(boundary.given)
        return boundary

    monkeypatch.setattr(StateCache, "begin", seen)
    torch.nn.init.normal_(loop.trained.value_head.weight)
    rollout = collect(loop, Clock())
    assert given[0] is False  # scored
    assert given[1:]
    assert all(given[1:])  # measured
    scores_S, values_N = rollout.scores_S, rollout.columns["old_values_N"]
    loop.trained.states = None
    rollout.columns = {}
    measure(rollout, loop.trained, loop.reference, loop.cutter, loop.sampling.temperature)
    torch.testing.assert_close(values_N, rollout.columns["old_values_N"], atol=1e-5, rtol=1e-5)
    assert float(values_N.std()) > 1e-3
    again = collect(loop, Clock())  # the cache of before is told the new rollout's rows
    torch.testing.assert_close(again.scores_S, scores_S, atol=1e-5, rtol=1e-5)


def counted(forward: Callable[..., Any], calls: dict[str, int], name: str) -> Callable[..., Any]:
    """The same forward, that counts."""

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return forward(*args, **kwargs)

    return counting


def moved(loop: Loop) -> Tensor:
    """All trained tensors after a step of training."""
    assert train(loop) is None
    return torch.cat([p.detach().flatten() for p in loop.trained.parameters() if p.requires_grad])


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_update_does_not_depend_on_how_it_is_cut(padding_free: bool, make: Make) -> None:
    flags = {"num_generations": 2, "mini_batch_size": 8, "max_steps": 2, "audit": False, "adam_epsilon": 1e-3}
    whole, cut = (moved(make(**flags, padding_free=padding_free, forward_tokens=n)) for n in (0, 90))
    still = moved(make(**flags, learning_rate=1e-12))
    assert float((whole - still).abs().max()) > 1e-3
    torch.testing.assert_close(whole, cut, atol=1e-5, rtol=0)


def test_parts_fit_what_is_computed(make: Make) -> None:
    loop = make(num_generations=2, mini_batch_size=8)
    groups = collect(loop, Clock()).groups
    for padded in (False, True):
        cutter = dataclasses.replace(loop.cutter, forward_tokens=150, padded=padded)
        parts = list(cutter.parts(groups, range(len(groups))))
        assert [index for part in parts for index in part] == list(range(8))
        assert len(parts) > 1
        for part in parts:
            sequences = [(p, a) for p, answers in (groups[i] for i in part) for a in answers]
            packed = sum(len(groups[i][0]) for i in part) + sum(len(a) for _, a in sequences)
            computed = len(sequences) * max(len(p) + len(a) for p, a in sequences) if padded else packed
            assert computed <= 150 or len(part) == 1


def test_early_stopping_leaves_out_the_rest_of_a_rollouts_updates(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make(early_stopping=True, target_kl=1e-6, num_ppo_epochs=3, max_steps=1, audit=False)
    logs: list[dict[str, float]] = []
    loop.on_log = lambda step, metrics, rollout: logs.append(metrics)
    steps = []
    once = training.update_once
    with monkeypatch.context() as patch:
        patch.setattr(training, "update_once", lambda *args: steps.append(1) or once(*args))
        assert train(loop) is None
    assert len(steps) == 2  # at the first step the policy is still the rollout's
    assert logs[0]["early_stop"] == 1
    assert logs[0]["approx_kl_nats"] > 0


def test_value_and_policy_have_learning_rates_of_their_own(make: Make) -> None:
    loop = make(learning_rate=1e-3, value_learning_rate=5e-3)
    rates = {group["initial_lr"]: {id(p) for p in group["params"]} for group in loop.engine.optimizer.param_groups}
    for name, parameter in loop.trained.named_parameters():
        if parameter.requires_grad:
            of_value = ".value." in name or name.startswith("value_head")
            assert id(parameter) in rates[5e-3 if of_value else 1e-3]
    whole = make(use_peft=False, learning_rate=1e-3, value_learning_rate=5e-3)
    ids = {id(p) for p in whole.engine.optimizer.param_groups[1]["params"]}
    names = {name.split(".")[0] for name, p in whole.trained.named_parameters() if id(p) in ids}
    assert names == {"value_head", "value_model"}


# --- the reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_reference_stays_where_the_policy_started(use_peft: bool, make: Make) -> None:
    loop = make(use_peft=use_peft, max_steps=2, num_generations=2)
    assert loop.reference is not None
    batch = loop.cutter.batch(collect(loop, Clock()).groups, range(8))
    before = reference_logprobs(loop.reference, batch, 1.0)
    first = loop.trained(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
    torch.testing.assert_close(before, first.logprobs_N, atol=2e-6, rtol=0)
    assert train(loop) is None
    assert torch.equal(before, reference_logprobs(loop.reference, batch, 1.0))
    after = loop.trained(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
    assert float((after.logprobs_N - before).abs().max().detach()) > 1e-3
    torch.testing.assert_close(
        reference_logprobs(loop.reference, batch, 0.5).exp(), plain_probabilities(loop, batch, 0.5), atol=1e-5, rtol=1e-4
    )


def plain_probabilities(loop: Loop, batch: Any, temperature: float) -> Tensor:
    """Of the targets under the folder's model, at a temperature, sequence by sequence."""
    record = json.loads((Path(loop.on_save.__self__.folder) / "run.json").read_text())  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(record["config"]["model_name_or_path"], dtype=torch.float32).eval()
    found = []
    for prompt, answers in unpacked(batch):
        for answer in answers:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append((logits / temperature).softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)])
    return torch.cat(found)


def unpacked(batch: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts and answers of a packed batch."""
    ids = batch.input_ids_BT[0].tolist()
    groups: list[tuple[list[int], list[list[int]]]] = []
    for segment in batch.segments.segments:
        text = ids[segment.start : segment.end]
        if segment.parent is None:
            groups.append((text, []))
        else:
            groups[-1][1].append(text)
    return groups


# --- the order of prompts -------------------------------------------------------------------------------------------------


def test_prompts_come_in_permutations() -> None:
    stream = prompt_indices(7, 0, 35, seed=3)
    assert all(sorted(stream[i : i + 7]) == list(range(7)) for i in range(0, 35, 7))
    assert len({tuple(stream[i : i + 7]) for i in range(0, 35, 7)}) == 5
    assert [prompt_indices(7, n, 5, seed=3) for n in range(0, 35, 5)] == [stream[n : n + 5] for n in range(0, 35, 5)]
    assert prompt_indices(7, 0, 35, seed=4) != stream


def test_the_same_prompt_gets_other_answers_later(make: Make) -> None:
    loop = make(rollout_batch_size=12, mini_batch_size=12, num_generations=1)  # two passes over six prompts
    episodes = collect(loop, Clock()).episodes
    by_source: dict[str, list[list[int]]] = {}
    for episode in episodes:
        by_source.setdefault(episode.source, []).append(episode.answer_ids)
    assert sorted(map(len, by_source.values())) == [2] * 6
    assert any(one != other for one, other in by_source.values())
    assert collect(loop, Clock()).episodes == episodes  # the step alone decides
    loop.step += 1
    assert collect(loop, Clock()).episodes != episodes
