"""The machinery of the exercises: checks, progress, the learner's copy of the course; and the form of every exercise.

One page of the learner's copy is run here from top to bottom; its lesson cells are left out, which `nbdev_test` runs
anyway, except those that hold imports. DIFFNB_RUN_ALL=1 runs every page in full, as Run All in Jupyter does.
"""
import contextlib, io, json, os, re, subprocess, sys

import nbformat, pytest, torch

from common import CHECK, NBS, form_errors, imports_only, source, written
from diffnb.workshop import check as framework, workbook
from diffnb.core import DiffnbError
from diffnb.workshop.check import Exercise, Wrong, check, exercises, progress, read_progress, same
from diffnb.workshop.course import lessons
from diffnb.workshop.workbook import learners_page, make_workbook


def verdict(answer, check_function):
    return framework._verdict(Exercise("0.1", "Test", 1, 1, check_function), answer)


def said(id, answer):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = check(id, answer)
    return result, out.getvalue()


def right_answer(id, lesson="02_schedule"):
    from common import namespace, run, without_check
    ex = written(lesson)[id]
    return run(without_check(ex.solution), namespace(lesson), f"<solution {id}>")[ex.name]


# every exercise

@pytest.mark.parametrize("lesson", lessons)
def test_form_of_every_exercise(lesson):
    errors = form_errors(lesson)
    assert not errors, "\n".join(errors)
    assert (NBS.parent / "tests" / "exercises" / f"test_{lesson}.py").exists(), "no wrong answers"


def test_every_check_has_its_exercise():
    assert [e.id for e in exercises()] == [id for lesson in lessons for id in written(lesson)]
    assert len(exercises()) >= 4 * len(lessons)


# check

def test_unknown_ids_name_the_nearest():
    for id, near in (("2.19", "'2.1'"), ("02.1", "2.1"), (99.1, "nearest")):
        with pytest.raises(DiffnbError, match=near):
            check(id, None)


def test_check_returns_a_bool_that_a_notebook_does_not_echo():
    result, text = said("2.1", None)
    assert not result and result == False and "not yet" in text and repr(result) == "False" and text.count("\n") == 1   # noqa
    assert result._ipython_display_() is None
    result, text = said("2.1", right_answer("2.1"))
    assert result and result == True and text == "✓ 2.1 How much noise is in it?: right.\n"   # noqa


def test_an_exception_is_told_with_the_learners_own_line():
    code = (
        "import torch\ndef helper(x):\n    return x @ x\ndef mine(x):\n    y = 1\n    return torch.stack([helper(x)])\n"
    )
    space = {}
    exec(compile(code, "<cell 7>", "exec"), space)
    import linecache
    linecache.cache["<cell 7>"] = (len(code), None, code.splitlines(True), "<cell 7>")
    word, text = verdict(space["mine"], lambda answer: answer(torch.zeros(2, 3)))
    assert (
        word == "wrong"
        and "in line 3 of your code, `return x @ x`" in text
        and "RuntimeError" in text
        and "\n" not in text)


def test_torchs_own_notimplementederror_is_no_stub():
    def mine(): raise NotImplementedError("'mean' not implemented for 'Byte'")
    assert verdict(mine, lambda answer: answer())[0] == "wrong"
    def stub(): raise NotImplementedError("your code here")
    assert verdict(stub, lambda answer: answer())[0] == "not yet"


@pytest.mark.parametrize(
    "answer", [lambda: 0, 5, "text", [1], torch.zeros(3), int, lambda *a: "x", lambda *a: object()],
    ids=["no arguments", "number", "text", "list", "tensor", "type", "returns text", "returns an object"])
def test_no_answer_makes_a_check_raise(answer):
    for e in exercises():
        word, text = framework._verdict(e, answer)
        assert word == "wrong" and text, (e.id, word, text)


def test_interruption_is_not_swallowed():
    def slow(*a): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        check("2.1", slow)


# same

x = torch.linspace(-1, 1, 12).view(3, 4)

@pytest.mark.parametrize(
    "got, want, words",
    [
        (None, x, "end with `return`"), ([1.0], x, "of type list where PyTorch tensor"),
        (x[:2], x, "has shape (2, 4) where (3, 4)"), (x.long(), x, "holds int64 values where float32"),
        (x / 0, x, "divided by zero"), (x * 0.9, x, "first at [0, 0]"), (x > 0, x, "holds bool"),
        (3.5, 3.0, "is 3.5 where 3 was expected"), ([1, 2], [1, 3], "first at [1]"), ([1], [1, 3], "1 entries where 2"),
        (x, 3.0, "has shape"), ("a", [1], "of type str")],
    ids=lambda v: "")
def test_same_says_what_is_wrong(got, want, words):
    with pytest.raises(Wrong) as e:
        same(got, want, "the result")
    assert words in str(e.value)


