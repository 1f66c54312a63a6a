"""Small random checkpoints of the families that vLLM's engine is tested with.

Each is what a user downloads: config.json, safetensors, a tokenizer with a chat
template. Made here, the same in every run. The weights are scaled so that a greedy
choice is clear but not certain: logits of a standard deviation of about three. With
saturated ones every wrong model passes, with flat ones the right model fails.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, EOS, _, END_OF_TURN = range(len(SPECIAL))
VOCABULARY = 384
# Token ids of two prompts.
PROMPT = [(11 * i + 3) % 256 + 64 for i in range(20)]
OTHER = [(17 * i + 5) % 256 + 64 for i in range(37)]
MAX_LEN = 512
WINDOW = 24

# Merges for the tokenizer: what is here is a token, the rest is bytes.
_TEXT = """the quick brown fox jumps over the lazy dog while the rain in spain stays
mainly in the plain and a model of language reads one token after the other and then
it writes one token after the other until the answer is done yes no true false null
seven servers stream several sentences to some clients who cancel or come back later
"""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=MAX_LEN,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    tie_word_embeddings=False,
)
_WINDOW_AND_FULL = dict(
    num_hidden_layers=4,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"] * 2,
)


def _configs() -> dict[str, transformers.PretrainedConfig]:
    """Family -> its config. Every feature that sets a family apart is in use."""
    gemma = dict(head_dim=32, query_pre_attn_scalar=24, tie_word_embeddings=True)
    llama3_scaling = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    sizes = SIZES
    return {
        "llama": transformers.LlamaConfig(
            **sizes, head_dim=32, rope_scaling=llama3_scaling
        ),
        "qwen2": transformers.Qwen2Config(**sizes),
        "qwen3": transformers.Qwen3Config(**sizes, head_dim=32),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **sizes,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=True,
        ),
        "mistral": transformers.MistralConfig(
            **sizes, head_dim=32, sliding_window=WINDOW
        ),
        "gemma2": transformers.Gemma2Config(
            **sizes | gemma | _WINDOW_AND_FULL,
            hidden_act="gelu_pytorch_tanh",  # as files have it; vLLM reads it alone
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
        ),
        "gemma3": transformers.Gemma3TextConfig(**sizes | gemma | _WINDOW_AND_FULL),
        "phi3": transformers.Phi3Config(**sizes),
        "gpt_oss": transformers.GptOssConfig(
            **sizes | _WINDOW_AND_FULL,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_scaling=dict(
                rope_type="yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=128,
            ),
        ),
    }


FAMILIES = list(_configs())


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY  # every token of a model has a text
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _fill(model: transformers.PreTrainedModel) -> None:
    """Random weights; see the module's text for their size."""
    # Its embeddings are large and are its output layer too: unless the layers add more
    # than they start from, it says its last token again.
    gemma = model.config.model_type.startswith("gemma")
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        inputs = parameter.shape[-1]
        if "embed_tokens" in name or "lm_head" in name:
            scale = 3.0 / inputs**0.5
        elif name.endswith(("gate_up_proj", "down_proj")):  # experts: [E, in, out]
            scale = 0.75 / parameter.shape[-2] ** 0.5
        elif parameter.dim() > 1:
            scale = 2.0 / inputs**0.5
        else:
            scale = 0.2
        # Norms stand about 1, or about 0 where a family adds it; so do biases.
        centre = 1.0 if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.0
        if gemma and ".post_" in name and "layernorm" in name:
            centre = 12.0
        parameter.copy_(noise * scale + centre)


@torch.no_grad()
def save_model(model: transformers.PreTrainedModel, folder: Path):
    """Fills and writes a model, in float32, and returns it."""
    _fill(model.float())
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_checkpoint(config, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(model, folder)
    return folder


def config(family: str) -> transformers.PretrainedConfig:
    return _configs()[family]


def save_family(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes the checkpoint of a family of `FAMILIES`."""
    return save_checkpoint(_configs()[family], folder, seed)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def save_lora(
    checkpoint: Path,
    folder: Path,
    seed: int,
    rank: int = 8,
    targets: Sequence[str] = LINEAR,
) -> Path:
    """An adapter of the layers whose names end so, in peft's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in sorted(load_file(checkpoint / "model.safetensors").items()):
        if name.split(".")[-2] not in targets or weight.dim() != 2:
            continue
        out_features, in_features = weight.shape
        is_embedding = "embed_tokens" in name
        if is_embedding:
            out_features, in_features = in_features, out_features
        a = torch.randn(rank, in_features, generator=generator)
        b = torch.randn(out_features, rank, generator=generator) / rank**0.5 / 2
        module = "base_model.model." + name.removesuffix(".weight")
        if is_embedding:  # a token takes a column of A
            tensors[module + ".lora_embedding_A"] = a / out_features**0.5
            tensors[module + ".lora_embedding_B"] = b
        else:
            tensors[module + ".lora_A.weight"] = a / in_features**0.5
            tensors[module + ".lora_B.weight"] = b
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(checkpoint),
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(targets),
    )
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_lora(checkpoint: Path, adapter: Path, folder: Path) -> Path:
    """The checkpoint with an adapter's products added to its weights."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    weights = load_file(checkpoint / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, a in lora.items():
        module, _, form = name.partition(".lora_")
        if form not in ("A.weight", "embedding_A"):
            continue
        product = lora[f"{module}.lora_{form.replace('A', 'B')}"] @ a
        weights[module.removeprefix("base_model.model.") + ".weight"] += scale * (
            product.T if form == "embedding_A" else product
        )
    copy_without_weights(checkpoint, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy_without_weights(checkpoint: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in checkpoint.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    for file in checkpoint.glob("*.jinja"):
        (folder / file.name).write_bytes(file.read_bytes())
