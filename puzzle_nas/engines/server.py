"""Run an engine's own OpenAI-compatible server on loopback. Nothing of ours listens on a port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from puzzle_nas.engines.base import LOOPBACK, ServingEngine
from puzzle_nas.errors import EngineError


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    process: subprocess.Popen
    port: int
    model: str
    """The name that requests must give."""

    @property
    def curl(self) -> str:
        """A command that gets an answer."""
        body = json.dumps({"model": self.model, "prompt": "Once upon a time", "max_tokens": 16})
        header = "'Content-Type: application/json'"
        return f"curl -s http://{LOOPBACK}:{self.port}/v1/completions -H {header} -d '{body}'"


@contextmanager
def served(
    engine: ServingEngine, exported: Path, port: int, context: int | None = None, timeout_seconds: float = 300.0
) -> Iterator[Server]:
    """Start the server and wait until it answers; it ends with the block.

    Args:
        context: tokens of the longest request; None means the model's own.

    Raises:
        EngineError: the port is taken, or the server ends or stays silent; quotes its last words.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise EngineError(f"Port {port} is taken; choose another one with --port.") from None
    command = engine.server_command(exported.resolve(), port, context)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **engine.environment()}
        )
        try:
            yield Server(process, port, _wait_until_ready(engine, process, port, log, timeout_seconds))
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(engine, process, port: int, log, timeout_seconds: float) -> str:
    deadline = time.monotonic() + timeout_seconds
    # Loopback only: a proxy of the environment has no say here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            words = engine.last_words([line.strip() for line in log.read().splitlines() if line.strip()])
            raise EngineError(f"{engine.name}'s server ended with exit code {process.returncode}: {words}")
        try:
            with opener.open(f"http://{LOOPBACK}:{port}/v1/models", timeout=5) as answer:
                return json.load(answer)["data"][0]["id"]
        except (urllib.error.URLError, OSError, ValueError):
            time.sleep(0.2)
    raise EngineError(f"{engine.name}'s server did not answer within {timeout_seconds:.0f} s.")
