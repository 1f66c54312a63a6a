"""vLLM's own benchmarks run against the server and the engine, and finish."""

import json
import subprocess

import pytest

import vllm_session
from vllm_server import NAME, OPTIONS, command, environment, serving

LIMIT = 600
DATA = ("--dataset-name", "random", "--num-prompts", "40")


def run(*arguments) -> str:
    done = subprocess.run(
        command("bench", *arguments),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint():
    return vllm_session.checkpoint("llama")


def test_bench_serve(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path, "--dtype", "float32") as server:
        run(
            *("serve", "--model", NAME, "--tokenizer", checkpoint, *DATA),
            *("--random-input-len", "48", "--random-output-len", "16"),
            *("--host", "127.0.0.1", "--port", server.port, "--ignore-eos"),
            *("--request-rate", "20", "--save-result"),
            *("--result-dir", tmp_path, "--result-filename", "result.json"),
        )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 40
    assert result["total_output_tokens"] == 40 * 16


def test_bench_throughput(checkpoint, tmp_path):
    result = tmp_path / "result.json"
    at = OPTIONS.index("--max-num-seqs")  # what follows is the engine's
    run(
        *("throughput", "--model", checkpoint, *DATA, "--dtype", "float32"),
        *("--input-len", "48", "--output-len", "16"),  # vLLM's other names here
        *(*OPTIONS[at:], "--max-model-len", "256", "--output-json", result),
    )
    assert json.loads(result.read_text())["num_requests"] == 40
