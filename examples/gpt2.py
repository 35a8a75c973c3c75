"""GPT-2 small: 124,439,808 parameters, with random weights; nothing is downloaded.

    graphsplit partition examples/gpt2.py -k 2 -o out/gpt2

Needs transformers. Heads, units of the MLPs and the residual stream are divided; the vocabulary is shared.
"""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 50257


def model() -> nn.Module:
    """The published architecture. The cache of keys and values is only for generation, so it is off."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, use_cache=False))


def example_inputs() -> dict[str, torch.Tensor]:
    """Two sequences of 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(VOCABULARY, (2, 64), generator=generator)}
