"""Where scores come from: by tokens or by text as the tokenizers demand, foreign classifiers as their cards use them, sums, lineage."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from adapters import stir
from conftest import CHATML, tiny_llama
from posttrain.flags import ModelFlags, RewardSourceFlags
from posttrain.model.adapter import FINGERPRINT, Lora, attach_lora, load_adapter
from posttrain.model.load import load_model
from posttrain.model.merge import merge_adapter
from posttrain.model.reward import install_scores, load_reward_model
from posttrain.training.episodes import Episode
from posttrain.training.reward_foreign import ForeignReward
from posttrain.training.reward_sources import build_reward_sources, check_lineage, load_reward
from posttrain.training.rewards import RewardSource, TokenReward, Weighted
from posttrain.training.token_scores import Scorer, ScoreStatistics, write_bias
from posttrain.types import UserError

OTHER = CHATML.replace("<|im_start|>", "## ").replace("<|im_end|>", " <|endoftext|>")
HOW = ModelFlags(model_name_or_path="unused", dtype="float32", forward_tokens=64)
TEXTS = [
    ("what rests?", "the fox"),
    ("what is in the shade of a tree?", "the dog jumps over it"),
    ("who?", "a fox"),
    ("why?", "so"),
]


def episodes(tokenizer: Any) -> list[Episode]:
    """One per text, as the policy samples them: through the stop token, but for the last, which was cut off."""
    made = []
    for index, (question, answer) in enumerate(TEXTS):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        stopped = index + 1 < len(TEXTS)
        ids = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] * stopped
        made.append(Episode(f"data.jsonl:{index + 1}", messages, [], prompt, ids, answer, stopped))
    return made


def lively(model: Any, folder: Path, tokenizer: Any) -> str:
    """Saved with weights that make the score depend on every token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def reward_folder(folder: Path, base: Path, tokenizer: Any) -> str:
    """A reward model as `posttrain rm --use_peft False` leaves it."""
    model = load_reward_model(str(base), "float32")
    model.config.pad_token_id = tokenizer.pad_token_id
    return lively(model, folder, tokenizer)


def load(folder: str, tokenizer: Any, how: ModelFlags = HOW, batch_rows: int = 3) -> Any:
    return load_reward(folder, how, tokenizer, "cpu", batch_rows)


