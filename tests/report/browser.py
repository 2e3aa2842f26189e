"""A headless Chromium for the tests that look at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

INSTALLED = ("chromium", "chromium-browser", "google-chrome")
NO_SANDBOX = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's own Chromium, else playwright's."""
    own = next(filter(None, map(shutil.which, INSTALLED)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=own, args=NO_SANDBOX)
        except Error as error:
            pytest.fail(f"No Chromium here; install one with: make browser. {error}")
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that was opened, and what it did."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Console messages and uncaught errors."""
    requests: list[str] = field(default_factory=list)
    """Addresses that it asked for, its own first."""


def visit(browser: Browser, file: Path, width: int = 1100, **settings) -> Visit:
    """Open a file and wait until its figures are drawn."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **settings).new_page()
    seen = Visit(page)
    page.on("console", lambda message: seen.complaints.append(message.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.resolve().as_uri())
    page.wait_for_selector("html[data-drawn]")
    return seen
