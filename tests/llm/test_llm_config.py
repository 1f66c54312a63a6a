"""Tests what examples/llm reads out of config.json: the same as transformers, or an
error that names the key and what it must be, before any weight is read."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import weights
import xla_ops
from checkpoints import TINY, edit_config, outcome, tiny_checkpoint
from command import command_error
from config import ModelConfig
from files import CheckpointError, CheckpointWarning
from model import Decoder, rope_frequencies

CLASSES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def raw_config(**changes) -> dict:
    """A config.json that is right, with changes; `...` takes a key out."""
    raw = json.loads(LlamaConfig(**TINY).to_json_string(use_diff=False)) | changes
    return {key: value for key, value in raw.items() if value is not ...}


# --- The same as transformers. ------------------------------------------------
ropes = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        dict(rope_type=st.just("default"), rope_theta=st.floats(1e3, 1e7))
    ),
    st.fixed_dictionaries(
        dict(
            rope_type=st.just("linear"),
            rope_theta=st.sampled_from([10000.0, 500000]),
            factor=st.floats(1, 64),
        )
    ),
    st.fixed_dictionaries(
        dict(
            rope_type=st.just("llama3"),
            factor=st.floats(1, 64),
            low_freq_factor=st.floats(0.5, 1),
            high_freq_factor=st.floats(2, 8),
            rope_theta=st.floats(1e3, 1e7),
        ),
        optional=dict(original_max_position_embeddings=st.integers(8, 8192)),
    ),
    st.fixed_dictionaries(
        dict(
            rope_type=st.just("yarn"),
            factor=st.floats(1, 64),
            rope_theta=st.floats(1e3, 1e7),
        ),
        optional=dict(
            original_max_position_embeddings=st.integers(8, 8192),
            attention_factor=st.floats(0.5, 2),
            beta_fast=st.floats(8, 64),
            beta_slow=st.floats(0.5, 4),
            mscale=st.sampled_from([0.707, 1.0]),
            mscale_all_dim=st.sampled_from([0.707, 1.0]),
            truncate=st.booleans(),
        ),
    ),
)


@st.composite
def configs(draw):
    """A config of transformers, and the config.json that holds what was given."""
    family = draw(st.sampled_from(sorted(CLASSES)))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    given = dict(
        vocab_size=draw(st.integers(1, 99)),
        hidden_size=heads * 8 * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 64)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=draw(st.integers(8, 9999)),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=draw(ropes),
    )
    if family != "qwen2" and draw(st.booleans()):
        given["head_dim"] = 8 * draw(st.integers(1, 32))
    if draw(st.booleans()):
        given["rms_norm_eps"] = draw(st.floats(1e-9, 1e-3))
    if family in ("llama", "qwen3"):
        given["attention_bias"] = draw(st.booleans())
    if family == "llama":
        given["mlp_bias"] = draw(st.booleans())
    if family == "mistral" and draw(st.booleans()):
        given["sliding_window"] = draw(st.none() | st.integers(1, 64))
    if family.startswith("qwen") and draw(st.booleans()):
        given["use_sliding_window"] = True
        given["sliding_window"] = draw(st.integers(1, 64))
        if draw(st.booleans()):
            given["max_window_layers"] = draw(st.integers(0, layers))
        else:
            kinds = st.sampled_from(["full_attention", "sliding_attention"])
            given["layer_types"] = draw(
                st.lists(kinds, min_size=layers, max_size=layers)
            )
    given = {key: value for key, value in given.items() if value is not None} | {
        key: None for key in given if key == "sliding_window" and given[key] is None
    }
    config = CLASSES[family](**copy.deepcopy(given))  # it fills in the rope's dict
    return config, given | {"model_type": family}


@settings(max_examples=60)
@given(configs())
def test_configs_mean_what_they_mean_to_transformers(pair):
    theirs, raw = pair
    ours = ModelConfig.from_dict(json.loads(json.dumps(raw)))
    # Read back from what transformers writes, which spells out every default.
    whole = json.loads(theirs.to_json_string(use_diff=False)) | {"eos_token_id": None}
    assert ModelConfig.from_dict(whole) == ours
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
        decoder = Decoder(ours, max_len=1)
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    if theirs.tie_word_embeddings:
        del wanted["lm_head.weight"]
    unpacked = weights.unpacked(decoder.state_dict())
    assert {name: t.shape for name, t in unpacked.items()} == wanted
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_len == theirs.max_position_embeddings
    for window, layer in zip(ours.sliding_windows, model.model.layers, strict=True):
        attention = layer.self_attn
        same = getattr(attention, "sliding_window", None)
        if theirs.model_type == "mistral":
            same = theirs.sliding_window
        assert window == same
    rotary = type(model.model.rotary_emb)(theirs)
    freq = rope_frequencies(ours.rope, ours.head_dim)
    assert torch.allclose(freq, rotary.inv_freq, rtol=3e-5, atol=0)
    assert ours.rope.attention_factor == pytest.approx(rotary.attention_scaling)


def test_old_and_new_spelling_of_rope_agree():
    expected = ModelConfig.from_dict(raw_config(rope_parameters=LLAMA3))
    assert expected.rope.kind == "llama3" and expected.rope.original_max_len == 32
    old = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old["type"] = old.pop("rope_type")
    changes = dict(rope_parameters=..., rope_theta=10000.0, rope_scaling=old)
    assert ModelConfig.from_dict(raw_config(**changes)) == expected


def test_rope_scaling_wins_over_rope_parameters():
    """transformers takes the old spelling where a file holds both."""
    raw = raw_config(
        rope_parameters=dict(rope_type="default", rope_theta=5.0),
        rope_scaling=dict(rope_type="linear", factor=2.0),
        rope_theta=7.0,
    )
    theirs = LlamaConfig.from_dict(copy.deepcopy(raw)).rope_parameters
    ours = ModelConfig.from_dict(raw).rope
    assert (ours.kind, ours.factor, ours.theta) == (
        theirs["rope_type"],
        theirs["factor"],
        theirs["rope_theta"],
    )
    assert ours.kind == "linear"


def test_yarn_factor_of_null_is_the_ratio_of_lengths():
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=None,
        original_max_position_embeddings=64,
    )
    ours = ModelConfig.from_dict(raw_config(rope_parameters=rope)).rope
    assert ours.factor == 256 / 64


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (95, {"eos_token_id": [4, 5]}, {4, 5}),
        (95, {"eos_token_id": 4}, {4}),
        (95, {"eos_token_id": None}, set()),  # generate() of transformers never stops
        (95, {}, {95}),
        ([95, 7], None, {95, 7}),
        (None, None, set()),
    ],
)
def test_end_tokens_come_from_generation_config_first(config, generation, expected):
    raw = raw_config(eos_token_id=config)
    assert ModelConfig.from_dict(raw, generation).eos_token_ids == expected


# --- Refused. -----------------------------------------------------------------
REFUSED = [
    (dict(model_type="gpt2"), "model_type must be one of llama, .*qwen3, got 'gpt2'"),
    (dict(model_type="mixtral"), "model_type must be one of .* got 'mixtral'"),
    (dict(model_type=["llama"]), r"model_type must be one of .* got \['llama'\]"),
    (dict(model_type=...), r"model_type must be one of .* got nothing among \['"),
    (dict(hidden_act="gelu"), "hidden_act must be silu, got 'gelu'"),
    (dict(hidden_act=None), "hidden_act must be silu, got None"),
    (dict(quantization_config=dict(bits=4)), "quantization_config must be absent"),
    (dict(num_local_experts=8), "num_local_experts must be absent, got 8: mixtures"),
    (dict(final_logit_softcapping=30.0), "final_logit_softcapping must be absent"),
    (dict(attention_chunk_size=8), "attention_chunk_size must be absent, got 8"),
    (dict(is_causal=False), "is_causal must be true, got False"),
    (dict(text_config={"a": 1}), "text_config must be absent"),
    (dict(head_dim=100), "head_dim must be a multiple of 8 up to 256, got 100"),
    (dict(head_dim=264), "head_dim must be a multiple of 8 up to 256, got 264"),
    (dict(head_dim=0), "head_dim must be an integer of at least 1, got 0"),
    (
        dict(head_dim=..., hidden_size=200),
        "head_dim, hidden_size / num_attention_heads, must be a multiple .* got 100",
    ),
    (dict(head_dim=..., hidden_size=8), "head_dim, .*, must be .* got 4"),
    (dict(head_dim=None, hidden_size=33), "hidden_size must be a multiple .* got 33"),
    (
        dict(num_attention_heads=5, num_key_value_heads=2),
        "num_key_value_heads must divide .* 5, got 2",
    ),
    (dict(num_key_value_heads=0), "num_key_value_heads must .* at least 1, got 0"),
    (dict(num_key_value_heads=4), "num_key_value_heads must divide .* 2, got 4"),
    (dict(hidden_size=...), "hidden_size must be an integer .* got nothing"),
    (dict(hidden_size="32"), "hidden_size must be an integer .* got '32'"),
    (dict(hidden_size=32.0), "hidden_size must be an integer .* got 32.0"),
    (dict(hidden_size=True), "hidden_size must be an integer .* got True"),
    (
        dict(hidden_size=2**40),
        "hidden_size must be at most 2147483647, got 1099511627776",
    ),
    (dict(num_hidden_layers=10001), "num_hidden_layers must be at most 10000"),
    (dict(num_hidden_layers=-1), "num_hidden_layers must be .* got -1"),
    (dict(vocab_size=None), "vocab_size must be an integer .* got None"),
    (dict(max_position_embeddings=0), "max_position_embeddings must .* got 0"),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps must be a number .* got '1e-6'"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be a number .* got nan"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
    (dict(attention_bias=1), "attention_bias must be true or false, got 1"),
    (dict(eos_token_id="</s>"), "eos_token_id must be a token id, .* got '</s>'"),
    (dict(eos_token_id=[[1]]), "eos_token_id must be a token id"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor must be 1, got 0.5"),
    (dict(rope_parameters=[1]), r"rope_parameters must be an object, got \[1\]"),
    (dict(rope_parameters=0), "rope_parameters must be an object, got 0"),
    (
        dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "rope_parameters must be one set of values for all layers",
    ),
    (dict(rope_parameters=..., rope_theta=None), "rope_theta must be .* got None"),
    (
        dict(rope_parameters=..., rope_theta=0),
        "rope_theta must be a number of at least 1, got 0",
    ),
]
REFUSED_ROPES = [
    (dict(rope_type="dynamic"), "rope_type must be one of default, .* got 'dynamic'"),
    (dict(rope_type="longrope"), "rope_type must be one of .* got 'longrope'"),
    (dict(type="mrope", rope_type=...), "type must be one of .* got 'mrope'"),
    (dict(rope_type=None), "rope_type must be one of .* got None"),
    (dict(factor=...), "factor must be a number of at least 1, got nothing"),
    (dict(factor=0), "factor must be a number of at least 1, got 0"),
    (dict(factor="8"), "factor must be a number of at least 1, got '8'"),
    (dict(low_freq_factor=...), "low_freq_factor must be a number .* got nothing"),
    (dict(high_freq_factor=1.0), "high_freq_factor must be over low_freq_factor 1.0"),
    (dict(rope_theta=-1), "rope_theta must be a number of at least 1, got -1"),
    (
        dict(original_max_position_embeddings=0),
        "original_max_position_embeddings must be .* at least 1, got 0",
    ),
    (dict(partial_rotary_factor=0.25), "partial_rotary_factor must be 1, got 0.25"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused(changes, message):
    with pytest.raises(CheckpointError, match=f"^config.json: {message}") as info:
        ModelConfig.from_dict(raw_config(**changes))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("changes, message", REFUSED_ROPES)
def test_refused_ropes(name, changes, message):
    rope = {k: v for k, v in (LLAMA3 | changes).items() if v is not ...}
    raw = raw_config(rope_parameters=...) | {name: rope}
    with pytest.raises(CheckpointError, match=rf"^config.json: {name}\.{message}"):
        ModelConfig.from_dict(raw)


WINDOWS = dict(
    model_type="qwen3", num_hidden_layers=2, use_sliding_window=True, sliding_window=8
)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sliding_window=0), "sliding_window must be .* at least 1, got 0"),
        (dict(layer_types=["full_attention"]), "layer_types must be a list of 2"),
        (dict(layer_types="full_attention"), "layer_types must be a list of 2"),
        (
            dict(layer_types=["full_attention", "linear_attention"]),
            "layer_types must hold full_attention or sliding_attention alone",
        ),
        (
            dict(layer_types=["sliding_attention"] * 2, use_sliding_window=False),
            "layer_types must hold full_attention alone.*use_sliding_window is false",
        ),
        (dict(num_key_value_heads=...), "num_key_value_heads must be .* got nothing"),
        (dict(model_type="mistral", sliding_window=0), "sliding_window must be"),
        (
            dict(model_type="mistral", layer_types=["full_attention"] * 2),
            "layer_types must be absent, or 2 times sliding_attention",
        ),
        (
            dict(
                model_type="mistral",
                sliding_window=None,
                layer_types=["sliding_attention"] * 2,
            ),
            "layer_types must be absent, or 2 times full_attention",
        ),
        (dict(model_type="llama"), "sliding_window must be null for this .* got 8"),
        (
            dict(
                model_type="llama",
                sliding_window=None,
                layer_types=["full_attention", "chunked_attention"],
            ),
            "layer_types must be absent, or 2 times full_attention",
        ),
    ],
)
def test_refused_windows(changes, message):
    with pytest.raises(CheckpointError, match=f"^config.json: {message}"):
        ModelConfig.from_dict(raw_config(**WINDOWS | changes))


def test_the_rule_for_head_dim_is_that_of_the_op():
    def op_takes(head_dim: int) -> bool:
        meta = torch.device("meta")
        cache = (torch.zeros(2, 16, 1, head_dim, device=meta),) * 2
        one = torch.zeros(1, dtype=torch.int32, device=meta)
        try:
            xla_ops.paged_attention(
                torch.zeros(3, 2, head_dim, device=meta),
                cache,
                one,
                one[None],
                torch.zeros(2, dtype=torch.int32, device=meta),
                one,
                1.0,
            )
        except ValueError:
            return False
        return True

    def config_takes(head_dim: int) -> bool:
        raw = raw_config(head_dim=head_dim)
        return outcome(lambda: ModelConfig.from_dict(raw))[1] is None

    sizes = range(1, 520)
    assert [config_takes(n) for n in sizes] == [op_takes(n) for n in sizes]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "llama", "default", "yarn"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
    ),
    max_leaves=6,
)
KEYS = [
    *sorted(raw_config()),
    *("quantization_config", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
    *("num_experts", "original_max_position_embeddings"),
]


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(CLASSES)),
    st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(sorted(LLAMA3)), json_values, max_size=2),
)
def test_any_value_is_followed_or_refused_by_name(family, changes, rope):
    raw = raw_config(model_type=family, rope_parameters=LLAMA3 | rope) | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        config, refusal = outcome(lambda: ModelConfig.from_dict(raw))
    if refusal:
        assert refusal.startswith("config.json: ") and "\n" not in refusal
        assert any(key in refusal for key in [*changes, *rope])
    else:
        assert len(config.sliding_windows) == config.num_layers
        assert torch.isfinite(rope_frequencies(config.rope, config.head_dim)).all()


# --- Ignored, but said. -------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(rope_parameters=dict(rope_type="default", mrope_section=[8, 8])),
            r"rope_parameters.mrope_section \[8, 8\] has no effect: rope_type default",
        ),
        (
            dict(rope_parameters=dict(rope_type="linear", factor=2, long_factor=[1])),
            r"rope_parameters.long_factor \[1\] has no effect",
        ),
    ],
)
def test_what_transformers_ignores_is_ignored_with_a_warning(changes, message):
    raw = raw_config(**changes)
    with pytest.warns(CheckpointWarning, match=f"^config.json: {message}"):
        config = ModelConfig.from_dict(raw)
    assert config.rope.theta == 10000.0


def test_no_warning_without_a_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig.from_dict(raw_config())
        ModelConfig.from_dict(raw_config(**WINDOWS))
        ModelConfig.from_dict(raw_config(sliding_window=None, layer_types=None))
        ModelConfig.from_dict(raw_config(layer_types=["full_attention"]))


@pytest.mark.parametrize("name", ["beta_fast", "beta_slow", "attention_factor"])
def test_a_number_whose_inverse_is_not_finite(name):
    yarn = {"rope_type": "yarn", "factor": 4.0, name: 5e-324}
    with pytest.raises(CheckpointError, match=f"{name} must be at least 1e-30, got"):
        ModelConfig.from_dict(raw_config(rope_scaling=yarn))


# --- Before weights. ----------------------------------------------------------
def test_a_config_is_refused_before_a_weight_is_read(tmp_path):
    """Not even a file that holds none is noticed."""
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    edit_config(folder, head_dim=100)
    said = command_error("--model", folder)
    assert "config.json: head_dim must be a multiple of 8 up to 256, got 100" in said
    edit_config(folder, head_dim=16)
    assert "model.safetensors must be a safetensors file, got an empty file" in (
        command_error("--model", folder)
    )
