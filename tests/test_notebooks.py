"""What every notebook promises, checked on the stored files; and the stored outputs of the quick ones against their
code.

Each rule is a function that yields what is wrong with a notebook, so that `test_a_planted_fault_is_seen` can try it on
faults."""
import base64, functools, html, importlib, io, re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
from PIL import Image

from diffnb.workshop.check import exercises

root = Path(__file__).resolve().parent.parent
paths = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
names = [str(p.relative_to(root / "nbs").with_suffix("")) for p in paths]

def outputs(nb):
    "(number of the cell, output) for all stored outputs."
    return [(i, o) for i, c in enumerate(nb.cells) if c.cell_type == "code" for o in c.outputs]

def text(output):
    "All that an output says, pictures left out."
    parts = [
        output.get("text", ""),
        *(v for k, v in sorted(output.get("data", {}).items()) if k.startswith("text/") and isinstance(v, str))]
    return re.sub(r"data:[\w/+]+;base64,[\w+/=\s]+", "", "\n".join(parts))

# ---- the rules ----

def skipped(nb, path):
    "A cell that no test runs; a directive other than these does nothing we want."
    for i, c in enumerate(nb.cells):
        for directive in (
            re.findall(r"^[ \t]*#[ \t]*\|[ \t]*([\w:. ]+)", c.source, re.M) if c.cell_type == "code" else []):
            if directive.split()[0] not in ("export", "exporti", "default_exp"):
                yield f"cell {i}: the directive `{directive.strip()}`"
        if c.cell_type == "raw" or re.search(r"^skip_exec:", c.source, re.M):
            yield f"cell {i}: nbdev_test may skip this"

def machine(nb, path):
    "What works on one machine only."
    here = r"(?:(?<![\w.:/<])|file://)/(?:home|root|tmp|work|Users|mnt|opt|var|usr|content|kaggle|data|etc|private)/|\b[A-Z]:\\\\?\w"
    for i, c in enumerate(nb.cells):
        if c.cell_type == "code" and re.search(r"\.cuda\(", c.source):
            yield f"cell {i}: .cuda()"
        if found := re.search(here, c.source):
            yield f"cell {i}: an absolute path at {c.source[found.start():][:40]!r}"
    for i, o in outputs(nb):
        if found := re.search(here, text(o)):
            yield f"cell {i}: an absolute path in the output, at {text(o)[found.start():][:40]!r}"

def noise(nb, path):
    "Warnings and errors; a lesson that shows an error catches it and prints the message."
    for i, o in outputs(nb):
        if o.output_type == "error":
            yield f"cell {i}: {o.ename}: {o.evalue[:80]}"
        if o.get("name") == "stderr":
            yield f"cell {i}: stderr: {o.text[:80]}"

def speechless(nb, path):
    "Figures without alt text: as `<img alt>` in HTML, or in the metadata of a stored picture."
    for i, o in outputs(nb):
        for kind in (k for k in o.get("data", {}) if k.startswith("image/")):
            if not o.metadata.get(kind, {}).get("alt", "").strip() and "<img" not in o.data.get("text/html", ""):
                yield f"cell {i}: a picture without alt text"
        for tag in re.findall(r"<img\b[^>]*>", o.get("data", {}).get("text/html", "")):
            alt = re.search(r"\balt=(\"[^\"]*\"|'[^']*')", tag)
            if not alt or len(alt[1].strip("\"' ")) < 10:
                yield f"cell {i}: an <img> without alt text that says something"

def unmade(nb, path):
    "A page that was never run, or whose outputs were lost."
    prints = [
        i
        for i, c in enumerate(nb.cells)
        if c.cell_type == "code" and re.search(r"^(?:print|show_images|you_are_here)\(", c.source, re.M)]
    if prints and not outputs(nb):
        yield f"no outputs at all, though cell {prints[0]} makes some: execute the notebook"