def plain(folder: str, inputs: Sequence[dict[str, Any]]) -> list[float]:
    """Logits of transformers' class, one dialogue at a time: what a model's card shows."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(**{k: torch.tensor([v]) for k, v in row.items()}).logits[0].tolist() for row in inputs]


# ---------------------------------------------------------------- ours, on tokens


@pytest.mark.parametrize("padding_free", [True, False])
def test_with_the_policys_tokenizer_the_sampled_ids_are_read(
    tmp_path: Path, model_folder: Path, tokenizer: Any, padding_free: bool
) -> None:
    folder = reward_folder(tmp_path, model_folder, tokenizer)
    write_bias(folder, ScoreStatistics(0.75, 1.0, 9))
    reward = load(folder, tokenizer, dataclasses.replace(HOW, padding_free=padding_free))
    assert isinstance(reward, TokenReward)
    assert reward.scorer.packed is padding_free
    made = episodes(tokenizer)
    alone = load_reward_model(folder, "float32").eval()
    install_scores(alone)
    expected = []
    for episode in made:
        ids = torch.tensor([episode.prompt_ids + episode.answer_ids])
        with torch.no_grad():
            expected.append(alone(input_ids=ids, score_at_S=torch.tensor([ids.shape[1] - 1])).scores_S.item() - 0.75)
    assert torch.tensor(expected).std() > 0.05
    torch.testing.assert_close(reward(made), expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in reward.scorer.model.parameters())


def test_a_merged_adapter_scores_like_the_adapter(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted = attach_lora(load_reward_model(str(model_folder), "float32"), Lora())
    stir(adapted, 0.2)
    adapted.save_pretrained(adapter)
    merge_adapter(str(model_folder), str(adapter), merged, tokenizer)
    whole = load_adapter(load_reward_model(str(model_folder), "float32"), str(adapter), trainable=False)
    install_scores(whole)
    made = episodes(tokenizer)
    expected = TokenReward("adapter", Scorer(whole, False, 2))(made)
    assert torch.tensor(expected).std() > 0.01
    torch.testing.assert_close(load(str(merged), tokenizer)(made), expected, rtol=1e-4, atol=1e-4)


def test_a_score_that_is_no_number_names_the_answer(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    reward = load(reward_folder(tmp_path, model_folder, tokenizer), tokenizer)
    with torch.no_grad():
        reward.scorer.model.score.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"reward_model: gave nan for data\.jsonl:1"):
        reward(episodes(tokenizer))


# ---------------------------------------------------------------- ours, on text


def test_another_template_is_rendered_and_the_stop_token_scored_even_where_it_pads(
    tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template, own.eos_token = OTHER.replace("<|endoftext|>\n", "<|endoftext|>"), "<|endoftext|>"
    own.pad_token = own.eos_token
    folder = reward_folder(tmp_path, model_folder, own)
    made = episodes(tokenizer)
    ids = [
        own(f"## user\n{question} <|endoftext|>## assistant\n{answer} <|endoftext|>", add_special_tokens=False)["input_ids"]
        for question, answer in TEXTS
    ]
    assert all(row[-1] == own.pad_token_id for row in ids)
    alone = load_reward_model(folder, "float32").eval()
    install_scores(alone)
    with torch.no_grad():
        expected = [alone(input_ids=torch.tensor([row]), score_at_S=torch.tensor([len(row) - 1])).scores_S.item() for row in ids]
    (tmp_path / "run.json").write_text("{}")
    write_bias(folder, ScoreStatistics(0.25, 1.0, 9))
    reward = load(folder, tokenizer)
    assert isinstance(reward, ForeignReward)
    torch.testing.assert_close(reward(made), [score - 0.25 for score in expected], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- anybody's


def word_tokenizer(template: str | None, **special: Any) -> Any:
    """Words as tokens, BERT's pairs of [CLS] a [SEP] b [SEP] with their types; nothing of the policy's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for pair in TEXTS for text in pair for word in text.replace("?", " ?").split()})
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "user", "assistant", "<", ">", "system", *words]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names_of_inputs = ["input_ids", "token_type_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=names_of_inputs,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **special,
    )
    made.chat_template = template
    return made


