"""The command line: ``lightning-rlhf fit|validate|test|predict|plan --config run.yaml``, and ``collect``."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_rlhf
from lightning_rlhf.callbacks import ResponseWriter
from lightning_rlhf.collect.command import ABOUT, COLLECT, collect
from lightning_rlhf.modules.arguments import known_arguments
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.planning.command import Asked, plan_run

PROGRAM = "lightning-rlhf"
PLAN = "plan"
_USER_ERRORS = (ValueError, TypeError, FileNotFoundError)


class Parser(LightningArgumentParser):
    """Says of a misspelt key which one was meant, without the page of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with one line for what the user got wrong.

        Args:
            message: What jsonargparse says.
            ex: What was raised.
        """
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            super().error(message, ex)
        sys.stderr.write(f"{PROGRAM}: error: {explained(message, list(self._keys()))}\n")
        sys.exit(2)

    def _keys(self) -> Iterator[str]:
        for action in self._actions:
            yield action.dest
            for parser in (action.choices if isinstance(action.choices, dict) else {}).values():
                yield from parser._keys()


class RLHFCLI(LightningCLI):
    """LightningCLI over the modules, DataModules and callbacks of this library, and over yours.

    Args:
        args: Of the command line, without the program's name.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.arguments = list(args)
        for name in lightning_rlhf.__all__:
            getattr(lightning_rlhf, name)  # what was imported can be named without its module
        super().__init__(
            RLHFModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # it would build on parameters before there are any
            load_from_checkpoint_support=False,  # the modules store their own arguments
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"log_every_n_steps": 1},
            parser_class=Parser,
            parser_kwargs={"prog": PROGRAM, "description": "Reinforcement learning from human feedback, from a YAML."},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what becomes of a run's results; alike for all commands, so that they share a YAML."""
        parser.add_argument(
            "--save_pretrained",
            type=str | None,
            default=None,
            help="Of fit: the folder to which policy and tokenizer are written when training is over.",
        )
        parser.add_argument(
            "--responses", type=str, default="responses.jsonl", help="Of predict: the JSONL file that is written."
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Adds `plan`, which reads what `fit` does, and `collect`."""
        super()._add_subcommands(parser, **kwargs)
        about = "Say where the memory of a run goes and whether it fits, from its configuration alone."
        planner = self._prepare_subcommand_parser(Trainer, "fit", description=about)
        planner.add_class_arguments(Asked)
        self._subcommand_parsers[PLAN] = planner
        assert parser._subcommands_action is not None
        parser._subcommands_action.add_subcommand(PLAN, planner, help=about)
        parser._subcommands_action.add_subcommand(COLLECT, Parser(), help=ABOUT)  # for the help alone: see main

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command line."""
        with _optimizers_of_torch():
            self.config = parser.parse_args(self.arguments)

    def _parse_ckpt_path(self) -> None:
        """Takes from a checkpoint the module's arguments that neither command line nor configuration give."""
        command = self.config.subcommand
        path = Path(self.config[command].ckpt_path or "")
        path = path / "meta.pt" if path.is_dir() else path  # of a sharded checkpoint
        if not path.is_file() or path.suffix not in (".ckpt", ".pt"):
            return
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True).get("hyper_parameters", {})
        with _optimizers_of_torch():
            given = self.parser.parse_args(self.arguments, defaults=False)[command].model
        cls = _imported(given.class_path)
        if cls is None or not set(stored) <= set(known_arguments(cls)):
            return  # of another module, which this one will say
        rest = {name: value for name, value in stored.items() if name not in given.get("init_args", {})}
        model = {"class_path": given.class_path, "init_args": rest}
        self.config = self.parser.parse_object({command: {"model": model}}, self.config)

    def instantiate_classes(self) -> None:
        """Builds trainer, module and data; what is wrong with their arguments is said without a traceback."""
        try:
            if self.subcommand == PLAN:
                self.model = self._alone("model", RLHFModule)  # a Trainer would look for its devices
            else:
                super().instantiate_classes()
        except _USER_ERRORS as error:
            cause: BaseException = error
            while "Does not validate against any" in str(cause) and cause.__cause__ is not None:
                cause = cause.__cause__
            self.parser.error(str(cause), error)

    def _alone(self, key: str, base: type) -> Any:
        """Builds what one section of the configuration says, and nothing else of it."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(base, key, fail_untyped=False)  # as Lightning reads them
        section = parser.parse_object({key: self.config[PLAN][key]})
        return parser.instantiate_classes(section)[key]

    def _run_subcommand(self, subcommand: str) -> None:
        """Plans, or calls the Trainer."""
        if subcommand != PLAN:
            super()._run_subcommand(subcommand)
            return
        section = self.config[PLAN]
        try:
            asked = Asked(**{name: section[name] for name in Asked.__dataclass_fields__})
            self.plan = plan_run(
                self.model, section.trainer, section.data, asked, lambda: self._alone("data", LightningDataModule)
            )
        except _USER_ERRORS as error:
            files = ", ".join(str(path) for path in section.config or ())
            self.parser.error(f"{files}: {error}" if files else str(error), error)

    def after_fit(self) -> None:
        """Exports the policy."""
        folder = self.config.fit.save_pretrained
        if folder is not None:
            self.model.save_pretrained(folder)

    def before_predict(self) -> None:
        """Has responses written to a file."""
        self.trainer.callbacks.append(ResponseWriter(self.config.predict.responses))  # type: ignore[attr-defined]


@contextmanager
def _optimizers_of_torch() -> Iterator[None]:
    """Lets the bare name of an optimizer be torch's, where another library that is imported has one of that name.

    bitsandbytes has an AdamW, and is imported as soon as PEFT is; jsonargparse would ask for a whole path, and has no
    setting by which one class comes before another (4.39 to 4.53).
    """
    from jsonargparse import _typehints

    resolve = _typehints.resolve_class_path_by_name

    def resolve_to_torch(cls: Any, name: str) -> str:
        found = getattr(torch.optim, name, None)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            return f"torch.optim.{name}"
        return resolve(cls, name)

    _typehints.resolve_class_path_by_name = resolve_to_torch
    try:
        yield
    finally:
        _typehints.resolve_class_path_by_name = resolve


def explained(message: str, keys: Sequence[str]) -> str:
    """What is wrong with a key or class, and which was probably meant.

    Args:
        message: What jsonargparse says.
        keys: Those that there are.

    Returns:
        One sentence, or the message as it is.
    """
    named = re.findall(r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    made = re.findall(r"Option '([^']+)' is not accepted\. Got value: Namespace\(class_path='([^']+)'", message)
    for path, option in [(path, option) for option, path in made] + named[::-1]:
        known = known_arguments(_imported(path))
        meant = _meant(option.removeprefix("init_args."), known) or f": it takes {', '.join(known)}."
        return f"`{option}` is no argument of {path.rpartition('.')[2]}{meant}"
    several = re.search(r"Multiple subclasses with name (\w+)\. .*?ambiguity: ([^\n]*?)\.?(?:\n|$)", message)
    if several:
        return f"`{several[1]}` is the name of several classes: write the one that is meant, of {several[2]}."
    missing = re.search(r"given class_path '([^']+)':\s+the following arguments are required: (.*)", message)
    if missing:
        return f"`{missing[2]}` is missing: {missing[1].rpartition('.')[2]} cannot do without."
    absent = re.match(r"the following arguments are required: \w+\.(\w+)$", message)
    if absent:
        return f"`{absent[1]}` is missing: a run cannot do without."
    other = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)", message)
    if other:
        key = other[1] or other[2]
        parts = sorted({name.split(".")[0] for name in keys})
        key, known = (key, list(keys)) if key.split(".")[0] in parts else (key.split(".")[0], parts)
        return f"`{key}` is no key of a configuration{_meant(key, known)}"
    *_, innermost = re.split(r'Parser key "(?:model|data|trainer\.callbacks)":', message)
    value = re.search(r'Parser key "(\w+)":\s+(.*?)(?:Given value|Got value): ([^\n]*)', innermost, flags=re.DOTALL)
    if value:
        expected = [
            line.strip(". ").replace("a typing.Literal", "one of ") for line in re.findall(r"Expected .*", value[2])
        ]
        return f"`{value[1]}={value[3]}` does not fit. {'; or: '.join(expected)}."
    unknown = re.search(r"Expected a dot import path string: (\w+)$", message, flags=re.MULTILINE)
    if unknown:
        classes = [cls.__name__ for base in (RLHFModule, LightningDataModule, Callback) for cls in _subclasses(base)]
        meant = _meant(unknown[1], classes) or ": one of your own is named with its module, as in `my_data.Prompts`."
        return f"`{unknown[1]}` is no class that is known{meant}"
    return message


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean `{close[0]}`?" if close else ""


def _subclasses(base: Any) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def found(args: Sequence[str]) -> list[str]:
    """Arguments in which ``examples/...yaml`` is the installed example, where the working folder has no such file.

    Args:
        args: Of the command line.

    Returns:
        The same number of arguments.
    """
    package = Path(lightning_rlhf.__file__).parent

    def place(name: str) -> str:
        is_ours = name.startswith("examples/") and not Path(name).exists() and (package / name).is_file()
        return str(package / name) if is_ours else name

    places = []
    for before, arg in zip(["", *args], args, strict=False):
        key, equals, path = arg.partition("=")
        if before in ("--config", "-c"):
            arg = place(arg)
        elif equals and key == "--config":
            arg = f"--config={place(path)}"
        places.append(arg)
    return places


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Without the program's name; ``sys.argv`` by default.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # a console script has its own folder there; this one finds `my_reward.score`
    args = found(sys.argv[1:] if args is None else args)
    if args[:1] == [COLLECT]:
        collect(args[1:], Parser)  # which has neither Trainer nor module
    else:
        RLHFCLI(args)
