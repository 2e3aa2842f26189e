"""`puzzle export`, `puzzle bench` and `puzzle serve` through the command line, and what users get wrong."""

import json
import resource
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file

from puzzle_nas import cli
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.engines import SERVING_ENGINES
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.engines.server import served
from puzzle_nas.errors import EngineError, ExportError
from puzzle_nas.exporters import EXPORTERS
from puzzle_nas.families.loading import save_model
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.stages.export_child import export_child
from tests.conftest import puzzle
from tests.exporters.children import EVERY_KIND, child_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("child")
    child = child_of(EVERY_KIND)
    save_model(child.model, child.tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """A verified GGUF of the child with every kind."""
    return export_child(checkpoint, "gguf", None, None, tmp_path_factory.mktemp("exports"))


@pytest.fixture
def check_refused(monkeypatch, capsys):
    """Run the command line in this process, where torch is imported already."""

    def check(*arguments, contains):
        monkeypatch.setattr(sys, "argv", ["puzzle", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_code:
            cli.main()
        message = capsys.readouterr().err
        assert exit_code.value.code == 2
        assert len(message.strip().splitlines()) == 1
        for text in contains:
            assert text in message

    return check


def test_an_export_says_how_it_was_verified(exported):
    assert exported.name == "gguf-bfloat16"
    record = json.loads((exported / EXPORT_RECORD).read_text())
    check = record["verification"]["float32"]
    assert check["num_tokens"] >= 512 and check["max_nats"] <= check["tolerance"]["max_nats"]
    assert check["version"]["llama-cpp-python"]
    assert sorted(file.name for file in exported.iterdir()) == [EXPORT_RECORD, "model.gguf"]


def test_a_quantised_export_through_the_command_line(checkpoint, tmp_path):
    out = puzzle("export", checkpoint, "--to", "gguf", "--quantize", "q8_0", "--out", tmp_path).stdout
    assert f"Exported to {tmp_path / 'gguf-q8_0'}" in out
    assert [folder.name for folder in tmp_path.iterdir()] == ["gguf-q8_0"]
    record = json.loads((tmp_path / "gguf-q8_0" / EXPORT_RECORD).read_text())
    assert list(record["verification"]) == ["float32", "q8_0"]
    kinds = Counter(t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf-q8_0/model.gguf").tensors)
    assert record["tensor_types"] == kinds and kinds["Q8_0"] and kinds["F32"]
    assert f"of {sum(kinds.values())} tensors" in out and f"{kinds['Q8_0']} are Q8_0" in out


def test_an_export_is_not_written_twice_and_a_damaged_one_anew(checkpoint, tmp_path, capsys):
    export = partial(export_child, checkpoint, "gguf", "float32", None, tmp_path)
    file = export() / "model.gguf"
    assert "already" not in capsys.readouterr().out
    before = file.read_bytes()
    export()
    assert "holds this very child already" in capsys.readouterr().out and file.read_bytes() == before
    file.write_bytes(before[:-1])
    export()
    assert "already" not in capsys.readouterr().out and file.read_bytes() == before


def test_what_a_quantised_type_does_not_fit_is_said(tmp_path, capsys):
    """Rows of 80 are not whole blocks of 32: most matrices stay in 16 bits."""
    child = child_of(hidden_size=80, num_hidden_layers=2)
    save_model(child.model, child.tokenizer, tmp_path / "child")
    export_child(tmp_path / "child", "gguf", None, "q4_0", tmp_path)
    types = json.loads((tmp_path / "gguf-q4_0" / EXPORT_RECORD).read_text())["tensor_types"]
    assert types["F16"] > 4 and types["Q4_0"] >= 2
    said = capsys.readouterr().out
    assert f"{types['F16']} are F16" in said and "what does not fit a type becomes another" in said


def test_generation_settings_do_not_disturb_verification(tmp_path):
    child = child_of(num_hidden_layers=2)
    child.model.generation_config.update(repetition_penalty=1.3, do_sample=True, temperature=0.7, top_k=20)
    save_model(child.model, child.tokenizer, tmp_path / "child")
    exported = export_child(tmp_path / "child", "transformers", None, None, tmp_path)
    kept = json.loads((exported / "generation_config.json").read_text())
    assert kept["repetition_penalty"] == 1.3 and kept["temperature"] == 0.7
    check = json.loads((exported / EXPORT_RECORD).read_text())["verification"]["float32"]
    assert check["continued_likewise"] == check["continued_tokens"]


def test_16_bits_are_verified_in_float32_first(checkpoint, tmp_path):
    exported = export_child(checkpoint, "gguf", "bfloat16", None, tmp_path)
    verification = json.loads((exported / EXPORT_RECORD).read_text())["verification"]
    assert verification["float32"]["max_nats"] < 1e-4 < verification["bfloat16"]["max_nats"]
    assert sorted(file.name for file in exported.iterdir()) == [EXPORT_RECORD, "model.gguf"]


def test_an_export_that_differs_is_not_left_behind(checkpoint, tmp_path, monkeypatch):
    write = EXPORTERS["gguf"].write

    def wrong(child, folder, dtype):
        child.model.model.norm.weight.mul_(1.01)
        write(child, folder, dtype)
        child.model.model.norm.weight.div_(1.01)

    monkeypatch.setattr(EXPORTERS["gguf"], "write", wrong)
    with pytest.raises(ExportError, match=r"does not compute this child.*Nothing was left behind"):
        export_child(checkpoint, "gguf", None, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(checkpoint, tmp_path, exported, check_refused, monkeypatch):
    out = ("--out", tmp_path)
    check_refused("export", tmp_path / "nothing", "--to", "gguf", *out, contains=["There is no checkpoint"])
    check_refused("export", checkpoint, "--to", "gguf", contains=["not a run folder", "--out FOLDER"])
    check_refused("export", checkpoint, "--to", "onnx", *out, contains=["'onnx'", "transformers, decilm", "gguf"])
    check_refused("export", checkpoint, "--to", "gguf", "--dtype", "int3", *out, contains=["int3", "float32, bfloat16"])
    check_refused("export", checkpoint, "--to", "gguf", "--quantize", "q1", *out, contains=["to q1; types: q8_0, q6_k"])
    check_refused("export", checkpoint, "--to", "decilm", *out, contains=["attention.linear (layer 2, 5)"])
    check_refused("engine", "install", "tgi", contains=["'tgi'", "llama.cpp"])
    check_refused("engine", "install", "transformers", contains=["nothing to install"])
    check_refused("serve", checkpoint, "--engine", "llama.cpp", contains=["is not an export", "puzzle export"])
    check_refused("serve", exported, "--engine", "transformers", contains=["holds gguf", "loads transformers"])
    check_refused("bench", exported, exported, "--engine", "llama.cpp", "--scenarios", "x", contains=["'x'", "table3"])
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path / "engines"))
    install = "puzzle engine install llama.cpp"
    check_refused("export", checkpoint, "--to", "gguf", *out, contains=["llama.cpp is not installed in", install])
    assert not list(tmp_path.iterdir())


def test_full_disk(checkpoint, tmp_path):
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "puzzle_nas.cli", "export", checkpoint, "--to", "gguf", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_large_files)
    assert result.returncode == 2, result.stderr
    assert "The disk is full" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bench_times_both_in_turns(exported, tmp_path):
    arguments = ("--engine", "llama.cpp", "--scenarios", "32/8,8/16", "--scale", "1", "--batch-sizes", "1,2")
    out = puzzle("bench", exported, exported, *arguments, "--repeats", "2", "--out", tmp_path / "bench.json").stdout
    assert "32/8" in out and "x" in out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert list(result["scenarios"]) == ["32/8", "8/16"]
    for row in result["scenarios"].values():
        assert len(row["speedup_by_repeat"]) == 2
        assert row["child"]["batch_size"] in (1, 2) and row["child"]["time_to_first_token_ms"] > 0
        assert row["child"]["tokens_per_second_per_device"] == row["child"]["tokens_per_second"]
        assert row["child"]["kv_cache_bytes"] == 448 * row["tokens_per_request"] * row["child"]["batch_size"]
    assert result["memory"]["child"]["kv_cache_bytes_per_token"] == 448
    assert result["memory"]["child"]["weight_bytes"] == (exported / "model.gguf").stat().st_size

    page = (tmp_path / "bench.html").read_text()
    assert "Parent and child interleaved on llama.cpp" in page and "32/8" in page


def test_bench_loads_as_it_is_told_or_refuses(exported, tmp_path, check_refused):
    command = ("bench", exported, exported, "--engine", "llama.cpp", "--scenarios", "8/4", "--scale", "1")
    puzzle(*command, "--batch-sizes", "1", "--repeats", "1", "--kv-format", "f32", "--out", tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["loading"] == {"dtype": None, "kv_format": "f32", "tensor_parallel": 1}
    assert result["memory"]["child"]["kv_cache_bytes_per_token"] == 2 * 448
    for option, sentence in (
        (("--kv-format", "q8_0"), "does not divide n_embd_head_k"),
        (("--kv-format", "fp8"), "no KV cache in fp8; choose one of f32, f16"),
        (("--dtype", "float16"), "does not convert weights to float16; make another export"),
        (("--tensor-parallel", "2"), "has no tensor parallelism; leave out --tensor-parallel"),
    ):
        check_refused(*command, *option, contains=["llama.cpp", sentence])


def test_a_server_answers_the_curl_line_that_is_printed(exported):
    with served(SERVING_ENGINES["llama.cpp"], exported, 18431) as server:
        command = shlex.split(server.curl.replace("curl -s", "curl -s --noproxy '*'"))
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert answer["usage"]["completion_tokens"] > 0
        with pytest.raises(EngineError, match="Port 18431 is taken"), served(server, exported, 18431):
            pass
    assert server.process.poll() is not None


def test_a_server_keeps_the_cache_as_the_export_says(exported, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    record = read_json(folder / EXPORT_RECORD)
    write_json(folder / EXPORT_RECORD, record | {"kv_format": "bf16"})
    with served(SERVING_ENGINES["llama.cpp"], folder, 18432) as server:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = json.dumps({"model": server.model, "prompt": "1 2 3", "max_tokens": 4}).encode()
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with opener.open(request) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] > 0
        given = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
        assert given[given.index("--type_k") + 1] == given[given.index("--type_v") + 1] == "30"


@pytest.mark.parametrize(("context", "fits"), [(None, 256), (64, 64)])
def test_a_server_takes_requests_as_long_as_the_model_or_as_asked(exported, context, fits):
    with served(SERVING_ENGINES["llama.cpp"], exported, 18433, context) as server:

        def answer(tokens):
            body = {"model": server.model, "prompt": "1 " * tokens, "max_tokens": 1}
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request) as reply:
                return json.load(reply)["usage"]["prompt_tokens"]

        assert fits - 8 <= answer(fits - 8) < fits
        with pytest.raises(urllib.error.HTTPError):
            answer(fits)


def test_a_context_beyond_the_positions(exported, check_refused):
    contains = ["The model has 256 positions; serve it with --context 256 or less."]
    check_refused("serve", exported, "--engine", "llama.cpp", "--context", 512, contains=contains)


def test_a_server_that_ends_is_quoted(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nonsense")
    with (
        pytest.raises(EngineError, match=r"llama\.cpp's server ended with exit code 1: "),
        served(SERVING_ENGINES["llama.cpp"], tmp_path, 18432),
    ):
        pass


def test_a_run_exports_its_child(tiny_run, tmp_path, monkeypatch, capsys, check_refused):
    monkeypatch.setattr(
        sys, "argv", ["puzzle", "export", str(tiny_run), "--to", "transformers", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    assert f"Exported to {tmp_path / 'transformers-float32'}" in capsys.readouterr().out
    exported = load_file(tmp_path / "transformers-float32" / "model.safetensors")
    assert exported.keys() == load_file(tiny_run / "child-gkd" / "model.safetensors").keys()
    check_refused(
        "export",
        tiny_run,
        "--to",
        "gguf",
        "--out",
        tmp_path,
        contains=["its tokenizer changes text before splitting it (Replace)"],
    )
    assert [folder.name for folder in tmp_path.iterdir()] == ["transformers-float32"]


def test_a_recipe_keeps_the_child_servable(tiny_run):
    text = (tiny_run / "recipe.yaml").read_text()
    recipe = parse_recipe(text, ["search.servable_by=[vllm-stock, llama.cpp]"])
    space = ArchitectureSearch.load(recipe, RunFolder(tiny_run)).space
    kinds = {(layer, spec.id) for layer, _, spec in space}
    assert (1, "attention.no_op") in kinds and (0, "attention.no_op") not in kinds
    assert not any(variant.endswith("linear") for _, variant in kinds)