def astray(nb, path):
    "Links, modules and lessons that are named but not there."
    for i, c in enumerate(nb.cells):
        for wrong in dead(c.source if c.cell_type == "markdown" else "", path.parent):
            yield f"cell {i}: {wrong}"
        for lesson in re.findall(r"\b(\d\d_[a-z]\w*)\b", c.source):
            if not (root / "nbs" / f"{lesson}.ipynb").exists():
                yield f"cell {i}: names the lesson {lesson}, which is not there"
        if c.cell_type == "markdown":
            for dotted in re.findall(r"`(diffnb(?:\.\w+)+)[`(]", c.source):
                if not exists(dotted):
                    yield f"cell {i}: `{dotted}` is not there"

formulas, code = r"\$\$.*?\$\$|\$[^$\n]+\$", r"^```.*?^```|`[^`\n]*`"

def without(what, markdown): return re.sub(what, "", markdown, flags=re.S | re.M)

def dead(markdown, folder):
    "Relative links in Markdown that lead to no file or heading."
    markdown = without(code, markdown)
    for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", markdown) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", markdown):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            continue
        to = folder / unquote(url.path)
        if url.path and not to.exists():
            yield f"no such file: {target}"
        elif url.fragment and to.suffix == ".ipynb" and unquote(url.fragment) not in headings(to):
            yield f"no such heading: {target}"

@functools.cache
def headings(path):
    "The anchors of a notebook's headings, as JupyterLab makes them."
    return {
        h.strip().replace(" ", "-")
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "markdown"
        for h in re.findall(r"^#+ (.*)$", c.source, re.M)}

@functools.cache
def exists(dotted):
    "Whether a name such as diffnb.sample.ddim can be imported."
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True

# The names of the table in 02_schedule against those that other libraries and papers use. A cell that speaks of such a
# library or paper may name them, and so may an attribute (`scheduler.alphas_cumprod`): it is the other library's.
compared = re.compile(
    r"diffusers|DDIMScheduler|DDPMScheduler|prediction_type|stable diffusion|improved-diffusion|paper", re.I)
terms = {
    r"(?<!\.)\balphas?_?cumprod\w*|\balphas_bar\b|\balphabar\b|\balpha_hat\b": "alpha_bar",
    r"(?<!\\)\bx_0\b|\bx_start\b|\bx_clean\b": "x0",
    r"\bxt\b|\bx_noisy\b|\bnoisy_images?\b": "x_t",
    r"(?<!\\)\bepsilon[- ]prediction\b|\bnoise[- ]prediction\b|\bepsilon_?pred\w*|\beps-prediction": "eps prediction",
    r"\bv-prediction|\bv_pred\w*|\bvelocity prediction": "v prediction",
    r"\bx0-prediction|\bsample prediction": "x0 prediction",
    r"\bguidance (?:scale|weight|strength)\b|\bguidance_(?:weight|strength)\b|\bcfg_scale\b": "guidance_scale",
    r"\b[Cc]lassifier free\b": "classifier-free",
    r"\bnum_(?:inference_)?steps\b|\bsampling_steps\b": "steps",
    r"\b[Tt]ime[- ]steps?\b|\bnum_timesteps\b": "timestep, T",
    r"\bU-[Nn]et\b|\bUnet\b": "UNet",
    r"\b[Ff]rechet distance\b": "Fréchet distance",
}

def misnamed(nb, path):
    "Terms spelled otherwise than in the table of 02_schedule."
    for i, c in enumerate(nb.cells):
        if compared.search(c.source):
            continue
        for wrong in spelled(without(formulas, c.source)):
            yield f"cell {i}: {wrong}"

def spelled(text):
    for pattern, right in terms.items():
        for found in re.finditer(pattern, text):
            yield f"{found[0]!r}, here called {right}"

def raw(nb, path):
    "Mathematics that no page draws, because it stands outside of dollar signs and of code."
    for i, c in enumerate(nb.cells):
        if c.cell_type != "markdown":
            continue
        for found in re.finditer(
            r"\w*[_^]\{[^}\n]*\}?|\\(?:frac|sqrt|alpha|bar|epsilon|cdot|mathbb)\b",
            without(f"{formulas}|{code}", c.source)):
            yield f"cell {i}: {found[0]!r} outside of $...$"

