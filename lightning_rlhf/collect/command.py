"""From the words after ``lightning-rlhf collect`` to what is done."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from lightning_rlhf.collect.commands import Add, Command, Export, LetJudge, Serve, Show

COLLECT = "collect"
ABOUT = "Collect preferences, from people on a web page or from models."
COMMANDS: dict[str, type[Command]] = {
    "add": Add,
    "serve": Serve,
    "judge": LetJudge,
    "export": Export,
    "progress": Show,
}
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def collect_parser(parser_class: type[ArgumentParser] = ArgumentParser) -> ArgumentParser:
    """Reads the command line.

    Args:
        parser_class: That says what is wrong with it.

    Returns:
        The parser.
    """
    parser = parser_class(prog=f"lightning-rlhf {COLLECT}", description=ABOUT)
    commands = parser.add_subcommands()
    for name, cls in COMMANDS.items():
        about = (inspect.getdoc(cls) or "").partition("\n")[0]
        one = parser_class(description=about)
        one.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML file of these arguments.")
        one.add_class_arguments(cls)
        commands.add_subcommand(name, one, help=about)
    return parser


def collect(args: Sequence[str], parser_class: type[ArgumentParser] = ArgumentParser) -> None:
    """Does what the command line says.

    Args:
        args: After ``collect``.
        parser_class: That says what is wrong with it.
    """
    import lightning_rlhf.collect.chat_judge  # noqa: F401  # so that its class can be named without its module

    parser = collect_parser(parser_class)
    config = parser.parse_args(list(args))
    name = config.subcommand
    fields = COMMANDS[name].__dataclass_fields__  # type: ignore[attr-defined]
    try:
        section = parser.instantiate_classes(config)[name]  # a judge looks at its arguments
        COMMANDS[name](**{key: section[key] for key in fields}).run()
    except USER_ERRORS as error:
        parser.error(str(error), error)
    except KeyboardInterrupt:
        print("Ended. What was answered is kept.")
