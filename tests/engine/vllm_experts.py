"""What routed experts compute, in plain torch: every expert over every token."""

import torch


def silu(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def gelu(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.gelu(gate) * up


def swigluoai(x):
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def dense(x, given, weights, experts, activation=silu, on_input=False):
    """Every expert over every token, in float64; the unchosen with weight zero."""
    w = {name: t.double() for name, t in given.items()}
    x = x.double()
    chosen = torch.zeros(len(x), len(w["w13_weight"]), dtype=torch.float64)
    chosen.scatter_(1, experts.long(), weights.double())
    out = torch.zeros_like(x)
    for e in range(chosen.shape[1]):
        factor = chosen[:, e : e + 1]
        rows = x * factor if on_input else x
        hidden = rows @ w["w13_weight"][e].t()
        hidden = hidden + w["w13_bias"][e] if "w13_bias" in w else hidden
        result = activation(hidden) @ w["w2_weight"][e].t()
        result = result + w["w2_bias"][e] if "w2_bias" in w else result
        out += torch.where(factor != 0, result, 0) * (1 if on_input else factor)
    return out


def softmax_routing(logits, top_k, renormalize):
    weights, experts = logits.double().softmax(-1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts
