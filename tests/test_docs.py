"""Every public function and method of the package has a docstring and a return annotation, and names DiffnbError if its
body raises it."""
import ast
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
modules = {
    str(path.relative_to(root / "diffnb").with_suffix("")): path
    for path in sorted((root / "diffnb").rglob("*.py"))
    if path.stem not in ("__init__", "_modidx") and path.parent.name != "checks"}
allowed = {}                                                        # module -> names that may lack something


def public(tree):
    """(name, function) of the public functions, and methods of public classes; `__init__` and other special methods are
    Python's."""
    for x in tree.body:
        if isinstance(x, ast.ClassDef) and not x.name.startswith("_"):
            yield from (
                (f"{x.name}.{f.name}", f)
                for f in x.body
                if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"))
        elif isinstance(x, ast.FunctionDef) and not x.name.startswith("_"):
            yield x.name, x


def raises(f):
    "Does the body raise DiffnbError, or an error of the package derived from it, itself?"
    names = {
        getattr(c, "id", "")
        for r in ast.walk(f)
        if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)
        for c in [r.exc.func]}
    return bool(names & {"DiffnbError", "NoSplit", "Wrong"})


def lacking(source):
    "What public functions of a module lack."
    for name, f in public(ast.parse(source)):
        said = ast.get_docstring(f) or ""
        if not said and name.rpartition(".")[2] != "forward":
            yield f"{name}: a docstring"
        if f.returns is None:
            yield f"{name}: a return annotation"
        if raises(f) and "raise" not in said.lower():
            yield f"{name}: a word on the DiffnbError it raises"


@pytest.mark.parametrize("module", modules)
def test_public_functions_are_documented(module):
    wrong = [
        text
        for text in lacking(modules[module].read_text(encoding="utf-8"))
        if text.partition(":")[0] not in allowed.get(module, ())]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def test_what_is_lacking_is_said():
    bare = (
        "def f(x): return x\nclass A:\n    def g(self):\n        'It.'\n        raise DiffnbError('no')\n  "
        "  def _h(self): pass\n")
    assert list(lacking(bare)) == [
        "f: a docstring", "f: a return annotation", "A.g: a return annotation",
        "A.g: a word on the DiffnbError it raises"]
    assert not list(lacking("def f(x) -> int:\n    'One. Raises DiffnbError for none.'\n    raise DiffnbError('no')"))


def ends(node):
    "The last characters of a string that is written down, of each of its branches; nothing for what is computed."
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr) and node.values:
        yield from ends(node.values[-1])
    elif isinstance(node, ast.BinOp):
        yield from ends(node.right)
    elif isinstance(node, ast.IfExp):
        yield from (*ends(node.body), *ends(node.orelse))


def stopped(source):
    "Messages of DiffnbError that end with a full stop: none should, an ellipsis may."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("DiffnbError", "TrainingStopped", "NoSplit"):
            for text in ends(node.args[0]) if node.args else ():
                if text.endswith(".") and not text.endswith("..."):
                    yield text


@pytest.mark.parametrize("module", modules)
def test_messages_end_without_a_full_stop(module):
    assert not list(stopped(modules[module].read_text(encoding="utf-8")))


def test_a_full_stop_is_seen():
    assert len(list(stopped("raise DiffnbError(f'no {x}: ' + ('give a.' if a else f'{b}.'))"))) == 2
    assert not list(stopped("raise DiffnbError(f'no {x}, use y')\nraise DiffnbError(f'got {x} ...')\nprint('Yes.')"))
