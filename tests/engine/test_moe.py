"""Routed experts of vLLM's layers, against a dense loop over the experts in torch."""

import re

import pytest
import torch
import torch_xla
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.fused_moe.shared_fused_moe import SharedFusedMoE

import xla_ops.vllm.moe as moe
from vllm_experts import dense, gelu, silu, softmax_routing, swigluoai
from vllm_layers import (  # noqa: F401, fixtures among them
    built_as,
    hlo,
    host_and_xla,
    on_xla,
    one_rank,
)

pytestmark = pytest.mark.usefixtures("one_rank")

EXPERTS, HIDDEN, INTERMEDIATE = 16, 32, 48
NAMES = iter(f"layers.{i}.experts" for i in range(10**6))


def layer(dtype=torch.float32, cls=FusedMoE, **options):
    options = dict(num_experts=EXPERTS, top_k=4) | options
    with built_as(dtype):
        made = cls(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            params_dtype=dtype,
            prefix=next(NAMES),
            **options,
        )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if name.startswith("w"):
            scale = 1.0 if "bias" in name else parameter.shape[-1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.data.mul_(scale)
    made.quant_method.process_weights_after_loading(made)
    return made


def weights_of(made):
    """Copies: moving a layer takes them from the host."""
    return {n: p.detach().clone() for n, p in made.named_parameters() if n[0] == "w"}


def deepseek_routing(logits, top_k, groups, topk_group, scoring, bias, scale):
    """Row by row, as the papers of DeepSeek-V2 and V3 have it; renormalised."""
    logits = logits.double()
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    size = logits.shape[1] // groups
    weights, experts = [], []
    for row in scores:
        biased = row if bias is None else row + bias.double()
        best = [
            biased[g * size : (g + 1) * size].topk(1 if bias is None else 2)[0].sum()
            for g in range(groups)
        ]
        kept = torch.stack(best).topk(topk_group)[1].tolist()
        allowed = [e for e in range(logits.shape[1]) if e // size in kept]
        order = sorted(allowed, key=lambda e: -biased[e].item())[:top_k]
        experts.append(order)
        weights.append(row[order] / row[order].sum() * scale)
    return torch.stack(weights), torch.tensor(experts)


def run(made, *args, lazily):
    """The layer's forward, on the host or on XLA."""
    if not lazily:
        return made(*args)
    out = on_xla(made)(*(a.to(torch_xla.device()) for a in args))
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def assert_near(out, exact, dtype=torch.float32):
    # Two products, an activation and a weighted sum, each rounded.
    steps = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
    assert out.dtype == dtype
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < steps[dtype], error


def inputs(tokens=13, dtype=torch.float32, experts=EXPERTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return x, torch.randn(tokens, experts, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tokens", [1, 13, 64])
def test_softmax_routing(lazily, tokens, renormalize, dtype):
    made = layer(dtype, renormalize=renormalize)
    given = weights_of(made)
    x, logits = inputs(tokens, dtype)
    out = run(made, x, logits, lazily=lazily)
    routing = softmax_routing(logits, 4, renormalize)
    assert_near(out, dense(x, given, *routing), dtype)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("groups, topk_group", [(4, 2), (1, 1), (8, 3)])
def test_grouped_routing(lazily, groups, topk_group, with_bias, scoring):
    bias = torch.nn.Parameter(torch.randn(EXPERTS)) if with_bias else None
    made = layer(
        use_grouped_topk=True,
        num_expert_group=groups,
        topk_group=topk_group,
        scoring_func=scoring,
        e_score_correction_bias=bias,
        routed_scaling_factor=2.5,
    )
    given = weights_of(made)
    held = None if bias is None else bias.detach().clone()
    x, logits = inputs()
    out = run(made, x, logits, lazily=lazily)
    routing = deepseek_routing(logits, 4, groups, topk_group, scoring, held, 2.5)
    assert_near(out, dense(x, given, *routing))


def test_a_bias_without_groups_counts_in_the_choice_alone(lazily):
    bias = torch.nn.Parameter(torch.randn(EXPERTS))
    held = bias.detach().clone()
    made = layer(e_score_correction_bias=bias, routed_scaling_factor=2.5)
    given = weights_of(made)
    x, logits = inputs()
    out = run(made, x, logits, lazily=lazily)
    scores = logits.double().softmax(-1)
    experts = (scores + held).topk(4)[1]
    weights = scores.gather(1, experts)
    weights = 2.5 * weights / weights.sum(-1, keepdim=True)
    assert_near(out, dense(x, given, weights, experts))


def test_custom_routing(lazily):
    def llama4(hidden_states, gating_output, topk, renormalize):
        scores, experts = torch.topk(gating_output, topk, dim=-1)
        return torch.sigmoid(scores.float()), experts.to(torch.int32)

    made = layer(
        top_k=1,
        custom_routing_function=llama4,
        apply_router_weight_on_input=True,
        renormalize=False,
    )
    given = weights_of(made)
    x, logits = inputs()
    out = run(made, x, logits, lazily=lazily)
    weights, experts = logits.double().topk(1)
    assert_near(out, dense(x, given, weights.sigmoid(), experts, on_input=True))


@pytest.mark.parametrize("activation, function", [("gelu", gelu), ("silu", silu)])
def test_activations(lazily, activation, function):
    made = layer(activation=activation)
    given = weights_of(made)
    x, logits = inputs()
    out = run(made, x, logits, lazily=lazily)
    routing = softmax_routing(logits, 4, True)
    assert_near(out, dense(x, given, *routing, function))


def test_gpt_oss(lazily):
    made = layer(activation="swigluoai", has_bias=True)
    given = weights_of(made)
    assert "w13_bias" in given and "w2_bias" in given
    x, logits = inputs()
    x = 5 * x  # beyond the activation's limits
    out = run(made, x, logits, lazily=lazily)
    routing = softmax_routing(logits, 4, True)
    assert_near(out, dense(x, given, *routing, swigluoai))


def test_shared_experts(lazily):
    shared = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
    weight = shared.weight.detach().clone()
    made = layer(cls=SharedFusedMoE, shared_experts=shared)
    given = weights_of(made)
    x, logits = inputs()
    shared_out, out = run(made, x, logits, lazily=lazily)
    assert_near(out, dense(x, given, *softmax_routing(logits, 4, True)))
    assert_near(shared_out, x.double() @ weight.double().t())


def test_a_class_of_the_model_s_own(lazily):
    """As DBRX and Aria have one, below FusedMoE and SharedFusedMoE."""

    class Experts(FusedMoE):
        pass

    made = layer(cls=Experts)
    given = weights_of(made)
    x, logits = inputs()
    out = run(made, x, logits, lazily=lazily)
    assert_near(out, dense(x, given, *softmax_routing(logits, 4, True)))


def test_a_gate_of_its_own_is_asked(lazily):
    class Gate(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    gate = Gate(HIDDEN, EXPERTS, bias=False)
    weight = gate.weight.detach().clone()
    made = layer(cls=SharedFusedMoE, shared_experts=torch.nn.Identity(), gate=gate)
    given = weights_of(made)
    x, _ = inputs()
    _, out = run(made, x, torch.full((13, EXPERTS), torch.nan), lazily=lazily)
    routing = softmax_routing(x @ weight.t(), 4, True)
    assert_near(out, dense(x, given, *routing))


def test_experts_of_another_rank_add_nothing(lazily):
    """What a rank of two computes: the half of the experts that it has, with biases."""
    made = layer(has_bias=True, activation="swigluoai")
    half = EXPERTS // 2
    given = {name: t[half:] for name, t in weights_of(made).items()}
    expert_map = torch.full((EXPERTS,), -1)
    expert_map[half:] = torch.arange(half)
    x, logits = inputs()
    weights, experts = softmax_routing(logits, 4, True)
    args = (x, given["w13_weight"], given["w2_weight"], weights.float(), experts)
    biases = given["w13_bias"], given["w2_bias"]
    device = torch_xla.device() if lazily else torch.device("cpu")
    out = moe.fused_experts(
        *(t.to(device) for t in args),
        "swigluoai",
        *(t.to(device) for t in biases),
        expert_map=expert_map.to(device),
    )
    local = torch.where(experts < half, 0, weights), (experts - half).clamp(min=0)
    padded = torch.zeros(13, half, dtype=torch.float64)
    padded.scatter_add_(1, local[1], local[0])
    every = torch.arange(half).expand(13, half)
    assert_near(out.cpu(), dense(x, given, padded, every, swigluoai))


def test_the_work_is_a_row_for_each_expert_of_a_token():
    """Not one for each expert: the products of 13 tokens and 4 experts take 52 rows."""
    made = on_xla(layer())
    x, logits = (t.to(torch_xla.device()) for t in inputs())
    text = hlo(made(x, logits))
    calls = re.findall(
        r"= f32\[(\d+),(\d+)\]\S* custom-call\(f32\[(\d+),(\d+)\]\S* \S+,"
        r" f32\[16,.*target=\"xla_ops.grouped_matmul\"",
        text,
    )
    rows = 13 * 4
    assert sorted(calls) == sorted(
        [
            (str(rows), str(2 * INTERMEDIATE), str(rows), str(HIDDEN)),
            (str(rows), str(HIDDEN), str(rows), str(INTERMEDIATE)),
        ]
    )
    assert " dot(" not in text
    # No array has a row for each expert of each token.
    assert not re.search(rf"\[{13 * EXPERTS},\d+\]|\[13,{EXPERTS},\d+\]", text)


def test_one_program_serves_every_routing():
    import torch_xla.debug.metrics as met

    made = on_xla(layer())
    device = torch_xla.device()
    compiled = []
    for seed in range(3):
        x, logits = (t.to(device) for t in inputs(seed=seed))
        torch_xla.sync()
        made(x, logits).cpu()
        compiled.append(met.metric_data("CompileTime")[0])
    assert compiled[1] == compiled[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(activation="relu2"),
            "FusedMoE: activation must be one of silu, gelu, swigluoai, got relu2",
        ),
        (
            dict(apply_router_weight_on_input=True),
            "FusedMoE: apply_router_weight_on_input must come with top_k 1, got 4",
        ),
        (
            dict(zero_expert_num=2, zero_expert_type="identity"),
            "FusedMoE: zero_expert_num must be 0 on XLA, got 2",
        ),
    ],
)
def test_refused_by_name(options, message):
    made = layer(**options)
    with pytest.raises((NotImplementedError, ValueError), match=re.escape(message)):
        made(*inputs())