def bert(n_labels: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=40,
        num_labels=n_labels, **changes,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def test_without_a_template_prompt_and_answer_are_a_pair(tmp_path: Path, tokenizer: Any) -> None:
    own = word_tokenizer(None, pad_token="[PAD]")
    folder = lively(bert(1), tmp_path, own)
    expected = [logits[0] for logits in plain(folder, [dict(own(question, answer)) for question, answer in TEXTS])]
    assert torch.tensor(expected).std() > 0.01
    assert own(*TEXTS[0])["token_type_ids"][-1] == 1
    reward = load(folder, tokenizer)
    assert isinstance(reward, ForeignReward)
    torch.testing.assert_close(reward(episodes(tokenizer)), expected, rtol=1e-4, atol=1e-5)


def test_several_turns_are_told_apart_by_blank_lines(tmp_path: Path, tokenizer: Any) -> None:
    reward = load(lively(bert(1), tmp_path, word_tokenizer(None, pad_token="[PAD]")), tokenizer)
    asked = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": None}, {"role": "user", "content": "why?"}]
    episode = dataclasses.replace(episodes(tokenizer)[0], messages=asked)
    assert reward.tokenizer.decode(reward.encode(episode)["input_ids"]) == "[CLS] who ? why ? [SEP] the fox [SEP]"


def test_two_labels_give_log_odds_and_three_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    own = word_tokenizer(None, pad_token="[PAD]")
    folder = lively(bert(2), tmp_path / "two", own)
    logits = plain(folder, [dict(own(question, answer)) for question, answer in TEXTS])
    reward = load(folder, tokenizer)
    expected = [b - a for a, b in logits]
    torch.testing.assert_close(reward(episodes(tokenizer)), expected, rtol=1e-4, atol=1e-5)
    swapped = dataclasses.replace(reward, label=0)(episodes(tokenizer))
    torch.testing.assert_close(swapped, [-score for score in expected], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="three: is a classifier of 3 labels"):
        load(lively(bert(3), tmp_path / "three", own), tokenizer)


def test_a_text_that_is_too_long_loses_its_beginning(tmp_path: Path, tokenizer: Any) -> None:
    reward = load(lively(bert(1), tmp_path / "pair", word_tokenizer(None, pad_token="[PAD]")), tokenizer)
    assert reward.max_tokens == 40
    long = [{"role": "user", "content": "fox " * 50 + "dog rests?"}]
    episode = dataclasses.replace(episodes(tokenizer)[0], messages=long)
    ids = reward.encode(episode)["input_ids"]
    text = reward.tokenizer.decode(ids)
    assert len(ids) == 40
    assert text.startswith("[CLS] fox fox")
    assert text.endswith("rests ? [SEP] the fox [SEP]")
    assert math.isfinite(reward([episode])[0])
    templated = "[CLS] {% for m in messages %}< {{ m['role'] }} > {{ m['content'] }} {% endfor %}"
    reward = load(lively(bert(1), tmp_path / "template", word_tokenizer(templated, pad_token="[PAD]")), tokenizer)
    ids = reward.encode(episode)["input_ids"]
    assert len(ids) == 40
    assert reward.tokenizer.decode(ids).startswith("[CLS] fox fox")
    assert reward.tokenizer.decode(ids).endswith("rests ? < assistant > the fox")


def gpt2(pad_token_id: int | None) -> Any:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, num_labels=1, pad_token_id=pad_token_id, eos_token_id=2
        )
    )


@pytest.mark.parametrize("pad", [None, 0, 2, 1000])
def test_padding_never_changes_what_a_classifier_says(tmp_path: Path, tokenizer: Any, pad: int | None) -> None:
    """None and out of range: the model has no padding and reads the last token. 2: it pads by its end token, and passes over it."""
    own = word_tokenizer("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}")
    assert own.pad_token is None
    folder = lively(gpt2(pad), tmp_path, own)
    rows = [
        own(f"user {question} [SEP]assistant {answer} [SEP]", add_special_tokens=False)["input_ids"] for question, answer in TEXTS
    ]
    assert len({len(row) for row in rows}) > 1
    expected = [logits[0] for logits in plain(folder, [{"input_ids": row} for row in rows])]
    for batch_rows in (1, 3, 10):
        got = load(folder, tokenizer, batch_rows=batch_rows)(episodes(tokenizer))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_types_is_given_none(tmp_path: Path, tokenizer: Any) -> None:
    """GPT-2 would add the embedding of token 0 or 1 to every token."""
    own = word_tokenizer(None)
    folder = lively(gpt2(0), tmp_path, own)
    expected = plain(folder, [{"input_ids": own(question, answer)["input_ids"]} for question, answer in TEXTS])
    torch.testing.assert_close(load(folder, tokenizer)(episodes(tokenizer)), [s for (s,) in expected], rtol=1e-4, atol=1e-5)


