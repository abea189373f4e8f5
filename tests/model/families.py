"""Tiny random models of many families, for tests."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WINDOW = 8
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SLIDING = {"mistral", "mixtral", "gemma3_text", "cohere2", "phi3", "starcoder2"}


def tiny(model_type: str, **changes: object) -> PreTrainedModel:
    """A model of the family with two layers; where it slides, one layer of each kind with a window of 8 tokens."""
    config = AutoConfig.for_model(model_type)
    for key, value in SMALL.items():
        known = getattr(config, key, None) is not None and not isinstance(getattr(type(config), key, None), property)
        if known or (key == "sliding_window" and model_type in SLIDING):
            setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention", "full_attention"] if model_type in SLIDING else config.layer_types[:2]
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=changes.get("attn_implementation")).float()
    with torch.no_grad():
        for parameter in model.parameters():  # far from zero, so that attention and biases matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
