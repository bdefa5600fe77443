"""Put each bug of the catalogue into its lesson and run the lesson: an assert on the page must fail.

    python tests/mutants/run.py                   the whole catalogue, two pages at a time (part of make test-all)
    python tests/mutants/run.py 05_sample ...     only these lessons, or only the bugs with these ids
    python tests/mutants/run.py --list            what there is

One process runs a lesson's cells from the top, unchanged. Before a cell that a bug lives in, it forks: the child runs
the cell with the bug in it, then the cells below, until one fails. So nothing is run twice but what a bug can change.
The process itself goes on to the last cell that killed a bug: a kill counts if the same cell passes without the bug. A
bug that survives its lesson then meets the tests: they run against a copy of the package with the bug in it. Nothing is
written into the repository. Exit code: 0 if every bug was killed; 1 if one survived; 2 if a lesson or a test fails
without any bug. """
import argparse, json, os, re, resource, select, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = {"AssertionError": "assert", "DiffnbError": "DiffnbError"}  # whatever else ends a lesson is a crash


# ---- the lesson as a list of cells

def cells(path): # a notebook -> (number, source, exported) of each code cell of the lesson; exercises are none of it
    found, exercises = [], False
    for i, c in enumerate(json.loads(Path(path).read_text())["cells"]):
        source = "".join(c["source"])
        headings = re.findall(r"^## (.*)$", source, re.M) if c["cell_type"] == "markdown" else []
        if headings:
            exercises = headings[-1].startswith("Exercises")  # they end at the next heading of their own level
        if exercises:
            continue
        tags = set(c["metadata"].get("tags", ()))
        if c["cell_type"] != "code" or tags & {"stub", "solution"} or re.search(r'\bcheck\("\d+\.\d+"', source):
            continue
        found.append((i, source, bool(re.search(r"^#\| *exporti?\b", source, re.M))))
    return found

def place(bug, lesson): # Bug, cells -> number of the cell it changes; ValueError if that is not exactly one place
    hits = {i: source.count(bug.old) for i, source, exported in lesson if exported and bug.old in source}
    if sum(hits.values()) != 1:
        raise ValueError(f"{bug.id}: its text occurs {sum(hits.values())} times in the exported cells of {bug.lesson}")
    return next(iter(hits))


# ---- one lesson, in a process of its own

def notebook_shell():
    "An IPython shell that shows nothing, keeps no history and starts no thread, so that it can be forked."
    import matplotlib
    matplotlib.use("Agg")
    import torch, tqdm
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0
    options = Config()
    options.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=options)
    shell.enable_gui = shell.showtraceback = shell.showsyntaxerror = lambda *_, **__: None
    shell.ast_node_interactivity = "none"                              # a cell's last value is not drawn
    return shell

def run_cell(shell, source): # -> the exception that ended it, or None
    result = shell.run_cell(source, store_history=False)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    return result.error_before_exec or result.error_in_exec

def with_bug(shell, bug, lesson, where): # in the child: the fate of one bug
    for i, source, _ in lesson:
        if i < where:
            continue
        if error := run_cell(shell, source.replace(bug.old, bug.new) if i == where else source):
            return {"by": "lesson", "kind": KINDS.get(type(error).__name__, "crash"), "cell": i, "own_cell": i == where,
                    "text": f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]}
    return {"by": None}

def forked(task, seconds): # -> what `task()` returns, from a child that is stopped after so many seconds of work
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            # of the processor, not of a busy machine's clock
            resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, resource.RLIM_INFINITY))
            told = json.dumps(task())
        except BaseException as e:
            told = json.dumps({"by": "lesson", "kind": "crash", "cell": -1, "own_cell": False, "text": repr(e)[:200]})
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    ready = select.select([read], [], [], 20 * seconds)[0]
    told = os.read(read, 65536) if ready else b""
    os.close(read)
    try:
        os.killpg(child, signal.SIGKILL)  # with whatever it started; gone already as a rule
    except OSError:
        pass
    status = os.waitpid(child, 0)[1]
    if told:
        return json.loads(told)
    if not ready or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"by": None, "text": f"not noticed within {seconds:.0f} s"}
    return {"by": "lesson", "kind": "crash", "cell": -1, "own_cell": False, "text": "the process died"}

def files_as_before(folder, copy): # undo what a child did to files that the lesson still needs
    shutil.rmtree(folder)
    shutil.copytree(copy, folder, symlinks=True)

