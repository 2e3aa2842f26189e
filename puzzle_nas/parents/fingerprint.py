"""What a parent's bytes are: the contents of every file that a result depends on, hashed once."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from puzzle_nas.artifacts import fingerprint

WEIGHTS = (".safetensors", ".bin", ".gguf")
SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
IGNORED = ("consolidated", "training_args", "optimizer", "scheduler", "rng_state", "trainer_state")
"""Beginnings of names that no loading reads."""
CHUNK_BYTES = 1 << 22


def parent_files(where: Path) -> list[Path]:
    """The files of a checkpoint folder that a result depends on, or the one .gguf file."""
    if where.is_file():
        return [where]
    files = [path for path in sorted(where.iterdir()) if path.suffix in WEIGHTS + SMALL]
    files += sorted(where.glob("chat_templates/*.jinja"))
    return [path for path in files if path.is_file() and not path.name.startswith(IGNORED)]


def parent_fingerprint(where: Path, cache: Path | None = None) -> str:
    """A short hash of the whole contents of a parent's files, by their names.

    What was hashed before is looked up by path, size, times of change and inode: a second look costs nothing.

    Args:
        cache: where hashes are kept. Default: $XDG_CACHE_HOME or ~/.cache, puzzle-nas/hashes.json.
    """
    files = parent_files(where)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puzzle-nas" / "hashes.json"
    known = _read(cache)
    stamps = {str(path.resolve()): _stamp(path) for path in files}
    new = [path for path, stamp in stamps.items() if known.get(path, [None])[:-1] != stamp]
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(new, pool.map(_digest, new), strict=True):
            # The stamp is from before: a file that changes while it is read is hashed again next time.
            known[path] = [*stamps[path], digest]
    if new:
        _write(cache, known)
    return fingerprint([[path.name, known[str(path.resolve())][-1]] for path in files])


def _stamp(path: Path) -> list[int]:
    """What changes with a file: size, times of its contents' and its entry's change in nanoseconds, inode."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _digest(path: str) -> str:
    """XXH3 of a file's bytes: as good as SHA-256 at noticing changes that nobody makes on purpose, and far faster."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(cache: Path) -> dict[str, list]:
    """Hashes of before; none where the cache is missing or damaged: it saves time, nothing else."""
    try:
        found = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(v, list) and v for v in found.values()) else {}


def _write(cache: Path, known: dict[str, list]) -> None:
    """Keep hashes, where the folder can be written."""
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known))
        os.replace(partial, cache)
    except OSError:
        return
