"""Where text comes from: one source of a recipe -> a stream of documents, in an order that a seed decides.

Local text is shuffled within windows of `WINDOW_CHARACTERS`, so that the first documents of a stream are
already spread over the whole of a source (or over a large part of a very large one).
"""

from __future__ import annotations

import ast
import glob
import gzip
import io
import itertools
import json
import os
import random
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from puzzle_nas.errors import DataError
from puzzle_nas.recipe import SourceSettings

PYTHON_STDLIB = "python-stdlib"
PARENT_SAMPLES = "parent-samples"

DOCUMENT_CHARACTERS = 8_000
"""Plain text and Python source longer than this are cut into several documents."""
WINDOW_CHARACTERS = 128_000_000
"""Text that is in memory together to be shuffled."""
OPEN_FILES = 16
"""Files of one glob that are read in turns."""
PROSE_SHARE = 2 / 3
"""Share of the standard library's characters that is prose, as long as there is prose left."""
HUB_SHUFFLE_DOCUMENTS = 1_000

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
PROSE_ONLY_FOLDERS = {"encodings", "pydoc_data"}
"""Tables of characters, and the topics that are prose already."""


def documents(settings: SourceSettings, seed: int) -> Iterator[str]:
    """The documents of one source, without empty ones. `parent-samples` is not text: the stage samples it.

    Raises:
        DataError: while iterating; nothing is there, it is not what its name says, or it holds no text.
    """
    name = settings.source
    if name == PYTHON_STDLIB:
        stream = _stdlib_documents(seed)
    elif _is_local(name):
        stream = _file_documents(name, settings.text_field, seed)
    else:
        stream = _hub_documents(name, settings.text_field, seed)
    empty = True
    for text in stream:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f"The source {name} holds no text; name another one in data.sources.")