# of a lesson (formulas and code are not counted as words), and its longest stretch without a figure or a table
CELLS, WORDS, STRETCH = 100, 3000, 15

def tiring(nb, path):
    "A lesson too long for one sitting, or too long without anything to look at."
    if not re.match(r"\d\d_", path.stem) or path.parent.name != "nbs":
        return
    read = [without(f"{formulas}|{code}", c.source) for c in nb.cells if c.cell_type == "markdown"]
    words = sum(len(re.findall(r"\w[\w'’-]*", text)) for text in read)
    if len(nb.cells) > CELLS or words > WORDS:
        yield f"{len(nb.cells)} cells and {words:,} words; at most {CELLS} and {WORDS:,}"
    last = -1
    for i, c in enumerate([*nb.cells, None]):
        if c is None or seen(c):
            if i - last - 1 > STRETCH:
                yield f"cells {last + 1} to {i - 1}: {i - last - 1} without a figure or table; at most {STRETCH}"
            last = i

def seen(cell):
    "Is there a figure or a table to look at?"
    if cell.cell_type == "markdown":
        return re.search(r"^\|[ :-]+\|", cell.source, re.M)
    return any(k.startswith("image/") or k == "text/html" for o in cell.get("outputs", ()) for k in o.get("data", {}))

def deaf(nb, path):
    "A stream replaced by None: JupyterLab flushes both when a cell displays something, and fails."
    for i, c in enumerate(nb.cells):
        if c.cell_type == "code" and re.search(r"redirect_std(?:out|err)\(None\)|sys\.std(?:out|err) = None", c.source):
            yield f"cell {i}: a stream is None; redirect it to io.StringIO()"

rules = [skipped, machine, noise, speechless, unmade, astray, misnamed, raw, tiring, deaf]

@pytest.mark.parametrize("rule", rules, ids=lambda r: r.__name__)
@pytest.mark.parametrize("path", paths, ids=names)
def test_rule(path, rule):
    assert not list(rule(nbformat.read(path, 4), path))

@pytest.mark.parametrize("path", paths, ids=names)
def test_size_and_form(path):
    assert path.stat().st_size < 1_000_000
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"                            # opens with the kernel that everyone has
    first = next(c for c in nb.cells if not c.source.startswith("#| default_exp"))
    assert first.cell_type == "markdown" and first.source.startswith("# "), "a page begins with its title"

def test_readme():
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert not list(dead(readme, root)) and not list(spelled(readme))
    for dotted in re.findall(r"`(diffnb(?:\.\w+)+)[`(]", readme):
        assert exists(dotted), dotted
    assert f"There are {len(exercises())} exercises" in readme

def test_docstrings_name_lessons_that_are_there():
    for path in (root / "diffnb").rglob("*.py"):
        for lesson in set(re.findall(r"\b(\d\d_[a-z]\w*)\b", path.read_text(encoding="utf-8"))):
            assert (root / "nbs" / f"{lesson}.ipynb").exists(), f"{path.name} names {lesson}"

# ---- stored outputs match their code ----

# Numbers may differ by one in their last printed place, or by a hundredth: another processor rounds otherwise. On the
# machine
# that stored them they are equal. Not compared: what is measured in time, and ids and addresses that change in every
# run.
number = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")
volatile = re.compile(
    r"(?<![\w.])[\d.,]+\s*(?:s|ms|µs|us|seconds?|minutes?|images/s|it/s|s/it|[MGk]i?B/s)\b|0x[0-9a-f]{6,}|"
    r"\b[0-9a-f]{32}\b|\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?")

