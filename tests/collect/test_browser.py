"""The page in a real browser: two annotators, of whom one has no mouse, and a server that is killed between."""

import json
import warnings

import pytest
import torch
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from benchmarks.collecting import chromium, missing_browser, served
from lightning_rlhf import PreferenceDataModule, RewardModule
from lightning_rlhf.cli import main
from tests.networks import tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, sgd

SCRIPT = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
ROWS = [
    {"prompt": "a b", "responses": ["c d", "e f"]},
    {"prompt": [{"role": "user", "content": "a\n  b"}], "responses": ["d", "e\n\nf"]},
    {"prompt": "\n\nHuman: a\n\nAssistant:", "responses": [SCRIPT, "b"]},
    {"prompt": "c", "responses": ["a", "b", "c"]},
    {"prompt": "d", "responses": ["a", "b"]},
]

pytestmark = [
    pytest.mark.slow,  # a browser, and a server that is started twice
    pytest.mark.skipif(
        missing_browser() is not None, reason=f"NO BROWSER, SO THE PAGE IS NOT TESTED: {missing_browser()}"
    ),
]


class Person:
    """Somebody before a browser."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)

    def find(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition):
        return WebDriverWait(self.driver, 20, 0.05).until(lambda _: condition())

    def text(self, selector):
        return " ".join(self.texts(selector))

    def sees(self, selector, text):
        self.until(lambda: text in self.text(selector))

    def press(self, *keys):
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def click(self, selector):
        self.find(selector)[0].click()

    def responses(self):
        return self.texts(".card .content")

    def texts(self, selector):
        """Of all at the same moment: the page may change at any."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector
        )

    def place_of(self, response):
        self.until(lambda: response in self.responses())
        return self.responses().index(response)

    def complaints(self):
        """What the console says since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def people(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = {"database": "x.sqlite", "prompts": "rows.jsonl", "answers_per_task": 2}
    with served(tmp_path, **arguments) as server, chromium() as first, chromium() as second:
        yield server, Person(first, server.url), Person(second, server.url)


@pytest.mark.timeout(600)
def test_two_people_answer_over_a_kill_and_a_reward_model_learns_from_it(people, tmp_path, monkeypatch):
    server, ann, bob = people
    with_mouse(ann)
    with_keys(bob)
    assert ann.complaints() + bob.complaints() == []
    assert (ann.driver.title, bob.driver.title) == ("Which response is better?",) * 2  # no script has run

    server.kill()
    bob.press("=")
    bob.sees("#status", "The server does not answer. Nothing was lost")
    bob.complaints()  # that it could not be reached
    server.start()
    after_the_kill(ann, bob)
    assert ann.complaints() + bob.complaints() == []
    server.kill()

    monkeypatch.chdir(tmp_path)
    main(["collect", "export", "--database", "x.sqlite", "--output", "out.jsonl"])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["task"], row["annotator"]))
    said = [(row["annotator"], row.get("chosen") or row["ranks"], row.get("tie"), row.get("grade")) for row in rows]
    assert said == [
        ("ann", "c d", None, 3),
        ("bob", "e f", None, 1),
        ("ann", "d", True, None),
        ("bob", "e\n\nf", None, None),
        ("ann", [2, 1, 3], None, None),
        ("bob", [1, 2, 2], None, None),
        ("ann", "b", None, None),
        ("bob", "a", True, None),
    ]
    assert rows[3]["comment"] == "it is =1 longer"
    learns(rows)


def with_mouse(ann):
    """Ann clicks: a graded preference, a tie, a skip."""
    ann.find("input[name=name]")[0].send_keys("ann")
    ann.click("button[type=submit]")
    ann.sees("#prompt", "a b")
    ann.click("[data-grade='3']")
    ann.find(".choose")[ann.place_of("c d")].click()
    ann.sees("#prompt", "a\n  b")
    assert ann.text("#prompt .role").lower() == "user"
    assert "e\n\nf" in ann.responses()
    ann.click("#tie")
    ann.until(lambda: SCRIPT in ann.responses())
    ann.sees("#progress", "2 by you")
    ann.click("#skip")
    ann.sees("#prompt", "c")


def with_keys(bob):
    """Bob types: a preference, which he takes back and gives again otherwise, one with a comment, and a skip."""
    bob.until(lambda: bob.driver.switch_to.active_element.tag_name == "input")
    bob.press("bob", Keys.ENTER)
    bob.sees("#prompt", "a b")
    bob.press("?")
    bob.until(lambda: bob.find("#help[open]"))
    bob.press(Keys.ESCAPE)
    bob.until(lambda: not bob.find("#help[open]"))
    bob.press(str(bob.place_of("c d") + 1))
    bob.sees("#prompt", "a\n  b")
    bob.press("u")
    bob.sees("#status", "Undone. You had found")
    bob.press("q", Keys.ARROW_RIGHT if bob.place_of("e f") else Keys.ARROW_LEFT)
    bob.sees("#prompt", "a\n  b")
    bob.press("c", "it is =1 longer", Keys.ENTER)
    bob.press(str(bob.place_of("e\n\nf") + 1))
    bob.until(lambda: SCRIPT in bob.responses())
    bob.press("s")
    bob.sees("#prompt", "c")
    bob.until(lambda: len(bob.responses()) == 3)


def after_the_kill(ann, bob):
    """Both go on where they were, with a ranking each, and nobody has to say again who they are."""
    bob.press(str(bob.place_of("a") + 1), "=", Keys.BACKSPACE)
    bob.press(*(str(bob.place_of(text) + 1) for text in "b"), "=", str(bob.place_of("c") + 1))
    bob.press(Keys.ENTER)
    bob.sees("#prompt", "d")
    bob.press("=")
    bob.until(lambda: bob.find("#nothing:not([hidden])"))
    for text in "ba":
        ann.find(".choose")[ann.place_of(text)].click()
    ann.until(lambda: "Place 3" in ann.text(".choose"))
    ann.click("#submit")
    ann.sees("#prompt", "d")
    ann.find(".choose")[ann.place_of("b")].click()
    ann.until(lambda: ann.find("#nothing:not([hidden])"))
    ann.sees("#progress", "4 of 5 done")
    ann.sees("#progress", "agreement α")
    ann.click("header a")
    ann.sees("table", "bob")


def learns(rows):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    module = RewardModule(tiny_gpt2(), tokenizer=tokenizer, tie_threshold=0.4, optimizer=sgd)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        bare_trainer(max_steps=1).fit(module, datamodule=PreferenceDataModule("out.jsonl", batch_size=len(rows)))
    assert torch.isfinite(torch.cat([p.detach().flatten() for p in module.parameters()])).all()
    assert module.trainer.global_step == 1
    direct = PreferenceDataModule("x.sqlite")
    assert [row.responses for row in direct.rows] == [row.responses for row in PreferenceDataModule("out.jsonl").rows]
