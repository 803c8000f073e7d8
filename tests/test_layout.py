"""The layout: which module may import which, and what belongs to the project."""

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

import additional_experiments
import gpt_download

ROOT = Path(additional_experiments.__file__).parent
is_clone = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows which files are the project's")
TOP = "additional_experiments.py classifier.py previous_chapters.py gpt_download.py runner tests data docs README.md"
TOP += " LICENSE requirements.txt pyproject.toml .gitattributes .gitignore .ci .github"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*(ROOT / name for name in TOP.split() if name.endswith(".py")), *(ROOT / "runner").glob("**/*.py")]
}


def imports(name):
    """The project's modules that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = [name.rpartition(".")[0]] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


# Each floor imports from those below it and from itself.
FLOORS = [
    ("previous_chapters", "runner.files", "runner.rows", "runner.wording"),
    ("runner.machine",),
    ("gpt_download",),
    ("runner.data",),
    ("classifier",),
    ("runner.saved",),
    ("runner.results", "runner.console", "runner.options"),
    ("additional_experiments",),
]


def test_directions_of_imports():
    graph = {name: imports(name) for name in MODULES if not name.endswith("__init__")}
    floors = {name: next(n for n, floor in enumerate(FLOORS) if name.startswith(floor)) for name in graph}
    upwards = [(name, other) for name in graph for other in graph[name] if floors[other] > floors[name]]
    assert upwards == [] and not any(graph[name] for name in graph if floors[name] == 0)
    assert "runner.files" in graph["runner.console"] and "gpt_download" in graph["runner.data.datasets"]  # all are seen
    assert not any("import_module" in path.read_text() or "__import__" in path.read_text() for path in MODULES.values())
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@is_clone
def test_nothing_else_stands_at_the_top():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {Path(name).parts[0] for name in files.splitlines()} == set(TOP.split())


@is_clone
def test_a_clone_with_the_line_ends_of_windows_has_the_same_files(tmp_path):
    command = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")]
    subprocess.run(command, check=True)
    for path in (gpt_download.VOCABULARY, gpt_download.SAMPLE, ROOT / "LICENSE"):
        assert (tmp_path / "clone" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert b"\r" not in (tmp_path / "clone" / "additional_experiments.py").read_bytes()