def test_same_lets_pass_what_is_right():
    for got, want in (
        (x, x), (x.double(), x), (x, x.double()), (x + 1e-7, x), (3, 3.0), (torch.tensor(3.0), 3.0), ((1, 2), [1, 2]),
        ([], []), (torch.full((2,), torch.nan), torch.full((2,), torch.nan)), (x.requires_grad_(), x.detach())):
        same(got, want, "x")


def test_a_right_answer_is_right_even_if_listed_as_a_mistake(): same(x, x, "x", {"never said": x})


# progress

def test_progress_is_noted_only_in_a_workbook_and_only_once(tmp_path, monkeypatch):
    answer = right_answer("2.1")
    monkeypatch.chdir(tmp_path)
    assert said("2.1", answer)[0] and not list(tmp_path.iterdir())
    (tmp_path / "progress.json").write_text(json.dumps({"solved": {"2.2": "2020-01-01"}, "else": 1}))
    (tmp_path / "workshop").mkdir()
    monkeypatch.chdir(tmp_path / "workshop")
    said("2.1", answer), said("2.2", right_answer("2.2")), said("2.2", None)
    now = json.loads((tmp_path / "progress.json").read_text())
    assert set(now["solved"]) == {"2.1", "2.2"} and now["solved"]["2.2"] == "2020-01-01" and now["else"] == 1
    table = progress()
    assert (
        table.solved == now["solved"]
        and f"2 of {len(exercises())} exercises solved" in repr(table)
        and "✓ 2020-01-01" in table._repr_html_())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["progress.json"]  # no temporary file


def test_a_damaged_progress_file_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("", "[1]", '{"solved": 3}', "\x00"):
        (tmp_path / "progress.json").write_text(text)
        result, printed = said("2.1", right_answer("2.1"))
        assert result and "not noted down" in printed and (tmp_path / "progress.json").read_text() == text
        with pytest.raises(DiffnbError, match="cannot be read"):
            progress()


def test_all_exercises_are_listed_without_a_workbook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = progress()
    assert not table.solved and all(e.id in repr(table) and e.stars in table._repr_html_() for e in exercises())
    (odd := tmp_path / "my folder").mkdir()
    with pytest.raises(DiffnbError, match="is not a workbook.*diffnb workbook .[^ ]*my folder.$"):
        progress(odd)


# the learner's copy

@pytest.fixture(scope="module")
def books(tmp_path_factory):
    root = tmp_path_factory.mktemp("books")
    make_workbook(root / "learner"), make_workbook(root / "teacher", solutions=True)
    return root


def pages(book):
    return {p.relative_to(book).as_posix(): json.loads(p.read_text(encoding="utf-8")) for p in book.rglob("*.ipynb")}


def test_no_solution_is_left_anywhere(books):
    found = pages(books / "learner")
    assert {f"{n}.ipynb" for n in lessons} | {"index.ipynb", "progress.ipynb"} <= set(found) and not any(
        "checks" in n for n in found)
    for lesson in lessons:
        page, text = found[f"{lesson}.ipynb"], json.dumps(found[f"{lesson}.ipynb"], ensure_ascii=False)
        for ex in written(lesson).values():
            assert json.dumps(ex.solution, ensure_ascii=False)[1:-1] not in text and ex.solution not in "".join(
                source(c) for c in page["cells"])
        tags = [t for c in page["cells"] for t in c["metadata"].get("tags", [])]
        assert "solution" not in tags and tags.count("stub") == len(written(lesson))
        for c in page["cells"]:
            if CHECK.fullmatch(source(c).strip()) or "stub" in c["metadata"].get("tags", []):
                assert c["outputs"] == [] and c["execution_count"] is None
        nbformat.validate(nbformat.from_dict(page))


def test_solutions_stay_folded_if_asked_for_and_note_nothing(books):
    for lesson in lessons:
        cells = [
            c
            for c in pages(books / "teacher")[f"{lesson}.ipynb"]["cells"]
            if "solution" in c["metadata"].get("tags", [])]
        assert len(cells) == len(written(lesson)) and all(
            c["metadata"]["jupyter"]["source_hidden"] and "check(" not in source(c) for c in cells)


def test_links_of_the_copy_lead_somewhere(books):
    book = books / "learner"
    for name, page in pages(book).items():
        for target in re.findall(
            r"\]\(([^)#\s:]+\.(?:ipynb|png|md))",
            "".join(source(c) for c in page["cells"] if c["cell_type"] == "markdown")):
            assert ((book / name).parent / target).exists(), (name, target)


def edit(path, text="# mine"):
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["cells"][-1]["source"] = text
    path.write_text(json.dumps(nb), encoding="utf-8")


@pytest.fixture
def next_version(monkeypatch):
    "A new version of the course: every lesson says something more in its first cell."
    def publish(words):
        def changed(nb, solutions=False):
            nb = learners_page(nb, solutions)
            nb.cells[0].source += words
            return nb
        monkeypatch.setattr(workbook, "learners_page", changed)
    return publish


