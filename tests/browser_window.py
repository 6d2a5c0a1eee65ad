"""A page in a real browser, for tests: opened at a size and in a theme, driven by keys and pointer.

Needs Chromium and its driver (Debian: chromium, chromium-driver), and selenium.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

INSTALLED = CHROMIUM.exists() and DRIVER.exists()


@contextmanager
def open_window(profile: Path, downloads: Path | None = None) -> Iterator["Window"]:
    """A headless Chromium with a profile of its own; files that it saves go to `downloads`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    if downloads is not None:
        behavior = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    yield Window(driver)
    driver.quit()


class Window:
    """One page opened at a size and in a theme."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(
        self,
        path: Path,
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        fragment: str = "",
    ) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri() + fragment)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        messages = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        urls = [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("file:", "data:"))]

    def overflowing(self) -> list[str]:
        """Elements that stick out of the window sideways, but for those inside a box of their own
        that scrolls."""
        return self.run("""
            const own = (e) => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
            const scrolls = (e) => e && e !== document.body && (own(e) || scrolls(e.parentElement));
            return [...document.querySelectorAll("main *, nav *")].filter((e) => {
              const box = e.getBoundingClientRect();
              return box.width > 1 && (box.right > innerWidth + 1 || box.left < -1)
                && !scrolls(e) && !e.closest("svg, .sr");
            }).map((e) => `${e.tagName}.${e.className}`);
            """)

    def selected(self) -> tuple[int, str]:
        """Place of the selected token in its rollout, and the text of the panel."""
        place = self.run(
            "return Number(document.querySelector('#b-tokens [aria-selected=true]').dataset.place)"
        )
        return place, self.run("return document.getElementById('b-detail').textContent")

    def text(self, element_id: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent", element_id)

    def click(self, selector: str) -> None:
        """Bring an element into view and click it with the pointer."""
        from selenium.webdriver.common.action_chains import ActionChains

        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        ActionChains(self.driver).move_to_element(element).click().perform()

    def choose(self, selector: str, text: str) -> None:
        """Choose an entry of a select by its text."""
        from selenium.webdriver.support.ui import Select

        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        Select(element).select_by_visible_text(text)

    def write(self, selector: str, text: str) -> None:
        """Write a text in place of what a field holds."""
        from selenium.webdriver.common.keys import Keys

        self.click(selector)
        field = self.driver.find_element("css selector", selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def rows(self, selector: str = "#x-table tbody tr") -> list[list[str]]:
        """The cells of a table's rows."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((row) =>"
            " [...row.children].map((cell) => cell.textContent))",
            selector,
        )

    def wait(self, script: str, seconds: float = 5.0):
        """What a script returns, as soon as that is true."""
        until = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < until, f"still not so after {seconds} s: {script}"
            time.sleep(0.02)
        return found