def lesson_process(notebook, ids, seconds, catalogue): # prints one line of JSON for each bug, and one for the lesson
    sys.path.insert(0, str(HERE))
    bugs = [b for b in load(catalogue) if b.id in ids]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)      # what lessons print is not for here
    lesson, shell = cells(notebook), notebook_shell()
    todo, start = {b.id: place(b, lesson) for b in bugs}, time.time()
    spent, files, copy = 0.0, Path(tempfile.gettempdir()), Path(tempfile.gettempdir() + ".copy")
    furthest = max(todo.values())
    for i, source, _ in lesson:
        if i > furthest:
            break                                         # nbdev_test runs the rest
        if i in todo.values():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(files, copy, symlinks=True)
        for bug in bugs:
            if todo[bug.id] != i:
                continue
            before = time.time()
            fate = (
                forked(lambda: with_bug(shell, bug, lesson, i), seconds)
                if bug.page
                else {"by": None, "text": "not of this page"})
            files_as_before(files, copy)
            spent += time.time() - before
            if fate["by"]:
                furthest = max(furthest, fate["cell"] if fate["cell"] >= 0 else lesson[-1][0])
            out.write(json.dumps({"id": bug.id, "seconds": time.time() - before, **fate}) + "\n")
        if error := run_cell(shell, source):
            out.write(
                json.dumps(
                    {"failed": f"{Path(notebook).name}, cell {i}, without any bug: {type(error).__name__}: {error}"})
                + "\n")
            return
    out.write(json.dumps({"lesson": str(notebook), "seconds": time.time() - start - spent}) + "\n")


# ---- the tests, against a copy of the package

def environment(**more):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return (
        clean
        | dict(
            OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg", CUDA_VISIBLE_DEVICES="",
            PYTHONDONTWRITEBYTECODE="1")
        | more)

def run_tests(bug, package, root=ROOT): # Bug or None, and the tests as a string -> (passed, what pytest said last)
    with tempfile.TemporaryDirectory() as d:
        copy = shutil.copytree(package, Path(d) / "copy" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        if bug.old:
            module = copy / f"{bug.module}.py"
            text = module.read_text()
            if text.count(bug.old) != 1:
                raise SystemExit(
                    f"{bug.id}: its text occurs {text.count(bug.old)} times in {module.name}; nbdev_export?")
            module.write_text(text.replace(bug.old, bug.new))
        env, told = environment(PYTHONPATH=str(copy.parent)), Path(d) / "told"
        (copy.parent / "told_by_pytest.py").write_text(
            f"import sys\ndef pytest_sessionfinish():\n    if m := sys.modules.get({package.name!r}): "
            f"open({str(told)!r}, 'w').write(m.__file__)\n")
        first, *rest = bug.tests.split(" ", 1)
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "told_by_pytest",
                "--no-header", str(root / "tests" / first),
                *(["-k", rest[0].removeprefix("-k ").strip("'\"")] if rest else [])],
            cwd=d, env=env, capture_output=True, text=True,
            timeout=1800)
        if done.returncode not in (0, 1):
            raise SystemExit(f"tests/{bug.tests} did not run: {(done.stdout + done.stderr).strip()[-300:]}")
        if told.exists() and not told.read_text().startswith(str(copy)):
            raise SystemExit(f"tests/{bug.tests} imported {told.read_text()}, not the copy with the bug")
        failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.M)
        return done.returncode == 0, failed[0] if failed else (done.stdout + done.stderr).strip().split("\n")[-1][:150]


# ---- all of it

def load(path):
    import importlib.util
    spec = importlib.util.spec_from_file_location("mutants_catalogue", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.BUGS

def run(bugs, catalogue, notebooks, package, seconds, workers, say):
    # -> (fate of each bug by id, seconds of each lesson by name)
    fates, lessons, broken = {}, {}, []
    def one(name):
        ids = [b.id for b in bugs if b.lesson == name]
        with tempfile.TemporaryDirectory() as d:
            os.mkdir(f"{d}/files")
            p = subprocess.Popen(
                [
                    sys.executable, str(HERE / "run.py"), "--process", str(notebooks / f"{name}.ipynb"), "--catalogue",
                    str(catalogue), "--seconds", str(seconds), *ids],
                cwd=d, env=environment(TMPDIR=f"{d}/files", PYTHONPATH=str(package.resolve().parent)),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True)
            for line in p.stdout:
                fact = json.loads(line)
                if "failed" in fact:
                    broken.append(fact["failed"])
                elif "lesson" in fact:
                    lessons[name] = fact["seconds"]
                else:
                    fates[fact["id"]] = fact
                    say(fact)
            wrong = p.stderr.read()
            p.wait()
            if name not in lessons and not broken:
                broken.append(f"{name}: {wrong.strip()[-800:] or 'its process died'}")
    names = sorted({b.lesson for b in bugs}, key=lambda n: -sum(b.lesson == n for b in bugs))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, names))
    if broken:
        raise SystemExit("\n".join(broken))

    left = [b for b in bugs if fates[b.id]["by"] is None and b.tests]
    def tested(bug):
        before = time.time()
        passed, told = run_tests(bug, package)
        if not passed:
            fates[bug.id] |= {"by": "tests", "kind": "tests", "text": told}
        fates[bug.id]["seconds"] += time.time() - before
        say(fates[bug.id])
    clean = {b.tests: b._replace(old="", new="") for b in left}                    # without any bug they must pass
    with ThreadPoolExecutor(workers) as pool:
        for which, (passed, told) in zip(clean, pool.map(lambda b: run_tests(b, package), clean.values())):
            if not passed:
                broken.append(f"tests/{which} without any bug: {told}")
        if not broken:
            list(pool.map(tested, left))
    if broken:
        raise SystemExit("\n".join(broken))
    return fates, lessons

