"""What the policy writes, for people to read while it learns."""

from __future__ import annotations

import html
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich import get_console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from lightning_rlhf.batches import Experience
from lightning_rlhf.callbacks.due import DueCallback


class SampleTable(DueCallback):
    """Shows the first prompts and responses of an iteration with their scores.

    They go to the console, above any progress bar, and to every logger that has a place for them, under ``samples``:
    a table in W&B and whatever else has a ``log_table(key, columns, data, step)``, a text in TensorBoard. A logger of
    numbers, such as ``CSVLogger``, gets none; :class:`RolloutWriter` keeps all there is in files.

    Args:
        every_n_iterations: How often.
        num_rows: Of process 0, from its first.
        console: Whether to print.
        max_characters: Of a text on the console; the loggers get all.
    """

    def __init__(
        self, every_n_iterations: int = 10, num_rows: int = 4, console: bool = True, max_characters: int = 400
    ) -> None:
        super().__init__(every_n_iterations)
        check_counts(num_rows, max_characters)
        self.num_rows = num_rows
        self.console = console
        self.max_characters = max_characters

    def on_experience(self, trainer: L.Trainer, module: Any, experience: Experience) -> None:
        """Called once an iteration, when scores are there and before the updates."""
        if not self.is_due(module) or not trainer.is_global_zero:
            return
        columns, rows = samples(experience, self.num_rows)
        if self.console:
            show(f"Samples of iteration {module.iteration}", columns, rows, self.max_characters)
        for logger in trainer.loggers:
            log_samples(logger, columns, rows, module.iteration)


def samples(experience: Experience, number: int) -> tuple[list[str], list[list[Any]]]:
    """The first rows of experience, as a table.

    Args:
        experience: Of this process.
        number: How many, if there are so many.

    Returns:
        The names of the columns, and the rows: prompt, response, the total score, and where it is put together of
        several each of them.
    """
    scores = {"total": experience.scores.total}
    if len(experience.scores.by_name) > 1:
        scores |= experience.scores.by_name
    columns = [values[:number].tolist() for values in scores.values()]
    prompts = [prompt_text(prompt) for prompt in experience.prompts[:number]]
    texts = zip(prompts, experience.responses[:number], *columns, strict=True)
    return ["prompt", "response", *scores], [list(row) for row in texts]


def check_counts(num_rows: int, max_characters: int) -> None:
    """Refuses a table that would be empty.

    Args:
        num_rows: Its rows.
        max_characters: Of a text.
    """
    for name, number in {"num_rows": num_rows, "max_characters": max_characters}.items():
        if number < 1:
            raise ValueError(f"`{name}={number}` must be at least 1.")


def show(title: str, columns: list[str], rows: list[list[Any]], max_characters: int) -> None:
    """Prints a table above any progress bar.

    Args:
        title: Of the table.
        columns: Their names.
        rows: Texts and numbers.
        max_characters: Of a text.
    """

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else f"{value:.3f}"
        return text if len(text) <= max_characters else text[:max_characters] + " ..."

    table = Table(title=title, show_lines=True)
    for column, value in zip(columns, rows[0], strict=True):
        if isinstance(value, str):
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(short(value)) for value in row))
    with tqdm.external_write_mode():
        get_console().print(table)


def prompt_text(prompt: Any) -> str:
    """A prompt as people read it.

    Args:
        prompt: A string, or a list of chat messages.

    Example:
        >>> prompt_text([{"role": "user", "content": "Hello?"}])
        'user: Hello?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def log_samples(logger: Logger, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """Logs a table, in the way that a logger has for it.

    Args:
        logger: Any of Lightning's.
        columns: Their names.
        rows: Texts and numbers.
        step: The x axis.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("samples", html_table(columns, rows), step)
    elif hasattr(logger, "log_table"):
        logger.log_table(key="samples", columns=columns, data=rows, step=step)


def html_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table that shows text as it is, whatever is in it.

    Args:
        columns: Their names.
        rows: Texts and numbers.
    """

    def cells(tag: str, values: list[Any]) -> str:
        texts = [value if isinstance(value, str) else f"{value:.6g}" for value in values]
        escaped = [html.escape(text).replace("\n", "<br>") for text in texts]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in escaped) + "</tr>"

    return "<table>" + cells("th", columns) + "".join(cells("td", row) for row in rows) + "</table>"
