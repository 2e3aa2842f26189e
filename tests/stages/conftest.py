"""A run that nothing disturbs, for all tests that disturb one."""

import pytest

from tests.faults import Undisturbed


@pytest.fixture(scope="session")
def undisturbed(tiny_run, tiny_settings, tmp_path_factory):
    """The tiny recipe with its cost table pinned, and a whole run of it. Tests must not change it."""
    return Undisturbed.make(tmp_path_factory.mktemp("undisturbed"), tiny_settings, tiny_run / "costs/torch.json")
