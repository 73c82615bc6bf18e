"""A real browser, without a window, in which tests open pages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.browser import Browser


@pytest.fixture(scope="session")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    found = Browser(program, driver, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture
def browser(_browser: Browser) -> Iterator[Browser]:
    """The browser; a test fails where a page of it logs an error, or asks another host."""
    _browser.forget()
    yield _browser
    assert not _browser.errors()
    _browser.open(Path("/dev/null"))
