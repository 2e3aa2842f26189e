"""One, two and three processes make the same library and scores; a killed one loses nothing that was finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from puzzle_nas.artifacts import RunFolder, file_checksum
from puzzle_nas.training.checkpoints import read_shards, write_shards
from tests.conftest import puzzle
from tests.faults import COUPLED

SHARED_WORK = ("library/main/*/*", "scores/main/*/*", "library/coupled/*", "library/coupled/*/*", "scores/coupled/*/*")
"""Computed by one process each, in the same way: equal bytes. GKD sums gradients in another order."""
GKD_TOLERANCE = 1e-3
"""Relative difference of GKD's losses and KLs between numbers of processes, float32."""


def checksums(run, patterns=SHARED_WORK):
    return {str(p.relative_to(run)): file_checksum(p) for pattern in patterns for p in run.glob(pattern) if p.is_file()}


@pytest.fixture(scope="module")
def pinned(tiny_run, tiny_settings, tmp_path_factory):
    """A recipe whose cost table is a file, and an undisturbed run of it in one process."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = {**tiny_settings, "costs": {"file": str(tiny_run / "costs/torch.json")}}
    settings["bld"] = settings["bld"] | COUPLED
    recipe = folder / "pinned.yaml"
    recipe.write_text(json.dumps(settings))
    puzzle("run", recipe, "--run-dir", folder / "one", "--to", "distill-child")
    return recipe, folder / "one"


@pytest.mark.parametrize(("count", "memory"), [(2, "all"), (3, "stream")])
def test_the_same_library_scores_and_child(count, memory, pinned, tmp_path):
    recipe, one = pinned
    run = tmp_path / "run"
    command = ["run", recipe, "--run-dir", run, "--to", "distill-child", "--nproc", count, f"memory={memory}"]
    result = puzzle(*command)
    assert result.stdout.count("score-blocks") == 1
    expected = checksums(one)
    assert len(expected) > 20 and checksums(run) == expected
    ours, theirs = (json.loads((folder / "gkd.json").read_text())["curve"] for folder in (run, one))
    assert len(theirs) > 2 and theirs[-1] != theirs[0]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=GKD_TOLERANCE)


def torchrun(count, *program):
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    result = subprocess.run([sys.executable, *ranks, *map(str, program)], timeout=600, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


NOTING = """
import os, sys
from puzzle_nas import pipeline
from puzzle_nas.cli import main
from puzzle_nas.families.streaming import WeightFiles

def noted(function, what):
    def noting(*arguments, **named):
        with open(f"{sys.argv[0]}.{os.environ['RANK']}", "a") as file:
            file.write(what(*arguments))
        return function(*arguments, **named)
    return noting

pipeline.run_stage = noted(pipeline.run_stage, lambda stage, *_: f" {stage.name}:")
layer_of = lambda _, module, prefix: prefix.split(".")[2] if ".layers." in prefix else ""
WeightFiles.fill = noted(WeightFiles.fill, layer_of)
main()
"""
"""Writes which layers a rank reads from disk, stage by stage: ` distill_blocks:01`."""


def test_a_rank_reads_its_own_layers_alone_twice_in_bld(pinned, tmp_path):
    recipe, one = pinned
    script, run = tmp_path / "noting.py", tmp_path / "run"
    script.write_text(NOTING)
    torchrun(2, script, "run", recipe, "--run-dir", run, "--to", "distill-blocks", "memory=stream")
    made = ("library/main/*/*",)
    assert checksums(run, made) == checksums(one, made)
    first, second = (Path(f"{script}.{rank}").read_text().split()[-1] for rank in range(2))
    # The second rank has its first layer's input from the first, which begins again below its own.
    assert (first, second) == ("distill_blocks:0101", "distill_blocks:23")


def start(command, run):
    arguments = [sys.executable, "-m", "puzzle_nas", *command, "--run-dir", run]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_a_rank(process, run, pattern):
    """kill -9 the last of the processes that torchrun started, once `pattern` is there."""
    while not any(run.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    ranks = [child for child in psutil.Process(process.pid).children() if "puzzle_nas" in child.cmdline()]
    os.kill(max(ranks, key=lambda child: child.pid).pid, signal.SIGKILL)


def test_a_killed_process_stops_the_run_with_a_sentence_and_loses_nothing(pinned, tmp_path):
    recipe, one = pinned
    run = tmp_path / "run"
    command = ["run", recipe, "--to", "couple-blocks", "--nproc", 2]
    process = start(map(str, command), run)
    kill_a_rank(process, run, "library/main/layer_00/*.json")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "was killed (SIGKILL" in errors and "goes on from here" in errors and "Traceback" not in errors
    finished = {p: (p.stat().st_mtime_ns, file_checksum(p)) for p in run.glob("library/main/*/*.json")}
    assert finished
    puzzle(*command, "--run-dir", run)
    assert {p: (p.stat().st_mtime_ns, file_checksum(p)) for p in finished} == finished
    assert checksums(run) == checksums(one)


@pytest.mark.parametrize(
    ("memory", "moment"), [("all", "library/main/layer_00/*.json"), ("stream", "scores/main/kl/layer_00*.json")]
)
def test_torchrun_restarts_what_was_killed_and_more_processes_take_over(memory, moment, pinned, tmp_path):
    recipe, one = pinned
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "puzzle_nas", "run", recipe, "--run-dir", run, "--to", "couple-blocks", f"memory={memory}"]
    said = tmp_path / "said.txt"
    with open(said, "w") as output:
        process = subprocess.Popen([*torchrun, "--max-restarts", "1", *command], stdout=output, stderr=output)
    kill_a_rank(process, run, moment)
    assert process.wait(timeout=600) == 0, said.read_text()
    assert checksums(run) == checksums(one)


@pytest.fixture
def start_rank():
    """Starts one of two ranks with a program of its own, as torchrun does; all are gone afterwards."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = []

    def start(number, program):
        environment = {**os.environ, **place, "WORLD_SIZE": "2", "RANK": str(number)}
        program = f"from puzzle_nas.training import parallel; parallel.join(); {program}"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_ranks_that_start_again_do_not_take_addresses_of_dead_ones(start_rank):
    # torchrun's restart, without its luck: the second rank is long there when the first one comes.
    work = "print(parallel.gathered([parallel.rank()]))"
    for pause in (0, 5):
        second = start_rank(1, work)
        time.sleep(pause)
        first = start_rank(0, work)
        assert first.communicate(timeout=300)[0].strip() == "[0, 1]"
        assert second.wait(timeout=300) == 0


