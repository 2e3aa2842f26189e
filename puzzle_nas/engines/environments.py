"""Environments of serving engines: each apart from ours, in a cache folder."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_nas.artifacts import explained_disk_errors, read_json, write_json
from puzzle_nas.errors import EngineError


def engines_folder() -> Path:
    """Where engines are installed: $PUZZLE_ENGINES, or a folder of the user's cache."""
    given = os.environ.get("PUZZLE_ENGINES")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "puzzle-nas" / "engines"


def environment_python(name: str, made_from: Mapping[str, Any]) -> Path:
    """The interpreter of an installed engine.

    Raises:
        EngineError: not installed, only half, or made from something else.
    """
    folder = engines_folder() / name
    record = folder / "installed.json"
    if not record.is_file():
        raise EngineError(f"{name} is not installed in {folder}. Install it with: puzzle engine install {name}")
    if read_json(record) != made_from:
        raise EngineError(
            f"{name} in {folder} is another version. Bring it up to date with: puzzle engine install {name}"
        )
    return folder / "bin" / "python"


def install_environment(name: str, steps: Sequence[Sequence[str]], made_from: Mapping[str, Any]) -> Path:
    """Make an environment by pip commands (`steps`, each the arguments after `pip`); nothing to do if it is there.

    `made_from` (JSON) is recorded; an environment made from something else is brought up to date by the same steps.

    Raises:
        EngineError: pip failed; quotes it.
    """
    folder = engines_folder() / name
    record = folder / "installed.json"
    with explained_disk_errors(folder):
        if record.is_file() and read_json(record) == made_from:
            return folder
        record.unlink(missing_ok=True)
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
    for step in steps:
        done = subprocess.run([folder / "bin" / "python", "-m", "pip", *step], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
            raise EngineError(f"pip could not install {name}: {lines[-1][:300]}")
    write_json(record, made_from)
    return folder
