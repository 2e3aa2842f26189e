"""The stage: files and facts of every split, twice the same, and what it says when it cannot."""

import json

import numpy as np
import pytest

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.errors import ArtifactError, DataError
from puzzle_nas.recipe import SPLITS
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.stages import prepare_data, prepare_parent

OVERRIDES = [
    "data.sequence_length=32",
    "data.train_tokens=1000",
    *(f"data.{split}_tokens=64" for split in ("calibration", "scoring", "selection", "validation")),
    "device=cpu",
    "threads=1",
    "precision=float32",
]


@pytest.fixture(scope="module")
def checkpoint(parent, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    parent.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} says {i * i}."}) + "\n" for i in range(300)))
    return path


def prepare(path, checkpoint, sources, *overrides):
    """A run folder in which the stage has run."""
    data = {"parent": str(checkpoint), "data": {"sources": sources}}
    recipe = parse_recipe(json.dumps(data), [*OVERRIDES, *overrides])
    run = RunFolder(path)
    path.mkdir(exist_ok=True)
    run.recipe.write_text(recipe.to_yaml())
    if not run.parent.exists():
        prepare_parent.run(recipe, run)
    prepare_data.run(recipe, run)
    return run


def both(text):
    return [{"source": str(text), "weight": 2}, {"source": "parent-samples", "weight": 1}]


def data_files(run):
    return {path.name: path.read_bytes() for path in (run / "data").rglob("*") if path.is_file()}


def test_splits_and_facts(tmp_path, checkpoint, text, tokenizer):
    run = prepare(tmp_path / "run", checkpoint, both(text))
    facts = json.loads((run / "data" / "data.json").read_text())
    assert facts["separator_id"] == tokenizer.eos_token_id
    for name in SPLITS:
        tokens = load_tokens(run, name)
        split = facts["splits"][name]
        assert tokens.shape == (split["blocks"], 32) and tokens.numel() == split["tokens"]
        assert sum(split["tokens_by_source"].values()) == split["tokens"]
        assert split["documents"] > 0
    validation = facts["splits"]["validation"]["tokens_by_source"]
    assert validation == {str(text): 43, "parent-samples": 21}


def test_twice_the_same_bytes(tmp_path, checkpoint, text):
    first = data_files(prepare(tmp_path / "a", checkpoint, both(text)))
    assert first == data_files(prepare(tmp_path / "b", checkpoint, both(text)))
    assert set(first) == {
        *(f"{name}.safetensors" for name in SPLITS),
        "data.json",
        "parent-samples.safetensors",
    }


def test_the_parent_writes_once(tmp_path, checkpoint, text, monkeypatch):
    run = prepare(tmp_path / "run", checkpoint, both(text))
    before = data_files(run)
    (run / "data" / "train.safetensors").unlink()

    def refuse(*arguments, **options):
        raise AssertionError("the parent writes again")

    monkeypatch.setattr(prepare_data, "sample_documents", refuse)
    assert data_files(prepare(tmp_path / "run", checkpoint, both(text))) == before
    for stale in ("seed=1", "data.train_tokens=1100", "data.sequence_length=31"):
        with pytest.raises(AssertionError, match="writes again"):
            prepare(tmp_path / "run", checkpoint, both(text), stale)
    (run / "data" / "sources" / "parent-samples.safetensors").write_bytes(b"cut off")
    with pytest.raises(AssertionError, match="writes again"):
        prepare(tmp_path / "run", checkpoint, both(text))


def test_samples_go_when_the_recipe_has_them_no_longer(tmp_path, checkpoint, text):
    prepare(tmp_path / "run", checkpoint, both(text))
    run = prepare(tmp_path / "run", checkpoint, [{"source": str(text)}])
    assert "parent-samples.safetensors" not in data_files(run)


def test_missing_and_corrupted_splits(tmp_path, checkpoint, text):
    with pytest.raises(ArtifactError, match=r"has no train text yet\. Make it with: puzzle prepare-data"):
        load_tokens(RunFolder(tmp_path), "train")
    run = prepare(tmp_path / "run", checkpoint, [{"source": str(text)}])
    content = run.split("train").read_bytes()
    for damage in (content[:100], content[:-1] + bytes([content[-1] ^ 1])):
        run.split("train").write_bytes(damage)
        with pytest.raises(ArtifactError, match=r"corrupted. Make it again with: puzzle prepare-data .* --again"):
            load_tokens(run, "train")


def test_a_missing_file_is_noticed_before_the_parent_writes(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(prepare_data, "sample_documents", lambda *arguments: pytest.fail("the parent writes"))
    sources = [{"source": "parent-samples"}, {"source": "missing.txt"}]
    with pytest.raises(DataError, match=r"There is no file missing\.txt"):
        prepare(tmp_path / "run", checkpoint, sources)


def test_sequences_longer_than_the_parent_reads(tmp_path, checkpoint, text):
    with pytest.raises(DataError, match="sequence_length is 512, but the parent has 256 positions; lower it"):
        prepare(tmp_path / "run", checkpoint, both(text), "data.sequence_length=512")


@pytest.mark.parametrize("expected", [1, 1 / 3])
def test_the_parent_writes_as_much_as_its_share(tmp_path, checkpoint, text, expected):
    sources = [{"source": "parent-samples"}] if expected == 1 else both(text)
    run = prepare(tmp_path / "run", checkpoint, sources, "data.train_tokens=4000")
    for split in json.loads((run / "data" / "data.json").read_text())["splits"].values():
        share = split["tokens_by_source"]["parent-samples"] / split["tokens"]
        assert share == pytest.approx(expected, abs=0.01)


def test_one_source_twice(tmp_path, checkpoint, text):
    with pytest.raises(DataError, match="twice; name it once and add up the weights"):
        prepare(tmp_path / "run", checkpoint, [{"source": str(text)}] * 2)


def test_two_columns_of_one_file(tmp_path, checkpoint, text):
    rows = [{"question": f"What is {i}?", "answer": f"It is the number {i}."} for i in range(100)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"source": str(path), "text_field": field} for field in ("question", "answer")]
    run = prepare(tmp_path / "run", checkpoint, sources)
    names = json.loads((run / "data" / "data.json").read_text())["splits"]["train"]["tokens_by_source"]
    assert list(names) == [f"{path} (question)", f"{path} (answer)"]
    assert np.all(load_tokens(run, "train").numpy() >= 0)
