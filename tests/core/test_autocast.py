"""What torch.autocast means for each op: the same as casting by hand."""

import itertools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import xla_ops
from support import Path, int32, same

HALF = torch.bfloat16
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def ops():
    return torch.ops.xla_ops


class Case(NamedTuple):
    """A call, and which arguments autocast casts to what."""

    function: object
    args: dict
    casts: dict

    def by_hand(self):
        cast = {name: self.args[name].to(dtype) for name, dtype in self.casts.items()}
        return self._replace(args={**self.args, **cast})


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def ends():
    return int32(0, 5)


def into(front, *written):
    """Makes a function of a mutable front that returns what it wrote."""

    def call(**args):
        front()(**args)
        return [args[name] for name in written]

    return call


def stacked_write(kv_cache, **args):
    key_cache, value_cache = kv_cache.unbind(0)
    xla_ops.reshape_and_cache_flash(
        key_cache=key_cache, value_cache=value_cache, **args
    )
    return kv_cache


def paged(dtype, cache_dtype, **features):
    return dict(
        query=randn(5, 4, 16, dtype=dtype),
        kv_cache=randn(2, 3, 4, 2, 16).to(cache_dtype),
        context_lens=int32(5),
        block_tables=int32([0, 1]),
        query_start_loc=ends(),
        num_seqs=int32(1),
        scale=0.25,
        **features,
    )


def varlen(dtype, **features):
    return dict(
        q=randn(5, 4, 16, dtype=dtype),
        k=randn(5, 2, 16, dtype=dtype),
        v=randn(5, 2, 16, dtype=dtype),
        cu_seqlens_q=ends(),
        cu_seqlens_k=ends(),
        max_seqlen_q=5,
        max_seqlen_k=5,
        **features,
    )


def varlen_out(out, **args):
    return ops().flash_attn_varlen.out(
        out=out,
        **args,
        seqused_k=None,
        leftpad_k=None,
        block_table=None,
        alibi_slopes=None,
        p_dropout=0.0,
        softmax_scale=0.25,
        zero_tensors=False,
        is_causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        return_softmax=False,
        gen=None,
    )


def write(dtype, cache_dtype, kv_cache_dtype="auto", **scales):
    return dict(
        key=randn(3, 2, 8, dtype=dtype),
        value=randn(3, 2, 8, dtype=dtype),
        kv_cache=torch.zeros(2, 2, 4, 2, 8).to(cache_dtype),
        slot_mapping=torch.arange(3),
        kv_cache_dtype=kv_cache_dtype,
        **scales,
    )


def first_layout_write(**args):
    """Into new caches of the other layout; returns both."""
    dtype = args.pop("cache_dtype")
    device = args["key"].device
    caches = dict(key_cache=torch.zeros(2, 2, 2, 4, 4, device=device).to(dtype))
    caches["value_cache"] = torch.zeros(2, 2, 8, 4, device=device).to(dtype)
    xla_ops.reshape_and_cache(**caches, **args)
    return list(caches.values())


def penalised(**args):
    xla_ops.apply_repetition_penalties_(**args)
    return args["logits"]


def normed_and_rotated(**args):
    xla_ops.fused_qk_norm_rope(**args)
    return args["qkv"]


def prepared(**args):
    query = xla_ops.fused_qk_norm_rope_and_cache(**args)
    return query, args["key_cache"], args["value_cache"]


def prepared_and_attended(**args):
    ints = dict(context_lens=int32(3), block_tables=int32([0, 1]))
    ints |= dict(query_start_loc=int32(0, 3), num_seqs=int32(1))
    device = args["qkv"].device
    ints = {name: t.to(device) for name, t in ints.items()}
    out = xla_ops.fused_qk_norm_rope_and_paged_attention(**args, **ints, scale=0.5)
    return out, args["key_cache"], args["value_cache"]


def projection_and_caches(dtype, table_dtype):
    given = projection(dtype, table_dtype)
    for name in ("num_heads_q", "num_heads_k", "num_heads_v"):
        del given[name]
    return dict(
        **given,
        **dict(num_heads=2, num_kv_heads=1, slot_mapping=torch.tensor([5, -1, 0])),
        **dict.fromkeys(("key_cache", "value_cache"), torch.zeros(2, 4, 1, 8).byte()),
        **dict(kv_cache_dtype="fp8", k_scale=TO_HALF, v_scale=TO_HALF),
    )


def projection(dtype, table_dtype):
    return dict(
        qkv=randn(3, 32, dtype=dtype),
        **dict(num_heads_q=2, num_heads_k=1, num_heads_v=1, head_dim=8, eps=1e-6),
        **dict(q_weight=randn(8), k_weight=randn(8)),
        cos_sin_cache=randn(4, 8, dtype=table_dtype),
        is_neox=True,
        position_ids=torch.arange(3),
    )


