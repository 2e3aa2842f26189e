"""The worker's side of engines/worker.py. Runs in an engine's own environment: standard library only.

A worker script defines a class with one method for each request (`load`, `log_probabilities`, ...), whose keyword
arguments are the request's fields and whose result is JSON, and calls `answer_requests` with an instance.
"""

import json
import os
import resource
import sys
import traceback


def peak_bytes() -> int:
    """The most memory that this process has had; macOS counts bytes, others KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer_requests(handler) -> None:
    """Answer requests from standard input until it ends.

    Engines print: their standard output is sent to standard error, answers keep the real one.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            answer = {"result": getattr(handler, name)(**request)}
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else 'no reason given'}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