def table(bugs, fates):
    rows = [f"{'lesson':<13}{'bugs':>5}{'assert':>9}{'DiffnbError':>13}{'crash':>7}{'tests':>7}{'survived':>10}"]
    for name in [*sorted({b.lesson for b in bugs}), "all"]:
        mine = [fates[b.id] for b in bugs if name in (b.lesson, "all")]
        n = Counter(f.get("kind", "survived") for f in mine)
        rows.append(
            f"{name:<13}{len(mine):>5}{n['assert']:>9}{n['DiffnbError']:>13}{n['crash']:>7}{n['tests']:>7}{n['survived']:>10}"
        )
    return "\n".join(rows)

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("which", nargs="*", help="lessons or ids of bugs; none: all")
    p.add_argument("--catalogue", default=str(HERE / "catalogue.py"))
    p.add_argument("--notebooks", default=str(ROOT / "nbs"))
    p.add_argument("--package", default=str(ROOT / "diffnb"))
    p.add_argument(
        "--seconds", type=float, default=60,
        help="of processor time for a bug in its lesson; what is not noticed by then meets the tests")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--list", action="store_true")
    p.add_argument("--no-tests", action="store_true", help="only the lessons")
    p.add_argument("--process", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.process:
        return lesson_process(a.process, set(a.which), a.seconds, a.catalogue)
    bugs = [b for b in load(a.catalogue) if not a.which or b.id in a.which or b.lesson in a.which]
    if a.list:
        return print(
            "\n".join(f"{b.lesson:<12} {b.id:<28} {b.what}" + (f" [{b.seen}]" if b.seen else "") for b in bugs))
    if not bugs:
        raise SystemExit(f"no lesson and no bug is called {', '.join(a.which)}: --list shows them")
    if a.no_tests:
        bugs = [b._replace(tests="") for b in bugs]
    start, byid = time.time(), {b.id: b for b in bugs}
    def say(f):
        how = {
            None: "survived the lesson" if byid[f["id"]].tests else "SURVIVED",
            "lesson": f"killed by the lesson, {f.get('kind')}, cell {f.get('cell')}",
            "tests": "killed by tests"}[f["by"]]
        print(
            f"{f['seconds']:6.1f} s  {byid[f['id']].lesson:<12} {f['id']:<28} {how}: {f.get('text', '')}"[:190],
            flush=True)
    try:
        fates, lessons = run(bugs, a.catalogue, Path(a.notebooks), Path(a.package), a.seconds, a.workers, say)
    except SystemExit as e:
        print(f"\nno result, something is wrong without any bug:\n{e}", file=sys.stderr)
        sys.exit(2)
    print("\n" + table(bugs, fates))
    survived = [b for b in bugs if fates[b.id]["by"] is None]
    weak = [b for b in bugs if fates[b.id].get("own_cell")]
    for title, group in (("killed only by a crash of the cell that holds the bug", weak), ("survived", survived)):
        if group:
            print(f"\n{title}:\n" + "\n".join(f"  {b.lesson} {b.id}: {b.what}" for b in group))
    n = Counter(f["by"] for f in fates.values())
    print(
        f"\n{len(bugs)} bugs: {n['lesson']} killed by lessons, {n['tests']} by tests, {len(survived)} survived; "
        f"{time.time() - start:.0f} s (the lessons alone: {sum(lessons.values()):.0f} s)")
    sys.exit(bool(survived))

if __name__ == "__main__":
    main()
