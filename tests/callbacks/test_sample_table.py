import html.parser

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.callbacks import SampleTable
from lightning_rlhf.callbacks.sample_table import html_table, log_samples, samples
from tests.training import Seen, bare_trainer, fit, module_of, share_of_early_letters


def length(prompts, responses):
    return [float(len(response)) for response in responses]


class Cells(html.parser.HTMLParser):
    """The texts of a table's cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"
        else:
            assert tag in ("table", "tbody", "thead")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_console_shows_the_first_rows_every_so_many_iterations(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    module = module_of(PPOModule, reward=[share_of_early_letters, (length, 0.5)])
    seen = fit(module, iterations=3, callbacks=[SampleTable(every_n_iterations=2, num_rows=2)])
    text = capsys.readouterr().out
    assert [f"Samples of iteration {i}" in text for i in range(3)] == [True, False, True]
    assert all(name in text for name in ("prompt", "response", "total", "share_of_early_letters", "length"))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    first = seen.experiences[0]
    expected = [
        [first.prompts[i], first.responses[i], *(f"{scores[i]:.3f}" for scores in (first.scores.total, *by_name))]
        for by_name in [list(first.scores.by_name.values())]
        for i in range(2)
    ]
    assert lines[:2] == expected
    assert len(lines) == 4


def test_a_single_reward_is_its_own_total():
    module = module_of(PPOModule)
    seen = fit(module, iterations=1)
    columns, rows = samples(seen.experiences[0], 100)
    assert columns == ["prompt", "response", "total"]
    assert len(rows) == 6


def test_a_long_text_is_cut_on_the_console_only(capsys, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("lightning_rlhf.modules.online.OnlineModule.texts", lambda self, tokens, mask: ["x" * 50] * 6)
    fit(
        module_of(PPOModule, reward=length),
        iterations=1,
        callbacks=[SampleTable(max_characters=20)],
        logger=TensorBoardLogger(tmp_path, name="", version=""),
    )
    assert "x" * 20 + " ..." in capsys.readouterr().out
    tags = EventAccumulator(str(tmp_path)).Reload()
    (event,) = tags.Tensors("samples/text_summary")
    assert "x" * 50 in event.tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")
def test_tensorboard_shows_the_text_as_it_was_written(tmp_path):
    """Through TensorBoard's own markdown, which drops what it takes for harmful."""
    from tensorboard import plugin_util
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    columns = ["prompt", "response", "total"]
    rows = [
        ["<b>bold</b> & *starred* | `ticks`", "first\n\n    second\n# third <eos>", 0.25],
        ["[a](http://b)", "_x_ $1$", -1.0],
    ]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_samples(logger, columns, rows, step=7)
    logger.finalize("success")
    (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("samples/text_summary")
    assert event.step == 7
    shown = Cells(plugin_util.markdown_to_safe_html(event.tensor_proto.string_val[0].decode()))
    assert shown.rows == [columns, *([*row[:2], f"{row[2]:g}"] for row in rows)]


def test_any_logger_with_tables_gets_one():
    class Tables:
        def log_table(self, key, columns, data, step):
            self.logged = (key, columns, data, step)

    logger = Tables()
    log_samples(logger, ["prompt"], [["a"]], 3)
    assert logger.logged == ("samples", ["prompt"], [["a"]], 3)


def test_a_logger_of_numbers_gets_nothing(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    log_samples(logger, ["prompt"], [["a"]], 3)
    assert logger.experiment.metrics == []


def test_nothing_is_printed_if_not_asked_for(capsys):
    fit(module_of(PPOModule), iterations=1, callbacks=[SampleTable(console=False)])
    assert "Samples" not in capsys.readouterr().out


def test_chat_messages_are_shown_by_role():
    tokenizer = module_of(PPOModule).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    module = module_of(PPOModule, tokenizer=tokenizer)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    seen = Seen()
    bare_trainer(max_epochs=1, callbacks=[seen]).fit(module, datamodule=PromptDataModule([{"prompt": chat}]))
    _, rows = samples(seen.experiences[0], 1)
    assert rows[0][0] == "system: a\nuser: b"


def test_html_holds_nothing_that_was_not_meant():
    assert Cells(html_table(["a"], [["<script>x</script>"], [1 / 3]])).rows == [
        ["a"],
        ["<script>x</script>"],
        ["0.333333"],
    ]


@pytest.mark.parametrize("name", ["every_n_iterations", "num_rows", "max_characters"])
def test_numbers_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"`{name}=0` must be at least 1"):
        SampleTable(**{name: 0})
