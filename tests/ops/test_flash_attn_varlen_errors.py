"""xla_ops.flash_attn_varlen: what is no legal call, and what is said of it."""

import dataclasses

import pytest
import torch
import torch_xla

import xla_ops
from support import int32
from xla_ops.core.custom_call import call_directly
from xla_ops.core.op import OPS

Q = torch.ones(3, 4, 16)
ROWS: dict = {
    "q": Q,
    "k": torch.ones(5, 2, 16),
    "v": torch.ones(5, 2, 16),
    "cu_seqlens_q": int32(0, 2, 3),
    "cu_seqlens_k": int32(0, 3, 5),
    "max_seqlen_q": 2,
    "max_seqlen_k": 3,
}
PAGED = ROWS | {
    "k": torch.ones(5, 4, 2, 16),
    "v": torch.ones(5, 4, 2, 16),
    "cu_seqlens_k": None,
    "seqused_k": int32(2, 1),
    "block_table": int32([0], [1]),
}
ONE = torch.ones(1)
ERRORS = [
    (ROWS, {"q": Q.int()}, "q must be float32, float16 or bfloat16, got int32"),
    (
        ROWS,
        {"q": torch.ones(3, 64)},
        "q must have shape [num_tokens, num_heads, head_dim], got [3, 64]",
    ),
    (
        ROWS,
        {name: torch.ones(5, 2, 12) for name in "qkv"},
        "q must have a head_dim that is a multiple of 8 up to 256, got 12",
    ),
    (
        PAGED,
        {"q": torch.ones(3, 2, 264)}
        | {name: torch.ones(5, 4, 2, 264) for name in "kv"},
        "q must have a head_dim that is a multiple of 8 up to 256, got 264",
    ),
    (
        ROWS,
        {"k": PAGED["k"]},
        "k must have shape [total_k, num_kv_heads, head_dim], got [5, 4, 2, 16]",
    ),
    (
        PAGED,
        {"k": ROWS["k"]},
        "k must have shape [num_blocks, page_size, num_kv_heads, head_dim], got"
        " [5, 2, 16]",
    ),
    (
        ROWS,
        {"k": Q[:, :2].half(), "v": Q[:, :2].half()},
        "k must be float32, got float16",
    ),
    (ROWS, {"v": Q[:, :2]}, "v must have shape [5, 2, 16], got [3, 2, 16]"),
    (ROWS, {"v": ROWS["v"].half()}, "v must be float32, got float16"),
    (
        ROWS,
        {"k": torch.ones(5, 2, 8), "v": torch.ones(5, 2, 8)},
        "k must have head_dim 16, got 8",
    ),
    (
        ROWS,
        {"k": torch.ones(5, 3, 16), "v": torch.ones(5, 3, 16)},
        "num_kv_heads must divide num_heads 4, got 3",
    ),
    (
        PAGED,
        {"k": torch.ones(5, 0, 2, 16), "v": torch.ones(5, 0, 2, 16)},
        "page_size must be at least 1, got 0",
    ),
    (ROWS, {"cu_seqlens_q": ONE}, "cu_seqlens_q must be int32, got float32"),
    (
        ROWS,
        {"cu_seqlens_q": int32(3)[0]},
        "cu_seqlens_q must have shape [max_num_seqs + 1], got []",
    ),
    (
        PAGED,
        {"cu_seqlens_q": int32(0, 3)},
        "cu_seqlens_q must have shape [3], got [2]",
    ),
    (
        ROWS,
        {"cu_seqlens_k": None},
        "cu_seqlens_k must be given without block_table, got None",
    ),
    (
        ROWS,
        {"cu_seqlens_k": int32(0, 3)},
        "cu_seqlens_k must have shape [3], got [2]",
    ),
    (ROWS, {"max_seqlen_q": -1}, "max_seqlen_q must be at least 0, got -1"),
    (ROWS, {"max_seqlen_k": -2}, "max_seqlen_k must be at least 0, got -2"),
    (ROWS, {"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
    (ROWS, {"softmax_scale": 1e39}, "softmax_scale must be finite, got inf"),
    (ROWS, {"softcap": 1e39}, "softcap must be finite and at least 0, got inf"),
    (ROWS, {"window_left": -2}, "window_left must be at least -1, got -2"),
    (ROWS, {"window_right": -2}, "window_right must be at least -1, got -2"),
    (ROWS, {"softcap": -1.0}, "softcap must be finite and at least 0, got -1"),
    (
        PAGED,
        {"seqused_k": None},
        "seqused_k must be given with block_table, got None",
    ),
    (
        PAGED,
        {"seqused_k": None, "cu_seqlens_k": ONE},
        "cu_seqlens_k must be int32, got float32",
    ),
    (
        PAGED,
        {"seqused_k": None, "cu_seqlens_k": int32(3)[0]},
        "cu_seqlens_k must have shape [max_num_seqs + 1], got []",
    ),
    (
        PAGED,
        {"seqused_k": int32([1], [2])},
        "seqused_k must have shape [max_num_seqs], got [2, 1]",
    ),
    (ROWS, {"seqused_k": int32(1)}, "seqused_k must have shape [2], got [1]"),
    (
        PAGED,
        {"block_table": int32([0], [1], [2])},
        "block_table must have shape [2, max_blocks], got [3, 1]",
    ),
    (
        PAGED,
        {"block_table": torch.ones(2, 1)},
        "block_table must be int32, got float32",
    ),
    (
        PAGED,
        {"leftpad_k": int32(0, 0)},
        "leftpad_k must be absent with block_table, got shape [2]",
    ),
    (ROWS, {"leftpad_k": int32(0)}, "leftpad_k must have shape [2], got [1]"),
    (
        ROWS,
        {"alibi_slopes": torch.ones(4).double()},
        "alibi_slopes must be float32, float16 or bfloat16, got float64",
    ),
    (
        ROWS,
        {"alibi_slopes": torch.ones(3, 4)},
        "alibi_slopes must have shape [4] or [2, 4], got [3, 4]",
    ),
    (
        ROWS,
        {"sinks": int32(1)},
        "sinks must be float32, float16 or bfloat16, got int32",
    ),
    (ROWS, {"sinks": ONE}, "sinks must have shape [4], got [1]"),
    (
        ROWS,
        {"kv_cache_dtype": "int8"},
        "kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8",
    ),
    (
        ROWS,
        {"kv_cache_dtype": "fp8"},
        "k must be float8_e4m3fn or uint8, got float32",
    ),
    (
        ROWS,
        {name: torch.ones(5, 2, 16, dtype=torch.uint8) for name in "kv"}
        | {"kv_cache_dtype": "fp8_e5m2", "v_scale": torch.ones(2, 4)},
        "v_scale must have 1 element or shape [2, 2], got shape [2, 4]",
    ),
    (
        ROWS,
        {name: torch.ones(5, 2, 16, dtype=torch.uint8) for name in "kv"}
        | {"kv_cache_dtype": "fp8_e5m2", "k_scale": ONE.half()},
        "k_scale must be float32, got float16",
    ),
]


def test_scales_of_keys_that_are_not_fp8_are_ignored(path):
    """vLLM's layers pass them always."""
    wanted, _ = path.run(lambda a: xla_ops.flash_attn_varlen(**a), ROWS)
    given = ROWS | {"k_scale": 7 * ONE, "v_scale": 7 * ONE}
    got, _ = path.run(lambda a: xla_ops.flash_attn_varlen(**a), given)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("legal, changes, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(path, legal, changes, message):
    with pytest.raises(Exception) as error:
        path.run(lambda a: xla_ops.flash_attn_varlen(**a), legal | changes)
    assert "flash_attn_varlen: " + message in str(error.value)


@pytest.mark.parametrize(
    "name", ["k", "v", "cu_seqlens_q", "seqused_k", "block_table", "sinks"]
)
def test_tensors_must_share_a_device(name):
    given = PAGED | {"sinks": torch.ones(4)}
    device = torch_xla.device()
    moved = {
        k: t.to(device) if isinstance(t, torch.Tensor) and k != name else t
        for k, t in given.items()
    }
    with pytest.raises(ValueError) as error:
        xla_ops.flash_attn_varlen(**moved)
    text = f"flash_attn_varlen: {name} must be on q's device {device}, got cpu"
    assert str(error.value) == text


@pytest.mark.parametrize("name", ["q", "k", "v", "cu_seqlens_q"])
def test_arguments_must_be_tensors(name):
    with pytest.raises(
        TypeError, match=rf"^flash_attn_varlen: {name} must be a tensor"
    ):
        xla_ops.flash_attn_varlen(**(ROWS | {name: 1}))


# Arguments of the functional ops, in order: operands, then attributes.
LEGAL = {
    "query": Q,
    "key": ROWS["k"],
    "value": ROWS["v"],
    "cu_seqlens_q": int32(0, 2, 3),
    "cu_seqlens_k": int32(0, 3, 5),
    "seqused_k": None,
    "block_table": None,
    "leftpad_k": None,
    "num_seqs": None,
    "alibi_slopes": None,
    "sinks": None,
    "k_scale": None,
    "v_scale": None,
    "scale": 0.25,
    "window_left": -1,
    "window_right": 0,
    "soft_cap": 0.0,
    "kv_cache_dtype": "auto",
    "num_splits": 1,
    "geometry": [1, 5, 2, 16, 0, 32, 16, 0, 0],
    "debug": False,
}
LEGAL_PAGED = LEGAL | {
    "cu_seqlens_k": None,
    "seqused_k": int32(2, 1),
    "block_table": int32([0], [1]),
    "geometry": [1, 5, 2, 16, 160, 32, 16, 0, 0],
}
BYTES = ROWS["k"].to(torch.uint8)
LEGAL_FP8 = LEGAL | {"key": BYTES, "value": BYTES, "kv_cache_dtype": "fp8"}
BROKEN = [
    (LEGAL, "query", Q.int()),
    (LEGAL, "query", Q.flatten()),
    (LEGAL, "query", Q[..., :12]),
    (LEGAL, "query", Q[:, :3]),
    (LEGAL, "key", ROWS["k"].half()),
    (LEGAL, "value", ROWS["k"].double()),
    (LEGAL, "kv_cache_dtype", "fp4"),
    (LEGAL, "kv_cache_dtype", "fp8_e5m2"),
    (LEGAL, "cu_seqlens_q", int32(0, 2, 3).long()),
    (LEGAL, "cu_seqlens_q", int32([0, 2, 3])),
    (LEGAL, "cu_seqlens_k", int32(0, 2, 3).long()),
    (LEGAL, "cu_seqlens_k", int32(0, 2)),
    (LEGAL, "seqused_k", ONE.expand(2)),
    (LEGAL, "seqused_k", int32(1)),
    (LEGAL, "leftpad_k", int32(1, 1).long()),
    (LEGAL, "leftpad_k", int32([1, 1])),
    (LEGAL, "num_seqs", ONE),
    (LEGAL, "num_seqs", int32(1, 1)),
    (LEGAL_PAGED, "seqused_k", int32(1, 1).long()),
    (LEGAL_PAGED, "seqused_k", int32([1, 1])),
    (LEGAL_PAGED, "block_table", int32([1, 1])),
    (LEGAL_PAGED, "block_table", int32([1], [1]).long()),
    (LEGAL_PAGED, "cu_seqlens_q", int32(0, 2)),
    (LEGAL_PAGED, "cu_seqlens_k", int32(0, 2, 3)),
    (LEGAL_PAGED, "leftpad_k", int32(0, 2)),
    (LEGAL, "alibi_slopes", torch.ones(4).half()),
    (LEGAL, "alibi_slopes", torch.ones(1, 4)),
    (LEGAL, "sinks", torch.ones(4).half()),
    (LEGAL, "sinks", torch.ones(4, 1)),
    (LEGAL, "k_scale", ONE),
    (LEGAL, "v_scale", ONE),
    (LEGAL_FP8, "k_scale", ONE.half()),
    (LEGAL_FP8, "v_scale", torch.ones(4)),
    (LEGAL, "scale", float("inf")),
    (LEGAL, "window_left", -2),
    (LEGAL, "window_right", -3),
    (LEGAL, "soft_cap", float("nan")),
    (LEGAL, "num_splits", -1),
    (LEGAL, "num_splits", 1025),
]


@pytest.mark.parametrize("op", ["flash_attn_varlen", "paged_attention"])
@pytest.mark.parametrize(
    "legal, name, value", BROKEN, ids=[f"{i}-{b[1]}" for i, b in enumerate(BROKEN)]
)
def test_the_handler_says_what_python_says(op, legal, name, value):
    with pytest.raises(ValueError) as error:
        OPS[op].lower(*(legal | {name: value}).values())
    assert str(error.value).startswith(op + ": ")
    bound = OPS[op].lowered(list(legal.values()))
    call_directly(bound)
    if name in bound.call.names:
        bound = bound.call.bind(legal | {name: value})
    else:
        attributes = {**bound.call.attributes, name: value}
        call = dataclasses.replace(bound.call, attributes=attributes)
        bound = bound._replace(call=call)
    with pytest.raises(ValueError) as from_handler:
        call_directly(bound)
    assert str(from_handler.value) == str(error.value)
