"""A real browser without a window, for what a page does.

`HF_REFLECT_CHROMIUM` names the browser to use; without it, the first Chromium of the system is taken, or Playwright's.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome")

_PATIENCE_MS = 60_000


@contextmanager
def launched() -> Iterator[Any]:
    """A running browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    playwright.expect.set_options(timeout=_PATIENCE_MS)
    with playwright.sync_playwright() as running:
        own = Path(running.chromium.executable_path)
        found = os.environ.get("HF_REFLECT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if found is None and not own.exists():
            pytest.skip("needs a Chromium: set HF_REFLECT_CHROMIUM, or run 'playwright install chromium'")
        browser = running.chromium.launch(executable_path=found or str(own), args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A file in a tab of its own, which reaches nothing else.

    Attributes:
        page: Playwright's page.
        complaints: What the console said, and errors nobody caught.
        requests: Everything that was asked for besides the file.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Any, file: Path, hash: str = "", **options: Any) -> Iterator[Opened]:
    """Opens a file from disk.

    Args:
        browser: From `launched`.
        file: An HTML file.
        hash: What the address ends in.
        options: Of the tab: `viewport`, `color_scheme`, ...
    """
    context = browser.new_context(viewport=options.pop("viewport", {"width": 1500, "height": 900}), **options)
    context.set_default_timeout(_PATIENCE_MS)
    tab = Opened(context.new_page())
    address = file.resolve().as_uri()

    def allow(route: Any) -> None:
        if route.request.url.split("#")[0] == address:
            route.continue_()
        else:
            tab.requests.append(route.request.url)
            route.abort()

    context.route("**/*", allow)
    tab.page.on("console", lambda message: tab.complaints.append(f"{message.type}: {message.text}"))
    tab.page.on("pageerror", lambda error: tab.complaints.append(f"uncaught: {error}"))
    tab.page.goto(address + hash)
    try:
        yield tab
    finally:
        context.close()
