"""kill -9 and Ctrl-C in the middle of a run, then the same command again: the same final bytes, cost table pinned."""

import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from puzzle_nas.artifacts import RunFolder
from tests import faults
from tests.faults import STAGES, Command, JumpingClock, differences, final_bytes, jump_file_times

MIDDLE = {
    "BLD": "library/main/layer_01/*.json",
    "BLD, within a layer": "scratch/distill_blocks/layer_*.safetensors",
    "coupled BLD": "library/coupled/layer_*/*.json",
    "coupled BLD, within a layer": "scratch/couple_blocks/layer_*.safetensors",
    "scoring of pairs": "scores/coupled/kl/*.json",
    "scoring": "scores/main/kl/layer_01.*.json",
    "GKD": "scratch/distill_child/state/step_????????",
}
STOPPED = "Stopped. What is done is kept; the same command goes on from here."


def killed_when(run, recipe, pattern, fault=None):
    """Start a run and kill it as soon as a file that matches is there; returns one such file."""
    command = Command("run", recipe, "--run-dir", run, fault=fault)
    while not (found := sorted(run.glob(pattern))):
        assert command.running, "the run ended before it could be killed"
        time.sleep(0.0005)
    command.signal(signal.SIGKILL)
    assert command.end().returncode == -signal.SIGKILL
    assert not (run / "evaluation.json").exists()
    return found[0]


@pytest.mark.parametrize("where", MIDDLE)
def test_a_killed_run_ends_with_the_same_bytes(where, undisturbed, tmp_path):
    run = tmp_path / "run"
    killed_when(run, undisturbed.recipe, MIDDLE[where])
    out = faults.puzzle("run", undisturbed.recipe, "--run-dir", run, check=True).stdout
    assert "already done" in out
    assert differences(final_bytes(run), undisturbed.bytes) == []


def test_five_kills_at_random_moments(undisturbed, tmp_path):
    """Five of the kills that benchmarks/faults.py draws."""
    rng = random.Random(0)
    aimed_at = sorted(rng.sample(STAGES, 5), key=STAGES.index)
    struck = [undisturbed.disturb(tmp_path / "run", undisturbed.draw(rng, stage)) for stage in aimed_at]
    assert len([stage for stage in struck if stage]) == 5, struck
    assert undisturbed.finish(tmp_path / "run") == []


def test_a_kill_between_a_record_and_the_removal_of_scratch_repeats_nothing(undisturbed, tmp_path):
    run = RunFolder(tmp_path / "run")
    killed_when(run.path, undisturbed.recipe, "stages/distill_child.json")
    record = run.record_path("distill_child").stat()
    run.scratch("distill_child").mkdir(parents=True, exist_ok=True)
    (run.scratch("distill_child") / "best.safetensors").write_bytes(b"left behind")
    assert undisturbed.finish(run.path) == []
    assert run.record_path("distill_child").stat().st_mtime_ns == record.st_mtime_ns


@pytest.mark.parametrize("where", ["BLD, within a layer", "GKD"])
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_training_checkpoint_is_noticed_and_done_without(where, how, undisturbed, tmp_path):
    run = tmp_path / "run"
    checkpoint = killed_when(run, undisturbed.recipe, MIDDLE[where])
    # GKD's is a folder.
    file = next(checkpoint.glob("*.safetensors"), checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    out = faults.puzzle("run", undisturbed.recipe, "--run-dir", run, check=True).stdout
    assert f"{checkpoint} is damaged" in " ".join(out.split())
    assert differences(final_bytes(run), undisturbed.bytes) == []


def test_nothing_depends_on_the_order_of_wall_clock_times(undisturbed, tmp_path):
    run = tmp_path / "run"
    for seed, moment in enumerate((MIDDLE["BLD"], MIDDLE["GKD"])):
        killed_when(run, undisturbed.recipe, moment, JumpingClock(seed))
        jump_file_times(run, seed)
    faults.puzzle("run", undisturbed.recipe, "--run-dir", run, fault=JumpingClock(2), check=True)
    assert differences(final_bytes(run), undisturbed.bytes) == []


def test_control_c_says_how_to_go_on(undisturbed, tmp_path):
    command = [sys.executable, "-m", "puzzle_nas.cli", "run", undisturbed.recipe, "--run-dir", tmp_path / "run"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored; Python then never hears of Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "run/data/data.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "goes on from here" in errors and "Traceback" not in errors
    assert not list((tmp_path / "run").rglob("*.partial"))


@dataclass
class InterruptedWhereNothingIsRaised:
    """Ctrl-C within a destructor, where Python drops exceptions."""

    stage: str

    def __call__(self, stage):
        if stage == self.stage:
            self.Dying()

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)


def test_control_c_that_python_drops_is_raised_again(undisturbed, tmp_path):
    run = tmp_path / "run"
    fault = InterruptedWhereNothingIsRaised("distill_blocks")
    ended = faults.puzzle("run", undisturbed.recipe, "--run-dir", run, fault=fault)
    assert ended.returncode == 130 and ended.stderr.strip() == STOPPED
    assert undisturbed.finish(run) == []


@dataclass
class NeverCleaningUp:
    """What follows the first Ctrl-C in a stage never ends."""

    stage: str

    def __call__(self, stage):
        if stage == self.stage:
            RunFolder.add_seconds = lambda *_: threading.Event().wait()


@pytest.mark.parametrize("stage", ["prepare_data", "distill_blocks", "assemble_child", "distill_child"])
def test_control_c_twice_stops_at_once(stage, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = Command("run", undisturbed.recipe, "--run-dir", run, fault=NeverCleaningUp(stage))
    assert command.wait_for(stage)
    time.sleep(0.02)
    command.signal(signal.SIGINT)
    time.sleep(0.1)
    assert command.running
    command.signal(signal.SIGINT)
    ended = command.end()
    assert ended.returncode == 130 and ended.stderr.strip() == STOPPED
    assert undisturbed.finish(run) == []
