"""What a Hugging Face config.json says about a decoder of Llama's family.

SPDX-License-Identifier: Apache-2.0

Reads the two spellings that are in use: `rope_theta` with `rope_scaling`
(transformers 4) and `rope_parameters` (transformers 5), and fills in what a
config.json leaves out as transformers' classes do. A value that this decoder
cannot follow is an error here, before a weight is read; one that transformers
ignores is ignored with a warning.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from files import (
    CheckpointError,
    CheckpointWarning,
    check_folder,
    is_there,
    missing,
    read_json,
    short,
)


class Family(NamedTuple):
    """What the architectures differ in, and their defaults."""

    max_len: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    # Biases of q, k and v, then of the attention's output; None: attention_bias says.
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool = False  # whether config.json may ask for it
    qk_norm: bool = False  # RMSNorm over each head of q and k
    windows: str = "none"  # sliding windows: "none", "all" layers, or "some"


FAMILIES = {
    "llama": Family(2048, mlp_bias=True),
    "mistral": Family(131072, qkv_bias=False, o_bias=False, windows="all"),
    "qwen2": Family(32768, qkv_bias=True, o_bias=False, windows="some"),
    "qwen3": Family(32768, head_dim=128, qk_norm=True, windows="some"),
}
# What xla_ops.paged_attention takes; tests/llm/test_llm_config.py holds the two
# together.
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256
# Another model, whatever model_type says.
QUANTISED = "quantised checkpoints are not read, take the one in bf16 or fp16"
MIXTURE = "mixtures of experts are not supported"
UNSUPPORTED = {
    "quantization_config": QUANTISED,
    "compression_config": QUANTISED,
    "num_experts": MIXTURE,
    "num_local_experts": MIXTURE,
    "n_routed_experts": MIXTURE,
    "attn_logit_softcapping": "soft caps are not supported",
    "final_logit_softcapping": "soft caps are not supported",
    "attention_chunk_size": "attention in chunks is not supported",
    "text_config": "models of more than text are not supported",
}
# What rope_parameters may hold, by its rope_type, beside what all may.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        *("mscale", "mscale_all_dim", "original_max_position_embeddings"),
    ),
}
ALL_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
MAX_LAYERS = 10000  # beyond it is a slip, which would fill the memory with layers


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 8192  # for "llama3" and "yarn", as are those below
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # of cosines and sines


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
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # one a layer
    eos_token_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Reads config.json and, where there is one, generation_config.json.

        Raises:
          CheckpointError: the folder has no config.json, a file is broken, or the
            config asks for something this decoder does not do.
        """
        folder = Path(folder)
        check_folder(folder)
        if not is_there(folder / "config.json"):
            fixes = {
                "snapshots": "give the folder below snapshots/ in it",
                "adapter_config.json": "merge the adapter into its base model first "
                "(peft's merge_and_unload)",
                "*.gguf": "GGUF files are not read, take the checkpoint in safetensors",
                "params.json": "take the checkpoint in Hugging Face's format",
            }
            raise missing(folder, "config.json", fixes, "give a folder that holds it")
        generation = folder / "generation_config.json"
        return cls.from_dict(
            read_json(folder / "config.json"),
            read_json(generation) if is_there(generation) else {},
        )

    @classmethod
    def from_dict(cls, raw: dict, generation: dict | None = None) -> "ModelConfig":
        """Reads the objects in config.json and generation_config.json.

        End-of-sequence tokens come from the second where it names any.

        Raises:
          CheckpointError: they ask for something this decoder does not do.
        """
        fields = _Fields(raw)
        architecture: Any = raw.get("model_type")
        fields.check(
            "model_type",
            f"be one of {', '.join(FAMILIES)}",
            isinstance(architecture, str) and architecture in FAMILIES,
        )
        for name, why in UNSUPPORTED.items():
            fields.check(name, "be absent", not raw.get(name), why)
        fields.check("is_causal", "be true", fields.flag("is_causal", True))
        activation = raw.get("hidden_act", "silu")
        fields.check("hidden_act", "be silu", activation in ("silu", "swish"))
        family = FAMILIES[architecture]
        num_heads = fields.integer("num_attention_heads")
        # Only Llama's has a default that can be right for a model of any size.
        must_say = architecture != "llama" and "num_key_value_heads" not in raw
        num_kv_heads = fields.integer(
            "num_key_value_heads", None if must_say else num_heads
        )
        fields.check(
            "num_key_value_heads",
            f"divide num_attention_heads {num_heads}",
            num_heads % num_kv_heads == 0,
        )
        hidden_size = fields.integer("hidden_size")
        max_len = fields.integer("max_position_embeddings", family.max_len)
        bias = fields.flag("attention_bias")
        windows = _sliding_windows(fields, family)
        ends = fields
        if generation and "eos_token_id" in generation:
            ends = _Fields(generation, "generation_config.json")
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=len(windows),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(fields, family, hidden_size, num_heads),
            max_len=max_len,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, max_len),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_windows=windows,
            eos_token_ids=ends.token_ids("eos_token_id"),
        )


