"""The rules of the house that a machine can hold: layers, sizes, one trainer, nothing heavy at start-up, a README that is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "src" / "posttrain"
FILES = sorted(PACKAGE.rglob("*.py"))
# A module imports from its own layer and from those before it. `objectives` and `model` do not know `data`.
LAYERS = ["types", "hf_flags", "flags", "config", "data", "model", "objectives", "training", "commands", "cli", "__main__"]
FORBIDDEN = {("model", "data"), ("objectives", "data")}


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("posttrain"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("posttrain.")}
    return names - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    mine = layer(file)
    if mine == "__init__":
        return
    for other in imported_layers(ast.parse(file.read_text())):
        assert LAYERS.index(other) <= LAYERS.index(mine), f"{mine} imports {other}"
        assert (mine, other) not in FORBIDDEN


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_sizes(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 300, "a file has at most 300 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name}: a function has at most 60 lines"


def test_complexity_and_parameters_are_held_by_the_linter() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    assert "max-complexity = 12" in settings
    assert "max-args = 7" in settings
    assert {"C90", "PLR0913"} <= set(re.findall(r'"([A-Z0-9]+)"', settings.split("select = ")[1].split("]")[0]))


def test_one_subclass_of_the_trainer() -> None:
    found = [
        f"{file.name}:{node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] == "Trainer" for base in node.bases)
    ]
    assert found == ["trainer.py:ObjectiveTrainer"]


@pytest.mark.parametrize("code", ["import posttrain", "import posttrain.cli as c; c.main(['--help'])"])
def test_start_up_loads_nothing_heavy(code: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy'}"
    check = f"import sys\n{code}\nsys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)


def test_no_trl_at_run_time() -> None:
    for file in FILES:
        assert not re.search(r"^\s*(from|import) trl\b", file.read_text(), re.MULTILINE), file


def test_no_broad_except() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                assert caught not in ("", "Exception", "BaseException"), f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "CONTRIBUTING.md"])
def test_every_path_in_the_pages_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    inline = re.findall(r"`([A-Za-z0-9_.\-/]+/[A-Za-z0-9_.\-/]*|[A-Za-z0-9_\-]+\.(?:py|md|toml|txt|yaml|sh))`", text)
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    made_by_runs = ("outputs/",)
    missing = [p for p in {*inline, *links} if not p.startswith(made_by_runs) and not (ROOT / p).exists()]
    missing = [p for p in missing if not (PACKAGE / p).exists()]
    assert not missing
    tree = re.search(r"```text\n(src/posttrain.*?)```", text, re.DOTALL)
    if tree:
        assert tree_paths(tree.group(1)), "the file tree is empty"
        assert not [p for p in tree_paths(tree.group(1)) if not (ROOT / p).exists()]


def tree_paths(block: str) -> list[str]:
    """Paths of an annotated tree: two spaces of indent a level, a name, then its explanation; names may be joined by ', '."""
    stack: list[str] = []
    found = []
    for line in block.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0]
        stack = stack[:depth]
        parts = [n.strip() for n in names.split(",")]
        found += ["/".join([*stack, part]).rstrip("/") for part in parts]
        if parts[0].endswith("/"):
            stack.append(parts[0].rstrip("/"))
    return found