def test_scores_of_a_half_precision_decoder_are_not_rounded(tmp_path: Path, tokenizer: Any) -> None:
    own = word_tokenizer("{% for m in messages %}{{ m['content'] }} [SEP]{% endfor %}")
    reward = load(lively(gpt2(0), tmp_path, own), tokenizer, dataclasses.replace(HOW, dtype="bfloat16"))
    assert reward.model.transformer.wte.weight.dtype == torch.bfloat16
    scores = torch.tensor(reward(episodes(tokenizer)))
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_template_that_cannot_render_names_the_dialogue(tmp_path: Path, tokenizer: Any) -> None:
    own = word_tokenizer("{{ raise_exception('no tools here') }}")
    reward = load(lively(gpt2(0), tmp_path, own), tokenizer)
    with pytest.raises(UserError, match=r"its chat template cannot render the dialogue of data\.jsonl:1: no tools here"):
        reward(episodes(tokenizer))


# ---------------------------------------------------------------- from flags


@dataclasses.dataclass(frozen=True)
class Constant:
    name: str
    value: float

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        return [self.value + i for i in range(len(episodes))]


def build(tokenizer: Any, adapter: RewardSource | None = None, **chosen: Any) -> Weighted:
    return build_reward_sources(RewardSourceFlags(**chosen), HOW, tokenizer, "cpu", adapter)


def functions(folder: Path) -> str:
    (folder / "mine.py").write_text(
        "def length(answers):\n    return [len(a) for a in answers]\ndef cut(stopped):\n    return [not s for s in stopped]\n"
    )
    (folder / "other.py").write_text("def length(answers):\n    return [1.0 for a in answers]\n")
    return f"{folder}/mine.py"