def pieces(lines: Iterable[str], limit: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut text into documents of about `limit` characters, at a blank line before twice that if possible."""
    kept: list[str] = []
    size = 0
    for long_line in lines:
        for start in range(0, len(long_line), limit):
            line = long_line[start : start + limit]
            kept.append(line)
            size += len(line)
            if (size >= limit and not line.strip()) or size >= 2 * limit:
                yield "".join(kept)
                kept, size = [], 0
    if kept:
        yield "".join(kept)


# Files


def _is_local(name: str) -> bool:
    return (
        any(name.endswith(suffix) for suffix in READERS)
        or any(sign in name for sign in "*?[")
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or Path(name).exists()
    )


def _local_files(name: str) -> list[Path]:
    pattern = os.path.expanduser(name)
    if Path(pattern).is_file():
        return [Path(pattern)]
    if Path(pattern).is_dir():
        raise DataError(f"The source {name} is a folder; name its files, for example {name.rstrip('/')}/*.jsonl.")
    if not any(sign in name for sign in "*?["):
        raise DataError(f"There is no file {name}; correct its name in data.sources.")
    files = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise DataError(f"The glob {name} matches no file; correct it in data.sources.")
    return files


def _file_documents(name: str, text_field: str, seed: int) -> Iterator[str]:
    """Documents of all files, read in turns and shuffled within a window."""
    files = _local_files(name)
    order = random.Random(seed)
    order.shuffle(files)
    streams = [_reader(path)(path, text_field) for path in files]
    window: list[str] = []
    size = 0
    for text in _in_turns(streams):
        window.append(text)
        size += len(text)
        if size >= WINDOW_CHARACTERS:
            order.shuffle(window)
            yield from window
            window, size = [], 0
    order.shuffle(window)
    yield from window


def _in_turns(streams: list[Iterator[str]]) -> Iterator[str]:
    """One document of each of `OPEN_FILES` streams in turn; a finished stream makes room for the next."""
    waiting = iter(streams)
    running = list(itertools.islice(waiting, OPEN_FILES))
    while running:
        for place in reversed(range(len(running))):
            text = next(running[place], None)
            if text is not None:
                yield text
            elif (following := next(waiting, None)) is not None:
                running[place] = following
            else:
                del running[place]


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise DataError(f"{path} is none of {', '.join(READERS)}; convert it, or take it out of data.sources.")


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from pieces(file)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it to UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def json_lines(path: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.gz file, each with its place for messages; `example` is what a line could be.

    Raises:
        DataError: missing, damaged, or a line is no JSON object.
    """
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    raise DataError(f"{path}, line {number}, is not JSON; mend or delete that line.") from None
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, line {number}, is not a JSON object; each line must be one, such as {example}."
                    )
                yield f"{path}, line {number},", row
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is damaged after line {number}; fetch or compress it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    for where, row in json_lines(path, f'{{"{text_field}": "..."}}'):
        yield _text_of(row, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise DataError(_no_column(str(path), text_field, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield _text_of({text_field: text}, text_field, str(path))
    except pyarrow.ArrowException:
        raise DataError(f"{path} is not a readable Parquet file; fetch or write it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _no_column(where: str, text_field: str, names: Iterable[str]) -> str:
    return f"{where} has no column '{text_field}' but {', '.join(names) or 'none'}; set the source's text_field."


def _text_of(row: dict[str, Any], text_field: str, where: str) -> str:
    """The row's text; a null counts as empty."""
    if text_field not in row:
        raise DataError(_no_column(where, text_field, row))
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where} holds no text in '{text_field}' but {type(text).__name__}; set the source's text_field."
        )
    return text


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
}


# The hub


def _hub_documents(name: str, text_field: str, seed: int) -> Iterator[str]:
    """The train split of a hub data set, streamed; `name:configuration` where it has several."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_DOCUMENTS):
            yield _text_of(dict(row), text_field, f"The hub data set {name}")
    except DataError:
        raise
    # Any exception: the loader passes on those of every library that a data set may use.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{name} is no file here, and as a hub data set it could not be loaded ({reason}); correct its "
            "name in data.sources (name:configuration where it has several), or give a local file."
        ) from error


# Python's standard library


def _stdlib_documents(seed: int) -> Iterator[str]:
    """Topics, docstrings and source of Python's own library, nothing of which is imported or run.

    Docstrings are taken out of the source, so that no text comes twice.
    """
    order = random.Random(seed)
    units: list[Path | str] = [*_stdlib_files(), *_topics()]
    order.shuffle(units)
    code: list[str] = []
    prose_characters = code_characters = 0
    for unit in units:
        prose = [unit] if isinstance(unit, str) else []
        if isinstance(unit, Path):
            prose, code_of_unit = _split_prose_and_code(unit)
            code += code_of_unit
        for text in prose:
            prose_characters += len(text)
            yield text
        while code and code_characters < prose_characters * (1 - PROSE_SHARE) / PROSE_SHARE:
            text = code.pop(order.randrange(len(code)))
            code_characters += len(text)
            yield text
    order.shuffle(code)
    yield from code


def _topics() -> list[str]:
    """The language reference's topics, as `help()` shows them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text for _, topic in sorted(topics.items()) for text in pieces(topic.splitlines(keepends=True))]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfig")]
    return sorted(found)


def _split_prose_and_code(path: Path) -> tuple[list[str], list[str]]:
    """Documents of a module's docstrings, each under the name of what it describes, and of its source."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return [], []
    # Not splitlines(): ast counts lines by \n alone.
    lines = io.StringIO(source).readlines()
    described: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        described += [*_heading(node, path.stem).splitlines(True), *text.splitlines(True), "\n", "\n"]
        docstring = node.body[0]
        for number in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
            lines[number] = ""
    has_code = PROSE_ONLY_FOLDERS.isdisjoint(path.parts)
    return list(pieces(described)), list(pieces(lines)) if has_code else []


def _heading(node: ast.AST, module: str) -> str:
    if isinstance(node, ast.Module):
        return f"Module {module}\n\n"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}\n\n"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return f"{node.name}({ast.unparse(node.args)})\n\n"