def rows(dtype=HALF, **others):
    return dict(input=randn(3, 16, dtype=dtype), **others)


def heads(dtype=HALF, **others):
    return dict(
        positions=torch.arange(3),
        query=randn(3, 32, dtype=dtype),
        key=randn(3, 16, dtype=others.pop("key_dtype", dtype)),
        head_size=16,
        cos_sin_cache=randn(4, 8),
        is_neox=True,
        **others,
    )


W = dict(weight=randn(16))
SCALE = dict(scale=torch.full((1,), 0.125))
TO_HALF = torch.full((1,), 0.125, dtype=HALF)  # as a half-precision op computes it


def cases() -> dict[str, Case]:
    f8 = torch.float8_e4m3fn
    weight = {"weight": HALF}
    both = {"residual": HALF, "weight": HALF}
    lse = dict(prefix_lse=randn(2, 3), suffix_lse=randn(2, 3, dtype=HALF))
    merge = dict(
        prefix_output=randn(3, 2, 8, dtype=HALF), suffix_output=randn(3, 2, 8), **lse
    )
    merged = {"suffix_output": HALF, "suffix_lse": torch.float32}
    residual = dict(residual=randn(3, 16))
    half_residual = dict(residual=randn(3, 16, dtype=HALF))
    float_scale = {"scale": torch.float32}
    qkv = dict.fromkeys("qkv", HALF)
    out = dict(result=torch.zeros(3, 16, dtype=HALF))
    x, f, o = xla_ops, into, ops
    found = {
        "rms_norm": (x.rms_norm, rows(**W), weight),
        "rms_norm.out": (
            f(lambda: o().rms_norm.out, "result"),
            rows(**W, **out, epsilon=1e-6),
            weight,
        ),
        "fused_add_rms_norm": (x.fused_add_rms_norm, rows(**W, **residual), both),
        "fused_add_rms_norm.out": (
            f(lambda: o().fused_add_rms_norm, "input", "residual"),
            rows(**W, **half_residual, epsilon=1e-6),
            weight,
        ),
        "rms_norm_static_fp8_quant": (
            x.rms_norm_static_fp8_quant,
            rows(**W, scale=TO_HALF),
            weight | float_scale,
        ),
        "fused_add_rms_norm_static_fp8_quant": (
            x.fused_add_rms_norm_static_fp8_quant,
            rows(**W, **SCALE, **residual),
            both,
        ),
        "rms_norm_dynamic_per_token_quant": (
            x.rms_norm_dynamic_per_token_quant,
            rows(**W, quant_dtype=torch.int8),
            weight,
        ),
        "fused_add_rms_norm_dynamic_per_token_quant": (
            x.rms_norm_dynamic_per_token_quant,
            rows(**W, **residual, quant_dtype=f8, scale_ub=TO_HALF),
            both | {"scale_ub": torch.float32},
        ),
        "rms_norm_dynamic_per_token_quant.out": (
            f(lambda: o().rms_norm_dynamic_per_token_quant.out, "result", "scale"),
            rows(
                **W,
                result=torch.zeros(3, 16, dtype=torch.int8),
                scale=torch.zeros(3, 1),
                epsilon=1e-6,
                scale_ub=None,
                residual=None,
            ),
            weight,
        ),
        "rotary_embedding": (
            x.rotary_embedding,
            heads(key_dtype=torch.float32),
            {"key": HALF, "cos_sin_cache": HALF},
        ),
        "rotary_embedding.out": (
            f(lambda: o().rotary_embedding, "query", "key"),
            heads(),
            {"cos_sin_cache": HALF},
        ),
        "silu_and_mul": (x.silu_and_mul, rows(torch.float32), {}),
        "mul_and_silu": (x.mul_and_silu, rows(), {}),
        "gelu_and_mul": (x.gelu_and_mul, rows(), {}),
        "gelu_tanh_and_mul": (x.gelu_tanh_and_mul, rows(), {}),
        "fatrelu_and_mul": (x.fatrelu_and_mul, rows(), {}),
        "swigluoai_and_mul": (x.swigluoai_and_mul, rows(torch.float32), {}),
        "gelu_new": (x.gelu_new, rows(), {}),
        "gelu_fast": (x.gelu_fast, rows(torch.float32), {}),
        "gelu_quick": (x.gelu_quick, rows(), {}),
        "convert_fp8": (x.convert_fp8, dict(src=randn(3, 16)), {}),
        "apply_repetition_penalties_": (
            penalised,
            dict(
                logits=randn(3, 16, dtype=HALF),
                prompt_mask=randn(3, 16) > 0,
                output_mask=randn(3, 16) > 0,
                repetition_penalties=randn(3).abs() + 1,
            ),
            {"repetition_penalties": HALF},
        ),
        "fused_qk_norm_rope": (
            normed_and_rotated,
            projection(HALF, torch.float16),
            {"q_weight": HALF, "k_weight": HALF, "cos_sin_cache": HALF},
        ),
        "fused_qk_norm_rope(float32 table)": (
            normed_and_rotated,
            projection(HALF, torch.float32),
            {"q_weight": HALF, "k_weight": HALF},
        ),
        "fused_qk_norm_rope_and_cache": (
            prepared,
            projection_and_caches(HALF, torch.float16),
            {
                **dict.fromkeys(("q_weight", "k_weight", "cos_sin_cache"), HALF),
                **dict.fromkeys(("k_scale", "v_scale"), torch.float32),
            },
        ),
        "fused_qk_norm_rope_and_paged_attention": (
            prepared_and_attended,
            projection_and_caches(HALF, torch.float16),
            {
                **dict.fromkeys(("q_weight", "k_weight", "cos_sin_cache"), HALF),
                **dict.fromkeys(("k_scale", "v_scale"), torch.float32),
            },
        ),
        "silu_and_mul_quant": (
            x.silu_and_mul_quant,
            rows(scale=TO_HALF),
            float_scale,
        ),
        "static_scaled_fp8_quant": (
            x.static_scaled_fp8_quant,
            rows(scale=TO_HALF),
            float_scale,
        ),
        "dynamic_scaled_fp8_quant": (
            x.dynamic_scaled_fp8_quant,
            rows(torch.float32),
            {},
        ),
        "dynamic_per_token_scaled_fp8_quant": (
            x.dynamic_per_token_scaled_fp8_quant,
            rows(scale_ub=TO_HALF),
            {"scale_ub": torch.float32},
        ),
        "static_scaled_int8_quant": (
            x.static_scaled_int8_quant,
            rows(torch.float32, scale=TO_HALF),
            float_scale,
        ),
        "dynamic_scaled_int8_quant": (x.dynamic_scaled_int8_quant, rows(), {}),
        "grouped_matmul": (
            x.grouped_matmul,
            dict(
                input=randn(4, 16, dtype=HALF),
                weight=randn(2, 8, 16),
                group_offsets=int32(0, 1, 4),
            ),
            weight,
        ),
        "linear": (
            x.linear,
            dict(input=randn(4, 16, dtype=HALF), weight=randn(8, 16), bias=randn(8)),
            dict.fromkeys(("weight", "bias"), HALF),
        ),
        "merge_attn_states": (x.merge_attn_states, merge, merged),
        "merge_attn_states.out": (
            f(lambda: o().merge_attn_states.out, "output"),
            dict(output=torch.zeros(3, 2, 8, dtype=HALF), output_lse=None, **merge),
            merged,
        ),
        "flash_attn_varlen": (x.flash_attn_varlen, varlen(torch.float32), qkv),
        "flash_attn_varlen(fp8)": (
            x.flash_attn_varlen,
            {
                **varlen(torch.float32, kv_cache_dtype="fp8", k_scale=TO_HALF),
                **dict.fromkeys("kv", randn(5, 2, 16).to(f8)),
            },
            {"q": HALF, "k_scale": torch.float32},
        ),
        "flash_attn_varlen(paged)": (
            x.flash_attn_varlen,
            {
                **varlen(torch.float32),
                **dict.fromkeys("kv", randn(3, 4, 2, 16, dtype=torch.float16)),
                **dict(block_table=int32([0, 1]), seqused_k=int32(5)),
                **dict(sinks=randn(4, dtype=HALF)),
            },
            {"q": torch.float16},
        ),
        "flash_attn_varlen.out": (
            varlen_out,
            varlen(torch.float32) | dict(out=torch.zeros(5, 4, 16).half()),
            dict.fromkeys("qkv", torch.float16),
        ),
        "paged_attention": (
            x.paged_attention,
            paged(torch.float32, HALF),
            {"query": HALF},
        ),
        "paged_attention(float32 cache)": (
            x.paged_attention,
            paged(HALF, torch.float32),
            {"query": torch.float32},
        ),
        "paged_attention(fp8)": (
            x.paged_attention,
            paged(torch.float32, f8, kv_cache_dtype="fp8", return_lse=True),
            {"query": HALF},
        ),
        "reshape_and_cache_flash": (
            stacked_write,
            write(torch.float32, HALF),
            {"key": HALF, "value": HALF},
        ),
        "reshape_and_cache_flash(float32 cache)": (
            stacked_write,
            write(HALF, torch.float32),
            {"key": torch.float32, "value": torch.float32},
        ),
        "reshape_and_cache_flash(fp8)": (
            stacked_write,
            {
                **write(HALF, f8, "fp8", k_scale=TO_HALF),
                "value": randn(3, 2, 8),
            },
            {"value": HALF, "k_scale": torch.float32},
        ),
        "reshape_and_cache": (
            first_layout_write,
            dict(
                key=randn(3, 2, 8),
                value=randn(3, 2, 8),
                slot_mapping=torch.arange(3),
                cache_dtype=HALF,
            ),
            {"key": HALF, "value": HALF},
        ),
    }
    return {name: Case(*case) for name, case in found.items()}


