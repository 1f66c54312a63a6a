"""Quantised layers of vLLM's on XLA, against plain torch on the same codes and scales.

The reference quantises activations alike and multiplies in float64; what may differ is
the order of a float32 sum and one rounding to the layer's dtype.
"""

import json
import re

import pytest
import torch
import torch_xla
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_layers import (  # noqa: F401, fixtures among them
    built_as,
    engine_log,
    hlo,
    host_and_xla,
    on_xla,
    one_rank,
    w8a8,
)
from xla_ops.vllm import quantization, scaled_mm, unpack

pytestmark = pytest.mark.usefixtures("one_rank")

FP8 = torch.float8_e4m3fn
IN, OUT = 96, 80
FUSED = [48, 32]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(method, config, dtype, fused=False, size=IN, bias=True, out=OUT):
    """A layer of vLLM's with the configuration that a checkpoint would give it."""
    with built_as(dtype):
        quant_config = get_quantization_config(method).from_config(config)
        options = dict(bias=bias, quant_config=quant_config, prefix="layers.0.mlp.up")
        if fused:
            return MergedColumnParallelLinear(size, FUSED, **options)
        return ReplicatedLinear(size, out, **options)


def fill(layer, **values):
    for name, value in values.items():
        parameter = getattr(layer, name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.data.copy_(value)
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(layer.bias.shape))
    layer.quant_method.process_weights_after_loading(layer)


def run(layer, x, lazily):
    if not lazily:
        return layer(x)[0]
    return on_xla(layer)(x.to(torch_xla.device()))[0].cpu()


def assert_near(out, exact, magnitude, dtype, depth=IN):
    """Within a rounding to `dtype`, and one of float32 for each term of the sum."""
    step = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    assert out.dtype == dtype and out.shape == exact.shape
    bound = 1.01 * step[dtype] * exact.abs() + (depth + 8) * 2.0**-24 * magnitude
    assert ((out.double() - exact).abs() <= bound).all()


def check(layer, x, codes, weight_codes, scales, lazily, offset=0.0):
    """scales: what the product of the codes is multiplied by."""
    bias = layer.bias.detach().double().clone()
    dtype = x.dtype
    a, b = codes.double() - offset, weight_codes.double()
    exact = (a @ b.t()) * scales + bias
    magnitude = (a.abs() @ b.abs().t()) * scales + bias.abs()
    assert_near(run(layer, x, lazily), exact, magnitude, dtype)


def fp8_rows(x):
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return (x.float() / scale).clamp(-448, 448).to(FP8), scale.double()


def fp8_static(x, scale):
    return (x.float() * (1 / scale)).clamp(-448, 448).to(FP8)


def fp8_weight(*shape):
    return (torch.randn(*shape) * 100).clamp(-448, 448).to(FP8)


FP8_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