def same_text(stored, now):
    "None, or where two texts differ."
    stored, now = (volatile.sub("…", t).splitlines() for t in (stored, now))
    if len(stored) != len(now):
        return f"{len(stored)} lines stored, {len(now)} made"
    for a, b in zip(stored, now):
        words = [re.sub(r"\s+", " ", number.sub("#", t)).strip() for t in (a, b)]
        if words[0] != words[1]:
            return f"stored {a!r}, made {b!r}"
        for x, y in zip(number.findall(a), number.findall(b)):
            digits, _, power = x.replace(",", "").lower().partition("e")
            unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
            x, y = float(x.replace(",", "")), float(y.replace(",", ""))
            if abs(x - y) > max(1.01 * unit if "." in digits or power else 0, 0.01 * abs(x)):
                return f"stored {a!r}, made {b!r}"

def pixels(data): return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float)

def same_picture(stored, now):
    "None, or how two PNG files differ: fonts and rounding move a few pixels, another curve moves many."
    stored, now = pixels(stored), pixels(now)
    if np.abs(np.subtract(stored.shape, now.shape)).max() > 12:
        return f"a picture of {stored.shape} stored, {now.shape} made"
    h, w = np.minimum(stored.shape, now.shape)
    if (off := np.abs(stored[:h, :w] - now[:h, :w]).mean()) > 6:
        return f"pictures differ by {off:.1f} of 255 levels on average"

def said(cell):
    "(text printed and shown, pictures) of a cell; how a stream was cut into pieces is chance."
    pictures, texts = [], []
    for o in cell.outputs:
        data = o.get("data", {})
        source = data.get("text/html", "")
        pictures += re.findall(r"data:image/png;base64,([\w+/=]+)", source) + (
            [data["image/png"]] if "image/png" in data else [])
        texts.append(
            text(o)
            if "<img" not in source
            else " ".join(html.unescape(t) for t in re.findall(r"alt=\"([^\"]*)\"", source)))
    return "".join(t if o.output_type == "stream" else f"\n{t}\n" for t, o in zip(texts, cell.outputs)), pictures

def differences(stored, now):
    "What differs between the outputs of two runs of a notebook."
    for i, (a, b) in enumerate(zip(stored.cells, now.cells, strict=True)):
        if a.cell_type != "code":
            continue
        (text_a, pictures_a), (text_b, pictures_b) = said(a), said(b)
        if wrong := same_text(text_a.strip(), text_b.strip()):
            yield f"cell {i}: {wrong}"
        if len(pictures_a) != len(pictures_b):
            yield f"cell {i}: {len(pictures_a)} pictures stored, {len(pictures_b)} made"
        for p, q in zip(pictures_a, pictures_b):
            if wrong := same_picture(p, q):
                yield f"cell {i}: {wrong}"

