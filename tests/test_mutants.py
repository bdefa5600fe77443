"""The catalogue of bugs fits the lessons, and its runner tells a bug that is caught from one that is not. All of it:
make test-all."""
import importlib.util, json, pathlib, subprocess, sys

import pytest

root = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("mutants_run", root / "tests/mutants/run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
bugs = run.load(root / "tests/mutants/catalogue.py")


def test_every_bug_fits_its_lesson_exactly_once():
    lessons = {name: run.cells(root / f"nbs/{name}.ipynb") for name in {b.lesson for b in bugs}}
    assert len(bugs) >= 340 and {name[:2] for name in lessons} >= {"01", "02", "03", "04", "05", "06", "07", "08"}
    for b in bugs:
        where, module = run.place(b, lessons[b.lesson]), (root / f"diffnb/{b.module}.py").read_text()
        assert module.count(b.old) == 1 and b.new != b.old, b.id
        source = next(s for i, s, _ in lessons[b.lesson] if i == where)
        compile(source.replace(b.old, b.new), b.id, "exec")                  # a bug is no typing error
        assert not b.tests or (root / "tests" / b.tests.split()[0]).exists(), b.id


def test_bugs_have_their_own_names_and_references_that_can_be_followed():
    assert len({b.id for b in bugs}) == len(bugs)
    for b in bugs:
        assert b.what and b.what[0].islower() | b.what[0].isdigit() | b.what.startswith(
            ("KID", "DDPM", "FiLM", "Python", "EMA", "CIFAR", "Heun", "Upsample", "Muon", "AdamW", "DPM-Solver++")
        ), b.id
        assert not b.seen or b.seen.count("/") == 1 and b.seen.rpartition("#")[2].isdigit(), b.id


BUG = ("from collections import namedtuple\n"
       "Bug = namedtuple('Bug', 'lesson id what old new seen tests page', defaults=[True])\n")


def notebook(path, *sources):
    path.write_text(
        json.dumps(
            {
                "cells": [dict(cell_type="code", metadata={}, source=s) for s in sources[:-1]]
                + [
                    dict(cell_type="markdown", metadata={}, source="## Exercises"),
                    dict(cell_type="code", metadata={}, source=sources[-1])]}))


@pytest.mark.slow
def test_the_runner_tells_caught_from_missed(tmp_path):
    lesson = (
        "%matplotlib inline",
        "#| export\ndef double(x): return 2 * x\ndef half(x): return x / 2\ndef third(x): return x / 3",
        "import pathlib, tempfile\npathlib.Path(tempfile.gettempdir(), 'file').touch(exist_ok=False)",
        "assert double(3) == 6", "third(1)", "1 / 0")
    notebook(tmp_path / "01_toy.ipynb", *lesson)
    (tmp_path / "toypackage").mkdir()
    (tmp_path / "toypackage/__init__.py").touch()
    (tmp_path / "toypackage/toy.py").write_text(lesson[1])
    (tmp_path / "tests").mkdir()  # not beside the package: pytest would import that one
    (tmp_path / "tests/test_half.py").write_text(
        "from toypackage.toy import half\ndef test_half(): assert half(4) == 2\n")
    test = tmp_path / "tests/test_half.py"
    (tmp_path / "bugs.py").write_text(BUG + "Bug.module = 'toy'\n"
        f"b = lambda id, old, new: Bug('01_toy', id, id, old, new, '', {str(test)!r})\n"
        "BUGS = [b('plain', '2 * x', '3 * x'), b('harmless', '2 * x', 'x * 2'), b('second', 'x / 2', 'x // 3'), "
        "b('crash', 'x / 3', 'x / 0'), b('own', 'double(x): ', 'double(x=y): ')]")
    done = subprocess.run(
        [
            sys.executable, root / "tests/mutants/run.py", "--catalogue", tmp_path / "bugs.py", "--notebooks", tmp_path,
            "--package", tmp_path / "toypackage"],
        capture_output=True, text=True,
        cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    said = {line.split()[3]: line for line in done.stdout.split("\n") if " s  " in line}
    assert (
        "killed by the lesson, assert, cell 3" in said["plain"]
        and "crash, cell 4" in said["crash"]
        and "SURVIVED" not in said["second"])
    assert "killed by tests" in said["second"] and "survived" in said["harmless"]
    assert "5 bugs: 3 killed by lessons, 1 by tests, 1 survived" in done.stdout
    assert done.stdout.split("holds the bug:\n")[1].startswith("  01_toy own")
    assert done.stdout.split("\nsurvived:\n")[1].startswith("  01_toy harmless")


@pytest.mark.slow
def test_a_lesson_that_fails_without_any_bug_is_no_kill(tmp_path):
    notebook(tmp_path / "01_toy.ipynb", "#| export\nx = 1", "assert x == 2", "")
    (tmp_path / "bugs.py").write_text(BUG + "BUGS = [Bug('01_toy', 'one', '', 'x = 1', 'x = 3', '', '')]")
    done = subprocess.run(
        [sys.executable, root / "tests/mutants/run.py", "--catalogue", tmp_path / "bugs.py", "--notebooks", tmp_path],
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "cell 1, without any bug: AssertionError" in done.stderr
