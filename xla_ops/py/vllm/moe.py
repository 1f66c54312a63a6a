"""Routed experts for vLLM's engine: FusedMoE on XLA tensors.

    import xla_ops.vllm.moe  # registers; before a model is built

A token's experts are rows, not loops. The (token, expert) pairs are sorted by expert,
`grouped_matmul` multiplies each run of rows by its expert's matrix, and the results go
back to their tokens: T tokens of top_k experts cost T * top_k rows, whatever the
number of experts. All shapes are static, so the routing stays on the device.

vLLM's own layer calls `torch.ops.vllm.moe_forward`, which torch_xla refuses for its
aliased arguments, and looks a forward context up. Here forward is called directly.

FusedMoE gets another forward, and with it the classes that models have below it. The
method of weights that are not quantised is registered (`register_oot`); methods of
other weights call `apply_experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.layer import FusedMoE

try:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
except ImportError:  # vLLM 0.12
    from vllm.model_executor.layers.fused_moe.layer import UnquantizedFusedMoEMethod

from ..ops import gelu_and_mul, grouped_matmul, silu_and_mul, swigluoai_and_mul

ACTIVATIONS = {
    "silu": silu_and_mul,
    "gelu": gelu_and_mul,
    "swigluoai": swigluoai_and_mul,
}


def _top_k(
    scores: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest scores and where they are; a bias counts in the choice alone."""
    if bias is None:
        return torch.topk(scores, top_k, dim=-1)
    experts = torch.topk(scores + bias, top_k, dim=-1)[1]
    return scores.gather(1, experts), experts


