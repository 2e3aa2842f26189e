"""kill -9 at random moments of whole runs, resumed until they end: are their files those of an undisturbed run?

A journey is one run of the tiny parent (4 layers, cost table pinned) that is killed once in every stage, half of the
times at a moment drawn from the stage's duration and half just before one of its changes of the file system, then
finished and compared, file by file. 60 kills take about two minutes.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.common import report
from tests.conftest import TINY_SETTINGS, glassllm_as_llama
from tests.faults import STAGES, Undisturbed, puzzle


def undisturbed_run(folder: Path) -> Undisturbed:
    """The tiny parent, a cost table measured once, and a run that nothing disturbs."""
    model, tokenizer = glassllm_as_llama()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "parent")
    settings = {"parent": str(folder / "parent"), **TINY_SETTINGS}
    recipe = folder / "measured.yaml"
    recipe.write_text(str(settings))
    puzzle("run", recipe, "--run-dir", folder / "measured", "--to", "measure-costs", check=True)
    return Undisturbed.make(folder, settings, folder / "measured/costs/torch.json")


def main(kills: int = 60, seed: int = 0) -> None:
    """Print where the kills struck and what became of them; keep the counts."""
    rng = random.Random(seed)
    struck: Counter[tuple[str, str]] = Counter()
    survived, lost, journeys = 0, [], 0
    with tempfile.TemporaryDirectory() as name:
        undisturbed = undisturbed_run(Path(name))
        while struck.total() < kills:
            run = Path(name) / f"run-{journeys}"
            survivors = 0
            for stage in STAGES:
                kill = undisturbed.draw(rng, stage)
                where = undisturbed.disturb(run, kill)
                if where is None:
                    break
                struck[where, kill.how] += 1
                survivors += 1
            differing = undisturbed.finish(run)
            lost += differing
            survived += 0 if differing else survivors
            journeys += 1
            print(
                f"journey {journeys}: {survivors} kills, {len(differing)} files differ {' '.join(differing)}",
                flush=True,
            )
    print(f"{'struck in':20}{'at a time':>10}{'before a write':>16}")
    for stage in STAGES:
        print(f"{stage:20}{struck[stage, 'time']:10d}{struck[stage, 'write']:16d}")
    figures = {
        "faults_injected": struck.total(),
        "faults_survived": survived,
        "artifacts_lost": len(lost),
        "artifacts_compared_per_run": len(undisturbed.bytes),
        "runs": journeys,
        "kills_at_a_time": sum(n for (_, how), n in struck.items() if how == "time"),
        "kills_before_a_write": sum(n for (_, how), n in struck.items() if how == "write"),
        **{f"kills_in_{stage}": struck[stage, "time"] + struck[stage, "write"] for stage in STAGES},
    }
    report("faults", figures)