def test_nothing_that_a_learner_wrote_is_overwritten(tmp_path, next_version):
    book, mine = tmp_path / "book", tmp_path / "book" / "03_unet.ipynb"
    make_workbook(book)
    edit(mine)
    kept = mine.read_bytes()
    ran = json.loads((book / "04_train.ipynb").read_text())
    ran["cells"][1]["outputs"] = []
    (book / "04_train.ipynb").write_text(json.dumps(ran))
    state = json.loads((book / "progress.json").read_text())
    state["solved"] = {"3.1": "2026-01-01"}
    (book / "progress.json").write_text(json.dumps(state))
    next_version("\n\nSecond edition.")
    done = dict((name, what) for what, name in make_workbook(book))
    assert mine.read_bytes() == kept and done["03_unet.new.ipynb"] == "beside" and done["04_train.ipynb"] == "updated"
    assert (
        "Second edition." in (book / "04_train.ipynb").read_text()
        and "Second edition." in (book / "03_unet.new.ipynb").read_text())
    assert read_progress(book / "progress.json")["solved"] == {"3.1": "2026-01-01"}
    assert {what for what, _ in make_workbook(book)} == {"as it was", "kept"}
    next_version("\n\nThird edition.")  # the page beside was not touched: it is replaced
    make_workbook(book)
    assert "Third edition." in (book / "03_unet.new.ipynb").read_text() and mine.read_bytes() == kept
    edit(book / "03_unet.new.ipynb", "# mine too")
    kept2 = (book / "03_unet.new.ipynb").read_bytes()
    next_version("\n\nFourth edition.")
    make_workbook(book, solutions=True)
    assert mine.read_bytes() == kept and (book / "03_unet.new.ipynb").read_bytes() == kept2
    assert "Fourth edition." in (book / "03_unet.new2.ipynb").read_text()


def test_damaged_and_deleted_pages(tmp_path, next_version):
    book = tmp_path / "book"
    make_workbook(book)
    (book / "01_data.ipynb").write_bytes(b"\xff not a notebook")
    (book / "02_schedule.ipynb").unlink()
    next_version(" More.")
    done = dict((name, what) for what, name in make_workbook(book))
    assert (
        (book / "01_data.ipynb").read_bytes() == b"\xff not a notebook"
        and done["01_data.new.ipynb"] == "beside"
        and done["02_schedule.ipynb"] == "new")


def test_an_interrupted_workbook_can_be_finished(tmp_path, monkeypatch):
    book, put, count = tmp_path / "book", workbook._put, []
    def dies(*a):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return put(*a)
    monkeypatch.setattr(workbook, "_put", dies)
    with pytest.raises(KeyboardInterrupt):
        make_workbook(book)
    monkeypatch.setattr(workbook, "_put", put)
    assert {what for what, _ in make_workbook(book)} == {"as it was", "new"}
    assert not list(book.glob("*.new*"))


def test_folders_that_are_no_workbook_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DiffnbError, match="not empty"):
        make_workbook(tmp_path)
    with pytest.raises(DiffnbError, match="is a file"):
        make_workbook(tmp_path / "thesis.txt")
    with pytest.raises(DiffnbError, match="not empty"):
        make_workbook(NBS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def run_all(path):
    return subprocess.run(
        [
            sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level=ERROR",
            path.name],
        cwd=path.parent, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def printed(page): return "".join("".join(o.get("text", "")) for c in page["cells"] for o in c.get("outputs", []))


@pytest.mark.slow
def test_run_all_of_a_learners_page(books, tmp_path):
    book = tmp_path / "book"
    make_workbook(book)
    page = json.loads((book / "02_schedule.ipynb").read_text())
    first = next(i for i, c in enumerate(page["cells"]) if re.search(r"^## Exercises", source(c), re.M))
    page["cells"] = [
        c
        for i, c in enumerate(page["cells"])
        if i >= first or c["cell_type"] == "code" and (imports_only(source(c)) or "#| export" in source(c))]
    # one kernel for both: it takes seconds to start
    page["cells"] += json.loads((book / "progress.ipynb").read_text())["cells"]
    (book / "02_schedule.ipynb").write_text(json.dumps(page))
    done = run_all(book / "02_schedule.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    page = json.loads((book / "02_schedule.ipynb").read_text())
    text = printed(page)
    assert text.count("not yet") == len(written("02_schedule")) - 1 and text.count("✗") == 1 and "✓" not in text
    assert f"0 of {len(exercises())} exercises solved" in "".join(page["cells"][-1]["outputs"][0]["data"]["text/html"])
    assert read_progress(book / "progress.json")["solved"] == {}


@pytest.mark.skipif("DIFFNB_RUN_ALL" not in os.environ, reason="minutes: set DIFFNB_RUN_ALL=1")
@pytest.mark.parametrize("name", ["index", *lessons, "progress"])
def test_run_all_of_every_page(books, name):
    done = run_all(books / "learner" / f"{name}.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
