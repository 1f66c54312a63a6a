"""Decodes in JAX with a paged KV cache that stays where it is.

SPDX-License-Identifier: Apache-2.0

    python examples/jax_decode/decode.py

A small Llama with random weights, on the CPU or a GPU, without torch. One jitted step
serves the prompts and each new token. Its caches are donated, so that XLA updates them
in place: the program looks at their addresses before and after, and for copies of a
cache in the compiled step. Then it computes the same tokens anew in plain JAX, without
a cache.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import xla_ops.jax as xj

VOCAB, HIDDEN, LAYERS, MLP = 256, 64, 2, 128
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
PAGE, NUM_BLOCKS, MAX_TOKENS = 8, 16, 64
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


class Batch(NamedTuple):
    """Where a step's tokens belong; the sizes are those of its program.

    Attributes:
        tokens, positions, slots: [num_tokens], of all sequences one after the other.
        starts: [num_seqs + 1], where each sequence's tokens begin.
        lengths: [num_seqs], tokens of each so far, the new ones included.
        tables: [num_seqs, max_blocks], the pages of each.
    """

    tokens: jax.Array
    positions: jax.Array
    slots: jax.Array
    starts: jax.Array
    lengths: jax.Array
    tables: jax.Array


def make_weights(seed: int = 0) -> dict:
    shapes = {
        "attention_norm": (HIDDEN,),
        "qkv": (QKV, HIDDEN),
        "out": (HIDDEN, HEADS * HEAD_DIM),
        "mlp_norm": (HIDDEN,),
        "gate_up": (2 * MLP, HIDDEN),
        "down": (HIDDEN, MLP),
    }
    rng = np.random.default_rng(seed)

    def draw(shape):
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    return {
        "embedding": draw((VOCAB, HIDDEN)),
        "norm": draw((HIDDEN,)),
        "layers": [{n: draw(s) for n, s in shapes.items()} for _ in range(LAYERS)],
        "rotary": rotary_table(),
    }


def rotary_table() -> jax.Array:
    """[MAX_TOKENS, HEAD_DIM]: cosines, then sines."""
    frequency = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = np.arange(MAX_TOKENS)[:, None] * frequency
    table = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    return jnp.asarray(table, jnp.float32)


def forward(weights: dict, caches: list, batch: Batch) -> tuple[list, jax.Array]:
    """Returns the new caches and the next token of each sequence."""
    x = weights["embedding"][batch.tokens]
    residual = jnp.zeros_like(x)
    new = []
    for layer, cache in zip(weights["layers"], caches, strict=True):
        x, residual = xj.fused_add_rms_norm(x, residual, layer["attention_norm"])
        # Rotates queries and keys, without a norm; keys and values go to the cache.
        query, cache = xj.fused_qk_norm_rope_and_cache(
            x @ layer["qkv"].T,
            *(HEADS, KV_HEADS, HEAD_DIM, 1e-6, None, None, weights["rotary"], True),
            *(batch.positions, cache, None, batch.slots),
        )
        new.append(cache)
        attended = xj.paged_attention(
            query,
            cache,
            batch.lengths,
            batch.tables,
            batch.starts,
            batch.lengths.shape[0],
            HEAD_DIM**-0.5,
        )
        x = attended.reshape(-1, HEADS * HEAD_DIM) @ layer["out"].T
        x, residual = xj.fused_add_rms_norm(x, residual, layer["mlp_norm"])
        x = xj.silu_and_mul(x @ layer["gate_up"].T) @ layer["down"].T
    x, _ = xj.fused_add_rms_norm(x, residual, weights["norm"])
    last = x[batch.starts[1:] - 1]
    return new, jnp.argmax(last @ weights["embedding"].T, -1).astype(jnp.int32)


@functools.partial(jax.jit, donate_argnums=1)
def step(weights: dict, caches: list, batch: Batch) -> tuple[list, jax.Array]:
    return forward(weights, caches, batch)


def make_caches() -> list:
    shape = (2, NUM_BLOCKS, PAGE, KV_HEADS, HEAD_DIM)
    return [jnp.zeros(shape, jnp.float32) for _ in range(LAYERS)]


def make_batch(tokens: list[list[int]], lengths: list[int]) -> Batch:
    """The new tokens of each sequence, of `lengths` tokens before."""
    width = NUM_BLOCKS // len(tokens)
    tables = np.arange(len(tokens) * width).reshape(len(tokens), width)
    counts = [len(t) for t in tokens]
    places = [np.arange(n, n + c) for n, c in zip(lengths, counts, strict=True)]
    slots = [tables[s][p // PAGE] * PAGE + p % PAGE for s, p in enumerate(places)]
    arrays = (
        np.concatenate(tokens),
        np.concatenate(places),
        np.concatenate(slots),
        np.cumsum([0, *counts]),
        np.add(lengths, counts),
        tables,
    )
    return Batch(*(jnp.asarray(a, jnp.int32) for a in arrays))


def decode(weights: dict, prompts: list[list[int]], num_new: int) -> tuple[list, dict]:
    """Returns the new tokens of each prompt, and what happened to the caches."""
    caches = make_caches()
    new: list[list[int]] = [[] for _ in prompts]
    fed, lengths = prompts, [0] * len(prompts)
    before = [cache.unsafe_buffer_pointer() for cache in caches]
    for _ in range(num_new):
        batch = make_batch(fed, lengths)
        caches, tokens = step(weights, caches, batch)
        lengths = [n + len(t) for n, t in zip(lengths, fed, strict=True)]
        fed = [[int(token)] for token in tokens]
        for sequence, token in zip(new, fed, strict=True):
            sequence += token
    text = step.lower(weights, caches, batch).compile().as_text()
    shape = ",".join(map(str, caches[0].shape))
    facts = {
        "before": before,
        "after": [cache.unsafe_buffer_pointer() for cache in caches],
        "copies": len(re.findall(rf"\[{shape}\][^ ]* copy\(", text)),
        "calls": text.count('custom_call_target="xla_ops.'),
    }
    return new, facts


def plain_next(weights: dict, tokens: list[int]) -> int:
    """The next token of one sequence in plain JAX, from all of its tokens."""

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight

    def rotate(x):
        cos, sin = jnp.split(weights["rotary"][: len(tokens), None], 2, -1)
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embedding"][jnp.asarray(tokens)]
    seen = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
    for layer in weights["layers"]:
        qkv = (norm(x, layer["attention_norm"]) @ layer["qkv"].T).reshape(
            len(tokens), -1, HEAD_DIM
        )
        query, key = rotate(qkv[:, :HEADS]), rotate(qkv[:, HEADS : HEADS + KV_HEADS])
        key, value = (
            jnp.repeat(part, HEADS // KV_HEADS, 1)
            for part in (key, qkv[:, HEADS + KV_HEADS :])
        )
        logits = jnp.einsum("qhd,khd->hqk", query, key) * HEAD_DIM**-0.5
        weight = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
        attended = jnp.einsum("hqk,khd->qhd", weight, value)
        x = x + attended.reshape(len(tokens), -1) @ layer["out"].T
        gate, up = jnp.split(norm(x, layer["mlp_norm"]) @ layer["gate_up"].T, 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ layer["down"].T
    return int(jnp.argmax(norm(x[-1], weights["norm"]) @ weights["embedding"].T))


def main() -> None:
    weights = make_weights()
    prompts, num_new = [[5, 17, 101, 7, 9, 33, 60, 2, 4], [200, 3]], 12
    new, facts = decode(weights, prompts, num_new)
    assert facts["before"] == facts["after"], "the caches moved"
    assert facts["copies"] == 0, "a cache is copied"
    for prompt, tokens in zip(prompts, new, strict=True):
        expected = list(prompt)
        for _ in range(num_new):
            expected.append(plain_next(weights, expected))
        assert tokens == expected[len(prompt) :], (tokens, expected)
        print(f"{prompt} -> {tokens}")
    print(f"{facts['calls']} handlers a step on {jax.devices()[0].platform}")
    print(f"caches at {[hex(a) for a in facts['after']]}, as at the start; no copies")


if __name__ == "__main__":
    main()