CASES = cases()


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.element_size() == 1 else t


def run(path: Path, case: Case, dtype=None):
    """Calls the case's function, under autocast where a dtype is given."""
    names = list(case.args)
    device = path.device.type

    def call(*values):
        args = dict(zip(names, values, strict=True))
        if dtype is None:
            return case.function(**args)
        with torch.autocast(device, dtype=dtype):
            return case.function(**args)

    result, _ = path.run(call, *case.args.values())
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", CASES)
def test_same_as_casting_by_hand(path, name):
    case = CASES[name]
    got, wanted = run(path, case, HALF), run(path, case.by_hand())
    for g, w in zip(got, wanted, strict=True):
        if g is not None:
            assert g.dtype == w.dtype
            assert same(bits(g), bits(w))


# Whose arguments go together without a cast too.
LEGAL = {"flash_attn_varlen", "paged_attention(fp8)", "rotary_embedding.out"}
NEED_CASTS = [name for name in CASES if CASES[name].casts and name not in LEGAL]


@pytest.mark.parametrize("name", NEED_CASTS)
def test_nothing_is_cast_without_autocast(path, name):
    """A call that needs a cast is refused, in words, by the op."""
    with pytest.raises(Exception, match=r"must (be|have) "):
        run(path, CASES[name])


def test_every_public_op_has_a_case():
    named = {name.partition(".")[0].partition("(")[0] for name in CASES}
    assert {*xla_ops.ops.__all__} - named == {"copy_blocks", "swap_blocks"}  # any dtype


