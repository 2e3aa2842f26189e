"""Faults for whole runs: commands in forked processes that have torch already, killed, starved of disk, or misled.

A fork server imports torch once; every command is a process of its own, and `kill -9` is the kernel's. Faults are
aimed at a stage: they strike after it has begun.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle_nas.artifacts import RunFolder, file_checksum
from puzzle_nas.stages import STAGES as PIPELINE

STAGES = tuple(stage.name for stage in PIPELINE)
PRELOADED = (
    *("puzzle_nas.pipeline", "puzzle_nas.report.page", "transformers.models.llama.modeling_llama"),
    *(f"puzzle_nas.stages.{name}" for name in STAGES),
)
TIMES = ("seconds/", "measured.json", "summary.json", "report.html", "evaluate_child", "write_report")
"""Measured times live in these and are no part of the claim."""
COUPLED = {"coupled_tokens": 2048}
"""Settings of coupled BLD, long enough to be interrupted."""
YEAR = 365 * 24 * 3600

Fault = Callable[[str], None]
"""Called in the process of the command with the name of each stage that begins."""


def final_bytes(folder: Path) -> dict[str, str]:
    """Checksums of all files whose bytes a recipe determines, by relative name."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: file_checksum(p) for name, p in files.items() if not any(part in name for part in TIMES)}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names that are missing, differ, or should not be there."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """`puzzle ARGUMENTS` in a forked process. Output goes through pipes: the disk may be full."""

    def __init__(self, *arguments: object, fault: Fault | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._folder = tempfile.TemporaryDirectory()
        self._pipes = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for pipe in self._pipes:
            os.mkfifo(pipe)
        self._ends = [os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) for pipe in self._pipes]
        self.begun, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_puzzle, args=([*map(str, arguments)], self._pipes, sender, fault))
        self._process.start()
        sender.close()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.running:
            os.kill(self.pid, number)

    def wait_for(self, stage: str, timeout: float = 300) -> bool:
        """Until that stage begins; False where the command ends before."""
        deadline = time.monotonic() + timeout
        try:
            while self.begun.poll(max(0, deadline - time.monotonic())):
                if self.begun.recv() == stage:
                    return True
        except EOFError:
            return False
        raise TimeoutError(f"{stage} did not begin within {timeout} s")

    def end(self, timeout: float = 300) -> Ended:
        """Wait for it."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        texts = []
        for end in self._ends:
            with os.fdopen(end, "rb", buffering=0) as file:
                texts.append((file.read() or b"").decode())
        self._folder.cleanup()
        return Ended(self._process.exitcode, *texts)


def puzzle(*arguments: object, fault: Fault | None = None, check: bool = False) -> Ended:
    """Run a command to its end.

    Raises:
        AssertionError: `check`, and it failed.
    """
    ended = Command(*arguments, fault=fault).end()
    assert not (check and ended.returncode), f"{arguments} -> {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended


def _puzzle(arguments: list[str], pipes: list[Path], sender: Any, fault: Fault | None) -> None:
    for descriptor, pipe in zip((1, 2), pipes, strict=True):
        opened = os.open(pipe, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    # A shell starts background jobs with SIGINT ignored; Python then never hears of Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = RunFolder.begin

    def begin_and_tell(self: RunFolder, stage: str, *rest: Any) -> None:
        sender.send(stage)
        begin(self, stage, *rest)
        if fault is not None:
            fault(stage)

    RunFolder.begin = begin_and_tell
    from transformers.utils import logging

    from puzzle_nas.cli import main
    from puzzle_nas.training import block_distillation

    block_distillation.CHECKPOINT_STEPS = 4
    # Where transformers is imported already, the environment that the command sets comes too late.
    logging.set_verbosity_error()
    sys.argv = ["puzzle", *arguments]
    main()


@dataclass
class KillBeforeWrite:
    """kill -9 just before the process changes the file system for the `number`-th time after a stage began."""

    stage: str
    number: int

    def __call__(self, stage: str) -> None:
        if stage == self.stage:
            _on_write(self._count)

    def _count(self) -> None:
        self.number -= 1
        if self.number < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _on_write(do: Callable[[], None]) -> None:
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}

    def hook(event: str, arguments: tuple) -> None:
        if event in changes or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE):
            do()

    sys.addaudithook(hook)


@dataclass
class CountWrites:
    """How often the process changes the file system in each stage but the last, written to a file."""

    file: Path
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, stage: str) -> None:
        if not self.counts:
            _on_write(self._count)
        self.file.write_text(json.dumps(self.counts))
        self.counts[stage] = 0

    def _count(self) -> None:
        if self.counts:
            self.counts[list(self.counts)[-1]] += 1


@dataclass
class FullDisk:
    """From the moment a stage has begun no file may be written: what a full disk does, whatever library writes."""

    stage: str

    def __call__(self, stage: str) -> None:
        if stage == self.stage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


@dataclass
class JumpingClock:
    """The wall clock jumps by up to thirty years, either way, at every reading."""

    seed: int

    def __call__(self, stage: str) -> None:
        rng, true_time = random.Random(f"{self.seed} {stage}"), time.time
        time.time = lambda: max(0.0, true_time() + rng.uniform(-30, 30) * YEAR)


def jump_file_times(folder: Path, seed: int) -> None:
    """Give every file a time of its own between 1980 and 2060."""
    rng = random.Random(seed)
    for path in sorted(folder.rglob("*")):
        moment = rng.uniform(10, 90) * YEAR
        os.utime(path, (moment, moment))


@dataclass(frozen=True)
class Kill:
    """One kill -9: when it was to strike, and in which stage it did."""

    aimed_at: str
    how: str
    """`time`, a moment drawn from the stage's duration (its end, where it ends sooner than in the undisturbed run), or
    `write`, before one of its changes of the file system."""
    moment: float
    """Seconds, or changes, after the stage began."""


@dataclass(frozen=True)
class Undisturbed:
    """A recipe with its cost table pinned, the bytes of a run of it, and how long each stage took."""

    recipe: Path
    bytes: dict[str, str]
    seconds: dict[str, float]
    writes: dict[str, int]

    @classmethod
    def make(cls, folder: Path, settings: dict[str, Any], cost_table: Path) -> Undisturbed:
        """Run it, in `folder`/whole."""
        recipe = folder / "pinned.yaml"
        everything = {**settings, "costs": {"file": str(cost_table)}, "bld": settings["bld"] | COUPLED}
        recipe.write_text(json.dumps(everything))
        counts = folder / "writes.json"
        puzzle("run", recipe, "--run-dir", folder / "whole", fault=CountWrites(counts), check=True)
        # The last stage writes two files, each opened and renamed, and its record.
        writes = {**json.loads(counts.read_text()), "write_report": 6}
        return cls(recipe, final_bytes(folder / "whole"), RunFolder(folder / "whole").seconds(), writes)

    @property
    def whole(self) -> Path:
        """The undisturbed run's folder. It must not be changed."""
        return self.recipe.parent / "whole"

    def draw(self, rng: random.Random, stage: str) -> Kill:
        """A random moment of a stage; of the last, which may end sooner than before, one of its changes."""
        if rng.random() < 0.5 and stage != STAGES[-1]:
            return Kill(stage, "time", rng.uniform(0, self.seconds[stage]))
        return Kill(stage, "write", rng.randrange(self.writes[stage]))

    def disturb(self, run: Path, kill: Kill) -> str | None:
        """Start or resume the run and kill it: the stage that was cut short, or None where the run ended before."""
        fault = KillBeforeWrite(kill.aimed_at, int(kill.moment)) if kill.how == "write" else None
        command = Command("run", self.recipe, "--run-dir", run, fault=fault)
        if kill.how == "time" and command.wait_for(kill.aimed_at):
            command.begun.poll(kill.moment)
            command.signal(signal.SIGKILL)
        ended = command.end()
        assert ended.returncode in (0, -signal.SIGKILL), f"{kill}: {ended.stdout}\n{ended.stderr}"
        if ended.returncode == 0:
            return None
        return next(stage for stage in STAGES if RunFolder(run).record(stage) is None)

    def finish(self, run: Path) -> list[str]:
        """Resume the run to its end; the names of files that differ from the undisturbed run's."""
        puzzle("run", self.recipe, "--run-dir", run, check=True)
        return differences(final_bytes(run), self.bytes)
