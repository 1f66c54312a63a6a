"""What a Hugging Face config.json says about a Llama or Qwen3 decoder.

SPDX-License-Identifier: Apache-2.0

Reads the two spellings that are in use: `rope_theta` with `rope_scaling`
(transformers 4) and `rope_parameters` (transformers 5). A field that this
decoder would have to ignore is an error, never a quietly different model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("llama", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    # The rest is for kind "llama3" alone.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int
    max_len: int  # positions that the model was made for
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm over each head of q and k
    sliding_windows: tuple[int | None, ...]  # one a layer
    eos_token_ids: frozenset[int]
    dtype: str  # of the stored weights: "float32", "bfloat16", "float16"

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Reads config.json and, where there is one, generation_config.json.

        Raises:
          FileNotFoundError: the folder has no config.json.
          ValueError: the config asks for something this decoder does not do.
        """
        folder = Path(folder)
        raw = _read_json(folder / "config.json")
        eos = raw.get("eos_token_id")
        generation = folder / "generation_config.json"
        if generation.exists():
            eos = _read_json(generation).get("eos_token_id", eos)
        return cls.from_dict(raw, eos)

    @classmethod
    def from_dict(cls, raw: dict, eos: int | list[int] | None = None) -> "ModelConfig":
        architecture = raw.get("model_type")
        _check("model_type", f"be one of {', '.join(ARCHITECTURES)}", architecture,
               architecture in ARCHITECTURES)  # fmt: skip
        _check("hidden_act", "be silu", raw.get("hidden_act"),
               raw.get("hidden_act", "silu") == "silu")  # fmt: skip
        _check("quantization_config", "be absent", raw.get("quantization_config"),
               not raw.get("quantization_config"))  # fmt: skip
        qwen = architecture == "qwen3"
        num_heads = _need(raw, "num_attention_heads")
        hidden_size = _need(raw, "hidden_size")
        max_len = raw.get("max_position_embeddings", 32768 if qwen else 2048)
        bias = bool(raw.get("attention_bias", False))
        eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        return cls(
            architecture=architecture,
            vocab_size=_need(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_need(raw, "intermediate_size"),
            num_layers=_need(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or (128 if qwen else hidden_size // num_heads),
            max_len=max_len,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=_rope(raw, max_len),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and not qwen,
            qk_norm=qwen,
            sliding_windows=_sliding_windows(raw),
            eos_token_ids=frozenset(eos_ids),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        )


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(
            f"model: folder must hold {path.name}, got {path.parent}"
        )
    return json.loads(path.read_text())


def _check(field: str, rule: str, value, ok: bool) -> None:
    if not ok:
        raise ValueError(f"config.json: {field} must {rule}, got {value!r}")


def _need(raw: dict, field: str):
    _check(field, "be present", None, field in raw)
    return raw[field]


def _rope(raw: dict, max_len: int) -> RopeConfig:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _check("rope type", f"be one of {', '.join(ROPE_TYPES)}", kind, kind in ROPE_TYPES)
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
    _check("partial_rotary_factor", "be 1", partial, partial == 1)
    return RopeConfig(
        theta=float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_len=int(scaling.get("original_max_position_embeddings", max_len)),
    )


def _sliding_windows(raw: dict) -> tuple[int | None, ...]:
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window")
    if raw["model_type"] != "qwen3" or not window or not raw.get("use_sliding_window"):
        return (None,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        full_below = raw.get("max_window_layers", 28)
        return tuple(window if i >= full_below else None for i in range(layers))
    _check("layer_types", f"have {layers} entries", len(kinds), len(kinds) == layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
