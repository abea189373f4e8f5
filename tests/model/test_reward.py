"""The reward model: same decoder, one score a position, shared prompts, saved so that plain transformers loads it too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification

from posttrain.data.pack_pairs import collate_pairs, collate_pairs_padded
from posttrain.model.adapter import Lora, attach_lora, base_fingerprint, load_adapter
from posttrain.model.attention import enable_segments, find_decoder
from posttrain.model.fused import fuse
from posttrain.model.load import load_model
from posttrain.model.logprobs import install_logprobs
from posttrain.model.reward import SequenceScores, has_score_head, install_scores, load_reward_model, score_head
from posttrain.types import PackedBatch, UserError

IN_TRANSFORMERS = ["llama", "qwen3", "mistral", "mixtral", "gpt_neox"]
MADE = ["granite", "olmoe"]  # no class for sequence classification there; one dense, one of experts
D = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved causal model of each family."""
    root = tmp_path_factory.mktemp("families")
    for family in [*IN_TRANSFORMERS, *MADE]:
        tiny(family).save_pretrained(root / family)
    return {family: str(root / family) for family in [*IN_TRANSFORMERS, *MADE]}


def reward_model(folder: str, seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = load_reward_model(folder, options.pop("dtype", "float32"), **options)
    model.config.pad_token_id = 0
    return model


def pair_rows(n_rows: int = 3) -> list[dict[str, Any]]:
    """Pairs whose sequences are longer than the families' window of 8."""
    generator = torch.Generator().manual_seed(5)

    def some(n_tokens: int) -> list[int]:
        return torch.randint(1, 96, (n_tokens,), generator=generator).tolist()

    return [
        {"prompt_ids": some(7 + 4 * i), "chosen_ids": some(5 + i), "rejected_ids": some(9 - i), "margin": 0.0}
        for i in range(n_rows)
    ]


def apart(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """Scores by the definition: the head on the decoder's last hidden state of each sequence alone."""
    scores = []
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            scores.append(find_decoder(model)(input_ids=ids).last_hidden_state[0, -1] @ score_head(model).weight[0])
    return torch.stack(scores)


def scores(model: Any, batch: PackedBatch) -> Tensor:
    return model(**batch.model_inputs(), score_at_S=batch.last_S()).scores_S


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("family", [*IN_TRANSFORMERS, *MADE])
def test_the_decoder_is_the_causal_models_and_its_head_is_not_loaded(folders: dict[str, str], family: str) -> None:
    model, causal = reward_model(folders[family]).eval(), load_model(folders[family], "float32").eval()
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        got, expected = (find_decoder(m)(input_ids=ids).last_hidden_state for m in (model, causal))
    assert torch.equal(got, expected)
    assert type(model).__name__ == type(causal).__name__.replace("ForCausalLM", "ForSequenceClassification")
    of_causal = {name for name, _ in causal.named_parameters()} - {"lm_head.weight", "embed_out.weight"}
    assert {name for name, _ in model.named_parameters()} == of_causal | {"score.weight"}
    assert model.config.num_labels == 1


def test_a_new_head_is_drawn_from_the_seed(folders: dict[str, str]) -> None:
    first, again, half = (score_head(reward_model(folders["llama"], dtype=d)).weight for d in ("float32", "float32", "bfloat16"))
    assert first.shape == (1, D)
    assert torch.equal(first, again)
    assert half.dtype == torch.float32
    assert torch.equal(first, half)
    assert not torch.equal(first, score_head(reward_model(folders["llama"], seed=4)).weight)
    drawn = torch.cat([score_head(reward_model(folders["llama"], seed=seed)).weight[0] for seed in range(40)])
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(D + 1), rel=0.1)  # 1,280 draws: 2 % standard error
    assert abs(drawn.mean().item()) < 0.02


def test_refusals_in_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    model = reward_model(folders["llama"])
    model.save_pretrained(tmp_path / "two")
    config = json.loads((tmp_path / "two/config.json").read_text())
    two = {**config, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "two/config.json").write_text(json.dumps(two))
    with pytest.raises(UserError, match="two: is a classifier of 2 labels, not a reward model"):
        load_reward_model(str(tmp_path / "two"))
    headless = {name: value for name, value in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(tmp_path / "headless", state_dict=headless)
    with pytest.raises(UserError, match=r"1 weights are not in the folder, the first is score\.weight"):
        load_reward_model(str(tmp_path / "headless"))
    causal = load_model(folders["llama"], "float32")
    causal.save_pretrained(
        tmp_path / "short", state_dict={n: p for n, p in causal.state_dict().items() if "layers.1.mlp.up" not in n}
    )
    with pytest.raises(UserError, match=r"1 weights are not in the folder, the first is model\.layers\.1\.mlp\.up_proj"):
        load_reward_model(str(tmp_path / "short"))
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification, not a causal language model"):
        load_model(str(tmp_path / "two"))


@pytest.mark.parametrize("family", [*IN_TRANSFORMERS, *MADE])
def test_a_saved_folder_loads_again_and_by_plain_transformers(folders: dict[str, str], tmp_path: Path, family: str) -> None:
    model = reward_model(folders[family]).eval()
    install_scores(model)
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 96, (2, 20))
    with torch.no_grad():
        expected = model(input_ids=ids, score_at_S=torch.tensor([19, 39])).scores_S
        torch.testing.assert_close(model(input_ids=ids).logits[:, 0], expected)  # the class's own forward, at the last token
        again = reward_model(str(tmp_path), seed=9).eval()
        install_scores(again)
        torch.testing.assert_close(again(input_ids=ids, score_at_S=torch.tensor([19, 39])).scores_S, expected)
        if family in IN_TRANSFORMERS:
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
            torch.testing.assert_close(plain(input_ids=ids).logits[:, 0], expected)


def test_the_head_keeps_its_precision_beside_a_bfloat16_decoder(folders: dict[str, str], tmp_path: Path) -> None:
    model = reward_model(folders["llama"], dtype="bfloat16").eval()
    assert {p.dtype for p in find_decoder(model).parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = load_reward_model(str(tmp_path), "bfloat16").eval()
    assert torch.equal(score_head(again).weight, score_head(model).weight)
    install_scores(again)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        got = again(input_ids=ids, score_at_S=torch.tensor([19])).scores_S
        hidden = find_decoder(again)(input_ids=ids).last_hidden_state[0, -1]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got[0], hidden.float() @ score_head(again).weight[0])
        assert again(input_ids=ids).logits.dtype == torch.float32  # the class's own forward bears the two types


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("family", [*IN_TRANSFORMERS, *MADE])
def test_shared_prompts_give_the_scores_and_gradients_of_separate_forwards(folders: dict[str, str], family: str) -> None:
    model = reward_model(folders[family]).eval()
    rows = pair_rows()
    expected = apart(model, rows)
    push = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (expected * push).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    attention = enable_segments(model)
    assert attention.packed, attention.reason
    install_scores(model)
    got = scores(model, collate_pairs(rows))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    (got * push).sum().backward()
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-6, msg=name)


def test_padded_rows_give_them_too(folders: dict[str, str]) -> None:
    model = reward_model(folders["llama"]).eval()
    install_scores(model)
    torch.testing.assert_close(scores(model, collate_pairs_padded(pair_rows())), apart(model, pair_rows()), rtol=1e-5, atol=1e-6)


def test_without_the_keyword_nothing_changes(folders: dict[str, str]) -> None:
    model = reward_model(folders["llama"]).eval()
    ids = torch.arange(1, 20)[None]
    before = model(input_ids=ids).logits
    install_scores(model)
    forward = model.forward
    install_scores(model)
    assert model.forward == forward
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(TypeError, match="every input is a keyword"):
        model(ids, score_at_S=torch.tensor([1]))
    causal = load_model(folders["llama"], "float32")
    assert not has_score_head(causal)
    with pytest.raises(TypeError, match="LlamaForCausalLM has no score head"):
        install_scores(causal)


def test_under_autocast_the_head_stays_in_float32(folders: dict[str, str]) -> None:
    model = reward_model(folders["llama"]).eval()
    install_scores(model)
    ids, at = torch.arange(1, 30)[None], torch.arange(29)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(input_ids=ids, score_at_S=at).scores_S
        hidden = find_decoder(model)(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(got, (hidden.float() @ score_head(model).weight[0]).detach(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, got.bfloat16().float())


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_the_router_loss_is_the_causal_models(folders: dict[str, str], family: str) -> None:
    inputs = {"input_ids": torch.arange(1, 25)[None], "output_router_logits": True}
    model, causal = reward_model(folders[family]).eval(), load_model(folders[family], "float32").eval()
    install_scores(model)
    install_logprobs(causal)
    asked = torch.tensor([3])
    expected = causal(**inputs, predict_N=asked, targets_N=asked).router_loss
    got = model(**inputs, score_at_S=asked)
    torch.testing.assert_close(got.router_loss, expected)
    got.router_loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("gate.weight"))
    assert model(input_ids=inputs["input_ids"], score_at_S=asked).router_loss is None


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_an_adapter_trains_the_head_and_is_loaded_exactly(
    folders: dict[str, str], tmp_path: Path, family: str, dtype: str
) -> None:
    model = attach_lora(reward_model(folders[family], dtype=dtype), Lora())
    enable_segments(model)
    install_scores(model)
    fuse(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name in trained if "lora_" not in name] == ["base_model.model.score.modules_to_save.default.weight"]
    assert {p.dtype for p in trained.values()} == {torch.float32}
    batch = collate_pairs(pair_rows())
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    for _ in range(3):
        got = scores(model, batch)
        torch.nn.functional.softplus(got[1::2] - got[0::2]).sum().backward()
        head_gradient = trained["base_model.model.score.modules_to_save.default.weight"].grad
        assert head_gradient is not None
        assert head_gradient.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["task_type"], saved["modules_to_save"]) == ("SEQ_CLS", ["score"])
    with torch.no_grad():
        expected = scores(model.eval(), batch)
        again = load_adapter(reward_model(folders[family], seed=8, dtype=dtype), str(tmp_path), trainable=False).eval()
        enable_segments(again)
        install_scores(again)
        fuse(again)
        assert torch.equal(scores(again, batch), expected)
        assert not torch.equal(scores(again, batch), scores(reward_with_segments(folders[family], dtype), batch))
        if family == "llama" and dtype == "float32":
            plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32).eval()
            row = pair_rows()[0]
            ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
            torch.testing.assert_close(plain(input_ids=ids).logits[0], expected[:1])


