"""Models that bring code of their own, written for transformers 4: they compute what they computed there, or one line says why not."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flag_probes_models import coded_model
from own_code_models import CODE, old_model
from posttrain.cli import main
from posttrain.commands.inference import Answerer, answer
from posttrain.data.chat_render import message_dicts, render
from posttrain.flags import SamplingFlags
from posttrain.model.adapter import linear_names
from posttrain.model.attention import enable_segments
from posttrain.model.load import load_model, load_tokenizer
from posttrain.model.logprobs import install_logprobs
from posttrain.model.own_code import misfit_line
from posttrain.model.own_generation import keeps_cache, pads_left, settle_generation
from posttrain.model.rope import context_tokens
from posttrain.training.rollout import Sampling, generate
from posttrain.types import UserError

REWARDS = Path(__file__).parents[1] / "ppo_rewards.py"


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def old(model_folder: Path, tmp_path: Path, tokenizer: Any) -> Path:
    return old_model(model_folder, tmp_path / "old", len(tokenizer))


def as_written(folder: Path) -> Any:
    """The model as transformers 4 made it: the class called, then the weights read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = importlib.import_module(type(config).__module__).OldForCausalLM(config)
    model.load_state_dict(torch.load(folder / "pytorch_model.bin"))
    return model.eval()


def test_tables_that_no_file_holds_are_computed(old: Path) -> None:
    state = torch.get_rng_state()
    loaded = load_model(str(old), "float32", trust_remote_code=True).eval()
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids, return_dict=True).logits, as_written(old)(ids, return_dict=True).logits)


def test_a_decoder_that_knows_neither_mask_nor_positions(old: Path) -> None:
    model: Any = load_model(str(old), "float32", trust_remote_code=True)
    assert install_logprobs(model).projection is not None
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    asked = {"predict_N": torch.tensor([0, 1, 4, 5]), "targets_N": torch.tensor([6, 7, 6, 7])}
    positions = (mask.cumsum(1) - 1) * mask
    got = model(input_ids=ids, attention_mask=mask, position_ids=positions, **asked).logprobs_N
    assert torch.allclose(got[:2], got[2:])
    with pytest.raises(TypeError, match="attention_mask"):  # on the left it would be attended to
        model(input_ids=ids, attention_mask=mask.flip(1), position_ids=positions, **asked)