def grouped_topk(
    scores: torch.Tensor,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's choice: the best groups of experts first, then experts of those.

    A group is as good as its best expert or, with a bias, as its best two together.

    Args:
        scores: [num_tokens, num_experts], float32.
        bias: [num_experts], added to the scores for the choice alone.

    Returns:
        The experts' scores without bias, and the experts: [num_tokens, top_k].
    """
    biased = scores if bias is None else scores + bias
    groups = biased.view(scores.shape[0], num_expert_group, -1)
    if bias is None:
        group_scores = groups.amax(-1)
    else:
        group_scores = groups.topk(2, dim=-1)[0].sum(-1)
    best = torch.topk(group_scores, topk_group, dim=-1)[1]
    # [num_tokens, num_expert_group]: whether a group is among the best.
    every = torch.arange(num_expert_group, device=scores.device)
    chosen = (best.unsqueeze(-1) == every).any(1)
    allowed = groups.masked_fill(~chosen.unsqueeze(-1), -torch.inf)
    experts = torch.topk(allowed.flatten(1), top_k, dim=-1)[1]
    return scores.gather(1, experts), experts


def route(
    layer: FusedMoE, hidden_states: torch.Tensor, router_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses each token's experts, as vLLM's `FusedMoE.select_experts` does.

    Returns:
        (weights, experts): [num_tokens, top_k], float32 and an integer type.
    """
    bias = layer.e_score_correction_bias
    if bias is not None:
        bias = bias.float()
    groups = layer.num_expert_group
    num_experts = router_logits.shape[-1]
    logits = router_logits.float()
    if layer.use_grouped_topk and num_experts > groups and num_experts % groups == 0:
        if layer.scoring_func == "sigmoid":
            scores = logits.sigmoid()
        elif layer.scoring_func == "softmax":
            scores = logits.softmax(-1)
        else:
            raise ValueError(
                "FusedMoE: scoring_func must be softmax or sigmoid, got"
                f" {layer.scoring_func}"
            )
        weights, experts = grouped_topk(
            scores, layer.top_k, groups, layer.topk_group, bias
        )
        scale = layer.routed_scaling_factor
    elif bias is None and layer.custom_routing_function is not None:
        return layer.custom_routing_function(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=layer.top_k,
            renormalize=layer.renormalize,
        )
    else:
        weights, experts = _top_k(logits.softmax(-1), bias, layer.top_k)
        # Without a bias the model scales its experts itself.
        scale = 1.0 if bias is None else layer.routed_scaling_factor
    if layer.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale if scale != 1.0 else weights, experts


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    weights_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    Args:
        x: [num_tokens, hidden].
        w13: [num_experts, 2 * intermediate, hidden], gate rows, then up rows (for
            `swigluoai` alternating).
        w2: [num_experts, hidden, intermediate].
        weights, experts: [num_tokens, top_k], of `route`.
        activation: a key of ACTIVATIONS.
        w13_bias, w2_bias: [num_experts, ...], or None.
        weights_on_input: whether weights multiply what an expert takes, not what it
            gives; for top_k 1.
        expert_map: the local number of each expert, -1 for one of another rank.

    Returns:
        [num_tokens, hidden], x's dtype; the sum is taken in float32.
    """
    if activation not in ACTIVATIONS:
        raise NotImplementedError(
            f"FusedMoE: activation must be one of {', '.join(ACTIVATIONS)}, got"
            f" {activation}"
        )
    num_tokens, top_k = experts.shape
    num_experts = w13.shape[0]
    if weights_on_input and top_k != 1:
        raise ValueError(
            "FusedMoE: apply_router_weight_on_input must come with top_k 1, got"
            f" {top_k}"
        )
    pairs = experts.reshape(-1).to(torch.int32)
    if expert_map is not None:
        pairs = expert_map.to(torch.int32).index_select(0, pairs)
        # Behind all groups, where rows are zero.
        pairs = torch.where(pairs < 0, num_experts, pairs)
    sorted_experts, order = torch.sort(pairs, stable=True)
    every = torch.arange(num_experts + 1, dtype=torch.int32, device=x.device)
    # How many pairs come before each expert's.
    offsets = (pairs < every.unsqueeze(-1)).sum(-1, dtype=torch.int32)

    # A cast: torch_xla aborts where index_select takes a result of sort as it is.
    places = order.to(torch.int32)
    rows = x.index_select(0, places // top_k)
    if weights_on_input:
        factors = weights.reshape(-1, 1).index_select(0, places)
        rows = (rows.float() * factors).to(x.dtype)
        weights = torch.ones_like(weights)
    hidden = grouped_matmul(rows, w13, offsets)
    local = sorted_experts.clamp(max=num_experts - 1)
    if w13_bias is not None:
        hidden = hidden + w13_bias.to(x.dtype).index_select(0, local)
    hidden = ACTIVATIONS[activation](hidden)
    rows = grouped_matmul(hidden, w2, offsets)
    if w2_bias is not None:
        bias = w2_bias.to(x.dtype).index_select(0, local)
        if expert_map is not None:
            bias = bias.masked_fill((sorted_experts == num_experts)[:, None], 0)
        rows = rows + bias

    # Where each pair's row went.
    found = torch.zeros_like(order).scatter(
        0, order, torch.arange(order.shape[0], device=x.device, dtype=order.dtype)
    )
    rows = rows.index_select(0, found).view(num_tokens, top_k, -1)
    return (rows.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def apply_experts(
    layer: FusedMoE, x: torch.Tensor, router_logits: torch.Tensor
) -> torch.Tensor:
    """Routes and computes a layer whose w13_weight and w2_weight are of x's dtype."""
    if layer.enable_eplb:
        raise NotImplementedError("FusedMoE: enable_eplb must be off on XLA, got True")
    if layer.zero_expert_num:
        raise NotImplementedError(
            f"FusedMoE: zero_expert_num must be 0 on XLA, got {layer.zero_expert_num}"
        )
    weights, experts = route(layer, x, router_logits)
    return fused_experts(
        x,
        layer.w13_weight,
        layer.w2_weight,
        weights,
        experts,
        activation=layer.activation,
        w13_bias=getattr(layer, "w13_bias", None),
        w2_bias=getattr(layer, "w2_bias", None),
        weights_on_input=layer.apply_router_weight_on_input,
        expert_map=layer.expert_map,
    )


def _forward(
    layer: FusedMoE, hidden_states: torch.Tensor, router_logits: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Routed experts, and shared ones where the layer has them, over all ranks."""
    size = hidden_states.shape[-1]
    if layer.hidden_size != size:
        hidden_states = F.pad(hidden_states, (0, layer.hidden_size - size))
    if layer.gate is not None:
        router_logits, _ = layer.gate(hidden_states)
    shared = layer.shared_experts
    parts = [] if shared is None else [shared(hidden_states)]
    parts.append(
        layer.quant_method.apply(
            layer=layer, x=hidden_states, router_logits=router_logits
        )
    )
    if layer.reduce_results and (layer.tp_size > 1 or layer.ep_size > 1):
        parts = [tensor_model_parallel_all_reduce(part) for part in parts]
    parts = [part[..., :size] for part in parts]
    return parts[0] if shared is None else (parts[0], parts[1])


# Models have classes of their own below these, which register_oot would not reach.
FusedMoE.forward_native = FusedMoE.forward_oot = _forward


@UnquantizedFusedMoEMethod.register_oot
class XlaUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """Weights as the checkpoint has them."""

    def forward_native(
        self, layer: FusedMoE, x: torch.Tensor, router_logits: torch.Tensor
    ) -> torch.Tensor:
        return apply_experts(layer, x, router_logits)

    forward_oot = forward_native

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        # No all-to-all kernels: the layer stays what it is.
        return None
