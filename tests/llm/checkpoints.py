"""Checkpoints for the tests of examples/llm, made by transformers, and its answers.

Weights are random everywhere (biases and norms too, which transformers would leave at
0 and 1), so that each feature of an architecture has an effect on what comes out.
"""

import json
import shutil
from pathlib import Path

import torch
import torch_xla
import torch_xla.runtime as xr
from torch_xla.backends import set_mat_mul_precision
from transformers import AutoModelForCausalLM, LlamaConfig

import weights
from config import ModelConfig
from engine import Engine
from files import CheckpointError

LLM = Path(weights.__file__).resolve().parent
MAX_LEN = 96
NEW_TOKENS = 20
# Of different lengths: one token, one page, longer than a prefill step.
PROMPTS = [
    [3],
    [(7 * i + 1) % 96 for i in range(16)],
    [(5 * i + 2) % 96 for i in range(43)],
    [90, 2, 90, 2, 90],
    [(11 * i) % 96 for i in range(20)],
]
# What a model with a tokenizer of its own can be: that of the demo's model.
TINY = dict(
    vocab_size=768,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
)


def make_checkpoint(config, folder: Path, **save_options) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 + (parameter.mean() > 0.5))
    model.save_pretrained(folder, **save_options)
    return folder


def tiny_checkpoint(folder: Path, **changes) -> Path:
    """A Llama of one layer, with the demo's tokenizer."""
    make_checkpoint(LlamaConfig(**TINY | changes), folder)
    shutil.copy(LLM / "tiny" / "tokenizer.json", folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    """Sets keys of the object in a file; `...` takes one out."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_config(folder: Path, **changes) -> None:
    edit_json(folder / "config.json", **changes)


def outcome(call):
    """(What a call returns, None), or (None, what a CheckpointError of it says)."""
    try:
        return call(), None
    except CheckpointError as error:
        return None, str(error)


def load(folder: Path, dtype=torch.float32):
    """The decoder on the host."""
    config = ModelConfig.from_folder(folder)
    return weights.load(folder, config, MAX_LEN, dtype, torch.device("cpu"))


def make_engine(folder: Path, **options) -> Engine:
    config = ModelConfig.from_folder(folder)
    device = torch_xla.device()
    if xr.device_type() != "CPU":  # where fp32 products are TF32 otherwise
        set_mat_mul_precision("highest")
    ops, parallel = options.pop("ops", "all"), options.get("parallel")
    decoder = weights.load(
        folder, config, MAX_LEN, torch.float32, device, ops, parallel
    )
    defaults = dict(max_len=MAX_LEN, max_seqs=3, max_prefill_tokens=32)
    engine = Engine(decoder, **defaults | options)
    engine.warm_up()
    return engine


def reference(folder: Path, prompts, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens by transformers, one prompt at a time: no padding there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers
