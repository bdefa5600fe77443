"""What the tests of all lessons' exercises share. A test file holds only the wrong answers:

    from common import tests_of
    WRONG = {"2.1": [(a_wrong_function, "words of the message meant for it"), ...], ...}
    test_form, test_stub, test_solution, test_wrong_answer = tests_of("02_schedule", WRONG)

Stubs and solutions are taken from the notebook and run with nothing but the notebook's own imports and what its module
exports: an exercise may not depend on a variable of the lesson.
"""
import ast, functools, importlib, linecache, pathlib, re
from dataclasses import dataclass, field

import json, pytest

from diffnb.workshop.check import _find, _verdict

NBS = pathlib.Path(__file__).resolve().parents[2] / "nbs"


@dataclass
class Written:
    "An exercise as it stands in the notebook: its cells in order, and the code cells by their part."
    id: str
    title: str
    cells: list = field(default_factory=list)

    def tagged(self, tag): return [c for c in self.cells if tag in c["metadata"].get("tags", [])]
    @property
    def stub(self): return source(self.tagged("stub")[0])
    @property
    def solution(self): return source(self.tagged("solution")[0])
    @property
    def name(self): # the answer's name, from the check cell
        return next(m[2] for c in self.cells if (m := CHECK.fullmatch(source(c).strip())))
    @property
    def debug(self): return self.title.startswith("Debug this")


CHECK = re.compile(r'check\("(\d+\.\d+)", (\w+)\)')


def source(cell): return "".join(cell["source"])


@functools.cache
def cells_of(lesson): return json.loads((NBS / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]


def written(lesson):
    "The exercises of a lesson, in order; the section ends at the next heading of its own level."
    found, inside = {}, False
    for cell in cells_of(lesson):
        text = source(cell)
        headings = re.findall(r"^## (.*)$", text, re.M) if cell["cell_type"] == "markdown" else []
        if headings:
            inside = headings[-1].startswith("Exercises")
        if not inside:
            continue
        if cell["cell_type"] == "markdown" and (m := re.search(r"^### (\d+\.\d+) (.+)$", text, re.M)):
            assert m[1] not in found, f"exercise {m[1]} is there twice"
            found[m[1]] = Written(m[1], m[2].strip())
        if found:
            list(found.values())[-1].cells.append(cell)
    return found


def imports_only(code):
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def namespace(lesson):
    "What a stub or solution may use: the module's names and the notebook's imports."
    module = next(m[1] for cell in cells_of(lesson) if (m := re.match(r"#\| default_exp (\w+)", source(cell))))
    space = dict(vars(importlib.import_module(f"diffnb.{module}")))
    for cell in cells_of(lesson):
        if cell["cell_type"] == "code" and imports_only(source(cell)):
            exec(source(cell), space)
    return {**space, "__name__": "__main__"}


def run(code, space, filename):
    "Run a cell; its lines can be shown in messages, as in Jupyter."
    linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)
    exec(compile(code, filename, "exec"), space)
    return space


def drawn(output): # a figure, as a picture or as a page's <img> with alt text
    data = output.get("data", {})
    return "image/png" in data or "<img" in "".join(data.get("text/html", ""))


def without_check(code): return re.sub(r"^assert check\(.*\)\s*$", "", code, flags=re.M)


