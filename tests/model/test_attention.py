"""Packed equals apart."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.model.attention import enable_segments


def test_llama_is_packed() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    assert enable_segments(LlamaForCausalLM(config)).packed
