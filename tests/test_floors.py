"""Imports point down: core imports nothing of the package, a lesson core and earlier lessons, the workshop what it
likes; in no circle.

Read from the source, so that imports inside of functions count too."""
import ast, re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
exported = re.compile(r"#\|\s*default_exp\s+(\w+)")                    # a lesson's module; the first page has none
lessons = {
    m[1]: int(path.stem[:2])
    for path in (root / "nbs").glob("[0-9][0-9]_*.ipynb")
    if (m := exported.search(path.read_text(encoding="utf-8")))}
free = {"__init__", "__main__"}                                    # the command, which is the workshop's


def imports(source, name):
    """The modules of diffnb that a module imports, and whether it does so inside of a function: pairs ('workshop.run',
    True)."""
    tree, found = ast.parse(source), set()
    inner = {
        id(x)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for x in ast.walk(f)}
    for x in ast.walk(tree):
        if isinstance(x, ast.ImportFrom):
            here = ["diffnb", *name.split(".")][:-x.level] if x.level else []
            base = ".".join([*here, *filter(None, [x.module])])
            full = (
                [f"{base}.{alias.name}" for alias in x.names]
                if base in ("diffnb", "diffnb.workshop", "diffnb.workshop.checks")
                else [base])
        elif isinstance(x, ast.Import):
            full = [alias.name for alias in x.names]
        elif isinstance(x, ast.Call) and getattr(x.func, "attr", getattr(x.func, "id", "")) == "import_module" \
                and x.args and isinstance(x.args[0], ast.Constant):
            full = [x.args[0].value]
        else:
            continue
        found |= {
            (m.removeprefix("diffnb."), id(x) in inner)
            for m in full
            if m.startswith("diffnb.") and m != "diffnb.__version__"}
    return found


def floors(modules):
    "What is wrong with the imports of {name: source}."
    edges = {name: imports(source, name) for name, source in modules.items()}
    for name, targets in edges.items():
        for target, _ in sorted(targets):
            if name in free or name.startswith("workshop."):
                continue
            if name == "core":
                yield f"core imports {target}: it may import nothing of the package"
            elif target.startswith("workshop"):
                yield f"lesson {lessons[name]:02}_{name} imports {target}, which is a floor above"
            elif target != "core" and lessons.get(target, 99) >= lessons[name]:
                yield f"lesson {lessons[name]:02}_{name} imports {target}, which comes later"
    yield from circles(
        {name: {t for t, inside in targets if not inside} & modules.keys() for name, targets in edges.items()})


def circles(edges):
    "Imports at the top of modules that lead back to where they began."
    done = set()
    def visit(name, path):
        if name in path:
            yield " -> ".join([*path[path.index(name):], name]) + " is a circle"
        elif name not in done:
            for target in sorted(edges[name]):
                yield from visit(target, [*path, name])
            done.add(name)
    for name in sorted(edges):
        yield from visit(name, [])


def package():
    return {
        re.sub(r"[/\\]", ".", str(path.relative_to(root / "diffnb").with_suffix(""))): path.read_text(encoding="utf-8")
        for path in (root / "diffnb").rglob("*.py")
        if path.stem not in ("__init__", "_modidx")}


def test_imports_point_down():
    wrong = sorted(set(floors(package())))
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_floor():
    here = {name for name in package() if "." not in name} - free - {"core"}
    assert here <= lessons.keys(), f"neither core nor a lesson: {here - lessons.keys()}"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"data": "from .workshop.run import train"}, "lesson 01_data imports workshop.run, which is a floor above"),
        ({"data": "def f():\n    from diffnb import sample"}, "lesson 01_data imports sample, which comes later"),
        ({"core": "import diffnb.data"}, "core imports data: it may import nothing of the package"),
        (
            {"data": "import importlib\nimportlib.import_module('diffnb.workshop.cli')"},
            "lesson 01_data imports workshop.cli, which is a floor above"),
        (
            {"workshop.run": "from .folder import x", "workshop.folder": "from diffnb.workshop import run"},
            "workshop.folder -> workshop.run -> workshop.folder is a circle")])
def test_a_planted_fault_is_said(change, said):
    assert said in set(floors(change))


def test_what_is_right_passes():
    right = {
        "core": "import torch", "data": "from .core import x",
        "sample": "from .data import y\nfrom diffnb.schedule import z", "schedule": "",
        "workshop.run": "from ..sample import ddim\ndef f():\n    from .folder import g",
        "workshop.folder": "from .run import train"}
    assert not list(floors(right))
