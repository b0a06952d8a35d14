"""A page in headless Chromium, over the pipe of its DevTools: what it looks like, and what it did while it was opened."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
#: Elements that reach past the right edge of the window, unless something around them scrolls or clips.
STICKING_OUT = """
[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || (box.right <= document.documentElement.clientWidth + 1 && box.left >= -1)) return false;
  for (let p = e; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return false;
  return true;
}).map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40))
"""
#: Texts that are wider than the box that clips them.
CUT_OFF = """
[...document.querySelectorAll('body *')].filter(e => getComputedStyle(e).overflowX === 'hidden'
  && e.scrollWidth > e.clientWidth + 1).map(e => e.tagName + ' ' + e.className)
"""


class Opened(NamedTuple):
    """What happened when a page was opened, and how it lies in the window."""

    complaints: list[str]  # of the console: errors, warnings, exceptions
    requests: list[str]  # addresses, but for the page itself and data: URIs
    width: int
    window: int
    sticking_out: list[str]
    cut_off: list[str]
    broken_images: list[str]
    shown: list[str]  # the ids of the images' sources, by the start of their address
    height: int


def find_browser() -> str | None:
    """The path of a Chromium on this machine; the variable ``DTS_HF_CHROMIUM`` goes before the usual names."""
    return os.environ.get("DTS_HF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


#: Of tests that need one.
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_browser() is None,
        reason="no Chromium here: install one (apt-get install chromium) or name it in DTS_HF_CHROMIUM",
    ),
]


class Tab:
    """One tab; ``open`` shows a file in it."""

    def __init__(self, writer: int, reader: int) -> None:
        self.writer, self.reader, self.rest, self.count = writer, reader, b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result; events on the way are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.reader, 1 << 20)
            assert part, "the browser has gone"
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        return dict(json.loads(text))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, page: Path, width: int, dark: bool = False, media: str = "") -> Opened:
        """Open ``page`` in a window ``width`` pixels wide and look at it."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => 0))).then(() => 1)")
        return Opened(
            complaints=list(self._complaints()),
            requests=[address for address in self._requests() if address != page.resolve().as_uri()],
            width=self.evaluate("document.documentElement.scrollWidth"),
            window=self.evaluate("innerWidth"),
            sticking_out=self.evaluate(STICKING_OUT),
            cut_off=self.evaluate(CUT_OFF),
            broken_images=self.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)"),
            shown=self.evaluate("[...document.images].map(i => i.currentSrc)"),
            height=self.evaluate("document.documentElement.scrollHeight"),
        )

    def _complaints(self) -> Iterator[str]:
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                yield str(parameters["exceptionDetails"].get("text"))
            elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
                yield str(parameters["args"])
            elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                yield str(parameters["entry"]["text"])

    def _requests(self) -> Iterator[str]:
        for event in self.events:
            if event.get("method") == "Network.requestWillBeSent":
                address = event["params"]["request"]["url"]
                if not address.startswith("data:"):
                    yield address

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser_tab(browser: str, profile: Path) -> Iterator[Tab]:
    """A tab of a new browser without a window, a profile or a network.

    Args:
        browser: from ``find_browser``.
        profile: an empty folder.
    """
    to_browser, from_browser = os.pipe(), os.pipe()
    # The browser reads from descriptor 3 and writes to 4, wherever our ends of the pipes happen to be
    shell = f'exec "$0" "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    options = [
        "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", shell, browser, *options],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        tab = Tab(to_browser[1], from_browser[0])
        yield tab
        tab.session = None
        tab.call("Browser.close")
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
