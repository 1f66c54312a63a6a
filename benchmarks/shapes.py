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


def weight(name: str, shape, dtype, rows=slice(None), columns=slice(None)):
    """A weight that depends on its name and shape alone, or a part of it, made at
    memory's speed: no more than the part is ever written."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)[rows]
    # The whole would be copies of this, one below the other.
    block = torch.empty(max(1, (1 << 20) // shape[1]), shape[1], dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    block.normal_(0, shape[1] ** -0.5, generator=generator)
    return block[:, columns].index_select(0, torch.arange(shape[0])[rows] % len(block))
