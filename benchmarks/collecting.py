"""The page of ``lightning-rlhf collect`` as others meet it: its server in a process of its own, and a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[1]


class Served:
    """``lightning-rlhf collect serve`` in a process of its own.

    Args:
        folder: In which it runs, and answers lie.
        **arguments: Of the command, but the port, which stays the same when it is started again.
    """

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.folder = folder
        self.arguments = arguments
        self.port = 0
        self.url = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts, and returns when it answers."""
        words = [f"--{name}={value}" for name, value in {**self.arguments, "port": self.port}.items()]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_rlhf", "collect", "serve", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            found = re.search(r"at (http://.*:(\d+)/)$", line)
            if found:
                self.url, self.port = found[1], int(found[2])
                return
        raise RuntimeError(f"the server ended with {self.process.wait()}: {said}")

    def kill(self) -> None:
        """Ends it as a lack of memory or power does, without a chance to write anything."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@contextmanager
def served(folder: Path, **arguments: Any) -> Iterator[Served]:
    """A server for a while.

    Args:
        folder: In which it runs.
        **arguments: Of the command.

    Yields:
        The server, started.
    """
    server = Served(folder, **arguments)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def missing_browser() -> str | None:
    """What of a browser is not installed; None if all of it is."""
    programs = {"chromium": _chromium(), "chromedriver": shutil.which("chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    return f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver" if missing else None


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def chromium(width: int = 1280, height: int = 860) -> Iterator[Chrome]:
    """A headless Chromium that knows no host but this one, and keeps what its console says.

    Args:
        width: Of its window, in pixels.
        height: Likewise.

    Yields:
        What drives it.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(_chromium())
    for word in (
        "headless=new",
        "no-sandbox",  # which root has none of
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "no-first-run",
        "hide-scrollbars",
        f"window-size={width},{height}",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
