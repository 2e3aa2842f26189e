"""BLD, scoring and GKD as the first version of this code did them, in a process of its own that does a step when told.

benchmarks/throughput.py starts it with the first version's `puzzle_nas` on its path.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMIT = "48aeff0"
"""The first one that did all three."""


class FirstVersion:
    """That process, as seen from the present code's.

    Args:
        asked: what `serve` takes.
    """

    def __init__(self, **asked: Any):
        self.code = tempfile.TemporaryDirectory()
        archive = subprocess.run(["git", "archive", COMMIT, "puzzle_nas"], capture_output=True)
        if archive.returncode:
            raise SystemExit(f"Commit {COMMIT} is not in this clone: there is no first version to compare with.")
        subprocess.run(["tar", "-x", "-C", self.code.name], input=archive.stdout, check=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asked)],
            env={**os.environ, "PYTHONPATH": self.code.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.does("nothing")  # Until it has loaded everything, it would disturb what is measured here.

    def does(self, *work: Any) -> Any:
        """What it answers, when it is done."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise SystemExit(f"The first version stopped at {work}.")
        return json.loads(answer)

    def end(self) -> None:
        """Let it go."""
        self.process.communicate()
        self.code.cleanup()


def serve(run: str, layer: int, threads: int, train: int, scoring: int, gkd: int, settings: dict[str, dict]) -> None:
    """Answer each line, a JSON list of what to do, until there are no more.

    Args:
        run: a finished run folder.
        layer: whose variants are trained and scored.
        train, scoring, gkd: sequences of each.
        settings: the recipe's `bld` and `gkd`.
    """
    import safetensors.torch
    import torch

    from puzzle_nas.architecture import spec_from_dict
    from puzzle_nas.families.loading import Machine, load_model
    from puzzle_nas.recipe import BLDSettings, GKDSettings
    from puzzle_nas.stages.distill_blocks import BlockTask, Trainee  # pyright: ignore[reportAttributeAccessIssue]
    from puzzle_nas.stages.distill_child import gkd_loss
    from puzzle_nas.subblocks import subblock_layer
    from puzzle_nas.training.activations import LayerActivations
    from puzzle_nas.training.optimiser import Optimiser
    from puzzle_nas.training.replacement import ReplacementWalk

    def known(kind: Any, values: dict) -> Any:
        return kind(**{key: value for key, value in values.items() if key in kind.model_fields})

    def tokens(split: str, sequences: int) -> torch.Tensor:
        return safetensors.torch.load_file(folder / f"data/{split}.safetensors")["tokens"].long()[:sequences]

    folder, machine = Path(run), Machine(torch.device("cpu"), torch.bfloat16)
    torch.set_num_threads(threads)
    parent = load_model(folder / "parent", machine)
    here: Any = parent.model.layers[layer]
    variants, weights_of = {}, {}
    for path in sorted((folder / f"library/initial/layer_{layer:02d}").glob("*.json")):
        spec = spec_from_dict(json.loads(path.read_text())["spec"])
        weights_of[spec] = safetensors.torch.load_file(path.with_suffix(".safetensors"))
        variants[spec] = subblock_layer(parent.config, here.layer_type, spec, weights_of[spec])

    walk: Any = ReplacementWalk(parent, tokens("scoring", scoring), 2048)
    for _ in range(layer):
        walk.advance()
    with tempfile.TemporaryDirectory() as scratch:
        activations: Any = LayerActivations(parent, tokens("train", train), Path(scratch))
        for number in range(layer):
            activations.compute(number)
            activations.advance()
        activations.compute(layer)
    task: Any = BlockTask(activations, here, "token", True)

    class Wanted:
        bld, gkd = known(BLDSettings, settings["bld"]), known(GKDSettings, settings["gkd"])

    def trainees(steps: int) -> list:
        return [
            Trainee(spec, subblock_layer(parent.config, here.layer_type, spec, fresh(weights)), Wanted, steps)
            for spec, weights in weights_of.items()
            if weights
        ]

    def fresh(weights: dict) -> dict:
        return {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}

    def bld(those: list, sequences: torch.Tensor, step: int = 0) -> None:
        batch = task.fetch(sequences)
        for trainee in those:
            task.loss(trainee, batch).backward()
            trainee.optimiser.step(step)

    child = load_model(folder / "child", machine).float()
    child.model.layers.requires_grad_(True)
    child.train()
    optimiser, gkd_tokens = Optimiser(child.model.layers, Wanted.gkd, 1000), tokens("train", gkd)
    kept: dict[int, tuple] = {}
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        answer: Any = None
        if what == "bld":
            size, steps = arguments
            if size not in kept:
                kept[size] = trainees(1000), itertools.cycle(torch.arange(train).split(size))
            for _ in range(steps):
                bld(kept[size][0], next(kept[size][1]))
        elif what == "train":
            batches, held = (torch.tensor(part) for part in arguments)
            those = trainees(len(batches))
            for step, sequences in enumerate(batches):
                bld(those, sequences, step)
            with torch.no_grad():
                answer = {t.spec.id: task.loss(t, task.fetch(held)).item() for t in those}
        elif what == "scoring":
            walk.try_variants([(spec.slot, variant) for spec, variant in variants.items()])
        elif what == "gkd":
            gkd_loss(parent, child, gkd_tokens, Wanted.gkd).backward()  # pyright: ignore
            optimiser.step(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
