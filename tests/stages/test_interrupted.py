"""kill -9 in the middle of a stage, then the same command again: the same final bytes, cost table pinned."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from puzzle_nas.artifacts import file_checksum
from tests.conftest import puzzle

TIMES = ("seconds", "measured.json", "summary.json", "report.html", "evaluate_child", "write_report")
"""Measured times live in these and are no part of the claim."""

MIDDLE = {
    "BLD": "library/main/layer_01/*.json",
    "BLD, within a layer": "scratch/distill_blocks/layer_*.safetensors",
    "scoring": "scores/main/kl/layer_01.*.json",
    "GKD": "scratch/distill_child/state/step_????????",
}


def final_bytes(folder):
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: file_checksum(p) for name, p in files.items() if not any(part in name for part in TIMES)}


@pytest.fixture(scope="module")
def pinned(tiny_run, tiny_settings, tmp_path_factory):
    """A recipe whose cost table is a file, and the bytes of a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("pinned")
    settings = {**tiny_settings, "costs": {"file": str(tiny_run / "costs/torch.json")}}
    recipe = folder / "pinned.yaml"
    recipe.write_text(json.dumps(settings))
    puzzle("run", recipe, "--run-dir", folder / "whole", "--to", "evaluate")
    return recipe, final_bytes(folder / "whole")


@pytest.mark.parametrize("where", MIDDLE)
def test_a_killed_run_ends_with_the_same_bytes(where, pinned, tmp_path):
    recipe, expected = pinned
    run = tmp_path / "run"
    command = [sys.executable, "-m", "puzzle_nas.cli", "run", recipe, "--run-dir", run, "--to", "evaluate"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(run.glob(MIDDLE[where])):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "evaluation.json").exists()
    out = puzzle("run", recipe, "--run-dir", run, "--to", "evaluate").stdout
    assert "already done" in out
    assert final_bytes(run) == expected


def test_control_c_says_how_to_go_on(pinned, tmp_path):
    recipe, _ = pinned
    command = [sys.executable, "-m", "puzzle_nas.cli", "run", recipe, "--run-dir", tmp_path / "run"]
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
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in errors and "Traceback" not in errors
    assert not list((tmp_path / "run").rglob("*.partial"))