class _Fields:
    """The fields of one JSON object, checked when they are taken.

    null counts as absent. Messages name the file, and the field by its path in it.
    """

    def __init__(self, raw: dict, file: str = "config.json", path: str = ""):
        self.raw, self.file, self.path = raw, file, path

    def check(self, name: str, rule: str, ok: bool, why: str = "") -> None:
        if not ok:
            self.fail(name, rule, why)

    def fail(self, name: str, rule: str, why: str = ""):
        got = short(self.raw[name]) if name in self.raw else "nothing"
        if name not in self.raw and not self.path and "model_type" not in self.raw:
            got += f" among {short(sorted(self.raw))}"
        raise CheckpointError(
            f"{self.file}: {self.path}{name} must {rule}, got {got}"
            + (f": {why}" if why else "")
        )

    def integer(
        self,
        name: str,
        default: int | None = None,
        least: int = 1,
        most: int = 2**31 - 1,
    ) -> int:
        value: Any = self.raw.get(name)
        if value is None and default is not None:
            return default
        ok = isinstance(value, int) and not isinstance(value, bool)
        self.check(name, f"be an integer of at least {least}", ok and value >= least)
        self.check(name, f"be at most {most}", value <= most)
        return value

    def number(
        self, name: str, default: float | None = None, least: float = 0
    ) -> float:
        """A number above 0, and at least `least`; finite in float32, as its powers and
        its inverse."""
        value: Any = self.raw.get(name)
        if value is None and default is not None:
            return default
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        rule = f"of at least {least}" if least else "above 0"
        ok = ok and 0 < value and least <= value < math.inf
        self.check(name, f"be a number {rule}", ok)
        self.check(name, "be at most 1e30", value <= 1e30)
        self.check(name, "be at least 1e-30", value >= 1e-30)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value: Any = self.raw.get(name)
        if value is None:
            return default
        self.check(name, "be true or false", isinstance(value, bool))
        return value

    def token_ids(self, name: str) -> frozenset[int]:
        value: Any = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        ok = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        self.check(name, "be a token id, or a list of them", ok)
        return frozenset(ids)

    def warn(self, name: str, why: str) -> None:
        warnings.warn(
            f"{self.file}: {self.path}{name} {short(self.raw[name])} has no effect: "
            f"{why}",
            CheckpointWarning,
            stacklevel=2,
        )


def _head_dim(fields: _Fields, family: Family, hidden_size: int, heads: int) -> int:
    if fields.raw.get("head_dim") is not None or family.head_dim is not None:
        name, head_dim = "head_dim", fields.integer("head_dim", family.head_dim)
    else:
        ok = hidden_size % heads == 0
        fields.check("hidden_size", f"be a multiple of num_attention_heads {heads}", ok)
        name = "head_dim, hidden_size / num_attention_heads,"
        head_dim = hidden_size // heads
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        raise CheckpointError(
            f"{fields.file}: {name} must be a multiple of {HEAD_DIM_STEP} up to "
            f"{MAX_HEAD_DIM}, got {head_dim}: the kernels of paged_attention take no "
            "other"
        )
    return head_dim


