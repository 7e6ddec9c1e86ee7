"""Pictures of the page of ``lightning-rlhf collect`` in a real browser, as the documentation shows them.

Run it with::

    python -m benchmarks.collect_page

writes them to ``docs/figures``. Chromium and its driver have to be installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.collecting import chromium, missing_browser, served
from lightning_rlhf.collect.answers import Answer
from lightning_rlhf.collect.store import Store
from lightning_rlhf.collect.tasks import read_tasks

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
INSTRUCTIONS = (
    "Prefer what is correct and helps the person who asks. Of two equally good responses take the shorter one."
)
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "My sourdough does not rise. What do I do wrong?"},
            {"role": "assistant", "content": "How old is your starter, and how warm is your kitchen?"},
            {"role": "user", "content": "Two weeks, fed once a day. About 18 °C."},
        ],
        "responses": [
            "At 18 °C a young starter is slow rather than dead.\n\n"
            "1. Put it somewhere at 24 to 26 °C, such as an oven with only its light on.\n"
            "2. Feed it twice a day, 1 : 1 : 1 by weight.\n"
            "3. Bake when it doubles within six hours.\n\n"
            "Until then let the dough itself rise longer, ten hours or more.",
            "Your starter is dead. Throw it away and buy yeast <b>today</b>.",
        ],
    },
    {
        "prompt": "Write a haiku about the sea.\n",
        "responses": [
            "Salt wind, a gull's cry\nthe tide writes its name again\nand takes it back home",
            "The sea is big and\nit is very blue indeed\nI like the sea. Yes.",
        ],
    },  # fmt: skip
    {"prompt": "Name a prime.", "responses": ["7", "9"]},
]
RANKING = {
    "prompt": "\n\nHuman: Explain to a child why the sky is blue.\n\nAssistant:",
    "responses": [
        "Sunlight is made of all colours. The air bounces the blue part around the most, so blue comes to "
        "your eyes from everywhere.",
        "Rayleigh scattering is proportional to the inverse fourth power of the wavelength.",
        "Because it mirrors the sea.",
    ],
}


def shoot(driver: Chrome, name: str, is_dark: bool = False) -> None:
    """Keeps what is seen.

    Args:
        driver: Of the browser.
        name: Of the picture.
        is_dark: Whether somebody likes it dark.
    """
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    time.sleep(0.5)
    FIGURES.mkdir(exist_ok=True)
    driver.save_screenshot(str(FIGURES / f"collect_{name}.png"))


def annotated(path: Path) -> None:
    """Two people who have answered a good deal, and agree on most of it.

    Args:
        path: Of the database.
    """
    seconds = itertools.accumulate(itertools.cycle([3, 5, 9, 4]))  # which everybody takes
    store = Store(path, answers_per_task=2, clock=lambda: float(next(seconds)))
    rows = [{"prompt": f"Add {n} and {n}.", "responses": [str(2 * n), str(2 * n + 1)]} for n in range(30)]
    store.add(read_tasks([*rows, *PAIRS]).tasks)
    for name in ("Ada", "Grace"):
        store.join(name)
        for number in range(30):
            given = store.next(name)
            assert given is not None
            is_wrong = name == "Grace" and number % 7 == 3
            better = min(given.responses, key=int) if not is_wrong else max(given.responses, key=int)
            ranks = tuple(1 if text == better else 2 for text in given.responses)
            store.answer(name, given.task, given.shown, Answer("preference", ranks))
    store.close()


def enter(driver: Chrome, url: str) -> None:
    """Says who one is.

    Args:
        driver: Of the browser.
        url: Of the page.
    """
    driver.get(url)
    driver.find_element("name", "name").send_keys("Ada")
    driver.find_element("css selector", "button").click()
    time.sleep(1)


def main() -> None:
    """Takes the pictures."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if missing_browser():
        raise SystemExit(missing_browser())
    with tempfile.TemporaryDirectory() as name, chromium(1280, 900) as driver:
        folder = Path(name)
        annotated(folder / "pairs.sqlite")
        with served(folder, database="pairs.sqlite", answers_per_task=2, instructions=INSTRUCTIONS) as server:
            enter(driver, server.url)
            driver.find_element("css selector", "[data-grade='2']").click()
            shoot(driver, "pair")
            driver.find_element("id", "help-button").click()
            shoot(driver, "keys", is_dark=True)
            driver.get(f"{server.url}progress")
            shoot(driver, "progress")
        (folder / "ranking.jsonl").write_text(json.dumps(RANKING) + "\n")
        with served(folder, database="ranking.sqlite", prompts="ranking.jsonl") as server:
            enter(driver, server.url)
            cards = driver.find_elements("css selector", ".card")
            next(card for card in cards if "Sunlight" in card.text).find_element("tag name", "button").click()
            shoot(driver, "ranking", is_dark=True)


if __name__ == "__main__":
    main()
