"""Where text comes from: one source of a recipe -> a stream of documents, in an order that a seed decides.

Local text is shuffled within windows of `WINDOW_CHARACTERS`, so that the first documents of a stream are
already spread over the whole of a source (or over a large part of a very large one).
"""

from __future__ import annotations

import ast
import glob
import io
import itertools
import json
import os
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from puzzle_nas.data.conversations import COLUMNS, SYSTEM, TOOLS, Conversation, conversation_of, messages_in
from puzzle_nas.errors import DataError
from puzzle_nas.hub import go_offline_if_unreachable
from puzzle_nas.recipe import PYTHON_STDLIB, SourceSettings
from puzzle_nas.text_files import opened, refuse_pointer

DOCUMENT_CHARACTERS = 8_000
"""Plain text and Python source longer than this are cut into several documents."""
WINDOW_CHARACTERS = 128_000_000
"""Text that is in memory together to be shuffled."""
OPEN_FILES = 16
"""Files of one glob that are read in rotation."""
PROSE_SHARE = 2 / 3
"""Share of the standard library's characters that is prose, as long as there is prose left."""
HUB_SHUFFLE_DOCUMENTS = 1_000

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
PROSE_ONLY_FOLDERS = {"encodings", "pydoc_data"}
"""Tables of characters, and the topics that are prose already."""
TEXT_COLUMN = SourceSettings.model_fields["text_field"].default

Document = str | Conversation


def documents(settings: SourceSettings, seed: int) -> Iterator[Document]:
    """The documents of one source, without empty ones. `parent-samples` is not text: the stage samples it.

    Raises:
        DataError: while iterating; nothing is there, it is not what its name says, or it holds no text.
    """
    name = settings.source
    if name == PYTHON_STDLIB:
        stream = stdlib_documents(seed)
    elif is_local(name):
        stream = _file_documents(name, settings.text_field, seed)
    else:
        stream = _hub_documents(name, settings.text_field, seed)
    empty = True
    for document in stream:
        if not _is_blank(document):
            empty = False
            yield document
    if empty:
        raise DataError(f"The source {name} holds no text; name another one in data.sources.")


def _is_blank(document: Document) -> bool:
    return document.is_blank if isinstance(document, Conversation) else not document.strip()


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


def is_local(name: str) -> bool:
    """Whether a source is files here, not a dataset of the hub."""
    return (
        any(name.endswith(suffix) for suffix in READERS)
        or any(sign in name for sign in "*?[")
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or Path(name).exists()
    )


def local_files(name: str) -> list[Path]:
    """The files that a name or glob means. Raises DataError: there are none."""
    pattern = os.path.expanduser(name)
    if Path(pattern).is_file():
        return [Path(pattern)]
    if Path(pattern).is_dir():
        raise DataError(f"The source {name} is a folder; name its files, for example {name.rstrip('/')}/*.jsonl.")
    if not any(sign in name for sign in "*?["):
        raise DataError(f"There is no file {name}; correct its name.")
    files = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise DataError(f"The glob {name} matches no file; correct it.")
    return files


def _file_documents(name: str, text_field: str, seed: int) -> Iterator[Document]:
    """Documents of all files, read in rotation and shuffled within a window."""
    files = local_files(name)
    order = random.Random(seed)
    order.shuffle(files)
    streams = [_reader(path)(path, text_field) for path in files]
    window: list[Document] = []
    size = 0
    for document in _in_turns(streams):
        window.append(document)
        size += len(document)
        if size >= WINDOW_CHARACTERS:
            order.shuffle(window)
            yield from window
            window, size = [], 0
    order.shuffle(window)
    yield from window


def _in_turns(streams: list[Iterator[Document]]) -> Iterator[Document]:
    """One document of each of `OPEN_FILES` streams in turn; a finished stream makes room for the next."""
    waiting = iter(streams)
    running = list(itertools.islice(waiting, OPEN_FILES))
    while running:
        for place in reversed(range(len(running))):
            document = next(running[place], None)
            if document is not None:
                yield document
            elif (following := next(waiting, None)) is not None:
                running[place] = following
            else:
                del running[place]


def _reader(path: Path) -> Reader:
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise DataError(f"{path} is none of {', '.join(READERS)}; convert it, or take it out of data.sources.")


def _read_text(path: Path, text_field: str) -> Iterator[Document]:
    with opened(path) as file:
        yield from pieces(file)


def json_lines(path: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.gz file, each with its place for messages; `example` is what a line could be.

    Raises:
        DataError: missing, damaged, or a line is no JSON object.
    """
    with opened(path) as file:
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


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    for where, row in json_lines(path, f'{{"{text_field}": "..."}}'):
        yield _document_of(row, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        refuse_pointer(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = _column(names, text_field, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[n for n in names if n in (column, SYSTEM, TOOLS)]):
                for row in batch.to_pylist():
                    yield _document_of(row, column, str(path))
    except pyarrow.ArrowException:
        raise DataError(f"{path} is not a readable Parquet file; fetch or write it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _column(names: Iterable[str], text_field: str, where: str) -> str:
    """The column to read: the one that is asked for, or, where none is, one of conversations."""
    names = list(names)
    conversations = [name for name in COLUMNS if name in names] if text_field == TEXT_COLUMN else []
    for name in (text_field, *conversations):
        if name in names:
            return name
    raise DataError(
        f"{where} has no column '{text_field}' but {', '.join(names) or 'none'}; set the source's text_field."
    )


def _document_of(row: dict[str, Any], text_field: str, where: str) -> Document:
    """The row's text or conversation; a null counts as empty."""
    column = _column(row, text_field, where)
    value = row[column]
    if value is None:
        return ""
    if (messages := messages_in(value)) is not None:
        return conversation_of(messages, where, row.get(SYSTEM), row.get(TOOLS))
    if not isinstance(value, str):
        raise DataError(
            f"{where} holds neither text nor messages in '{column}' but {type(value).__name__}; "
            "set the source's text_field."
        )
    return value


Reader = Callable[[Path, str], Iterator[Document]]
READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
}


# The hub


def _hub_documents(name: str, text_field: str, seed: int) -> Iterator[Document]:
    """The train split of a hub data set, streamed; `name:configuration` where it has several."""
    go_offline_if_unreachable()
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_DOCUMENTS):
            yield _document_of(dict(row), text_field, f"The hub data set {name}")
    except DataError:
        raise
    # Any exception: the loader passes on those of every library that a data set may use.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{name} is not a file here, and as a hub data set it could not be loaded ({reason}); correct its "
            "name in data.sources (name:configuration where it has several), or give a local file."
        ) from error


# Python's standard library


def stdlib_documents(seed: int) -> Iterator[str]:
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
