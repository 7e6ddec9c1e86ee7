"""The package as a whole: what it imports, in which direction, and what pip makes of it."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lightning_rlhf": ROOT / "lightning_rlhf",
    "lightning_rlhf.callbacks": ROOT / "callbacks",
    "lightning_rlhf.examples": ROOT / "examples",
}

# A room may import from itself and from those before it, but not from its neighbours on the same line. The empty name
# stands for the public names, `from lightning_rlhf import PPOModule`.
ORDER = (
    ("functional", "batches", "chance", "dotted"),
    ("models",),
    ("generation", "rewards", "data"),
    ("strategies",),
    ("modules",),
    ("planning",),
    ("",),
    ("callbacks", "collect"),
    ("cli", "sweep"),
    ("__main__",),
    ("examples",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, Path]:
    """The file of every module under the name that it has once installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):  # which does not follow links
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


MODULES = modules()


def room(name: str) -> str:
    """The room that a dotted name lies in: `functional` for `lightning_rlhf.functional.kl.k1`."""
    second = name.split(".")[1] if "." in name else ""
    return second if f"lightning_rlhf.{second}" in MODULES else ""


def syntax(name: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Whatever a module imports, wherever in the file, by its full dotted name."""
    for node in ast.walk(syntax(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = node.level - (MODULES[name].name == "__init__.py")
                source = ".".join([*name.split(".")[: -up or None], *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def run(*command: str, cwd: Path, **environment: str) -> str:
    """What a command prints, after checking that it ended well."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_every_public_name_is_there() -> None:
    import lightning_rlhf

    assert [name for name in lightning_rlhf.__all__ if getattr(lightning_rlhf, name, None) is None] == []


def test_a_name_that_is_not_there_is_missed_as_in_any_module() -> None:
    import lightning_rlhf

    with pytest.raises(AttributeError, match="^module 'lightning_rlhf' has no attribute 'DPOModul'$"):
        lightning_rlhf.DPOModul  # noqa: B018


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in MODULES} - set(RANK) == set()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    home = room(name)
    inside = [target for target in imports(name) if target.split(".")[0] == "lightning_rlhf"]
    wrong = [target for target in inside if room(target) != home and RANK[room(target)] >= RANK[home]]
    if home not in ("cli", "__main__", "examples", "callbacks"):
        wrong += [target for target in inside if room(target) == "callbacks"]
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "functional"])
def test_functional_knows_torch_and_nothing_else(name: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "jaxtyping", "lightning_rlhf"} - {"logging"}
    targets = list(imports(name))
    attributes = [ast.unparse(node) for node in ast.walk(syntax(name)) if isinstance(node, ast.Attribute)]
    assert [target for target in targets if target.split(".")[0] not in allowed] == []
    assert [target for target in targets + attributes if target.startswith("torch.distributed")] == []


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("callbacks", "examples")])
def test_mapped_folders_import_absolutely(name: str) -> None:
    relative = [node for node in ast.walk(syntax(name)) if isinstance(node, ast.ImportFrom) and node.level]
    assert [ast.unparse(node) for node in relative] == []


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_the_folders_by_their_bare_names(name: str) -> None:
    assert [target for target in imports(name) if target.split(".")[0] in ("callbacks", "examples")] == []


def test_no_algorithm_is_imported_inside_the_room_of_algorithms() -> None:
    import lightning_rlhf

    public = [getattr(lightning_rlhf, name) for name in lightning_rlhf.__all__ if name.endswith("Module")]
    bases = {base for cls in public for base in cls.__mro__[1:]}  # an algorithm is final
    algorithms = {cls.__module__ for cls in public if cls not in bases and room(cls.__module__) == "modules"}
    assert algorithms, "no algorithm is public"
    wrong = [
        (name, target)
        for name, file in MODULES.items()
        if room(name) == "modules" and file.name != "__init__.py"
        for target in imports(name)
        if any(f"{target}.".startswith(f"{other}.") for other in algorithms - {name})
    ]
    assert wrong == []


