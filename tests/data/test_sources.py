"""Documents out of every kind of source, and one sentence for everything that can be wrong with one."""

import gzip
import itertools
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from puzzle_nas.data import sources
from puzzle_nas.errors import DataError
from puzzle_nas.recipe import SourceSettings

TEXTS = [f"Document {i}: {'word ' * i}" for i in range(40)]


def read(source, seed=0, text_field="text"):
    return list(sources.documents(SourceSettings(source=str(source), text_field=text_field), seed))


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text, "domain": "x"}) + "\n" for text in texts)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json_lines(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(40)}), tmp_path / "c.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet"])
def test_tables_give_every_document_in_an_order_of_the_seed(files, name):
    documents = read(files / name)
    assert sorted(documents) == sorted(TEXTS) and documents != TEXTS
    assert documents == read(files / name) != read(files / name, seed=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_byte_order_marks_are_not_text(tmp_path, name, encoding):
    text = "Zwölf 日本語." if name.endswith(".txt") else json_lines(["Zwölf 日本語."])
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path / name) == ["Zwölf 日本語."]


SAID = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
SHARED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def called(arguments):
    """A conversation with a call as servers send it."""
    calls = [{"type": "function", "function": {"name": "look", "arguments": arguments}}]
    return [SAID[0], {"role": "assistant", "content": "", "tool_calls": calls}]


CALL = [SAID[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": SAID}, SAID),
        ({"conversations": SHARED}, SAID),
        ({"id": 3, "messages": PARTS}, SAID),
        # As `datasets` keeps sequences of objects, and as JSON in a text column.
        ({"messages": {"role": ["user", "assistant"], "content": ["What?", "That."]}}, SAID),
        ({"messages": json.dumps(SAID)}, SAID),
        ({"text": json.dumps(SHARED)}, SAID),
        ({"system": "Be brief.", "conversations": SHARED}, [{"role": "system", "content": "Be brief."}, *SAID]),
        ({"system": "", "messages": SAID}, SAID),
        ({"messages": CALL}, [SAID[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]),
        ({"messages": called('{"at": [1]}')}, called({"at": [1]})),
        ({"messages": called("not JSON")}, called("not JSON")),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations(tmp_path, name, row, messages):
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n" + json.dumps({**dict.fromkeys(row), "messages": []}))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    (found,) = read(tmp_path / name)
    assert found.messages == messages


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_tools_of_a_conversation(tmp_path, name, written):
    """Nulls are what tables give for fields that other rows have."""
    of_rows = [[TOOL], [{"type": "function", "function": {"name": "go", "strict": True}}], None]
    rows = [{"messages": SAID, "tools": json.dumps(tools) if written and tools else tools} for tools in of_rows]
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    found = read(tmp_path / name)
    assert sorted(map(str, (list(c.tools) for c in found))) == sorted(str(tools or []) for tools in of_rows)


@pytest.mark.parametrize("tools", ["{not", "7", '["look"]', {"name": "look"}])
def test_tools_that_are_none(tmp_path, tools):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": SAID, "tools": tools}))
    with pytest.raises(DataError, match=r"line 1, holds 'tools' that are no.*mend or leave out that column"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("User", "BOT"), ("prompter", "model")])
@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_by_other_names(tmp_path, key, asks, answers):
    """A template would write `human` as it is: a turn that the parent has never seen."""
    value = {"role": "content", "from": "value"}[key]
    row = [{key: asks, value: "What?"}, {key: answers, value: "That."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    assert read(tmp_path / "a.jsonl")[0].messages == SAID


def test_json_that_is_no_conversation_is_text(tmp_path):
    texts = [json.dumps([{"role": "admin"}, {"role": "guest"}]), "[{not json", "[]", json.dumps(["role"])]
    (tmp_path / "a.jsonl").write_text(json_lines(texts))
    assert sorted(read(tmp_path / "a.jsonl")) == sorted(texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_was_not_fetched(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 2690\n")
    with pytest.raises(DataError, match=r"is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"):
        read(tmp_path / name)


def test_a_column_of_messages_by_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "chat": SAID}) + "\n")
    (found,) = read(tmp_path / "a.jsonl", text_field="chat")
    assert found.messages == SAID
    assert read(tmp_path / "a.jsonl") == ["no"]


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS, "body"))
    assert sorted(read(tmp_path / "a.jsonl", text_field="body")) == sorted(TEXTS)


def test_null_and_blank_texts_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "  "}\n{"text": "kept"}\n')
    assert read(tmp_path / "a.jsonl") == ["kept"]


def test_short_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert read(tmp_path / "a.txt") == ["One.\n\nTwo.\n"]


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "text " * 100 + "\n\n" for i in range(100)]
    (tmp_path / "a.txt").write_text("".join(paragraphs))
    documents = read(tmp_path / "a.txt")
    assert len(documents) > 4 and max(map(len, documents)) < 2 * sources.DOCUMENT_CHARACTERS
    assert all(d.startswith("Paragraph") and d.endswith("\n\n") for d in documents)
    assert sum(d.count("Paragraph") for d in documents) == 100


def test_text_without_line_ends_is_cut_too():
    assert [len(p) for p in sources.pieces(["x" * 25], limit=10)] == [20, 5]


