"""The model hub, where it does not answer."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

from puzzle_nas.progress import console

PATIENCE_SECONDS = 5


def go_offline_if_unreachable() -> None:
    """Leave the hub alone from here on where it does not answer: its client would try for half a minute.

    What has been fetched before is found all the same.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE_SECONDS)
    except urllib.error.HTTPError:
        # An answer, if not a kind one.
        return
    except OSError:
        constants.HF_HUB_OFFLINE = True
        # For libraries that are imported later.
        os.environ["HF_HUB_OFFLINE"] = "1"
        console.print(
            f"  {constants.ENDPOINT} does not answer; only what was fetched before can be used.", markup=False
        )