TENSOR, CHANNEL = {"strategy": "tensor"}, {"strategy": "channel"}
TOKEN = {"strategy": "token", "dynamic": True}
STATIC = {"strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_fp8_dynamic(lazily, rows, dtype):
    layer = make("fp8", FP8_DYNAMIC, dtype)
    weight, x = fp8_weight(OUT, IN), torch.randn(rows, IN).to(dtype)
    fill(layer, weight=weight, weight_scale=torch.tensor([0.01]))
    codes, scale = fp8_rows(x)
    check(layer, x, codes, weight, scale * torch.tensor(0.01).double(), lazily)


def test_fp8_static(lazily):
    layer = make("fp8", FP8_STATIC, torch.bfloat16)
    weight, x = fp8_weight(OUT, IN), torch.randn(7, IN).bfloat16()
    scales = torch.tensor([0.01]), torch.tensor([0.005])
    fill(layer, weight=weight, weight_scale=scales[0], input_scale=scales[1])
    check(
        *(layer, x, fp8_static(x, scales[1]), weight),
        *(scales[0].double() * scales[1].double(), lazily),
    )


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_fp8_shards_keep_their_scales(lazily, method):
    """vLLM's own kernels take one scale, and quantise shards a second time for it."""
    config = FP8_DYNAMIC if method == "fp8" else w8a8("float", TENSOR, TOKEN)
    layer = make(method, config, torch.bfloat16, fused=True)
    weight, x = fp8_weight(OUT, IN), torch.randn(5, IN).bfloat16()
    first, second = weight.split(FUSED)
    for shard, (codes, scale) in enumerate([(first, 0.01), (second, 0.03)]):
        layer.weight.weight_loader(layer.weight, codes, shard)
        loader = layer.weight_scale.weight_loader
        loader(layer.weight_scale, torch.tensor(scale), shard)
    fill(layer)
    codes, scale = fp8_rows(x)
    by_shard = torch.tensor([0.01, 0.03]).repeat_interleave(torch.tensor(FUSED))
    check(layer, x, codes, weight, scale * by_shard.double(), lazily)


def test_fp8_shards_that_the_checkpoint_fused(lazily):
    layer = make("fp8", FP8_DYNAMIC, torch.bfloat16, fused=True)
    weight, x = fp8_weight(OUT, IN), torch.randn(5, IN).bfloat16()
    layer.weight_scale.data[0] = 0.02  # the other stays as vLLM made it
    fill(layer, weight=weight)
    codes, scale = fp8_rows(x)
    check(layer, x, codes, weight, scale * torch.tensor(0.02).double(), lazily)


def test_fp8_online(lazily):
    """`quantization="fp8"`: bfloat16 weights, quantised as the last shard is loaded."""
    config = {"quant_method": "other", "activation_scheme": "dynamic"}
    layer = make("fp8", config, torch.bfloat16, fused=True)
    weight, x = torch.randn(OUT, IN).bfloat16(), torch.randn(5, IN).bfloat16()
    for shard, part in enumerate(weight.split(FUSED)):
        layer.weight.weight_loader(layer.weight, part, shard)
    assert layer.weight.dtype == FP8
    fill(layer)
    weight_scale = weight.float().abs().max() / 448
    codes, scale = fp8_rows(x)
    weight_codes = fp8_static(weight, weight_scale)
    check(layer, x, codes, weight_codes, scale * weight_scale.double(), lazily)


@pytest.mark.parametrize("inputs", [TOKEN, STATIC], ids=["token", "static"])
@pytest.mark.parametrize("weights", [TENSOR, CHANNEL], ids=["tensor", "channel"])
def test_compressed_fp8(lazily, weights, inputs):
    layer = make("compressed-tensors", w8a8("float", weights, inputs), torch.bfloat16)
    weight, x = fp8_weight(OUT, IN), torch.randn(9, IN).bfloat16()
    scales = torch.rand(OUT, 1) if weights is CHANNEL else torch.rand(1)
    values = dict(weight=weight, weight_scale=scales)
    codes, scale = fp8_rows(x)
    if inputs is STATIC:
        values["input_scale"] = torch.tensor([0.005])
        scale = values["input_scale"].double()
        codes = fp8_static(x, values["input_scale"])
    fill(layer, **values)
    check(layer, x, codes, weight, scale * scales.double().view(1, -1), lazily)


def int8_rows(x):
    most = x.float().abs().amax(-1, keepdim=True)
    codes = (x.float() * (torch.full_like(most, 127) / most)).round().clamp(-128, 127)
    return codes, (most / 127).double(), 0


def int8_azp_rows(x):
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    scale = (high - low) / 255
    azp = (-128 - low / scale).round()
    codes = ((x.float() * (1 / scale)).round() + azp).clamp(-128, 127)
    return codes, scale.double(), azp.double()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "azp"])