def test_one_model_through_training_merge_and_inference(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "the dog"}, {"from": "gpt", "value": "rests in the shade"}]
    rows.write_text((json.dumps({"conversations": turns}) + "\n") * 4)
    trust = ["--trust_remote_code", "True"]
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    words = ["sft", "--model_name_or_path", str(old), "--train_file_dir", str(rows), "--output_dir", run, "--max_steps", "1"]
    assert main([*words, *trust, "--packing", "True", "--report_to", "none", "--use_cpu", "True"]) == 0
    assert "rows: padded" in capsys.readouterr().err
    assert {"W_pack", "o_proj"} == set(json.loads((tmp_path / "run" / "adapter_config.json").read_text())["target_modules"])
    assert main(["merge", "--base_model", str(old), "--lora_model", run, "--output_dir", merged, *trust]) == 0
    out = tmp_path / "answers.jsonl"
    assert main(["inference", "--base_model", merged, *trust, "--max_new_tokens", "3", "--output_file", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2
    assert "one prompt at a time" in capsys.readouterr().err


def test_code_that_keeps_its_cache_in_its_own_way_answers_without(old: Path, tokenizer: Any) -> None:
    model = load_model(str(old), "float32", trust_remote_code=True).eval()
    settle_generation(model)
    assert (keeps_cache(model), pads_left(model)) == (False, False)
    answerer = Answerer(model, tokenizer, 100)
    how = SamplingFlags(max_new_tokens=4, temperature=0)
    prompts = [[5, 6, 7, 8], [9, 10]]
    together = answer(answerer, prompts, how)
    for prompt, found in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(len(found.ids)):
            ids.append(int(as_written(old)(torch.tensor([ids]), return_dict=True).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == found.ids


def test_ppo_samples_from_code_that_keeps_its_cache_in_its_own_way(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    model = load_model(str(old), "float32", trust_remote_code=True).eval()
    settle_generation(model)
    prompts = [[5, 6, 7, 8], [9, 10]]  # of unlike lengths, whose padding the code would attend to
    for prompt, response in zip(prompts, generate(model, prompts, Sampling(4, (), 0, temperature=0), 0), strict=True):
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(as_written(old)(torch.tensor([ids]), return_dict=True).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == response.ids
    rows = tmp_path / "prompts.jsonl"
    rows.write_text((json.dumps({"messages": [{"role": "user", "content": "the dog"}]}) + "\n") * 4)
    words = ["ppo", "--model_name_or_path", str(old), "--trust_remote_code", "True", "--train_file_dir", str(rows)]
    words += [
        "--output_dir",
        str(tmp_path / "ppo"),
        "--reward_func",
        f"{REWARDS}:vowels",
        "--use_cpu",
        "True",
        "--report_to",
        "none",
    ]
    sizes = {"max_steps": 1, "rollout_batch_size": 4, "mini_batch_size": 4, "max_target_length": 4, "learning_rate": 0.01}
    assert main([*words, *(str(word) for name, value in sizes.items() for word in (f"--{name}", value))]) == 0
    said = capsys.readouterr().err
    assert "without a cache" in said
    assert "one prompt at a time" in said
    assert (tmp_path / "ppo" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("old_words", "new_words", "message"),
    [
        (
            "import torch\n",
            "import torch\nfrom transformers.deepspeed import gone\n",
            r"No module named 'transformers.deepspeed' \(mod",
        ),
        (
            "import torch\n",
            "import torch\nimport no_such_package\n",
            "needs packages that are not installed: pip install no_such_package",
        ),
        (
            "super().__init__(config)\n        self.model",
            "super().__init__(config)\n        config.lost\n        self.model",
            "'lost'",
        ),
        ("bias=False)\n        self.post_init()", "bias=False)", r"all_tied_weights_keys' \(modeling_old.py\)"),
        (
            "    _tied",
            "    def tie_weights(self):\n        pass\n\n    _tied",
            r"tie_weights\(\) got an unexpected .*\(modeling_old.py, line",
        ),
    ],
)
def test_code_that_does_not_run_here_is_one_line(
    old_words: str, new_words: str, message: str, model_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    assert CODE.count(old_words) == 1
    folder = old_model(model_folder, tmp_path / "broken", len(tokenizer), CODE.replace(old_words, new_words))
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(folder), "float32", trust_remote_code=True)
    assert "\n" not in str(caught.value)
    if "packages" not in message:
        assert "written for transformers 4.31.0, does not run under" in str(caught.value)


def test_an_error_in_training_is_one_line_and_ours_keeps_its_traceback(
    model_folder: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = CODE.replace("mask[None])", "mask[None])\n        if self.training:\n            hidden.no_such_method()")
    folder = old_model(model_folder, tmp_path / "late", len(tokenizer), code)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 4)
    words = ["pt", "--model_name_or_path", str(folder), "--train_file_dir", str(text), "--output_dir", str(tmp_path / "run")]
    words += ["--trust_remote_code", "True", "--report_to", "none", "--use_cpu", "True"]
    assert main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "its own code" in last
    assert "no_such_method" in last
    assert misfit_line(TypeError("ours() got an unexpected keyword argument 'x'")) is None
    monkeypatch.setattr("posttrain.commands.train.resolve", lambda _: None.ours)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        main([*words[:-2], "--overwrite_output_dir", "True"])


LEAKS = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

class CodedConfig(LlamaConfig):
    model_type = "coded"

class CodedModel(LlamaModel):
    def forward(self, *args, **kwargs):
        if self.training:  # as Baichuan-7B with xformers: causal, and no mask asked
            kwargs.pop("segments", None)
            kwargs["attention_mask"] = None
        return super().forward(*args, **kwargs)

class CodedForCausalLM(LlamaForCausalLM):
    config_class = CodedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = CodedModel(config)
        self.post_init()

class CodedTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("leaks", [True, False])
def test_attention_that_sees_other_documents_in_training_only_is_padded(model_folder: Path, tmp_path: Path, leaks: bool) -> None:
    folder = coded_model(model_folder, tmp_path / "coded")
    if leaks:
        (folder / "coded.py").write_text(LEAKS)
    model = load_model(str(folder), "float32", trust_remote_code=True)
    model.train()
    found = enable_segments(model)
    assert found.packed is not leaks
    assert all(module.training for module in model.modules())
    assert ("differ" in found.reason or "sees" in found.reason) is leaks


TOKENIZER = """
from transformers import PreTrainedTokenizer

PIECES = ["<unk>", "<s>", "</s>", "<|user|>", *(chr(n) for n in range(32, 127))]

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}

    @property
    def vocab_size(self):
        return len(PIECES)

    def get_vocab(self):
        return {piece: n for n, piece in enumerate(PIECES)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return PIECES.index(token) if token in PIECES else 0

    def _convert_id_to_token(self, index):
        return PIECES[index]
"""


def own_tokenizer(folder: Path, code: str = TOKENIZER) -> Path:
    folder.mkdir()
    (folder / "own_tokenizer.py").write_text(code)
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    marks = {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | marks))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "4.31.0"}))
    return folder


def test_marks_that_own_code_takes_apart_become_one_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(own_tokenizer(tmp_path / "own")), trust_remote_code=True)
    ids = tokenizer("a<|user|>b</s>", add_special_tokens=False)["input_ids"]
    assert ids == [4 + ord("a") - 32, 3, 4 + ord("b") - 32, 2]


def test_only_what_own_code_does_is_laid_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error of ours that it called, nor one of a class that it only imports."""
    module: Any = ModuleType("transformers_modules.theirs")
    exec(
        "from torch import Tensor\nclass Old: pass\ndef call(inner): return inner(None)\ndef fail(): return Old().gone",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def line_of(failing: Callable[[], Any]) -> str | None:
        with pytest.raises((AttributeError, TypeError)) as caught:
            failing()
        return misfit_line(caught.value)

    assert "'gone' (" in str(line_of(module.fail))
    assert line_of(lambda: module.call(message_dicts)) is None
    assert "(theirs.py)" in str(line_of(lambda: module.Old().lost))
    assert line_of(lambda: torch.zeros(1).lost) is None


def test_a_tokenizer_that_loads_and_cannot_be_called_is_one_line(tmp_path: Path) -> None:
    code = (
        TOKENIZER
        + "\n    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None):\n        return encoded_inputs\n"
    )
    folder = own_tokenizer(tmp_path / "own", code)
    with pytest.raises(UserError, match=r"does not run under .*_pad\(\) got an unexpected .*\(own_tokenizer.py\)"):
        load_tokenizer(str(folder), trust_remote_code=True)


def test_a_template_gets_marks_that_are_plain_properties() -> None:
    given: dict[str, Any] = {}
    stub = SimpleNamespace(special_tokens_map={"bos_token": "<s>"}, bos_token="<s>", eos_token="</s>", pad_token=None)
    stub.apply_chat_template = lambda turns, **kwargs: given.update(kwargs) or "text"
    render(stub, [], prompt=False)
    assert given["eos_token"] == "</s>"
    assert "bos_token" not in given
    assert "pad_token" not in given


def test_a_head_that_own_code_does_not_name_gets_no_matrices(model_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    code = CODE.replace("lm_head", "output_layer").replace("return self.output_layer\n", "return None\n")
    folder = old_model(model_folder, tmp_path / "headless", len(tokenizer), code)
    weights = torch.load(folder / "pytorch_model.bin")
    weights["output_layer.weight"] = weights.pop("lm_head.weight")
    torch.save(weights, folder / "pytorch_model.bin")
    taken, left = linear_names(load_model(str(folder), "float32", trust_remote_code=True))
    assert left == ["output_layer"]
    assert {name.rsplit(".", 1)[-1] for name in taken} == {"W_pack", "o_proj"}


def test_positions_of_own_code() -> None:
    known = SimpleNamespace(seq_length=512, auto_map={"AutoConfig": "x.Y"})
    assert context_tokens(known) == 512
    assert context_tokens(SimpleNamespace(seq_length=512)) is None  # Bloom's, which is no limit
