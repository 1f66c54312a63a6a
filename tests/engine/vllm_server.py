"""`vllm serve` on loopback, in processes of its own, as a user runs it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil

import vllm_session  # noqa: F401 (the environment)

START_SECONDS = 400  # on two cores that run other tests
REQUEST_SECONDS = 90
NAME = "model"
OPTIONS = [
    *("--served-model-name", NAME),
    *("--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "64"),
    *("--num-gpu-blocks-override", "256"),
]


def environment() -> dict[str, str]:
    """Of a command of vLLM's: the engine in a process of its own, as is its default."""
    env = dict(os.environ)
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return env


def command(*arguments) -> list[str]:
    """`vllm ARGUMENTS` with this interpreter."""
    program = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [*program, *map(str, arguments)]


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process = process
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url + "/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_SECONDS,
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=REQUEST_SECONDS)

    def post(self, path: str, **body) -> httpx.Response:
        return httpx.post(self.url + path, timeout=REQUEST_SECONDS, **body)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, those of one name and other labels added up."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def engine(self) -> psutil.Process:
        """The process in which the model runs."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (found,) = [p for p in children if "EngineCore" in " ".join(p.cmdline())]
        return found

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if self.get("/health").status_code == 200:
                    return
            time.sleep(0.5)
        end = "\n".join(self.log.read_text().splitlines()[-60:])
        raise AssertionError(f"the server did not become ready:\n{end}")


@contextlib.contextmanager
def serving(checkpoint: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server of a checkpoint; its log goes into a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    arguments = ["--host", "127.0.0.1", "--port", port, *OPTIONS, *options]
    with log.open("w") as out:
        process = subprocess.Popen(
            command("serve", checkpoint, *arguments),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
