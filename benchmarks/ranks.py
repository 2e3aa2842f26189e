"""BLD, scoring and GKD with one thread, with two, and with two processes of one thread each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from puzzle_nas.artifacts import RunFolder

WAYS = {"one_thread": (1, 1), "two_threads": (2, 1), "two_processes": (2, 2)}
"""Threads of the machine, and processes that divide them."""
PARTS = {
    ("distill-blocks", "score-blocks"): ["bld.tokens=4096"],
    ("distill-child", "distill-child"): ["gkd.tokens=8192", "gkd.evaluate_every_steps=8"],
}
"""First and last stage, and their budget."""


def figures() -> dict[str, float]:
    """Wall seconds by stage and way, and speed-ups over one thread; printed and returned."""
    base, result = RunFolder(Path("runs/torch")), {}
    for (first, last), budget in PARTS.items():
        for way, (threads, processes) in WAYS.items():
            run = RunFolder(Path("runs/benchmark-ranks") / f"{first}-{way}")
            shutil.rmtree(run.path, ignore_errors=True)
            shutil.copytree(base.path, run.path, ignore=shutil.ignore_patterns("scratch", "download", "exports"))
            command = ["run", str(run.recipe), "--run-dir", str(run), "--from", first, "--to", last]
            options = [f"threads={threads}", *budget, f"--nproc={processes}"]
            subprocess.run([sys.executable, "-m", "puzzle_nas", *command, *options], check=True)
            for stage in (first, last):
                name = stage.replace("-", "_")
                result[f"seconds_{name}_{way}"] = run.seconds()[name]
            shutil.rmtree(run.path)
    for key, seconds in list(result.items()):
        stage, _, way = key.removeprefix("seconds_").partition("_one_thread")
        if not way and key.endswith("_one_thread"):
            for other in ("two_threads", "two_processes"):
                result[f"speedup_{stage}_{other}"] = seconds / result[f"seconds_{stage}_{other}"]
    for name, value in result.items():
        print(f"  {name:45s} {value:8.2f}")
    return result
