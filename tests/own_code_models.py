"""Small models with code of their own, written as such code was for transformers 4: own attention, own tables, a fused projection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class OldConfig(PretrainedConfig):
    model_type = "old"

    def __init__(self, vocab_size=64, hidden_size=16, positions=512, **kwargs):
        self.vocab_size, self.hidden_size, self.positions = vocab_size, hidden_size, positions
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        angles = torch.outer(torch.arange(config.positions).float(), 0.1 ** torch.arange(config.hidden_size).float())
        self.register_buffer("sines", angles.sin(), persistent=False)  # on no file
        self.cosines = angles.cos()  # and not even a buffer

    def forward(self, x, mask):
        x = x + self.sines[: x.shape[1]] + self.cosines[: x.shape[1]].to(x.device)
        q, k, v = self.W_pack(x).chunk(3, -1)
        return x + self.o_proj(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class OldPreTrainedModel(PreTrainedModel):
    config_class = OldConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        pass


class OldModel(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config)])
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, return_dict=True):
        mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        hidden = self.layers[0](self.embed_tokens(input_ids), mask[None])
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=((hidden, hidden),) if use_cache else None)


class OldForCausalLM(OldPreTrainedModel, GenerationMixin):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = OldModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, return_dict=True, **kwargs):
        if past_key_values is not None:
            past_key_values[0][0].shape
        outputs = self.model(input_ids, use_cache=use_cache)
        logits = self.lm_head(outputs.last_hidden_state)
        if not return_dict:  # None too, which peft passes on
            return (logits,)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        return {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": kwargs.get("use_cache")}
"""


def old_model(tokenizer_folder: Path, folder: Path, vocab: int, code: str = CODE) -> Path:
    """A folder with the code above, random weights and the tokenizer of another folder."""
    folder.mkdir(parents=True)
    for file in tokenizer_folder.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "modeling_old.py").write_text(code)
    config = {
        "model_type": "old", "architectures": ["OldForCausalLM"], "vocab_size": vocab, "hidden_size": 16, "dtype": "float32",
        "transformers_version": "4.31.0", "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "modeling_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (vocab, 16), "model.layers.0.W_pack.weight": (48, 16),
        "model.layers.0.o_proj.weight": (16, 16), "lm_head.weight": (vocab, 16),
    }  # fmt: skip
    torch.save({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / "pytorch_model.bin")
    return folder