def test_every_op_has_a_rule():
    names = [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("xla_ops::", "xla_gpu::", "xla::flash_attn_varlen_op"))
        and name not in ("xla_ops::owned", "xla_ops::no_gradient")
        and not name.endswith("_")  # twins, which a front calls
    ]
    assert len(names) > 40
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, device in itertools.product(names, ("XLA", "CUDA", "CPU")):
        assert has_kernel(name, f"Autocast{device}"), name


@hypothesis.given(
    path=st.sampled_from(["cpu", "lazy"]),
    input=st.sampled_from(FLOATS),
    weight=st.sampled_from(FLOATS),
    residual=st.sampled_from(FLOATS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_any_dtypes(path, input, weight, residual, dtype, seed):
    torch.manual_seed(seed)
    args = rows(
        input, weight=randn(16, dtype=weight), residual=randn(3, 16).to(residual)
    )
    case = Case(xla_ops.fused_add_rms_norm, args, {"weight": input, "residual": input})
    got, wanted = run(Path(path), case, dtype), run(Path(path), case.by_hand())
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == input
        assert same(g, w)


@pytest.mark.parametrize("path", ["cpu", "lazy"])
def test_a_layer_under_autocast(path):
    """A float32 module, as users write it, with gradients on."""
    torch.manual_seed(0)
    path = Path(path)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 32)
            self.weight = torch.nn.Parameter(torch.rand(32))

        def forward(self, x):
            return xla_ops.silu_and_mul(xla_ops.rms_norm(self.linear(x), self.weight))

    layer, x = Layer().to(path.device), path.put(torch.randn(3, 16))
    with torch.enable_grad(), torch.autocast(path.device.type, dtype=HALF):
        got = layer(x)
    wanted = layer.to(HALF)(x.to(HALF))
    assert got.dtype == HALF and got.requires_grad
    assert torch.allclose(got, wanted, atol=1e-2)


@pytest.mark.parametrize("path", ["cpu", "lazy"])
def test_what_is_not_cast(path):
    path = Path(path)
    x, w = path.put((randn(3, 16, dtype=HALF), randn(16)))
    device = path.device.type
    wrong = "rms_norm: weight must be bfloat16, got float"
    other = "cpu" if path.is_xla else "xla"
    for off in (
        torch.autocast(device, dtype=HALF, enabled=False),
        torch.autocast(other, dtype=HALF),
    ):
        with off, pytest.raises(ValueError, match=wrong + "32"):
            xla_ops.rms_norm(x, w)
    with torch.autocast(device, dtype=HALF):
        with pytest.raises(ValueError, match=wrong + "64"):
            xla_ops.rms_norm(x, w.double())
        with pytest.raises(ValueError, match="result must be bfloat16, got float32"):
            torch.ops.xla_ops.rms_norm(x.float(), x, w, 1e-6)
