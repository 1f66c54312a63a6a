"""Gradients of attention's batches (`varlen`), and what they have to be.

The oracle is torch's own derivative of attention by a loop over sequences.
"""

import torch

import xla_ops
from support import assert_close_to_exact
from varlen import attend

ALL = ("q", "k", "v", "sinks")


def cotangents(batch):
    """Gradients of out and lse."""
    q = batch.arguments["q"]
    return torch.randn(q.shape).to(q.dtype), torch.randn(q.shape[1], q.shape[0])


def asked_of(arguments, asked=ALL):
    return [name for name in asked if arguments.get(name) is not None]


def call(arguments):
    return xla_ops.flash_attn_varlen(**arguments)


def gradients(path, arguments, grads, asked=ALL, function=call):
    """What backward gives on a path, by argument."""
    asked = asked_of(arguments, asked)
    given = path.put({n: arguments[n].clone() for n in asked})
    given = {**path.put(arguments), **given}
    for name in asked:
        given[name].requires_grad_()
    grads = path.put(grads)
    results = path.function(function)(given)
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
    path.wait()
    return {name: given[name].grad.cpu() for name in asked}


def oracle(batch, arguments, grads, dtype, asked=ALL):
    """The same by torch, in `dtype` throughout."""
    leaf = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
    options = {**arguments}
    query, sinks = leaf(arguments["q"]), arguments.get("sinks")
    if sinks is not None:
        options["sinks"] = sinks = leaf(sinks)
    keys, values = ([leaf(t) for t in ts] for ts in (batch.keys, batch.values))
    results = attend(query, keys, values, batch.query_lens, dtype, options)
    leaves = [query, *keys, *values, *([] if sinks is None else [sinks])]
    # Where nothing is seen, nothing depends on them.
    total = sum(0 * t.sum() for t in leaves)
    pairs = [
        (r + total, g.to(dtype))
        for r, g in zip(results, grads, strict=True)
        if g is not None
    ]
    found = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs])
    n = len(keys)
    wanted = {"q": found[0], "sinks": found[-1]}
    for name, of_seqs in (("k", found[1 : n + 1]), ("v", found[n + 1 : 2 * n + 1])):
        if arguments.get("block_table") is None:
            wanted[name] = in_rows(arguments, name, of_seqs, dtype)
    return {name: wanted[name] for name in asked_of(arguments, asked)}


def in_rows(arguments, name, of_seqs, dtype):
    """Gradients of each sequence's tokens, where those are in k or v."""
    whole = torch.zeros(arguments[name].shape, dtype=dtype)
    starts = arguments["cu_seqlens_k"].tolist()
    pads = arguments.get("leftpad_k")
    for s, t in enumerate(of_seqs):
        start = starts[s] + (0 if pads is None else int(pads[s]))
        whole[start : start + len(t)] = t
    return whole


def check(path, batch, asked=ALL, grads=None, **options):
    """Holds the gradients to the accuracy rule; returns them."""
    arguments = {**batch.arguments, **options}
    if arguments.get("block_table") is not None:
        asked = [name for name in asked if name not in ("k", "v")]
    grads = grads or cotangents(batch)
    got = gradients(path, arguments, grads, asked)
    dtype = arguments["q"].dtype
    exact = oracle(batch, arguments, grads, torch.float64, asked)
    rounded = oracle(batch, arguments, grads, dtype, asked)
    assert set(got) == set(exact)
    for name, t in got.items():
        assert t.dtype == arguments[name].dtype
        assert_close_to_exact(t, rounded[name], exact[name], floor=4e-6)
    return got


def everything(seqs, heads):
    return {
        "window_left": 20,
        "window_right": 1,
        "softcap": 15.0,
        "softmax_scale": 0.3,
        "alibi_slopes": torch.rand(seqs, heads) / 4,
        "sinks": torch.randn(heads),
    }
