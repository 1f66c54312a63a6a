"""Quantised checkpoints, and transformers with layers that quantise as those say.

The reference computes with the codes that are in the checkpoint and rounds activations
as the engine must, in float32: what remains between the two is a code here and there
that falls on the other side of a tie.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_checkpoints import copy_without_weights
from vllm_oracle import Oracle

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FP8: 448.0}
BLOCK = 128
# Layers that vLLM merges: one scale, where a layer has one.
_MERGED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
# The largest activation that a static scale has codes for. A few are larger.
_STATIC_RANGE = {"down_proj": 24.0, "o_proj": 6.0}
_STATIC_DEFAULT = 3.5


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are quantised.

    Attributes:
        dtype: of the codes.
        weights: what has a scale: a "tensor", a "channel" or a "block".
        activations: what has a scale: a "tensor", whose scale is in the checkpoint, or
            a "token" or a "group" of a token, whose scales are found as they come.
        symmetric: whether zero is code 0; else activations have a zero point.
    """

    dtype: torch.dtype
    weights: str
    activations: str
    symmetric: bool = True

    def config(self) -> dict:
        """As `quantization_config` of compressed-tensors."""
        kind = dict(num_bits=8, type="int" if self.dtype == torch.int8 else "float")
        weights: dict = dict(kind, symmetric=True, strategy=self.weights, dynamic=False)
        inputs: dict = dict(
            kind,
            symmetric=self.symmetric,
            strategy=self.activations,
            dynamic=self.activations != "tensor",
        )
        if self.weights == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
        if self.activations == "group":
            inputs["group_size"] = BLOCK
        group = dict(targets=["Linear"], weights=weights, input_activations=inputs)
        name = "int" if self.dtype == torch.int8 else "float"
        return dict(
            quant_method="compressed-tensors",
            format=f"{name}-quantized",
            quantization_status="compressed",
            config_groups=dict(group_0=group),
            ignore=["lm_head"],
        )


SCHEMES = {
    "int8": Scheme(torch.int8, "channel", "token"),
    "int8_zero_point": Scheme(torch.int8, "channel", "token", symmetric=False),
    "int8_static": Scheme(torch.int8, "channel", "tensor"),
    "int8_static_zero_point": Scheme(torch.int8, "channel", "tensor", symmetric=False),
    "fp8": Scheme(FP8, "channel", "token"),
    "fp8_tensor": Scheme(FP8, "tensor", "token"),
    "fp8_static": Scheme(FP8, "tensor", "tensor"),
    "fp8_block": Scheme(FP8, "block", "group"),
}


def to_codes(values: torch.Tensor, scale, zero_point, dtype) -> torch.Tensor:
    """The nearest codes, in float32."""
    largest = LARGEST[dtype]
    if dtype == torch.int8:
        return ((values / scale).round() + zero_point).clamp(-128.0, largest)
    return (values / scale).clamp(-largest, largest).to(dtype).float()


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


def expand(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A scale of a weight, so that it multiplies the codes."""
    if scheme.weights != "block":
        return scale
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def _weight_scale(weight, together: list, scheme: Scheme) -> torch.Tensor:
    largest = LARGEST[scheme.dtype]
    if scheme.weights == "tensor":
        return torch.stack([w.abs().max() for w in together]).max().view(1) / largest
    if scheme.weights == "channel":
        return weight.abs().amax(1, keepdim=True) / largest
    return _blocks(weight).abs().amax((1, 3)) / largest


def save_quantized(checkpoint: Path, scheme: Scheme, folder: Path) -> Path:
    """A checkpoint with the linear layers of attention and MLP quantised."""
    weights = load_file(checkpoint / "model.safetensors")
    tensors = dict(weights)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        layer = name.removesuffix(".weight")
        kind = layer.split(".")[-1]
        merged = next((group for group in _MERGED if kind in group), (kind,))
        together = [weights[name.replace(kind, other)] for other in merged]
        scale = _weight_scale(weights[name], together, scheme)
        codes = to_codes(weights[name], expand(scale, scheme), 0.0, scheme.dtype)
        tensors[name] = codes.to(scheme.dtype)
        tensors[layer + ".weight_scale"] = scale
        if scheme.activations == "tensor":
            reach = _STATIC_RANGE.get(kind, _STATIC_DEFAULT)
            tensors[layer + ".input_scale"] = torch.tensor(
                [reach / LARGEST[scheme.dtype]]
            )
            if not scheme.symmetric:
                tensors[layer + ".input_zero_point"] = torch.tensor(
                    [11], dtype=torch.int8
                )
    copy_without_weights(checkpoint, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = scheme.config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class _Linear(nn.Module):
    """x W^T by codes and scales."""

    def __init__(self, tensors: dict[str, torch.Tensor], layer: str, scheme: Scheme):
        super().__init__()
        scale = expand(tensors[layer + ".weight_scale"], scheme)
        self.weight = tensors[layer + ".weight"].float() * scale
        self.input_scale = tensors.get(layer + ".input_scale")
        self.zero_point = tensors.get(layer + ".input_zero_point", torch.zeros(1))
        self.scheme = scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.weights == "block":
            return x @ self.weight.T  # the engine dequantises these when it reads them
        dtype, largest = self.scheme.dtype, LARGEST[self.scheme.dtype]
        zero_point = self.zero_point.float()
        if self.input_scale is not None:
            scale = self.input_scale
        elif self.scheme.symmetric:
            scale = x.abs().amax(-1, keepdim=True) / largest
        else:
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            scale = (high - low) / 255.0
            zero_point = (-128.0 - low / scale).round()
        x = (to_codes(x, scale, zero_point, dtype) - zero_point) * scale
        return x @ self.weight.T


class QuantizedOracle(Oracle):
    """Transformers with a quantised checkpoint's layers."""

    def __init__(self, original: Path, quantized: Path, scheme: Scheme):
        super().__init__(original, torch.float32)
        tensors = load_file(quantized / "model.safetensors")
        for name, module in list(self.model.named_modules()):
            if name.endswith("_proj"):
                parent = self.model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.split(".")[-1], _Linear(tensors, name, scheme))
                assert isinstance(module, nn.Linear) and module.bias is None


def base_config() -> transformers.LlamaConfig:
    """Of what gets quantised: every layer is made of whole blocks."""
    return transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=2 * BLOCK,
        intermediate_size=4 * BLOCK,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
