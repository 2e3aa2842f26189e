"""A hub that does not answer costs seconds, not half a minute."""

import time

import pytest
from huggingface_hub import constants

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import find_checkpoint, open_parent


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_an_unreachable_hub_is_said_at_once(unreachable, tmp_path, capsys):
    begin = time.monotonic()
    with pytest.raises(
        CheckpointError, match="owner/nothing can be loaded neither from this disk nor from the model hub"
    ):
        open_parent(find_checkpoint("owner/nothing", tmp_path))
    assert time.monotonic() - begin < 10
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().out