def _rope(config: _Fields, max_len: int) -> RopeConfig:
    # rope_scaling first, as transformers has it where a file holds both.
    name = "rope_scaling" if config.raw.get("rope_scaling") else "rope_parameters"
    raw = config.raw.get(name)
    raw = {} if raw is None else raw
    config.check(name, "be an object", isinstance(raw, dict))
    fields = _Fields(raw, path=f"{name}.")
    by_layer = [key for key in raw if key.endswith("_attention")]
    config.check(name, "be one set of values for all layers", not by_layer)
    spelling = "rope_type" if "rope_type" in raw else "type"
    kind = raw.get(spelling, "default")
    supported = isinstance(kind, str) and kind in ROPE_KEYS
    fields.check(spelling, f"be one of {', '.join(ROPE_KEYS)}", supported)
    for holder in (fields, config):
        partial = holder.raw.get("partial_rotary_factor")
        ok = partial is None or partial == 1
        holder.check("partial_rotary_factor", "be 1", ok)
    for key in sorted(raw.keys() - {*ALL_ROPE_KEYS, *ROPE_KEYS[kind]}):
        fields.warn(key, f"rope_type {kind} does not take it")
    holder = fields if "rope_theta" in raw else config
    default = None if "rope_theta" in holder.raw else 10000.0
    theta = holder.number("rope_theta", default, least=1)
    if kind == "default":
        return RopeConfig(theta=theta)
    # Some files have it beside the object; transformers lets that one win.
    beside = "original_max_position_embeddings"
    original = (config if beside in config.raw else fields).integer(beside, max_len)
    if kind == "yarn" and raw.get("factor", 0) is None:  # the key is there, and null
        factor = max_len / original
    else:
        factor = fields.number("factor", least=1)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    if kind == "llama3":
        low = fields.number("low_freq_factor")
        high = fields.number("high_freq_factor")
        fields.check("high_freq_factor", f"be over low_freq_factor {low}", high > low)
        return RopeConfig(theta, kind, factor, original, low, high)
    fields.check("rope_theta", "be over 1", theta > 1)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_len=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
        attention_factor=_yarn_attention_factor(fields, factor),
    )


def _yarn_attention_factor(fields: _Fields, factor: float) -> float:
    """YaRN's temperature (arXiv:2309.00071), as DeepSeek's configs extend it."""
    if fields.raw.get("attention_factor") is not None:
        return fields.number("attention_factor")

    def mscale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weights = [fields.raw.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(weights):
        return mscale()
    return mscale(fields.number("mscale")) / mscale(fields.number("mscale_all_dim"))


def _sliding_windows(fields: _Fields, family: Family) -> tuple[int | None, ...]:
    layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    raw = fields.raw
    if family.windows == "none":
        # transformers' model takes no notice of it, but its cache does.
        given = raw.get("sliding_window") is not None
        fields.check("sliding_window", "be null for this model_type", not given)
    if family.windows != "some":
        window = None
        # null is not the same as absent.
        if family.windows == "all" and raw.get("sliding_window", 0) is not None:
            window = fields.integer("sliding_window", 4096)
        kind = "full_attention" if window is None else "sliding_attention"
        ok = raw.get("layer_types") in (None, [kind] * layers)
        fields.check("layer_types", f"be absent, or {layers} times {kind}", ok)
        return (window,) * layers
    window = None
    if fields.flag("use_sliding_window") and raw.get("sliding_window", 0) is not None:
        window = fields.integer("sliding_window", 4096)
    kinds = raw.get("layer_types")
    if kinds is None:
        full_below = fields.integer("max_window_layers", 28, least=0)
        return tuple(window if i >= full_below else None for i in range(layers))
    ok = isinstance(kinds, list) and len(kinds) == layers
    fields.check("layer_types", f"be a list of {layers}", ok)
    allowed = ["full_attention"] + ["sliding_attention"] * (window is not None)
    fields.check(
        "layer_types",
        f"hold {' or '.join(allowed)} alone",
        all(kind in allowed for kind in kinds),
        "" if window else "use_sliding_window is false",
    )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