def test_only_one_file_shifts_logits_against_tokens() -> None:
    def shifts(node: ast.AST) -> bool:
        """Whether this is `[:, :-1]`, or the like with more dimensions."""
        if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)):
            return False
        return any(isinstance(part, ast.Slice) and ast.unparse(part) == ":-1" for part in node.slice.elts[1:])

    shifting = {name for name in MODULES if room(name) != "examples" for node in ast.walk(syntax(name)) if shifts(node)}
    assert shifting <= {"lightning_rlhf.functional.logprobs"}


def test_importing_the_package_costs_little_beside_lightning(tmp_path: Path) -> None:
    script = """
import json, sys, time
start = time.perf_counter()
import lightning
middle = time.perf_counter()
before = set(sys.modules)
import lightning_rlhf
end = time.perf_counter()
for name in lightning_rlhf.__all__:
    getattr(lightning_rlhf, name)
print(json.dumps([middle - start, end - middle, sorted(set(sys.modules) - before)]))
"""
    output = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    lightning, own, new = json.loads(output.splitlines()[-1])
    heavy = ("transformers.modeling_utils", "transformers.models", "bitsandbytes", "jsonargparse", "peft", "matplotlib")
    assert [name for name in new if name.startswith(heavy)] == []
    assert own < 0.5 * lightning + 0.5


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, links kept, since a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS.values():
        shutil.copytree(folder, copy / folder.name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(checkout: Path, where: Path, *kinds: str) -> None:
    """Builds from a copy; with nothing fetched, since setuptools comes from this environment."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(where), *kinds, str(checkout), cwd=where)


def test_sdist_keeps_the_folders_on_top(checkout: Path, tmp_path: Path) -> None:
    build(checkout, tmp_path, "--sdist")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"callbacks/__init__.py", "examples/randomwalks/__init__.py", "lightning_rlhf/py.typed", "LICENSE"} <= held
    assert [name for name in held if name.startswith(("lightning_rlhf/callbacks", "lightning_rlhf/examples"))] == []


@pytest.mark.parametrize("kinds", [("--wheel",), ()], ids=["from the checkout", "from the sdist"])
def test_wheel_holds_the_folders_inside_the_package(checkout: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    build(checkout, tmp_path, *kinds)
    unpacked, empty = tmp_path / "unpacked", tmp_path / "empty"
    empty.mkdir()
    version = importlib.import_module("lightning_rlhf").__version__
    with zipfile.ZipFile(next(tmp_path.glob(f"lightning_rlhf-{version}-*.whl"))) as wheel:
        wheel.extractall(unpacked)
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (scripts,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/entry_points.txt"))
        assert "lightning-rlhf = lightning_rlhf.cli:main" in scripts

    for package, folder in FOLDERS.items():
        kinds_of_files = ("*.py", "*.yaml", "py.typed", "*.html", "*.css", "*.js", "*.svg")
        files = [file for kind in kinds_of_files for file in folder.rglob(kind)]
        wanted = {f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}" for file in files}
        assert wanted - packed == set()
    assert [name for name in packed if not name.startswith("lightning_rlhf/")] == []

    script = f"import {', '.join(FOLDERS)}; print(lightning_rlhf.callbacks.__file__, lightning_rlhf.examples.__file__)"
    output = run(sys.executable, "-c", script, cwd=empty, PYTHONPATH=str(unpacked))
    assert output.count(str(unpacked)) == 2


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda file: file.stem)
def test_invariants_are_numbered_as_in_the_list(file: Path) -> None:
    listed = re.findall(r"^(\d+)\. ", (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert listed == [str(number) for number in range(1, 41)]

    marks = re.findall(r"mark\.invariant\(([^)]*)\)", file.read_text(encoding="utf-8"))
    used = {number.strip() for mark in marks for number in mark.split(",")}
    assert used <= set(listed)