def execute(nb, folder):
    "A copy of the notebook, run in an empty folder: it needs no file that another notebook made."
    from nbclient import NotebookClient
    nb = nbformat.from_dict(nb)
    for c in nb.cells:
        if c.cell_type == "code":
            c.outputs = []
    NotebookClient(nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return nb

# Neither timings, nor training, whose last digits differ from processor to processor, nor (index) what the machine is;
# nbdev_test runs the others.
same_everywhere = [
    "01_data", "02_schedule", "workshop/check", "workshop/data_reader", "workshop/interchange", "workshop/widgets",
    "workshop/workbook"]

@pytest.mark.slow
@pytest.mark.parametrize("name", same_everywhere)
def test_stored_outputs_match_their_code(name, tmp_path):
    stored = nbformat.read(root / "nbs" / f"{name}.ipynb", 4)
    assert not list(differences(stored, execute(stored, tmp_path))), (
        f"execute nbs/{name}.ipynb again and keep its outputs")

# ---- faults, planted ----

# ---- the glossary

chapters = [path for path in paths if path.parent.name == "nbs" and path.stem != "index"]

def prose(path):
    "Markdown cells of a page, without code, links, headings and tables."
    drop = f"{formulas}|{code}|" + r"\[[^\]\n]*\]\([^)\n]*\)|^#.*$|^\|.*$"
    return [(c.source, without(drop, c.source)) for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]

def too_early(term, page, texts):
    "Where a term is used before its page has it in bold; texts: {page: (source, prose) of each cell}."
    word = re.compile(rf"(?<![\w-]){re.escape(term)}(?![\w-])", re.I if term == term.lower() else 0)
    for name, cells in texts.items():
        for source, text in cells:
            if name == page and re.search(rf"\*\*{re.escape(term)}\*\*", source, re.I):
                return
            if word.search(text) and page not in source: # a link to that page is a promise, and no use
                yield f"{term}, introduced in {page}, is used before in {name}: {text[:80]!r}"
    yield f"{term} is not introduced in {page}: nowhere in bold"

def test_glossary():
    rows = [
        re.findall(r"^\| (.+?) \| .+ \| \[(\w+)\]\(\w+\.ipynb\) \|$", c.source, re.M)
        for c in nbformat.read(root / "nbs/index.ipynb", 4).cells
        if c.source.startswith("## Glossary")]
    texts = {path.stem: prose(path) for path in chapters}
    assert len(rows) == 1 and len(rows[0]) > 40
    assert [page for _, page in rows[0]] == sorted(page for _, page in rows[0])
    assert not [wrong for term, page in rows[0] for wrong in too_early(term, page, texts)]

def test_a_term_used_too_early_is_seen():
    def early(*cells):
        return list(too_early("simple loss", "02_b", {"01_a": [(cells[0],) * 2], "02_b": [(c, c) for c in cells[1:]]}))
    assert early("the simple loss", "The **simple loss** is") and early("", "a simple loss", "The **Simple loss** is")
    assert early("", "a simple loss") and early("simple loss", "")
    assert not early("simple loss, see 02_b", "The **simple loss** is")
    assert not early("simple losses", "**simple loss**")


def notebook(source="1", cell="code", **output):
    make = (
        nbformat.v4.new_code_cell
        if cell == "code"
        else nbformat.v4.new_markdown_cell
        if cell == "markdown"
        else nbformat.v4.new_raw_cell)
    c = make(source)
    if output:
        c.outputs = [nbformat.v4.new_output(**output)]
    return nbformat.v4.new_notebook(cells=[c])

def shown(**data): return dict(output_type="display_data", data={k.replace("_", "/"): v for k, v in data.items()})
def printed(text, name="stdout"): return dict(output_type="stream", name=name, text=text)

faults = [
    (skipped, notebook("#| eval: false\nx = 1")), (skipped, notebook("x = 1\n#|eval:false")),
    (skipped, notebook("#| hide\nx")), (skipped, notebook("#| slow\nx")),
    (skipped, notebook("---\nskip_exec: true\n---", "raw")), (skipped, notebook("# T\n\nskip_exec: true", "markdown")),
    (machine, notebook("model.cuda()")), (machine, notebook("u = 'file:///home/me/x'")),
    (machine, notebook("x = open('/home/me/x.png')")), (machine, notebook("see /Users/me/x", "markdown")),
    (machine, notebook(**printed("saved /tmp/abc/x.png"))), (machine, notebook("p = 'C:\\\\data'")),
    (machine, notebook(**shown(text_plain="PosixPath('/root/x/y')"))),
    (noise, notebook(**printed("UserWarning: ...", "stderr"))),
    (noise, notebook(output_type="error", ename="ValueError", evalue="no", traceback=[])),
    (speechless, notebook(**shown(image_png="AAAA", text_plain="<Figure>"))),
    (speechless, notebook(**shown(text_html='<img src="data:image/png;base64,AA">'))),
    (speechless, notebook(**shown(text_html='<img alt="" src="x">'))),
    (speechless, notebook(**shown(text_html='<img alt="figure" src="x">'))), (unmade, notebook("x = 1\nprint(x)")),
    (astray, notebook("[a](99_none.ipynb)", "markdown")),
    (astray, notebook("[a](02_schedule.ipynb#No-such)", "markdown")), (astray, notebook("![a](x.png)", "markdown")),
    (astray, notebook("as 02_schedules says", "markdown")), (astray, notebook("`diffnb.sample.dddim`", "markdown")),
    (astray, notebook("# see 12_more")),
    *(
        (misnamed, notebook(t, "markdown"))
        for t in (
            "`alphas_cumprod` falls", "the image x_0", "epsilon-prediction", "v-prediction", "the guidance scale",
            "classifier free", "a time step", "the U-Net", "the Frechet distance")),
    (raw, notebook("the slightly less noisy x_{t-1}", "markdown")), (raw, notebook("about \\sqrt(2)", "markdown")),
    *(
        (misnamed, notebook(t))
        for t in ("alphas_cumprod = 1", "x_start = x", "f(num_inference_steps=5)", "xt = 1", "# a U-Net"))]

figure = notebook(**shown(text_html='<img alt="a curve that falls" src="x">')).cells[0]
table = notebook("| a | b |\n|---|---|\n| 1 | 2 |", "markdown").cells[0]

def page(*cells): return nbformat.v4.new_notebook(cells=list(cells))
plain = notebook().cells[0]
faults += [
    (tiring, page(*[plain, figure] * 51)), (tiring, notebook("word " * 3001, "markdown")),
    (tiring, page(table, *[plain] * 16)), (tiring, page(*[plain] * 16, figure)),
    (tiring, page(figure, *[plain] * 16, table))]

@pytest.mark.parametrize("rule, nb", faults, ids=[f"{r.__name__}{i}" for i, (r, _) in enumerate(faults)])
def test_a_planted_fault_is_seen(rule, nb):
    assert list(rule(nb, root / "nbs" / "01_data.ipynb"))

@pytest.mark.parametrize(
    "rule, nb",
    [
        (skipped, notebook("#| export\nx = 1")),
        (machine, notebook("x / tmp / y, 'runs/tmp/a', 'https://a.org/data/x'")),
        (noise, notebook(**printed("must be 3"))),
        (speechless, notebook(**shown(text_html='<img alt="a curve that falls" src="x">'))),
        (astray, notebook("[a](02_schedule.ipynb)", "markdown")),
        (astray, notebook("`diffnb.sample.ddim` in 05_sample", "markdown")),
        (misnamed, notebook("diffusers says alphas_cumprod", "markdown")),
        (misnamed, notebook("$x_0$ and x0", "markdown")),
        (tiring, page(*[plain] * 15, figure, *[plain] * 15, table, *[plain] * 15)),
        (raw, notebook("$x_{t-1}$, and `x_{t}` in LaTeX", "markdown")),
        (misnamed, notebook("same(lin.alphas_cumprod, linear.alpha_bar)"))])
def test_what_is_right_passes(rule, nb):
    assert not list(rule(nb, root / "nbs" / "01_x.ipynb"))

@pytest.mark.parametrize(
    "stored, now, equal",
    [
        ("loss 0.031 after 5", "loss 0.032 after 5", True), ("loss 0.031", "loss 0.041", False),
        ("34 steps", "30 steps", False), ("a 1", "b 1", False), ("12,345 images", "12,346 images", True),
        ("1.2e-05", "1.3e-05", True), ("1.2e-05", "1.2e-03", False), ("took 0.5 s", "took 7.1 s", True),
        ("1\n2", "1", False)])
def test_comparing_texts(stored, now, equal):
    assert (same_text(stored, now) is None) == equal

@pytest.mark.slow
def test_comparing_runs(tmp_path):
    cells = [
        "import matplotlib.pyplot as plt\nprint(2 + 2)", "plt.plot([0, 1], [0, 1]);",
        "import pathlib\nassert not list(pathlib.Path().iterdir())"]
    nb = execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), tmp_path)
    assert not list(differences(nb, nb))
    other = nbformat.from_dict(nb)
    other.cells[0].source, other.cells[1].source = cells[0].replace("2 + 2", "2 + 3"), "plt.imshow([[0, 1], [1, 0]]);"
    found = list(differences(nb, execute(other, tmp_path)))
    assert any(f.startswith("cell 0: stored '4', made '5'") for f in found) and any(
        "cell 1: " in f and "picture" in f for f in found)
    other.cells[1].outputs = []
    assert any(f == "cell 1: 1 pictures stored, 0 made" for f in differences(nb, other))
