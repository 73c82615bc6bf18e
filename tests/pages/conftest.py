"""A real browser, without a window, in which tests open pages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_schemas import Run
from dimefm.training.run_folder import read_run
from tests.e2e.test_older_formats import unpack_to
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


@pytest.fixture(scope="session")
def like(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The document of a run that an older release wrote; others are made like it."""
    return read_run(str(unpack_to(tmp_path_factory.mktemp("older")) / "run"))
