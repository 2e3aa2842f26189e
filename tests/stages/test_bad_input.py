"""Every mistake: one clear sentence, exit code 2, nothing half-written with a final name."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

from puzzle_nas import cli
from tests.conftest import glassllm_as_llama, puzzle
from tests.families.parents import config_of, random_parent


def check_refused(*arguments, contains):
    """Check that a command is refused with one sentence, and return it."""
    result = puzzle(*arguments, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for part in contains:
        assert part in lines[0], lines[0]
    return lines[0]


@pytest.fixture
def recipe(tmp_path, tiny_settings):
    """Write a recipe with changes and return its path."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**tiny_settings, **changes}))
        return path

    return write


@pytest.fixture
def copy_of_run(tiny_run, tmp_path):
    """A finished run that a test may damage."""
    shutil.copytree(tiny_run, tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_recipe():
    check_refused("run", "nowhere.yaml", contains=["There is no recipe nowhere.yaml"])


def test_unknown_key(recipe, tmp_path):
    check_refused("run", recipe(gdk={}), "--run-dir", tmp_path / "r", contains=["gdk", "Did you mean gkd?"])
    check_refused("run", recipe(), "search.limit.speedup=2", "--run-dir", tmp_path / "r", contains=["search.limit"])
    assert not (tmp_path / "r").exists()


def test_a_setting_that_is_gone(recipe, tmp_path):
    contains = ["gkd.lora_rank is no longer a setting", "peft"]
    check_refused("run", recipe(gkd={"lora_rank": 4}), "--run-dir", tmp_path / "r", contains=contains)
    check_refused("run", recipe(), "memory=divide", "--run-dir", tmp_path / "r", contains=["set memory: stream"])
    assert not (tmp_path / "r").exists()


def test_value_out_of_range(recipe, tmp_path):
    check_refused("run", recipe(), "gkd.tokens=-5", "--run-dir", tmp_path / "r", contains=["gkd.tokens", "-5"])


def test_a_parent_that_the_engine_does_not_serve(recipe, tmp_path):
    config = config_of("olmo3")
    config.vocab_size = 1024
    random_parent(config).save_pretrained(tmp_path / "olmo")
    glassllm_as_llama()[1].save_pretrained(tmp_path / "olmo")
    arguments = ["run", recipe(parent=str(tmp_path / "olmo")), "engine=llama.cpp", "--run-dir", tmp_path / "r"]
    check_refused(
        *arguments, contains=["llama.cpp does not serve this parent: ", "no layers of olmo3", "engine: torch"]
    )
    assert not (tmp_path / "r/parent.json").exists() and not (tmp_path / "r/data").exists()


def test_missing_checkpoint(recipe, tmp_path):
    check_refused(
        "run", recipe(parent="./no/such/model"), "--run-dir", tmp_path / "r", contains=[f"{tmp_path}/no/such/model"]
    )
    (tmp_path / "empty").mkdir()
    empty = recipe(parent=str(tmp_path / "empty"))
    check_refused("run", empty, "--run-dir", tmp_path / "r2", contains=["config.json"])


def test_truncated_checkpoint(recipe, tmp_path, tiny_parent):
    shutil.copytree(tiny_parent, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200_000])
    cut = recipe(parent=str(tmp_path / "cut"))
    check_refused("run", cut, "--run-dir", tmp_path / "r", contains=["incomplete or damaged"])
    assert not (tmp_path / "r/parent.json").exists()


def test_unknown_family(recipe, tmp_path):
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/config.json").write_text(json.dumps({"model_type": "opt"}))
    opt = recipe(parent=str(tmp_path / "opt"))
    check_refused("run", opt, "--run-dir", tmp_path / "r", contains=["'opt'", "llama, mistral, qwen2, qwen3"])


