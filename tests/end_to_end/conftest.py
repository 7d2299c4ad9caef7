"""A headless Chromium for the tests of the pages."""

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.rollout.conftest import copies  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium: set CHROMIUM, put one on PATH, or run tools/install_browser.sh")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file; at the end, check that only files were requested and that no script failed."""
    contexts, requests, errors = [], [], []

    def open_page(path: Path, width: int = 1280, paused: bool = False, **options):
        """Open a page; one that is `paused` gets time only from page.clock.run_for."""
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        if paused:
            page.clock.install(time=time.time() - 3600)  # a slow browser would be past the moment to stop at
            page.clock.pause_at(time.time() + 1)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert all(url.startswith("file://") for url in requests), requests