def test_no_rank_leaves_while_another_may_need_it(start_rank):
    early = start_rank(0, "print('done', flush=True); parallel.leave()")
    late = start_rank(1, "import sys; sys.stdin.read(); parallel.leave()")
    assert early.stdout.readline() == "done\n"
    with pytest.raises(subprocess.TimeoutExpired):
        early.wait(timeout=3)
    late.stdin.close()
    assert early.wait(timeout=300) == late.wait(timeout=300) == 0


def test_gkd_goes_on_from_its_checkpoint_with_another_number_of_processes(pinned, tmp_path):
    recipe, one = pinned
    run = tmp_path / "run"
    process = start(map(str, ["run", recipe, "--to", "distill-child", "--nproc", 2]), run)
    kill_a_rank(process, run, "scratch/distill_child/state/step_????????")
    process.communicate(timeout=600)
    (saved,) = [p for p in (run / "scratch/distill_child/state").glob("step_*") if p.suffix != ".partial"]
    assert len(list(saved.glob("*.safetensors"))) == 2
    puzzle("run", recipe, "--run-dir", run, "--to", "distill-child")
    ours, theirs = (json.loads((folder / "gkd.json").read_text())["curve"] for folder in (run, one))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=GKD_TOLERANCE)


def test_a_users_mistake_is_one_sentence(pinned, tmp_path):
    recipe, _ = pinned
    result = puzzle("run", recipe, "--run-dir", tmp_path / "run", "--nproc", 2, "bld.token=3", check=False)
    assert result.returncode == 2 and result.stderr.strip().count("\n") == 0 and "bld.token." in result.stderr
    wrong = f"data.sources=[{{source: {tmp_path}/none.txt}}]"
    result = puzzle("run", recipe, "--run-dir", tmp_path / "run", "--nproc", 2, wrong, check=False)
    assert result.returncode == 2 and result.stderr.count("puzzle:") == 1 and "none.txt" in result.stderr


SETTINGS = {
    "micro-batches": ["gkd.micro_batch_tokens=32", "gkd.batch_tokens=160", "gkd.gradient_checkpointing=true"],
    "embeddings": ["gkd.also_train=[embeddings]"],
    "the stored parent": ["gkd.parent_top_k=16", "gkd.losses={kl: 1}"],
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_gkd_in_shards_learns_what_one_process_learns(settings, pinned, tmp_path):
    _, one = pinned
    curves = []
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        shutil.copytree(one, run)
        command = ["distill-child", run, *SETTINGS[settings], "gkd.tokens=2048", "gkd.learning_rate=1e-4"]
        torchrun(count, "-m", "puzzle_nas", *command)
        curves.append(json.loads((run / "gkd.json").read_text())["curve"])
        assert not RunFolder(run).scratch("distill_child").exists()
    alone, shared = curves
    assert alone[-1]["selection_kl_nats"] < alone[0]["selection_kl_nats"]
    for mine, other in zip(shared, alone, strict=True):
        assert mine == pytest.approx(other, rel=GKD_TOLERANCE)


def test_a_run_folder_in_use_is_refused_once(pinned):
    recipe, one = pinned
    with RunFolder(one).locked():
        held = puzzle("run", recipe, "--run-dir", one, "--nproc", 2, check=False)
    assert held.returncode == 2 and held.stderr.count("puzzle:") == 1 and "Another puzzle command" in held.stderr


def test_a_checkpoint_gives_back_its_tensors_and_forgets_older_steps(tmp_path):
    tensors = {"weight/a": torch.arange(6.0).view(2, 3), "step/a": torch.tensor(3.0), "losses": torch.ones(4).double()}
    assert read_shards(tmp_path, {}) is None
    write_shards(tmp_path, {"losses": torch.zeros(1)}, 1)
    write_shards(tmp_path, tensors, 12)
    found = read_shards(tmp_path, {"a": torch.zeros(2, 3)})
    assert found is not None
    loaded, step = found
    assert step == 12 and loaded.keys() == tensors.keys() and len(list(tmp_path.iterdir())) == 1
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    path = next(tmp_path.rglob("*.safetensors"))
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert read_shards(tmp_path, {}) is None and not any(tmp_path.iterdir())
