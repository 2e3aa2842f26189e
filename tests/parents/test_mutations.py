"""A seeded part of benchmarks/fuzz.py: damaged files give transformers' own function or one sentence."""

import random
import shutil

import pytest

from tests.parents.mutations import MUTATIONS, bases, outcome


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return bases(tmp_path_factory.mktemp("sound"))


def test_undamaged_checkpoints_compute_what_transformers_computes(sound):
    assert [outcome(folder) for folder in sound] == [("same_function", "")] * len(sound)


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_never_silent(seed, sound, tmp_path):
    rng = random.Random(f"test-{seed}")
    folder = tmp_path / "parent"
    shutil.copytree(rng.choice(sound), folder)
    done = MUTATIONS[seed % len(MUTATIONS)](folder, rng)
    became, why = outcome(folder)
    assert became in ("same_function", "refused_in_one_sentence"), f"{done}: {why}"