def reward_with_segments(folder: str, dtype: str) -> Any:
    model = reward_model(folder, dtype=dtype).eval()
    enable_segments(model)
    install_scores(model)
    return model


def test_an_adapter_that_is_resumed_and_saved_again_is_described_alike(folders: dict[str, str], tmp_path: Path) -> None:
    attach_lora(reward_model(folders["llama"]), Lora(modules_to_save="embed_tokens,score")).save_pretrained(tmp_path / "first")
    load_adapter(reward_model(folders["llama"]), str(tmp_path / "first")).save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second"))
    assert first["modules_to_save"] == second["modules_to_save"] == ["embed_tokens", "score"]
    assert first["auto_mapping"] == second["auto_mapping"]


@pytest.mark.parametrize("family", [*IN_TRANSFORMERS, *MADE])
def test_a_reward_model_has_the_fingerprint_of_its_base(folders: dict[str, str], family: str) -> None:
    causal, model = load_model(folders[family], "float32"), reward_model(folders[family])
    assert base_fingerprint(model) == base_fingerprint(causal) == base_fingerprint(reward_model(folders[family], seed=7))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1" in n).add_(1)
    assert base_fingerprint(model) != base_fingerprint(causal)


def test_adapters_of_the_other_kind_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    attach_lora(reward_model(folders["llama"]), Lora()).save_pretrained(tmp_path / "reward")
    attach_lora(load_model(folders["llama"], "float32"), Lora()).save_pretrained(tmp_path / "causal")
    with pytest.raises(UserError, match="reward: is the adapter of a reward model"):
        load_adapter(load_model(folders["llama"], "float32"), str(tmp_path / "reward"))
    with pytest.raises(UserError, match="causal: has no score head"):
        load_adapter(reward_model(folders["llama"]), str(tmp_path / "causal"))


def test_under_distributed_data_parallel(folders: dict[str, str], tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = attach_lora(reward_model(folders["llama"]), Lora())
        enable_segments(model)
        install_scores(model)
        wrapped = DistributedDataParallel(model)
        batch = collate_pairs(pair_rows())
        for _ in range(2):  # the second forward fails where the first left a parameter without its gradient
            output = wrapped(**batch.model_inputs(), score_at_S=batch.last_S())
            assert isinstance(output, SequenceScores)
            output.scores_S.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()
