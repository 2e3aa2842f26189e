"""The stage's own part: limits hold as measured."""

import shutil

import pytest

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.effort import Effort
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import SearchSettings
from puzzle_nas.stages import search_architecture


@pytest.fixture
def searched(tiny_run, tmp_path, monkeypatch):
    """The result of the tiny run's search, measured speed-ups being so many times what the costs predict."""
    copy = RunFolder(shutil.copytree(tiny_run, tmp_path / "run"))

    def search(measured_over_predicted, speed_attempts=3, **effort):
        monkeypatch.setattr(
            search_architecture,
            "_measured_speedup",
            lambda *arguments: measured_over_predicted * arguments[-1]["speedup_predicted"],
        )
        recipe = open_run(copy).model_copy(update={"search": SearchSettings(limits={"speedup": 1.3})})
        return search_architecture.search_measured(recipe, copy, Effort(**effort), speed_attempts)

    return search


@pytest.mark.parametrize("off", [0.9, 1.1])
def test_the_limit_is_corrected_before_children_are_measured(searched, off):
    result = searched(off, by_sums=3)
    first, last = result["speed_checks"]
    assert first["speedup_predicted"] >= 1.3 and last["speedup_measured"] >= 1.3
    corrected = 1.3 * search_architecture.MARGIN / off
    predicted = [child["speedup_predicted"] for child in result["children_measured"]]
    assert min(predicted) >= corrected * (1 - 1e-6)
    # A table that makes children slower than they are would otherwise cost quality.
    assert off < 1 or min(predicted) < 1.3


def test_the_limit_is_tightened_until_it_is_met_as_measured(searched):
    result = searched(0.9)
    assert [check["speedup_measured"] >= 1.3 for check in result["speed_checks"]] == [False, True]


def test_the_limit_is_loosened_where_the_child_is_faster_than_asked(searched):
    """So much faster that the parent itself is fast enough."""
    result = searched(1.4)
    first, *others = result["speed_checks"]
    assert first["speedup_measured"] > 1.3 * 1.4 * 0.999 and others
    assert result["score_sum"] == 0 and result["speedup_predicted"] == pytest.approx(1)
    trusted = searched(1.0, speed_attempts=0)
    assert trusted["score_sum"] > 0


def test_a_limit_out_of_reach_once_corrected_still_gives_a_child(searched):
    fastest = searched(1.0, speed_attempts=0)
    result = searched(0.2, by_sums=2, speed_attempts=1)
    assert result["speedup_predicted"] >= 1.3 and fastest["speed_checks"] == []


def test_the_next_limit_lies_between_a_child_too_slow_and_one_fast_enough():
    def checks(*pairs):
        return [{"speedup_predicted": predicted, "speedup_measured": measured} for predicted, measured in pairs]

    wanted = 1.3 * search_architecture.MARGIN
    next_limit = search_architecture.next_limit
    assert next_limit(1.3, checks((1.3, 1.2))) == pytest.approx(wanted * 1.3 / 1.2)
    assert next_limit(1.3, checks((1.3, 1.18), (1.44, 1.40))) == pytest.approx(1.3 + 0.14 * (wanted - 1.18) / 0.22)
    # Of several on a side the nearest counts, whichever was last.
    assert next_limit(1.3, checks((1.2, 1.1), (1.44, 1.40), (1.3, 1.18))) == pytest.approx(
        1.3 + 0.14 * (wanted - 1.18) / 0.22
    )
    # The slower one was predicted to be the faster: no line through these says anything.
    assert next_limit(1.3, checks((1.44, 1.2), (1.4, 1.35))) == pytest.approx(wanted * 1.4 / 1.35)
