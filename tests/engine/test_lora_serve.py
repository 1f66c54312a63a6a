"""`vllm serve --enable-lora`: a model's name says which adapter answers."""

import concurrent.futures

import openai
import pytest

import vllm_session
from vllm_adapters import ANSWER
from vllm_checkpoints import OTHER, PROMPT, merge_lora, save_lora
from vllm_oracle import Oracle, assert_greedy
from vllm_server import NAME, serving

NAMES = ["one", "two", "three"]


@pytest.fixture(scope="module")
def checkpoint():
    return vllm_session.checkpoint("llama")


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_lora(checkpoint, root / name, seed=i) for i, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def oracles(checkpoint, folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    merged = {
        name: Oracle(merge_lora(checkpoint, adapter, root / name))
        for name, adapter in folders.items()
    }
    return {NAME: vllm_session.oracle(checkpoint), **merged}


@pytest.fixture(scope="module")
def server(checkpoint, folders, tmp_path_factory):
    modules = [f"{name}={folders[name]}" for name in NAMES[:2]]
    options = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with serving(
            checkpoint,
            tmp_path_factory.mktemp("server"),
            *("--dtype", "float32", *options, "--lora-modules", *modules),
        ) as running:
            yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def assert_answers(client, oracles, names) -> None:
    """Concurrent requests to these models answer as their merged checkpoints."""
    asked = [(name, prompt) for name in names for prompt in (PROMPT, OTHER)]

    def ask(pair):
        name, prompt = pair
        choice = client.completions.create(
            model=name,
            prompt=prompt,
            temperature=0.0,
            max_tokens=ANSWER,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ).choices[0]
        return choice.token_ids

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert len(answer) == ANSWER
        assert_greedy(oracles[name], prompt, answer)


def test_models(client, oracles):
    assert {model.id for model in client.models.list()} == {NAME, "one", "two"}
    assert_answers(client, oracles, [NAME, "one", "two"])


def test_an_adapter_that_comes_and_goes(server, client, oracles, folders):
    body = dict(lora_name="three", lora_path=str(folders["three"]))
    response = server.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 200, response.text
    assert_answers(client, oracles, ["three", "one", NAME, "two"])
    response = server.post("/v1/unload_lora_adapter", json=dict(lora_name="three"))
    assert response.status_code == 200, response.text
    with pytest.raises(openai.NotFoundError):
        assert_answers(client, oracles, ["three"])
    assert_answers(client, oracles, [NAME, "two"])


def test_a_bad_adapter(server, client, oracles, tmp_path):
    body = dict(lora_name="bad", lora_path=str(tmp_path / "nothing"))
    response = server.post("/v1/load_lora_adapter", json=body)
    assert 400 <= response.status_code < 500, response.text
    assert "No adapter found" in response.json()["error"]["message"]
    assert_answers(client, oracles, [NAME, "one"])
