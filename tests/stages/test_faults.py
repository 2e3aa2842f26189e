"""Full and read-only disks, damaged artifacts, two processes, and numbers that are not finite, in every stage.

Each: one clear sentence and exit code 2, or the run goes on and says what it left out; then, once the fault is
mended, the bytes of a run that nothing disturbed.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch

from puzzle_nas.architecture import choice_id
from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.pipeline import stage_named
from tests.faults import STAGES, Command, FullDisk, differences, final_bytes, puzzle

FULL = "The disk is full"


def refused(ended, *contains):
    """Check that a command was refused with one sentence that holds these parts, and return it."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    for part in contains:
        assert part in line, line
    return line


def damage(path, how, rng):
    """Cut a file, or flip one bit."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A finished run that a test may damage."""
    shutil.copytree(undisturbed.whole, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def forget_from(run, stage):
    """Leave a run as it is before `stage` starts."""
    for name in STAGES[STAGES.index(stage) :]:
        run.discard(name, stage_named(name).writes)


def on_a_disk(script, *arguments):
    """A command in a mount namespace of its own, after a shell script has mounted something there."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine lets nobody mount a disk for a test")
    command = ["unshare", "-rm", "sh", "-ec", f'{script}\nexec "$@"', "sh", sys.executable, "-m", "puzzle_nas.cli"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_a_disk_that_fills_up_in_every_stage_in_turn(undisturbed, tmp_path):
    run = tmp_path / "run"
    for stage in STAGES:
        refused(puzzle("run", undisturbed.recipe, "--run-dir", run, fault=FullDisk(stage)), FULL, str(run))
        assert not list(run.rglob("*.partial"))
        assert [name for name in STAGES if RunFolder(run).record(name)] == list(STAGES[: STAGES.index(stage)])
    assert undisturbed.finish(run) == []


def test_activations_that_do_not_fit_the_disk_are_refused_before_the_kernel_ends_the_process(copy, undisturbed):
    """They are written through memory: on a full disk that would be SIGBUS, without a word."""
    forget_from(copy, "distill_blocks")
    (copy / "scratch").mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size=1m tmpfs {copy / 'scratch'}"
    refused(on_a_disk(mount, "run", undisturbed.recipe, "--run-dir", copy), FULL, "scratch/distill_blocks")
    assert undisturbed.finish(copy.path) == []


@pytest.mark.parametrize("part", [".", "library", "scratch", "stages"])
def test_a_read_only_folder(part, copy, undisturbed):
    folder = copy / part
    folder.mkdir(exist_ok=True)
    mount = f"mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}"
    refused(on_a_disk(mount, "distill-blocks", copy, "--again"), str(copy), "cannot be written")
    assert undisturbed.finish(copy.path) == []


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_artifacts_are_noticed_named_and_made_anew(stage, copy, undisturbed):
    rng = random.Random(stage)
    for how in ("truncated", "flipped"):
        name = rng.choice(sorted(copy.record(stage)["outputs"]))
        damage(copy / name, how, rng)
        line = refused(puzzle("run", undisturbed.recipe, "--run-dir", copy), f"{copy / name} is corrupted")
        found = json.loads(puzzle("verify", copy, "--json").stdout)
        assert [c["changed"] for c in found["stages"].values() if c["changed"]] == [[name]]
        way_out = re.search(r"puzzle (\S+) (\S+) --again$", line)
        assert way_out, line
        puzzle(*way_out.groups(), "--again", check=True)
        assert undisturbed.finish(copy.path) == []
        assert puzzle("verify", copy).returncode == 0


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_records_are_noticed(stage, copy, undisturbed):
    """A record that cannot be read is refused; one that says something else is not believed."""
    rng = random.Random(stage)
    for how in ("truncated", "flipped"):
        path = copy.record_path(stage)
        damage(path, how, rng)
        assert puzzle("verify", copy).returncode == 2
        ended = puzzle("run", undisturbed.recipe, "--run-dir", copy)
        if ended.returncode:
            line = refused(ended)
            way_out = re.search(r"puzzle (\S+) (\S+) --again$", line)
            if way_out:
                puzzle(*way_out.groups(), "--again", check=True)
            else:
                assert f"{path} is corrupted. Delete it" in line
                path.unlink()
        assert undisturbed.finish(copy.path) == []


def test_a_stage_that_is_run_alone_checks_what_it_reads(copy):
    damage(copy / "child/model.safetensors", "flipped", random.Random(0))
    line = refused(
        puzzle("evaluate-child", copy, "--again"), "child/model.safetensors is corrupted", "puzzle assemble-child"
    )
    assert "--again" in line
    assert (copy / "evaluation.json").exists(), "nothing may be discarded for a command that is refused"


def test_another_parent_in_the_same_place_is_noticed(undisturbed, tiny_settings, tmp_path):
    shutil.copytree(tiny_settings["parent"], tmp_path / "parent")
    settings = {**json.loads(undisturbed.recipe.read_text()), "parent": str(tmp_path / "parent")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    command = ("run", recipe, "--run-dir", tmp_path / "run", "--to", "prepare-data")
    puzzle(*command, check=True)
    assert puzzle(*command, check=True).stdout.count("already done") == 2
    weights = tmp_path / "parent/model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    assert "prepare-parent  stale" in puzzle("verify", tmp_path / "run").stdout
    assert "already done" not in puzzle(*command, check=True).stdout
    assert puzzle("verify", tmp_path / "run").returncode == 0


def test_two_processes_on_one_run_folder(undisturbed, tmp_path):
    run = tmp_path / "run"
    first = Command("run", undisturbed.recipe, "--run-dir", run)
    assert first.wait_for("build_library")
    for command in (("run", undisturbed.recipe, "--run-dir", run), ("prepare-data", run, "--again")):
        refused(puzzle(*command), f"Another puzzle command (process {first.pid}) works on {run}", "--run-dir")
    assert first.end().returncode == 0
    assert differences(final_bytes(run), undisturbed.bytes) == []


def test_verify_says_what_is_fine_missing_changed_stale_and_unrecorded(copy, undisturbed):
    fine = puzzle("verify", copy, check=True).stdout
    assert len(re.findall(r"^\S+ +fine +[1-9]\d* files fine$", fine, re.MULTILINE)) == len(STAGES)
    assert "Everything that is recorded is there and unchanged." in fine and "unrecorded" not in fine
    (copy / "library/main/layer_00/ffn.w96.json").unlink()
    damage(copy / "data/train.safetensors", "flipped", random.Random(1))
    (copy / "notes.txt").write_text("mine")
    recipe = copy.recipe.read_text()
    copy.recipe.write_text(recipe.replace("refit: true", "refit: false"))
    before = {p: p.stat().st_mtime_ns for p in copy.path.rglob("*")}
    ended = puzzle("verify", copy)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert re.search(
        r"^distill-blocks +damaged +55 files fine\n  missing: library/main/layer_00/ffn.w96.json$", ended.stdout, re.M
    )
    assert re.search(r"^prepare-data +damaged .*\n  changed: data/train.safetensors$", ended.stdout, re.M)
    assert [line.split()[0] for line in ended.stdout.splitlines() if " stale " in f"{line} "[:27]] == [
        *("search-architecture", "assemble-child", "refit-child", "distill-child", "evaluate-child", "write-report")
    ]
    assert "unrecorded: notes.txt" in ended.stdout and f"puzzle prepare-data {copy} --again" in ended.stdout
    found = json.loads(puzzle("verify", copy, "--json").stdout)
    assert found["sound"] is False and found["unrecorded"] == ["notes.txt"]
    assert {name: c["state"] for name, c in found["stages"].items() if c["state"] != "fine"} == {
        "prepare_data": "damaged",
        "distill_blocks": "damaged",
        **dict.fromkeys(("search_architecture", "assemble_child", "refit_child"), "stale"),
        **dict.fromkeys(("distill_child", "evaluate_child", "write_report"), "stale"),
    }
    assert {p: p.stat().st_mtime_ns for p in copy.path.rglob("*")} == before


def test_verify_of_an_unfinished_run_finds_no_fault(copy):
    forget_from(copy, "score_blocks")
    (copy / "scores/main/kl").mkdir(parents=True, exist_ok=True)
    (copy / "scores/main/kl/layer_00.ffn.w96.json").write_text("{}")
    out = puzzle("verify", copy, check=True).stdout
    assert re.search(r"^score-blocks +unfinished$", out, re.M)
    assert "unrecorded: scores/main/kl/layer_00.ffn.w96.json" in out
    refused(puzzle("verify", copy / "library"), "is not a run folder")


@dataclass
class SpoiledVariants:
    """BLD writes these variants, by (layer, id), with every weight of one value."""

    values: dict

    def __call__(self, stage):
        from puzzle_nas.training import block_distillation

        write = block_distillation.write_variant

        def spoil(path, specs, weights, facts):
            value = self.values.get((int(path.parent.name.removeprefix("layer_")), choice_id(specs)))
            if value is not None:
                weights = {name: torch.full_like(w, value) for name, w in weights.items()}
            write(path, specs, weights, facts)

        block_distillation.write_variant = spoil


def chosen(run):
    """(layer, variant id) of everything the search chose, baselines included."""
    from puzzle_nas.architecture import Architecture

    found = read_json(run.architecture())
    children = [found, *found["baselines"].values()]
    return {
        (layer, spec.id)
        for child in children
        if "architecture" in child
        for layer, _, spec in Architecture.from_list(child["architecture"])
    }


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (float("nan"), "its score is not a finite number"),
        (3e38, "its score is not a finite number"),
        (0.0, "it has weights and adds nothing"),
    ],
)
def test_variants_without_a_score_and_dead_ones_are_named_and_never_chosen(value, named, copy, undisturbed):
    initial = {p.name.removesuffix(".safetensors") for p in copy.path.glob("library/initial/layer_00/*.safetensors")}
    weighty = {name for name in initial if read_json(copy / f"library/initial/layer_00/{name}.json")["parameters"] > 0}
    spoilt = sorted(choice for choice in chosen(copy) if choice[1] in weighty)
    assert spoilt
    puzzle("distill-blocks", copy, "--again", fault=SpoiledVariants(dict.fromkeys(spoilt, value)), check=True)
    out = puzzle("run", undisturbed.recipe, "--run-dir", copy, check=True).stdout
    for layer, name in spoilt:
        assert f"Layer {layer}, {name}: {named}; it is never chosen." in " ".join(out.split())
    assert chosen(copy).isdisjoint(spoilt)
    summary = read_json(copy.summary)
    assert summary["child"]["validation_kl_nats_distilled"] < 5


@dataclass
class OverflowingSequence:
    """The parent's activations of one training sequence overflow from layer 1 on."""

    def __call__(self, stage):
        from puzzle_nas.training.activations import LayerActivations

        compute = LayerActivations.compute

        def overflow(self):
            compute(self)
            if self.layer >= 1:
                self.added["ffn"].tensor[0] = float("inf")

        LayerActivations.compute = overflow


def test_a_batch_that_overflows_in_bld_is_left_out_and_named(copy):
    out = puzzle("distill-blocks", copy, "--again", fault=OverflowingSequence(), check=True).stdout
    sentence = r"Layer (\d), \S+: the loss was not finite in 1 of 16 steps of BLD; they were left out."
    named = re.findall(sentence, " ".join(out.split()))
    more, trained = map(int, re.search(r"So it went with (\d+) more, of (\d+) variants in all", out).groups())
    assert "0" not in named and len(named) + more == trained * 3 // 4
    for path in copy.path.glob("library/main/layer_0[1-3]/*.safetensors"):
        assert all(w.isfinite().all() for w in safetensors.torch.load_file(path).values())
    facts = read_json(copy / "library/main/layer_02/ffn.w96.json")
    assert facts["fell_back"] is False and facts["held_out_loss_end"] < facts["held_out_loss_start"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_parent_that_overflows_is_refused(precision, undisturbed, tiny_settings, tmp_path):
    shutil.copytree(tiny_settings["parent"], tmp_path / "parent")
    weights = tmp_path / "parent/model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] * float("inf")
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    settings = {**json.loads(undisturbed.recipe.read_text()), "parent": str(tmp_path / "parent")}
    settings["costs"]["force"] = True
    recipe.write_text(json.dumps({**settings, "precision": precision}))
    way_out = {"float32": "its weights are damaged", "bfloat16": "set precision=float32"}[precision]
    refused(puzzle("run", recipe, "--run-dir", tmp_path / "run"), f"NaN or infinity in {precision}", way_out)


def test_records_whose_fingerprint_does_not_fit_are_named(copy):
    record = copy.record("score_blocks")
    record["outputs_fingerprint"] = fingerprint("something else")
    write_json(copy.record_path("score_blocks"), record)
    ended = puzzle("verify", copy)
    assert ended.returncode == 2 and f"{copy.record_path('score_blocks')} is corrupted" in ended.stdout
