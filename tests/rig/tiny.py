"""Tiny models: random weights of a scale at which answers depend on the prompt."""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512


def tiny_llama(folder, seed=0):
    """A Llama of 3 layers, 64 wide, in float32, without a tokenizer. Two KV heads, one for
    each of two ranks."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                fan_in = 1 if "embed" in name else weight.shape[1]
                torch.nn.init.normal_(weight, std=1.5 / math.sqrt(fan_in))
    model.save_pretrained(folder)
    return folder
