"""A serving engine's process, seen from ours: one JSON line there, one JSON line back."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_nas.errors import EngineError


class Worker:
    """A worker script that runs from `with` to the end of its block.

    What it writes to standard error goes to a scratch file, of which errors quote the last lines.
    """

    def __init__(self, engine: str, python: Path, script: Path, environment: Mapping[str, str]):
        self.engine = engine
        self._command = [str(python), str(script)]
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Worker:
        self._log = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        try:
            self._process = subprocess.Popen(self._command, text=True, env=self._environment, **pipes)
        except OSError as error:
            raise EngineError(
                f"{self.engine}'s Python does not start; delete its folder and install it again: {error}"
            ) from error
        return self

    def __exit__(self, *_) -> None:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, request: str, **arguments: Any) -> Any:
        """The answer to one request.

        Raises:
            EngineError: the engine refused, or its process ended; quotes what it said.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EngineError(f"{self.engine} stopped during {request} (exit code {code}): {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.engine} failed in {request}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-500:] or "it said nothing."