def test_tokenizer_of_another_model(recipe, tmp_path, tiny_parent):
    shutil.copytree(tiny_parent, tmp_path / "mixed")
    path = tmp_path / "mixed/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<new{i}>": len(vocab) + i for i in range(9)}
    path.write_text(json.dumps(tokenizer))
    mixed = recipe(parent=str(tmp_path / "mixed"))
    check_refused("run", mixed, "--run-dir", tmp_path / "r", contains=["1033", "1024", "belongs to another model"])


def test_empty_and_tiny_data(recipe, tmp_path, tiny_settings):
    for name, text in (("empty.txt", ""), ("tiny.txt", "A few words.")):
        (tmp_path / name).write_text(text)
        data = {**tiny_settings["data"], "sources": [{"source": str(tmp_path / name)}]}
        check_refused("run", recipe(data=data), "--run-dir", tmp_path / name.removesuffix(".txt"), contains=[name])


def test_kv_heads_that_do_not_divide(recipe, tmp_path):
    bad = recipe(search_space={"kv_heads": [3]})
    check_refused("run", bad, "--run-dir", tmp_path / "r", contains=["kv_heads", "3 does not divide", "1, 2"])


def test_impossible_limits(tiny_run):
    sentence = check_refused("search", tiny_run, "--limit", "speedup=1000", contains=["speedup=1000 can reach"])
    assert "Loosen a limit" in sentence
    both = check_refused(
        "search", tiny_run, "--limit", "speedup=1000", "--limit", "parameters=10", contains=["parameters=10 can reach"]
    )
    assert "speedup=1000 can reach" in both
    assert not list((tiny_run / "search").glob("speedup=1000*"))
    check_refused("search", tiny_run, "--limit", "sped=2", contains=["'sped' is not a limit", "speedup"])


def test_impossible_limits_are_found_before_the_long_stages(recipe, tmp_path):
    impossible = recipe(search={"limits": {"speedup": 500}})
    check_refused("run", impossible, "--run-dir", tmp_path / "r", contains=["speedup=500 can reach"])
    assert not (tmp_path / "r/library").exists()


def test_run_folder_of_another_recipe(recipe, copy_of_run, tiny_settings):
    data = {**tiny_settings["data"], "sequence_length": 16}
    check_refused("run", recipe(data=data), "--run-dir", copy_of_run, contains=["belongs to another recipe", "data"])


def test_no_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for command in ("show", "compare", "score-blocks"):
        for folder, message in (("a", "There is no folder "), ("b", "b is not a run folder: it has no recipe.yaml")):
            monkeypatch.setattr(sys, "argv", ["puzzle", command, folder])
            with pytest.raises(SystemExit, match="2"):
                cli.main()
            assert message in capsys.readouterr().err


def test_an_unfinished_run(recipe, tmp_path, tiny_run):
    run = tmp_path / "a run"
    puzzle("run", recipe(), "--run-dir", run, "--to", "prepare-data")
    for command in (("show",), ("compare", tiny_run)):
        contains = ["is not finished: prepare-parent, prepare-data done, next is measure-costs", f"--run-dir '{run}'"]
        check_refused(*command, run, contains=contains)


@pytest.mark.parametrize(
    ("setting", "why"),
    [("patience: 3", "does not know the key patience"), ("evaluation: {timing_repeats: 7}", "is no longer a setting")],
)
def test_a_run_folder_of_another_version(setting, why, copy_of_run):
    path = copy_of_run / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", f"seed: 0\n{setting}"))
    contains = [f"{path} was written by another version (puzzle-nas ", why, "--run-dir"]
    for command in ("score-blocks", "evaluate", "verify"):
        check_refused(command, copy_of_run, contains=contains)


