"""Write benchmarks/results/NAME.json: what a benchmark measured, with the command, machine, date and commit."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from puzzle_nas.machine import describe, this_machine

RESULTS = Path(__file__).parent / "results"


def by_arithmetic(name: str) -> str:
    """A name of its own for what is measured without AMX: such figures do not go together with those of it."""
    if torch.cuda.is_available():
        return name
    if not this_machine().autocast:
        return f"{name}_float32"
    capabilities = torch.cpu.get_capabilities()
    return name if capabilities.get("amx_bf16") or not capabilities.get("avx512_bf16") else f"{name}_avx512"


def save(name: str, figures: dict[str, float], machine: dict | None = None, command: str | None = None) -> Path:
    """Keep flat figures with units in their names."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command or shlex.join(["python", *sys.argv]),
        "machine": machine or describe(this_machine()) | {"cores": os.cpu_count()},
        "load_average_1_min": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
