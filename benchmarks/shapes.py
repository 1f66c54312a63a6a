"""Models that programs here measure: shapes, by config.json's names, and weights."""

import zlib

# Llama 3's: 3.2 for the smallest, 3.1.
LLAMA = {
    "1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


def weight(name: str, shape, dtype):
    """A weight that depends on its name and shape alone, made at memory's speed."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    block = torch.empty(1 << 20, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    block.normal_(0, shape[1] ** -0.5, generator=generator)
    whole = torch.empty(shape, dtype=dtype)
    for part in whole.view(-1).split(block.numel()):
        part.copy_(block[: part.numel()])
    return whole