def test_glob_mixes_its_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json_lines(f"{name}{i}" for i in range(50)))
    documents = read(tmp_path / "*.jsonl")
    assert len(set(documents)) == 150
    assert {document[0] for document in documents[:30]} == set("abc")


def test_large_files_are_read_in_turns_not_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_CHARACTERS", 40)
    monkeypatch.setattr(sources, "OPEN_FILES", 2)
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json_lines(f"{name}{i:03d}" for i in range(50)))
    documents = read(tmp_path / "*.jsonl")
    assert len(set(documents)) == 150
    assert len({document[0] for document in documents[:10]}) == 2


# Every mistake is one sentence with the way out.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "There is no file .*missing.jsonl; correct its name"),
        ("*.jsonl", None, r"The glob .*\*.jsonl matches no file; correct it"),
        ("", None, r"is a folder; name its files, for example .*/\*.jsonl"),
        ("./a.csv", b"a,b\n", r"a.csv is none of .txt, .jsonl, .jsonl.gz, .parquet; convert it"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2, is not JSON; mend or delete"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1, is not a JSON object"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "n": 1}\n',
            "line 2, has no column 'text' but body, n; set",
        ),
        (
            "a.jsonl",
            b'{"text": 3}\n',
            "line 1, holds neither text nor messages in 'text' but int; set the source's text_field",
        ),
        ("a.jsonl", b'{"text": ""}\n', "The source .*a.jsonl holds no text; name another"),
        ("a.txt", b"", "The source .*a.txt holds no text"),
        ("a.txt", b"caf\xe9\n", "a.txt is not UTF-8 text; convert it"),
        ("a.txt", "UTF-16 without a mark".encode("utf-16-le"), "a.txt holds zero bytes, so it is not UTF-8 text"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl is not UTF-8 text; convert it"),
        ("a.jsonl", b'{"messages": [{"text": "x"}]}\n', "line 1, holds a message without role and content"),
        ("a.jsonl", b'{"conversations": [{"from": "wizard", "value": "x"}]}\n', "message from 'wizard'; known: system"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}\n',
            r"line 1, holds a message that is not text \(image\); leave it out",
        ),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is damaged; fetch or compress it again"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(TEXTS).encode())[:-90],
            "a.jsonl.gz is damaged; fetch",
        ),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet is not a readable Parquet file; fetch"),
    ],
)
def test_mistakes(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'text' but body, n; set the source's text_field"):
        read(tmp_path / "a.parquet")


# The hub, without the hub


class Rows(list):
    def shuffle(self, seed, buffer_size):
        return self


def test_hub_data_set_and_its_configuration(monkeypatch):
    import datasets

    asked = []

    def load(path, configuration, split, streaming):
        asked.append((path, configuration, split, streaming))
        return Rows([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/set") == ["one", "two"] == read("owner/set:part")
    assert asked == [("owner/set", None, "train", True), ("owner/set", "part", "train", True)]


def test_hub_data_set_that_cannot_be_loaded(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = r"owner/set is not a file here, and .* could not be loaded \(Couldn't reach the hub\); correct"
    with pytest.raises(DataError, match=message):
        read("owner/set")


# Python's standard library


def test_docstrings_leave_the_source_and_nothing_is_imported(tmp_path):
    module = tmp_path / "shy.py"
    module.write_text(
        '"""What it is."""\nraise SystemExit\n\nclass A:\n    """An A.\n\n    Long."""\n    x = 1\n\n'
        '    def f(self, y=2):\n        "Does f."\n        return "\x0c"\n'
    )
    prose, code = sources._split_prose_and_code(module)
    assert prose == ["Module shy\n\nWhat it is.\n\nclass A\n\nAn A.\n\nLong.\n\nf(self, y=2)\n\nDoes f.\n\n"]
    assert code == ['raise SystemExit\n\nclass A:\n    x = 1\n\n    def f(self, y=2):\n        return "\x0c"\n']


def test_stdlib_is_two_thirds_prose_until_prose_runs_out(monkeypatch):
    files = [path for path in sources._stdlib_files() if path.parent.name in ("json", "email", "logging")]
    assert files
    monkeypatch.setattr(sources, "_stdlib_files", lambda: files)
    all_prose = set(sources._topics())
    for path in files:
        all_prose.update(sources._split_prose_and_code(path)[0])
    documents = read(sources.PYTHON_STDLIB)
    assert documents == read(sources.PYTHON_STDLIB) != read(sources.PYTHON_STDLIB, seed=1)
    last_prose = max(i for i, document in enumerate(documents) if document in all_prose)
    sizes = [(len(document), document in all_prose) for document in documents[: last_prose + 1]]
    prose = list(itertools.accumulate(size * is_prose for size, is_prose in sizes))
    everything = list(itertools.accumulate(size for size, _ in sizes))
    assert all(p / e > 0.6 for p, e in zip(prose, everything, strict=True) if e > 10 * sources.DOCUMENT_CHARACTERS)
    assert prose[-1] == sum(len(text) for text in documents if text in all_prose)


def test_stdlib_leaves_tests_and_installed_packages_out():
    parts = {part for path in sources._stdlib_files() for part in path.parts}
    assert parts.isdisjoint({"test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
    next(sources.documents(SourceSettings(source=sources.PYTHON_STDLIB), 0))
    assert "antigravity" not in sys.modules