def form_errors(lesson):
    "Everything in which a lesson's exercise section differs from the form, as sentences."
    errors, exercises = [], written(lesson)
    code = [source(c) for c in cells_of(lesson) if c["cell_type"] == "code"]
    def need(fact, said):
        if not fact:
            errors.append(f"{ex.id if exercises else lesson}: {said}")
    if not 4 <= len(exercises) <= 7:
        errors.append(f"{lesson} has {len(exercises)} exercises, not 4 to 7")
    if sum("from diffnb.workshop.check import check" in c for c in code) != 1:
        errors.append(f"{lesson}: import check in one cell")
    if [e.debug for e in exercises.values()] != [False] * (len(exercises) - 1) + [True]:
        errors.append(f"{lesson}: the last exercise, and no other, is 'Debug this: ...'")
    if list(exercises) != [f"{int(lesson[:2])}.{i + 1}" for i in range(len(exercises))]:
        errors.append(f"{lesson}: ids {list(exercises)}")
    for ex in exercises.values():
        head, known, plain = source(ex.cells[0]), _find(ex.id), lambda s: s.removeprefix("Debug this: ").strip()
        need(plain(known.title) == plain(ex.title), f"title {ex.title!r}, but the check says {known.title!r}")
        m = re.search(r"^(★+)(☆*) · (\d+) minutes\s*$", head, re.M)
        need(m and len(m[1] + m[2]) == 3, "no line '★☆☆ · 5 minutes' below the heading")
        if m:
            need(
                (len(m[1]), int(m[3])) == (known.level, known.minutes),
                f"stars and minutes {m[0]!r}, but the check says {known.level}, {known.minutes}")
        hints = next((source(c) for c in ex.cells if c["cell_type"] == "markdown" and "<summary>" in source(c)), "")
        need(
            re.findall(r"<summary>(.*?)</summary>", hints) == ["Hint 1", "Hint 2", "Hint 3"],
            "not three hints in one cell")
        need(hints.count("<details>") == hints.count("</details>") == 3, "hints are not nested in three <details>")
        need(all(len(h.split()) >= 5 for h in re.split(r"<summary>.*?</summary>", hints)[1:]), "an empty hint")
        need(len(ex.tagged("stub")) == len(ex.tagged("solution")) == 1, "not one stub and one solution")
        need(sum(bool(CHECK.fullmatch(source(c).strip())) for c in ex.cells) == 1, f'no cell check("{ex.id}", name)')
        if errors:
            continue
        kinds = [
            (
                "stub"
                if c in ex.tagged("stub")
                else "solution"
                if c in ex.tagged("solution")
                else "check"
                if CHECK.fullmatch(source(c).strip())
                else "hints"
                if source(c) == hints
                else "")
            for c in ex.cells]
        need([k for k in kinds if k] == ["stub", "check", "hints", "solution"], f"order of the parts: {kinds}")
        need(ex.tagged("solution")[0]["metadata"].get("jupyter", {}).get("source_hidden"), "the solution is not folded")
        need(
            ex.solution.rstrip().endswith(f'assert check("{ex.id}", {ex.name})'),
            "the solution does not end with its check")
        need(next(CHECK.finditer(ex.solution), [0, 0])[1] == ex.id, "the solution checks another exercise")
        need(re.match("my_|My|faulty_|Faulty", ex.name), f"{ex.name} should begin with my_ or faulty_")
        if ex.debug:
            pictures = [c for c in ex.tagged("hide-input") if any(drawn(o) for o in c.get("outputs", []))]
            need(
                pictures and ex.cells.index(pictures[0]) < ex.cells.index(ex.tagged("stub")[0]),
                "no symptom picture before the faulty code")
        else:
            need(
                'raise NotImplementedError("your code here")' in ex.stub, "the stub does not raise NotImplementedError")
        for node in ast.parse(ex.stub).body:
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                need(
                    node.returns and all(a.annotation for a in arguments if a.arg != "self"),
                    f"{node.name} is not fully annotated")
                need(ast.get_docstring(node), f"{node.name} has no docstring")
        where = max(i for i, c in enumerate(code) if c == ex.solution)
        need(
            not any(re.search(rf"\b{ex.name}\b", c) for c in code[where + 1 :]), f"{ex.name} is used after its exercise"
        )
    return errors


def tests_of(lesson, wrong):
    "Four tests for a lesson: form, stubs, solutions, wrong answers."
    ids = list(wrong)

    def test_form():
        errors = form_errors(lesson)
        assert not errors, "\n".join(errors)
        assert list(written(lesson)) == ids, "every exercise needs its wrong answers, in order"
        few = {i: len(w) for i, w in wrong.items() if len(w) < 3}
        assert not few, f"fewer than three wrong answers: {few}"

    @pytest.mark.parametrize("id", ids)
    def test_stub(id):
        ex, space = written(lesson)[id], namespace(lesson)
        taken = set(space)
        run(ex.stub, space, f"<stub {id}>")
        assert ex.name not in taken, f"{ex.name} shadows a name of the lesson"
        word, said = _verdict(_find(id), space[ex.name])
        assert word == ("wrong" if ex.debug else "not yet"), (word, said)

    @pytest.mark.parametrize("id", ids)
    def test_solution(id):
        ex = written(lesson)[id]
        space = run(without_check(ex.solution), namespace(lesson), f"<solution {id}>")
        for _ in range(5):
            assert _verdict(_find(id), space[ex.name]) == ("right", "right.")

    cases = [(id, i) for id in ids for i in range(len(wrong[id]))]
    @pytest.mark.parametrize("id, i", cases, ids=[f"{id}-{i}" for id, i in cases])
    def test_wrong_answer(id, i):
        answer, words = wrong[id][i]
        for _ in range(3):                                             # the inputs are new each time
            word, said = _verdict(_find(id), answer)
            assert word == "wrong" and words in said, (word, said)

    return test_form, test_stub, test_solution, test_wrong_answer


tests_of.__test__ = False  # no test itself, although its name begins with "test"
