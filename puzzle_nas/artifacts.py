"""The run folder: names, atomic writes, fingerprints, integrity. No torch.

A file with its final name is complete: it is written beside, flushed and renamed. Every stage leaves a record,
`stages/NAME.json`, that says what it was made from and the checksum of each file it made; a stage whose record
still matches is done. Measured seconds live apart, in `seconds/`, so that equal inputs give equal bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle_nas.errors import ArtifactError, PuzzleError, puzzle_command


def fingerprint(value: Any) -> str:
    """A short hash of any JSON value; equal values give equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:32]


@contextmanager
def explained_disk_errors(path: Path):
    """Turn a full or read-only disk into one sentence."""
    try:
        yield
    except PuzzleError:
        raise
    except Exception as error:
        # safetensors reports I/O trouble with an exception of its own that only quotes the number; numpy's says how
        # much it could write.
        number = error.errno if isinstance(error, OSError) else None
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        quoted = any(f"(os error {n})" in str(error) for n in full) or "requested and" in str(error)
        if number in full or quoted:
            raise ArtifactError(
                f"The disk is full, or a file may not grow: {path} could not be written. Make room and run the same "
                "command again; what is done is kept."
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise ArtifactError(f"{path} cannot be written. Choose another --run-dir.") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that its final name only ever names the whole of it."""
    write_whole(path, lambda partial: partial.write_bytes(data))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, and give it its own once it is whole and on the disk."""
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.touch()
            mode = partial.stat().st_mode
            write(partial)
            # See `complete_folder`.
            partial.chmod(mode)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of readable JSON."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, made_by: str | None = None) -> Any:
    """Read JSON.

    Raises:
        ArtifactError: missing (naming the command that makes it) or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        way_out = f" Make it with: {puzzle_command(made_by, _run_folder_of(path))}" if made_by else ""
        raise ArtifactError(f"{path} is missing.{way_out}") from None
    except (ValueError, UnicodeDecodeError):
        raise ArtifactError(f"{path} is corrupted. Delete it and run the same command again.") from None


def _run_folder_of(path: Path) -> Path:
    """The folder that the file is, or would be, somewhere in."""
    return next((folder for folder in path.parents if (folder / "recipe.yaml").is_file()), path.parent)


@contextmanager
def written_by_this_version(path: Path, made_by: str) -> Iterator[None]:
    """Around what reads keys of a run's JSON.

    Raises:
        ArtifactError: a key is not there, as another version wrote the file.
    """
    try:
        yield
    except KeyError as error:
        raise ArtifactError(
            f"{path} has no {error.args[0]}: another version wrote it. "
            f"Write it again with: {puzzle_command(made_by, _run_folder_of(path), '--again')}"
        ) from None


@contextmanager
def complete_folder(path: Path):
    """Yield a folder to fill; it gets its final name, replacing an older one, only if nothing was raised."""
    partial = path.with_name(path.name + ".partial")
    with explained_disk_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # As those of any program: safetensors' own are for their owner alone, and engines may run as somebody else.
        mode = partial.stat().st_mode & 0o666
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)


class RunFolder:
    """Names and records inside one run folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._sound: set[str] = set()
        """Stages whose files this process has made or checked."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    # names
    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self / "recipe.yaml"

    @property
    def parent(self) -> Path:
        """What the parent is: checkpoint, family, sizes."""
        return self / "parent.json"

    def split(self, name: str) -> Path:
        """Packed tokens of one split."""
        return self / "data" / f"{name}.safetensors"

    def variant(self, layer: int, variant_id: str, library: str = "main") -> Path:
        """Weights of one trained variant; its facts lie beside it with the suffix .json."""
        return self / "library" / library / f"layer_{layer:02d}" / f"{variant_id}.safetensors"

    def initial_variant(self, layer: int, variant_id: str) -> Path:
        """Weights of one variant as initialised, before BLD."""
        return self.variant(layer, variant_id, "initial")

    def score(self, layer: int, variant_id: str, library: str = "main", metric: str = "kl") -> Path:
        """Replace-1-block score of one variant."""
        return self / "scores" / library / metric / f"layer_{layer:02d}.{variant_id}.json"

    @property
    def coupled_pairs(self) -> Path:
        """Which pairs of variants coupled BLD trains, by layer."""
        return self / "library" / "coupled" / "pairs.json"

    def costs(self, engine: str) -> Path:
        """Cost table of one engine."""
        return self / "costs" / f"{engine}.json"

    def architecture(self, name: str = "main") -> Path:
        """A search's result."""
        return self / "search" / name / "architecture.json"

    def candidate(self, measured: str) -> Path:
        """What the search measured of one assembled child; `measured` is a fingerprint of the child and of what."""
        return self / "search" / "main" / "candidates" / f"{measured}.json"

    @property
    def frontier(self) -> Path:
        """The best children and the baselines over a range of limits; the picture lies beside it, .html."""
        return self / "search" / "frontier.json"

    @property
    def drafts(self) -> Path:
        """The best children as drafts for their parent."""
        return self / "search" / "drafts.json"

    @property
    def summary(self) -> Path:
        """Everything that `puzzle show` prints."""
        return self / "summary.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self / "report.html"

    def relative(self, path: Path) -> str:
        """`path` as written in summaries: relative to the run folder when inside it."""
        try:
            return str(path.resolve().relative_to(self.path.resolve()))
        except ValueError:
            return os.path.relpath(path.resolve(), self.path.resolve())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. The lock is the operating system's: it ends with this process, however that ends.

        Raises:
            ArtifactError: another process holds it, or the folder cannot be written.
        """
        import fcntl

        path = self / ".lock"
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().decode() or "just started"
                raise ArtifactError(
                    f"Another puzzle command (process {holder}) works on {self}. Wait until it ends, or name another "
                    "folder with --run-dir."
                ) from None
            file.truncate(0)
            with explained_disk_errors(path):
                file.write(str(os.getpid()).encode())
            try:
                yield
            finally:
                file.truncate(0)

    # records
    def record_path(self, stage: str) -> Path:
        """Where a stage says that it is done."""
        return self / "stages" / f"{stage}.json"

    def record(self, stage: str) -> dict[str, Any] | None:
        """A stage's record, or None when it has not finished yet.

        Raises:
            ArtifactError: it is corrupted.
        """
        path = self.record_path(stage)
        if not path.exists():
            return None
        record = read_json(path)
        sound = isinstance(record, dict) and set(record) == {"made_from", "outputs_fingerprint", "outputs"}
        if not sound or record["outputs_fingerprint"] != fingerprint(record["outputs"]):
            raise ArtifactError(f"{path} is corrupted. Delete it and run the same command again.")
        return record

    def files(self, patterns: Iterable[str]) -> dict[str, str]:
        """Checksums of the finished files that match glob patterns, by relative name."""
        found = sorted({p for pattern in patterns for p in self.path.glob(pattern) if p.is_file()})
        return {str(p.relative_to(self.path)): file_checksum(p) for p in found if not p.name.endswith(".partial")}

    def scratch(self, stage: str) -> Path:
        """Where a stage keeps what it needs to resume; deleted when the stage is done."""
        return self / "scratch" / stage

    def begin(self, stage: str, made_from: str, outputs: Iterable[str]) -> None:
        """Before a stage runs: keep what an interrupted run of it left, unless that was made from something else."""
        marker = self / "stages" / f"{stage}.begun.json"
        if not marker.exists() or read_json(marker) != {"made_from": made_from}:
            self.discard(stage, outputs)
            write_json(marker, {"made_from": made_from})
        self.record_path(stage).unlink(missing_ok=True)
        self._sound.discard(stage)

    def discard(self, stage: str, outputs: Iterable[str]) -> None:
        """Delete what a stage has made."""
        self._sound.discard(stage)
        with explained_disk_errors(self.path):
            self.record_path(stage).unlink(missing_ok=True)
            (self / "stages" / f"{stage}.begun.json").unlink(missing_ok=True)
            (self / "seconds" / f"{stage}.json").unlink(missing_ok=True)
            shutil.rmtree(self.scratch(stage), ignore_errors=True)
            for name in self.files(outputs):
                (self.path / name).unlink()

    def finish(self, stage: str, made_from: str, outputs: Iterable[str]) -> None:
        """After a stage: write its record, delete its scratch."""
        self.write_record(stage, made_from, self.files(outputs))
        self._sound.add(stage)
        self.clear_scratch(stage)

    def clear_scratch(self, stage: str) -> None:
        """Only once the record is written: without either, a killed stage would start from nothing."""
        shutil.rmtree(self.scratch(stage), ignore_errors=True)

    def write_record(self, stage: str, made_from: str, outputs: Mapping[str, str]) -> None:
        """Say that `stage` is done."""
        write_json(
            self.record_path(stage),
            {"made_from": made_from, "outputs_fingerprint": fingerprint(outputs), "outputs": dict(outputs)},
        )

    def add_seconds(self, stage: str, seconds: float, peak_memory_bytes: int = 0) -> None:
        """Add wall time to a stage's account (sums over interrupted tries), and note its process's peak memory."""
        path = self / "seconds" / f"{stage}.json"
        before = read_json(path) if path.exists() else {"seconds": 0.0}
        peak = max(peak_memory_bytes, before.get("peak_memory_bytes", 0))
        write_json(path, {"seconds": before["seconds"] + seconds, "peak_memory_bytes": peak})

    def seconds(self) -> dict[str, float]:
        """Wall time by stage."""
        return {p.stem: read_json(p)["seconds"] for p in sorted((self / "seconds").glob("*.json"))}

    def peak_memory_bytes(self) -> int | None:
        """The most memory that any stage's process had, None where that was not noted."""
        peaks = [read_json(p).get("peak_memory_bytes", 0) for p in (self / "seconds").glob("*.json")]
        return max(peaks, default=0) or None

    def verify_outputs(self, stage: str, command: str) -> None:
        """Check that a finished stage's files are still what it made.

        Raises:
            ArtifactError: the stage has not finished, or a file is missing or changed.
        """
        if stage in self._sound:
            return
        record = self.record(stage)
        if record is None:
            way_out = puzzle_command(command, self.path)
            raise ArtifactError(f"{self.path} has no finished {stage} yet. Make it with: {way_out}")
        for name, checksum in record["outputs"].items():
            path = self.path / name
            if not path.is_file() or file_checksum(path) != checksum:
                state = "corrupted" if path.exists() else "missing"
                way_out = puzzle_command(command, self.path, "--again")
                raise ArtifactError(f"{path} is {state}. Make it again with: {way_out}")
        self._sound.add(stage)
