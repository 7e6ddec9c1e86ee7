"""The virtual environments in which TRL is measured: PPO as TRL last had it, and everything else as it is now.

TRL is no dependency of this library; it lives beside it, with the same torch and transformers. Run it with::

    python -m benchmarks.environments
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

RELEASES = {".venv-trl-ppo": "1.12.0", ".venv-trl": "1.16.0"}
"""Folder of each environment, and its release of TRL: the first is the last one with ``trl.experimental.ppo``."""

_STAMP = ".installed"


def folder_of(row: str) -> str:
    """Which environment runs a row.

    Args:
        row: Such as ``"ppo"``.

    Returns:
        Its folder, relative to the repository.
    """
    return ".venv-trl-ppo" if row == "ppo" else ".venv-trl"


def python_of(row: str) -> Path | None:
    """The interpreter of the environment that runs a row.

    Args:
        row: Such as ``"ppo"``.

    Returns:
        Its path, or None where the environment was not made, or not to its end.
    """
    folder = ROOT / folder_of(row)
    return folder / "bin" / "python" if (folder / _STAMP).exists() else None


def make(name: str, torch_index: str) -> None:
    """Makes an environment, or leaves it alone if it is complete.

    Args:
        name: Its folder, one of :data:`RELEASES`.
        torch_index: The package index that torch alone is taken from; empty: where pip takes the rest.
    """
    folder, release = ROOT / name, RELEASES[name]
    if (folder / _STAMP).exists() and (folder / _STAMP).read_text() == release:
        print(f"{name} is there, with TRL {release}")
        return
    print(f"{name}: TRL {release}; this takes a few minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = ["-c", ROOT / "constraints-cpu.txt"]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", *constraints]
    # Torch first and by itself: resolved together with the rest, it may come with CUDA.
    subprocess.run([*pip, *(["--index-url", torch_index] if torch_index else []), "torch"], check=True)
    subprocess.run([*pip, "transformers", "rich", f"trl=={release}"], check=True)
    (folder / _STAMP).write_text(release)


def main(args: list[str] | None = None) -> None:
    """Makes both environments.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.environments", description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX", ""), help="that torch is taken from")
    options = parser.parse_args(args)
    for name in RELEASES:
        make(name, options.torch_index)


if __name__ == "__main__":
    main()