def test_a_corrected_mistake_goes_on(recipe, tmp_path, tiny_parent, tiny_settings):
    run = ("--run-dir", tmp_path / "r")
    check_refused("run", recipe(parent=str(tmp_path / "nowhere")), *run, contains=["There is no checkpoint"])
    wrong = {**tiny_settings["data"], "sources": [{"source": str(tmp_path / "no.txt")}]}
    check_refused("run", recipe(data=wrong), *run, contains=["There is no file"])
    puzzle("run", recipe(), *run, "--to", "prepare-data")
    check_refused("run", recipe(data=wrong), *run, contains=["belongs to another recipe: its data differs"])


def test_a_lora_adapter_is_not_a_parent(recipe, tmp_path, tiny_parent):
    adapter, both = tmp_path / "adapter", tmp_path / "both"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    contains = ["holds a LoRA adapter (adapter_config.json), not a model", "merge_and_unload"]
    check_refused("run", recipe(parent=str(adapter)), "--run-dir", tmp_path / "r", contains=contains)
    shutil.copytree(tiny_parent, both)
    (both / "adapter_config.json").write_text("{}")
    contains = ["holds a whole model and a LoRA adapter (adapter_config.json)", "merge_and_unload"]
    check_refused("run", recipe(parent=str(both)), "--run-dir", tmp_path / "r", contains=contains)


def test_a_summary_of_an_older_version(copy_of_run):
    path = copy_of_run / "summary.json"
    summary = json.loads(path.read_text())
    del summary["child"]["speedup_measured_standard_error"]
    path.write_text(json.dumps(summary))
    check_refused(
        "show", copy_of_run, contains=["no speedup_measured_standard_error", "puzzle write-report", "--again"]
    )


def test_a_stage_whose_input_is_missing(recipe, tmp_path):
    puzzle("run", recipe(), "--run-dir", tmp_path / "r", "--to", "prepare-data")
    check_refused("score-blocks", tmp_path / "r", contains=["no finished distill-blocks", "puzzle distill-blocks"])


def test_corrupted_artifact(copy_of_run, tiny_run):
    target = copy_of_run / "library/main/layer_01/ffn.w96.safetensors"
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    check_refused("distill-blocks", copy_of_run, contains=["ffn.w96.safetensors is corrupted", "--again"])
    puzzle("distill-blocks", copy_of_run, "--again")
    assert target.read_bytes() == (tiny_run / "library/main/layer_01/ffn.w96.safetensors").read_bytes()


def test_full_disk(recipe, tmp_path):
    """A limit on file sizes stands in for a full disk: every larger write fails, whatever library writes it."""

    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    command = [sys.executable, "-m", "puzzle_nas.cli", "run", recipe(), "--run-dir", tmp_path / "r"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_large_files)
    assert result.returncode == 2, result.stderr
    assert "The disk is full" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "r").rglob("*.partial"))
    done = puzzle("run", recipe(), "--run-dir", tmp_path / "r", "--to", "build-library").stdout
    assert "already done" in done


def test_command_line_mistakes(tiny_run):
    check_refused("run", "x.yaml", "--form", "search", contains=["--form"])
    check_refused("search", contains=["Name either a run folder"])
    check_refused("search", tiny_run, contains=["Name a limit", f"puzzle search-architecture {tiny_run}"])
    check_refused("search", tiny_run, "--limit", "speedup", contains=["NAME=NUMBER"])
    check_refused("generate", tiny_run / "nothing", "hello", contains=["no checkpoint"])


def test_cost_table_from_elsewhere(recipe, tmp_path, tiny_run):
    table = json.loads((tiny_run / "costs/torch.json").read_text())
    table["machine"]["processor"] = "Another Processor"
    file = tmp_path / "elsewhere.json"
    file.write_text(json.dumps(table))
    arguments = ("run", recipe(), f"costs.file={file}", "--run-dir", tmp_path / "r", "--to", "measure_costs")
    check_refused(*arguments, contains=["Another Processor", "costs.force=true"])
    assert not (tmp_path / "r/costs/torch.json").exists()
    puzzle(*arguments, "costs.force=true")
    assert (tmp_path / "r/costs/torch.json").exists()