def test_sources_are_summed_by_their_weights(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    file = functions(tmp_path)
    folder = reward_folder(tmp_path / "rm", model_folder, tokenizer)
    made = episodes(tokenizer)
    rewards = build(
        tokenizer, Constant("reward_adapter", 2.0), reward_adapter="a", reward_model_name_or_path=folder,
        reward_func=f"{file}:length, {file}:cut", reward_weights="1.0,-2,0.5,0", reward_batch_size=2,
    )  # fmt: skip
    scores, by_source = rewards.scores_by_source(made)
    assert list(by_source) == ["reward_adapter", "reward_model", "length", "cut"]
    assert by_source["reward_adapter"] == [2.0, 3.0, 4.0, 5.0]
    assert by_source["length"] == [float(len(answer)) for _, answer in TEXTS]
    assert by_source["cut"] == [0, 0, 0, 1]
    model = load(folder, tokenizer)(made)
    torch.testing.assert_close(by_source["reward_model"], model, rtol=1e-5, atol=1e-5)
    expected = [2.0 + i - 2 * model[i] + 0.5 * len(TEXTS[i][1]) for i in range(4)]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert rewards(made) == scores


def test_functions_of_one_name_keep_apart(tmp_path: Path, tokenizer: Any) -> None:
    file = functions(tmp_path)
    specs = f"{file}:length,{tmp_path}/other.py:length"
    assert list(build(tokenizer, reward_func=specs).scores_by_source(episodes(tokenizer))[1]) == specs.split(",")
    assert build(tokenizer, reward_func=specs).weights == (1.0, 1.0)


def test_the_batch_size_is_the_models(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    ours = reward_folder(tmp_path / "ours", model_folder, tokenizer)
    foreign = lively(bert(1), tmp_path / "foreign", word_tokenizer(None, pad_token="[PAD]"))
    (by_tokens,) = build(tokenizer, reward_model_name_or_path=ours, reward_batch_size=5).sources
    (by_text,) = build(tokenizer, reward_model_name_or_path=foreign, reward_batch_size=6).sources
    assert isinstance(by_tokens, TokenReward)
    assert isinstance(by_text, ForeignReward)
    assert (by_tokens.scorer.batch_rows, by_tokens.scorer.batch_tokens, by_text.batch_rows) == (5, 64, 6)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "nothing gives scores: name --reward_adapter, --reward_model_name_or_path or --reward_func"),
        ({"reward_func": "{}:length,{}:length"}, r"mine\.py:length: is named twice"),
        ({"reward_func": "{}:length", "reward_weights": "1,2"}, "--reward_weights 1,2: expected 1 finite numbers"),
        ({"reward_func": "{}:length", "reward_weights": "nan"}, "--reward_weights nan: expected 1 finite numbers"),
        ({"reward_func": "{}:length", "reward_weights": "a"}, "--reward_weights a: expected numbers, like 1.0,0.5"),
        ({"reward_func": "{}:length", "reward_batch_size": 0}, "--reward_batch_size 0: must be at least 1"),
        ({"reward_model_name_or_path": "{}/nowhere"}, "no such model folder"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, tokenizer: Any, chosen: dict[str, Any], message: str) -> None:
    file = functions(tmp_path)
    given = {name: value.replace("{}", file) if isinstance(value, str) else value for name, value in chosen.items()}
    with pytest.raises(UserError, match=message):
        build(tokenizer, **given)


def test_models_that_are_no_reward_models(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="is a language model without a score head; `posttrain rm` trains a reward model"):
        load(str(model_folder), tokenizer)
    attach_lora(load_reward_model(str(model_folder), "float32"), Lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter: holds an adapter; name it with --reward_adapter"):
        load(str(tmp_path / "adapter"), tokenizer)
    folder = Path(reward_folder(tmp_path / "rm", model_folder, tokenizer))
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="rm: cannot load its tokenizer"):
        load(str(folder), tokenizer)


# ---------------------------------------------------------------- lineage


def reward_adapter(folder: Path, base: Path) -> str:
    attach_lora(load_reward_model(str(base), "float32"), Lora()).save_pretrained(folder)
    return str(folder)


def test_an_adapter_of_the_policys_base_is_taken(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    adapter = reward_adapter(tmp_path, model_folder)
    tokenizer.save_pretrained(adapter)
    check_lineage(adapter, load_model(str(model_folder), "float32"), tokenizer)


def test_an_adapter_of_another_base_is_refused_with_both_hashes(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    adapter = reward_adapter(tmp_path / "adapter", model_folder)
    tiny_llama(vocab=len(tokenizer), seed=1).save_pretrained(tmp_path / "other")
    other = load_model(str(tmp_path / "other"), "float32")
    here = attach_lora(load_model(str(tmp_path / "other"), "float32"), Lora()).peft_config["default"].auto_mapping[FINGERPRINT]
    theirs = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["auto_mapping"][FINGERPRINT]
    with pytest.raises(UserError) as caught:
        check_lineage(adapter, other)
    text = str(caught.value)
    assert f"weights {theirs[:8]})" in text
    assert f"weights {here[:8]})" in text
    assert theirs[:8] != here[:8]
    assert "\n" not in text
    assert "--reward_model_name_or_path" in text


def test_other_tokens_are_refused(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    adapter = reward_adapter(tmp_path, model_folder)
    own = copy.deepcopy(tokenizer)
    own.chat_template = OTHER
    own.save_pretrained(adapter)
    model = load_model(str(model_folder), "float32")
    with pytest.raises(UserError, match="its chat template is not the policy's"):
        check_lineage(adapter, model, tokenizer)
    own.add_tokens(["fox"])
    own.save_pretrained(adapter)
    with pytest.raises(UserError, match="its vocabulary is not the policy's"):
        check_lineage(adapter, model, tokenizer)


def test_other_adapters_are_refused_and_one_without_a_hash_is_told(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(str(model_folder), "float32")
    attach_lora(load_model(str(model_folder), "float32"), Lora()).save_pretrained(tmp_path / "causal")
    with pytest.raises(UserError, match="causal: is not the adapter of a reward model"):
        check_lineage(str(tmp_path / "causal"), model)
    adapter = Path(reward_adapter(tmp_path / "reward", model_folder))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "auto_mapping": None}))
    check_lineage(str(adapter), model)
    assert "cannot be checked to be of the policy's base" in caplog.text
