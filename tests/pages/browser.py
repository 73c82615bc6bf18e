"""Chromium, driven by Selenium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

_OPTIONS = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-quic",
            "disable-background-networking", "disable-component-update", "disable-sync",
            "window-size=1200,900")  # fmt: skip


class Browser:
    """One window."""

    def __init__(self, program: str, driver: str, folder: Path) -> None:
        options = ChromeOptions()
        options.binary_location = program
        for one in (*_OPTIONS, f"user-data-dir={folder}"):
            options.add_argument(f"--{one}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options=options, service=Service(driver))

    def open(self, page: Path | str) -> None:
        """Open a file, or a URL."""
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)

    def errors(self) -> list[Any]:
        """What pages have logged as errors or warnings since this was last asked."""
        return [one for one in self.driver.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]

    def forget(self) -> None:
        """Forget what was logged."""
        self.driver.get_log("browser")

    def all(self, selector: str) -> list[WebElement]:
        """The elements of a CSS selector that are shown."""
        return [one for one in self.driver.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]

    def texts(self, selector: str) -> list[str]:
        """Their texts."""
        return [one.text for one in self.all(selector)]

    def one(self, selector: str) -> WebElement:
        """The first of them; waits until there is one."""
        found: WebElement = WebDriverWait(self.driver, 10).until(lambda _: self.all(selector))[0]
        return found

    def type(self, selector: str, words: str) -> None:
        """Type into a field, in place of what is in it."""
        field = self.one(selector)
        field.clear()
        field.send_keys(words)

    def press(self, element: WebElement, key: str) -> None:
        """Press a key by its name in selenium.webdriver.Keys, such as ARROW_RIGHT."""
        element.send_keys(getattr(Keys, key))

    def hover(self, element: WebElement) -> None:
        """Move the pointer to the middle of an element."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def widths(self, selector: str) -> list[int]:
        """How wide in pixels the pictures of a selector are by their files; 0 for one that is none."""
        load = """const done = arguments[1], all = [...document.querySelectorAll(arguments[0])];
            all.forEach(one => { one.loading = 'eager'; });
            Promise.allSettled(all.map(one => one.decode())).then(() => done(all.map(one => one.naturalWidth)))"""
        found: list[int] = self.driver.execute_async_script(load, selector)
        return found

    def run(self, script: str, *given: Any) -> Any:
        """The value that JavaScript returns."""
        return self.driver.execute_script(script, *given)

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window as wide as a phone or a desk."""
        self.driver.set_window_size(width, height)

    def close(self) -> None:
        """End the program."""
        self.driver.quit()
