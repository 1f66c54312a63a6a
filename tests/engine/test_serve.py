"""A real `vllm serve`: OpenAI's API, clients that misbehave, an engine that dies."""

import concurrent.futures
import json
import time

import httpx
import openai
import pytest
from transformers import AutoTokenizer

import vllm_session
from vllm_checkpoints import VOCABULARY
from vllm_oracle import assert_greedy
from vllm_server import NAME, REQUEST_SECONDS, serving

ANSWER = 12
PROMPTS = [
    [(start * 31 + 7 * i + i * i) % (VOCABULARY - 5) + 5 for i in range(length)]
    for start, length in enumerate([1, 9, 16, 33, 70, 100] * 4)
]
MESSAGES = [{"role": "user", "content": "is the rain in spain"}]
# What a greedy answer of a fixed length takes, and its tokens with it.
GREEDY = dict(
    model=NAME,
    temperature=0.0,
    max_tokens=ANSWER,
    extra_body={"ignore_eos": True, "return_token_ids": True},
)
# Text comes once its bytes are characters, and of a random model not all are; and a
# busy server joins what it has not handed on.
LONG = GREEDY | {"max_tokens": 150}


@pytest.fixture(scope="module")
def checkpoint():
    return vllm_session.checkpoint("llama")


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return vllm_session.oracle(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # A random model would write spaces without end.
    grammars = '{"backend": "xgrammar", "disable_any_whitespace": true}'
    options = ("--dtype", "float32", "--structured-outputs-config", grammars)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # /sleep and its like
        with serving(checkpoint, folder, *options) as running:
            yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def assert_answers(client, oracle) -> None:
    """The server is alive and well."""
    choice = client.completions.create(prompt=PROMPTS[3], **GREEDY).choices[0]
    assert_greedy(oracle, PROMPTS[3], choice.token_ids)


def until(condition, seconds=30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_completion(client, oracle):
    answer = client.completions.create(prompt=PROMPTS[4], logprobs=2, **GREEDY)
    choice = answer.choices[0]
    assert len(choice.token_ids) == ANSWER and choice.finish_reason == "length"
    assert_greedy(oracle, PROMPTS[4], choice.token_ids)
    expected = oracle.after(PROMPTS[4], choice.token_ids)
    chosen = [float(row[t]) for row, t in zip(expected, choice.token_ids, strict=True)]
    assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-4)
    assert answer.usage.prompt_tokens == len(PROMPTS[4])
    assert answer.usage.completion_tokens == ANSWER


def test_chat(client, checkpoint, oracle):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.prompt_token_ids == prompt
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert len(choice.token_ids) == ANSWER
    assert_greedy(oracle, prompt, choice.token_ids)


def test_streaming(client):
    whole = client.completions.create(prompt=PROMPTS[2], **LONG).choices[0]
    parts = list(client.completions.create(prompt=PROMPTS[2], stream=True, **LONG))
    assert len(parts) > 3
    assert "".join(part.choices[0].text for part in parts) == whole.text
    tokens = [t for part in parts for t in part.choices[0].token_ids or ()]
    assert tokens == whole.token_ids
    assert parts[-1].choices[0].finish_reason == "length"


def test_streaming_chat(client):
    asked = dict(messages=MESSAGES, **LONG)
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = list(client.chat.completions.create(stream=True, **asked))
    texts = [p.choices[0].delta.content or "" for p in parts if p.choices]
    assert sum(map(bool, texts)) > 3
    assert "".join(texts) == whole


def test_structured_chat(client):
    schema = dict(
        type="object",
        properties={"answer": {"type": "string", "enum": ["yes", "no"]}},
        required=["answer"],
        additionalProperties=False,
    )
    answer = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=0.0,
        max_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
    )
    assert json.loads(answer.choices[0].message.content)["answer"] in ("yes", "no")


def test_concurrent_clients(client, oracle):
    def ask(prompt):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        return answer.choices[0].token_ids

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(ask, PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_greedy(oracle, prompt, answer)


def test_cancelled_clients(server, client, oracle):
    """A client that goes away leaves no request running."""
    long = GREEDY | {"max_tokens": 400}
    streams = [
        client.completions.create(prompt=prompt, stream=True, **long)
        for prompt in PROMPTS[:6]
    ]
    for stream in streams:
        next(iter(stream))
    assert server.metrics()["vllm:num_requests_running"] > 0
    for stream in streams:
        stream.close()
    assert until(lambda: server.metrics()["vllm:num_requests_running"] == 0)
    assert_answers(client, oracle)


BAD = {
    "model": (dict(model="other"), 404),
    "long prompt": (dict(prompt=[7] * 600), 400),
    "token id": (dict(prompt=[VOCABULARY + 1]), 400),
    "max_tokens": (dict(max_tokens=-1), 400),
    "temperature": (dict(temperature=-1.0), 400),
    "top_p": (dict(top_p=2.0), 400),
    "n": (dict(n=0), 400),
    "logprobs": (dict(logprobs=1000), 400),
    "logit_bias": (dict(logit_bias={str(VOCABULARY + 1): 1.0}), 400),
    "regex": (dict(structured_outputs={"regex": "(["}), 400),
    "grammar": (dict(structured_outputs={"grammar": "root ::= ("}), 400),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request(server, client, oracle, case):
    changes, status = BAD[case]
    body = dict(model=NAME, prompt=[5, 6, 7], max_tokens=4) | changes
    response = server.post("/v1/completions", json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert_answers(client, oracle)


def test_bad_json(server, client, oracle):
    headers = {"content-type": "application/json"}
    response = server.post("/v1/completions", content=b"{", headers=headers)
    assert 400 <= response.status_code < 500
    assert_answers(client, oracle)


def test_sleep_is_refused(server, client, oracle):
    response = server.post("/sleep")
    assert response.status_code == 501, response.text
    message = response.json()["error"]["message"]
    assert message == "xla_ops: sleep must not be called on XLA, got a call"
    assert server.get("/is_sleeping").json() == {"is_sleeping": False}
    assert_answers(client, oracle)


def test_metrics(server, client):
    before = server.metrics()
    client.completions.create(prompt=PROMPTS[3], **GREEDY)
    after = server.metrics()
    for name, more in {
        "vllm:generation_tokens_total": ANSWER,
        "vllm:prompt_tokens_total": len(PROMPTS[3]),
        "vllm:request_success_total": 1,
    }.items():
        assert after[name] - before[name] == more, name


def test_killed_engine(server, client):
    """Last, since it ends the server: who waits gets an error, and nobody hangs."""
    stream = client.completions.create(
        prompt=PROMPTS[1], stream=True, **GREEDY | {"max_tokens": 400}
    )
    parts = iter(stream)
    next(parts)
    killed = time.monotonic()
    server.engine().kill()
    with pytest.raises((openai.APIError, httpx.TransportError)):
        list(parts)
    with pytest.raises(openai.APIError):
        client.completions.create(prompt=PROMPTS[1], **GREEDY)
    assert time.monotonic() - killed < REQUEST_SECONDS / 2
    assert server.process.wait(timeout=60) is not None
