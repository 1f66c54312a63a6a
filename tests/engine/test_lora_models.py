"""LoRA on other models, dtypes and kinds of weights, and with drafts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vllm.lora.request import LoRARequest

import vllm_session
from vllm_adapters import ANSWER, LORA, answers, assert_answers
from vllm_checkpoints import (
    ATTENTION,
    OTHER,
    PROMPT,
    merge_lora,
    save_checkpoint,
    save_lora,
)
from vllm_in_process import engine, greedy, metric, steady
from vllm_oracle import Oracle, assert_greedy
from vllm_quantized import SCHEMES, QuantizedOracle, base_config, save_quantized

# Few programs: these start an engine each.
OPTIONS = LORA | dict(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    compilation_config={"cudagraph_specialize_lora": False},
)


@pytest.fixture
def lora(tmp_path):
    """Of a checkpoint and an adapter's options: what to ask, and what is right."""

    def make(family, **kind):
        checkpoint = vllm_session.checkpoint(family)
        adapter = save_lora(checkpoint, tmp_path / "adapter", seed=1, **kind)
        merged = merge_lora(checkpoint, adapter, tmp_path / "merged")
        asked = {0: None, 1: LoRARequest("adapter", 1, str(adapter))}
        return (
            checkpoint,
            asked,
            {0: vllm_session.oracle(checkpoint), 1: Oracle(merged)},
        )

    return make


def test_speculation(lora):
    """Drafts of n-grams are judged by the request's adapter."""
    checkpoint, asked, oracles = lora("llama")
    ngram = dict(
        method="ngram",
        num_speculative_tokens=2,
        prompt_lookup_min=1,
        prompt_lookup_max=2,
    )
    # So that every token of an answer has come before.
    params = greedy(2 * ANSWER, allowed_token_ids=PROMPT)

    def change(logits, before):
        allowed = torch.full_like(logits, -torch.inf)
        allowed[PROMPT] = 0.0
        return logits + allowed

    prompts, numbers = [PROMPT, OTHER + PROMPT] * 2, [0, 0, 1, 1]
    with engine(checkpoint, speculative_config=ngram, **OPTIONS) as llm, steady(llm):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            lora_request=[asked[i] for i in numbers],
            use_tqdm=False,
        )
        assert metric(llm, "spec_decode_num_drafts") > 10
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
    for number, prompt, output in zip(numbers, prompts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        assert_greedy(oracles[number], prompt, answer, change)


def test_experts(lora, tmp_path):
    """Layers beside the experts have adapters; one of experts is refused."""
    checkpoint, asked, oracles = lora("qwen3_moe", targets=(*ATTENTION, "gate"))
    bad = save_lora(checkpoint, tmp_path / "bad", seed=5, targets=("up_proj",))
    with engine(checkpoint, **OPTIONS) as llm, steady(llm):
        assert_answers(llm, asked, oracles, [1, 0])
        with pytest.raises(ValueError, match="expected target modules"):
            answers(llm, [PROMPT], [LoRARequest("bad", 2, str(bad))])
        assert_answers(llm, asked, oracles, [1, 0])


class _WithAdapter(nn.Module):
    """A layer, and what an adapter adds to it."""

    def __init__(self, layer, a, b, scale):
        super().__init__()
        self.layer, self.a, self.b, self.scale = layer, a, b, scale

    def forward(self, x):
        return self.layer(x) + self.scale * (x @ self.a.T) @ self.b.T


def add_adapter(oracle: Oracle, adapter: Path) -> None:
    """Puts an adapter beside the oracle's layers, as peft does, in its dtype."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    matrices = {
        name.removeprefix("base_model.model."): t.to(oracle.model.dtype)
        for name, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    for name in [n for n in matrices if n.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        parent, _, last = path.rpartition(".")
        layer = _WithAdapter(
            oracle.model.get_submodule(path),
            matrices[name],
            matrices[path + ".lora_B.weight"],
            config["lora_alpha"] / config["r"],
        )
        setattr(oracle.model.get_submodule(parent), last, layer)


def errors(oracle: Oracle, exact: Oracle, outputs) -> tuple[float, float]:
    """How far the oracle and the engine are from what is exact, root mean square.

    In the log-probabilities of an answer's tokens.
    """
    found = []
    for output in outputs:
        prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
        rows = exact.after(prompt, answer), oracle.after(prompt, answer)
        entries = output.outputs[0].logprobs
        for row, by_oracle, token, entry in zip(*rows, answer, entries, strict=True):
            got = torch.tensor([by_oracle[token], entry[token].logprob])
            found.append(got - row[token])
    of_oracle, of_engine = torch.stack(found).square().mean(0).sqrt().tolist()
    return of_oracle, of_engine


def test_bfloat16(lora):
    """No further from float32 than transformers in bfloat16 with the adapter."""
    checkpoint, asked, oracles = lora("qwen2")
    with engine(checkpoint, dtype="bfloat16", **OPTIONS) as llm, steady(llm):
        outputs = answers(llm, [OTHER, PROMPT] * 2, [asked[i] for i in (0, 0, 1, 1)])
    peer = Oracle(checkpoint, torch.bfloat16)
    of_peer, error = errors(peer, oracles[0], outputs[:2])
    assert error < 1.5 * of_peer, (error, of_peer)
    add_adapter(peer, Path(asked[1].lora_path))
    of_peer, error = errors(peer, oracles[1], outputs[2:])
    assert error < 1.5 * of_peer, (error, of_peer)


def test_quantised_base(tmp_path):
    """Products of codes, and beside them the adapter's own."""
    original = save_checkpoint(base_config(), tmp_path / "original")
    scheme = SCHEMES["int8"]
    checkpoint = save_quantized(original, scheme, tmp_path / "int8")
    adapter = save_lora(original, tmp_path / "adapter", seed=6)
    oracle = QuantizedOracle(original, checkpoint, scheme)
    add_adapter(oracle, adapter)
    exact = Oracle(merge_lora(original, adapter, tmp_path / "merged"))
    request = LoRARequest("adapter", 1, str(adapter))
    with engine(checkpoint, **OPTIONS) as llm, steady(llm):
        outputs = answers(llm, [PROMPT, OTHER], [request] * 2)
    noise, _ = errors(oracle, exact, outputs)
    _, error = errors(oracle, oracle, outputs)
    assert noise > 0.01
    assert error < 0.25 * noise, (error, noise)