@pytest.mark.parametrize("inputs", [TOKEN, STATIC], ids=["token", "static"])
@pytest.mark.parametrize("weights", [TENSOR, CHANNEL], ids=["tensor", "channel"])
def test_compressed_int8(lazily, weights, inputs, symmetric):
    config = w8a8("int", weights, inputs | {"symmetric": symmetric})
    layer = make("compressed-tensors", config, torch.bfloat16)
    weight = torch.randint(-128, 128, (OUT, IN), dtype=torch.int8)
    x = (torch.randn(9, IN) + 0.5).bfloat16()
    scales = torch.rand(OUT, 1) if weights is CHANNEL else torch.rand(1)
    values = dict(weight=weight, weight_scale=scales)
    if inputs is STATIC:
        values["input_scale"] = torch.tensor([0.02])
        scale, azp = torch.tensor(0.02).double(), 0
        codes = (x.float() / torch.tensor(0.02)).round()
        if not symmetric:
            values["input_zero_point"] = torch.tensor([-21], dtype=torch.int8)
            azp = -21
            codes = (x.float() * (1 / torch.tensor(0.02))).round() + azp
        codes = codes.clamp(-128, 127)
    else:
        codes, scale, azp = int8_rows(x) if symmetric else int8_azp_rows(x)
    fill(layer, **values)
    scales = scale * scales.double().view(1, -1)
    check(layer, x, codes, weight, scales, lazily, offset=azp)


def check_dequantised(layer, x, weight, lazily, caplog, what):
    """weight: [OUT, IN], exact; the layer holds it rounded to its dtype."""
    dtype = x.dtype
    rounded = weight.to(dtype)
    held = dict(layer.named_parameters())
    assert torch.equal(held["weight"].data, rounded)
    assert set(held) - {"weight", "bias"} <= {"weight_shape"}, "packed weights are kept"
    bias = layer.bias.detach().double().clone()
    out = run(layer, x, lazily)
    a, b = x.double(), rounded.double()
    magnitude = a.abs() @ b.abs().t() + bias.abs()
    # torch's and XLA's own linear layer, which may round the sum before the bias.
    wanted = a @ b.t() + bias
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-17}
    assert ((out.double() - wanted).abs() <= step[dtype] * magnitude).all()
    said = [r.getMessage() for r in caplog.records if "dequantised" in r.getMessage()]
    assert any(what in line for line in said), said


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_fp8_blocks(lazily, method, log):
    if method == "fp8":
        config = FP8_DYNAMIC | {"weight_block_size": [128, 128]}
    else:
        block = {"strategy": "block", "block_structure": [128, 128]}
        inputs = {"strategy": "group", "group_size": 128, "dynamic": True}
        config = w8a8("float", block, inputs)
    layer = make(method, config, torch.bfloat16, size=320, out=200)
    weight, scales = fp8_weight(200, 320), torch.rand(2, 3)
    name = "weight_scale_inv" if method == "fp8" else "weight_scale"
    fill(layer, weight=weight, **{name: scales})
    factors = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :320]
    x = torch.randn(5, 320).bfloat16()
    exact = weight.float() * factors
    check_dequantised(layer, x, exact, lazily, log, "fp8 (in blocks) weights")


@pytest.mark.parametrize("weights", [TENSOR, CHANNEL], ids=["tensor", "channel"])
def test_fp8_weights_alone(lazily, weights, log):
    config = w8a8("float", weights, None)
    layer = make("compressed-tensors", config, torch.bfloat16)
    weight = fp8_weight(OUT, IN)
    scales = torch.rand(OUT, 1) if weights is CHANNEL else torch.rand(1)
    fill(layer, weight=weight, weight_scale=scales)
    x = torch.randn(5, IN).bfloat16()
    exact = weight.float() * scales
    check_dequantised(layer, x, exact, lazily, log, "fp8 (weights alone)")


def pack(numbers, bits, dim, order=None):
    """Numbers into int32, lowest bits first, by Python's own integers."""
    rows = numbers.movedim(dim, -1)
    shape = rows.shape
    words = []
    for row in rows.reshape(-1, shape[-1]).tolist():
        if order is not None:
            size = len(order)
            row = [row[i // size * size + order[i % size]] for i in range(len(row))]
        stream = sum(number << (bits * i) for i, number in enumerate(row))
        count = len(row) * bits // 32
        values = [stream >> (32 * i) & 0xFFFFFFFF for i in range(count)]
        words.append([v - 2**32 if v >= 2**31 else v for v in values])
    packed = torch.tensor(words, dtype=torch.int32)
    return packed.view(*shape[:-1], -1).movedim(-1, dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "azp"])
@pytest.mark.parametrize(
    "group_size, actorder", [(32, None), (None, None), (32, "group")]
)
def test_compressed_packed(lazily, bits, symmetric, group_size, actorder, dtype, log):
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    args |= {"strategy": "group" if group_size else "channel", "group_size": group_size}
    args |= {"actorder": actorder}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    config = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    layer = make("compressed-tensors", config, dtype)
    groups = IN // group_size if group_size else 1
    numbers = torch.randint(0, 2**bits, (OUT, IN))
    scales = torch.rand(OUT, groups).to(dtype)
    group_of = torch.arange(IN) // (group_size or IN)
    values = dict(weight_packed=pack(numbers, bits, 1), weight_scale=scales)
    zeros = torch.full((OUT, groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (OUT, groups))
        values["weight_zero_point"] = pack(zeros, bits, 0)
    if actorder:
        group_of = group_of[torch.randperm(IN)]
        values["weight_g_idx"] = group_of.to(torch.int32)
    fill(layer, **values)
    exact = (numbers - zeros[:, group_of]).float() * scales.float()[:, group_of]
    x = torch.randn(5, IN).to(dtype)
    check_dequantised(layer, x, exact, lazily, log, f"{bits}-bit weights")


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(lazily, bits, desc_act, form, log):
    config = {"bits": bits, "group_size": 32, "desc_act": desc_act, "sym": True}
    config |= {"quant_method": "gptq", "checkpoint_format": form}
    config["modules_in_block_to_quantize"] = ["mlp.up"]
    layer = make("gptq", config, torch.bfloat16, out=96)
    numbers, scales = torch.randint(0, 2**bits, (IN, 96)), torch.rand(3, 96).bfloat16()
    zeros = torch.randint(0, 2**bits, (3, 96))
    group_of = torch.arange(IN) // 32
    if desc_act:
        group_of = group_of[torch.randperm(IN)]
    fill(
        layer,
        qweight=pack(numbers, bits, 0),
        qzeros=pack(zeros, bits, 1),
        scales=scales,
        g_idx=group_of.to(torch.int32),
    )
    shift = 1 if form == "gptq" else 0
    exact = (numbers - zeros[group_of] - shift).float() * scales.float()[group_of]
    x = torch.randn(5, IN).bfloat16()
    check_dequantised(layer, x, exact.t(), lazily, log, f"{bits}-bit GPTQ weights")


def test_awq(lazily, log):
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    layer = make("awq", config, torch.bfloat16)
    numbers, zeros = torch.randint(0, 16, (IN, OUT)), torch.randint(0, 16, (3, OUT))
    scales = torch.rand(3, OUT).bfloat16()
    # AWQ's packers put column order[i] of eight at place i.
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    fill(
        layer,
        qweight=pack(numbers, 4, 1, order),
        qzeros=pack(zeros, 4, 1, order),
        scales=scales,
    )
    group_of = torch.arange(IN) // 32
    exact = (numbers - zeros[group_of]).float() * scales.float()[group_of]
    x = torch.randn(5, IN).bfloat16()
    check_dequantised(layer, x, exact.t(), lazily, log, "4-bit AWQ weights")


# What XLA is given: the forms that it makes fp8 and int8 products of.


def graph(layer, x):
    layer = on_xla(layer)
    x = x.to(torch_xla.device())
    torch_xla.sync()
    return hlo(layer(x)[0])


def dots(text):
    return re.findall(
        r"= (\S+?)\{\S* dot\((\S+?)\{\S* \S+ (\S+?)\{\S* \S+\), (.*)", text
    )


@pytest.mark.parametrize("inputs", [TOKEN, STATIC], ids=["token", "static"])
def test_fp8_is_a_product_of_fp8(inputs):
    layer = make("compressed-tensors", w8a8("float", CHANNEL, inputs), torch.bfloat16)
    values = dict(weight=fp8_weight(OUT, IN), weight_scale=torch.rand(OUT, 1))
    if inputs is STATIC:
        values["input_scale"] = torch.tensor([0.01])
    fill(layer, **values)
    text = graph(layer, torch.randn(32, IN).bfloat16())
    [(out, left, right, dims)] = dots(text)
    assert (out, left) == (f"f32[32,{OUT}]", f"f8e4m3fn[32,{IN}]")
    assert right == f"f8e4m3fn[{OUT},{IN}]"
    assert "lhs_contracting_dims={1}, rhs_contracting_dims={1}" in dims
    # Nothing is done to the weight before the product.
    assert not re.search(rf"\[(?:{OUT},{IN}|{IN},{OUT})\]\S* (?!parameter)\w+\(", text)


def test_int8_is_a_product_of_int8():
    layer = make("compressed-tensors", w8a8("int", CHANNEL, TOKEN), torch.bfloat16)
    weight = torch.randint(-128, 128, (OUT, IN), dtype=torch.int8)
    fill(layer, weight=weight, weight_scale=torch.rand(OUT, 1))
    text = graph(layer, torch.randn(32, IN).bfloat16())
    [(out, left, right, dims)] = dots(text)
    assert (out, left) == (f"s32[32,{OUT}]", f"s8[32,{IN}]")
    assert right == f"s8[{OUT},{IN}]"
    assert "lhs_contracting_dims={1}, rhs_contracting_dims={1}" in dims
    assert not re.search(rf"\[(?:{OUT},{IN}|{IN},{OUT})\]\S* (?!parameter)\w+\(", text)


def test_one_scale_for_all_is_one_number():
    """Then XLA hands it to cuBLASLt: the product is multiplied by a scalar."""
    layer = make("fp8", FP8_STATIC, torch.bfloat16, bias=False)
    fill(
        layer,
        weight=fp8_weight(OUT, IN),
        weight_scale=torch.tensor([0.01]),
        input_scale=torch.tensor([0.01]),
    )
    text = graph(layer, torch.randn(32, IN).bfloat16())
    multiplied = re.findall(rf"= f32\[32,{OUT}\]\S* multiply\(", text)
    assert len(multiplied) == 1
    assert re.search(rf"= f32\[32,{OUT}\]\S* broadcast\(f32\[\] ", text)


def test_few_rows_are_padded_on_a_gpu(monkeypatch):
    layer = make("fp8", FP8_DYNAMIC, torch.bfloat16)
    weight, x = fp8_weight(OUT, IN), torch.randn(1, IN).bfloat16()
    fill(layer, weight=weight, weight_scale=torch.tensor([0.01]))
    codes, scale = fp8_rows(x)
    bias = layer.bias.detach().double().clone()
    monkeypatch.setattr(scaled_mm, "_is_gpu", lambda: True)
    layer = on_xla(layer)
    out = layer(x.to(torch_xla.device()))[0]
    [(shape, *_)] = dots(hlo(out))
    assert shape == f"f32[16,{OUT}]"
    exact = (codes.double() @ weight.double().t()) * scale * 0.01 + bias
    torch.testing.assert_close(out.cpu().double(), exact, rtol=2.0**-7, atol=1e-3)


def test_layers_that_are_refused():
    args = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    args |= {"strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    config = {"format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}}
    with pytest.raises(
        NotImplementedError, match="compressed-tensors: a layer must be"
    ):
        make("compressed-tensors", config, torch.bfloat16)


def test_every_supported_name_is_registered():
    for name in quantization.SUPPORTED:
        assert get_quantization_config(name).__module__ == quantization.__name__


def test_numbers_across_words():
    numbers = torch.arange(32) % 8
    packed = pack(numbers[None], 3, 1)
    assert packed.shape == (1, 3)
    assert torch.equal(unpack.integers(packed, 3, 1)[0], numbers.int())


def test_a_configuration_is_json(tmp_path):
    """As a checkpoint's config.json has it, not as Python objects."""
    config = json.loads(json.dumps(w8a8("float", CHANNEL, TOKEN)))
    assert make("compressed-tensors", config, torch.bfloat16).weight.dtype == FP8
