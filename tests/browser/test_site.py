"""The course's static site: built as `make site` builds it, its links and pictures checked, then read in a browser.

The browser comes from conftest.py. Screenshots of failures: _site/failures/."""
import fcntl, functools, http.server, re, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow

root = Path(__file__).resolve().parents[2]
html = root / "_site" / "html"
lessons = sorted(p.stem for p in (root / "nbs").glob("[0-9]*.ipynb"))
sizes = {"phone": (390, 844), "desktop": (1280, 900)}

pytest.importorskip("myst_nb", reason="the site needs the packages of site_requirements")

# ---- the built files ----

class Page(HTMLParser):
    "What a page refers to, and what can be referred to in it."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.pictures, self.scripts, self._script = set(), [], [], [], [], False
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update(v for k in ("id", "name") if (v := attrs.get(k)))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") not in ("next", "prev", "index", "search", "canonical"):
            self.loads.append(attrs["href"])
        if tag != "a" and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "img":
            self.pictures.append(attrs)
        self._script = tag == "script"
    def handle_data(self, data):
        if self._script:
            self.scripts.append(data)
    def handle_endtag(self, tag): self._script = False

def broken(folder):
    """Every internal link, anchor and file in the pages of `folder` that leads nowhere, and all that comes from
    elsewhere."""
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in folder.rglob("*.html")
             if p.relative_to(folder).parts[0] != "_static"}                # templates of the theme
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        for kind, targets in (("link", page.links), ("file", page.loads)):
            for target in targets:
                url = urlsplit(target)
                if url.scheme == "data":
                    continue
                if url.scheme or url.netloc:
                    if kind == "file" or url.scheme not in ("https", "http", "mailto"):
                        yield f"{where}: loads {target[:100]}"
                    continue
                to = (path.parent / unquote(url.path)).resolve() if url.path else path
                if not to.is_file():
                    yield f"{where}: no such {kind}: {target}"
                elif url.fragment and to in pages and unquote(url.fragment) not in pages[to].ids:
                    yield f"{where}: no such place: {target}"
        for script in page.scripts:
            for address in re.findall(r"https?://[^\s\"'<>)]+", script):
                if "www.w3.org" not in address:
                    yield f"{where}: a script names {address}"
    for path in folder.rglob("*.css"):
        for target in re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s]+)", path.read_text(encoding="utf-8")):
            if target.startswith(("http:", "https:", "//")):
                yield f"{path.relative_to(folder)}: loads {target}"

@pytest.fixture(scope="session")
def built():
    "The site, built once: a second worker waits, and then finds nothing to do."
    html.parent.mkdir(exist_ok=True)
    with open(html.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, root / "site" / "build.py"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr                        # Sphinx runs with -W: a warning is an error
    return html

def test_links_and_pictures(built):
    assert not list(broken(built))

def test_every_lesson_has_its_page_and_figures(built):
    import nbformat
    for name in ("index", *lessons):
        page = Page((built / f"{name}.html").read_text(encoding="utf-8"))
        nb = nbformat.read(root / "nbs" / f"{name}.ipynb", 4)
        data = [o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])]
        figures = sum("image/png" in d for d in data) + sum(d.get("text/html", "").count("<img") for d in data)
        assert len(page.pictures) >= figures, (
            f"{name}: {len(page.pictures)} pictures on the page, {figures} figures stored")

def test_reference_names_everything_public(built):
    import importlib, inspect
    for page in (built / "api").glob("*.html"):
        text, module = page.read_text(encoding="utf-8"), importlib.import_module(f"diffnb.{page.stem}")
        for name in module.__all__:
            f = getattr(module, name)
            if inspect.isfunction(f) and f.__module__ == module.__name__:
                assert f">{name}<" in text, f"{page.name}: {name}"

def test_solutions_are_folded(built):
    assert not list((built / "workshop" / "checks").glob("*.html"))               # those pages are nothing but answers
    for path in built.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for cell in re.findall(r'<div class="cell tag_solution.{0,300}', text, re.S):
            assert "<details" in cell, path.name
        assert text.count("<details") == text.count("</details>"), f"{path.name}: a hint is not closed"

@pytest.mark.parametrize(
    "fault, message",
    [
        ('<a href="99_none.html">', "no such link"), ('<a href="02_schedule.html#none">', "no such place"),
        ('<img src="none.png">', "no such file"),
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn"),
        ('<link rel="stylesheet" href="//fonts.example.org/a.css">', "loads //fonts"),
        ('<script>import("https://cdn.example.org/x.js")</script>', "a script names")])
def test_the_check_sees(fault, message, tmp_path):
    (tmp_path / "02_schedule.html").write_text('<h1 id="here">')
    (tmp_path / "a.html").write_text(
        '<a href="02_schedule.html#here"><img '
        'src="data:image/png;base64,AA"><script>"http://www.w3.org/2000/svg"</script>')
    assert not list(broken(tmp_path))
    (tmp_path / "b.html").write_text(fault)
    [found] = broken(tmp_path)
    assert message in found

# ---- in a browser ----

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope="session")
def site(built):
    "The site's address on this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()

@pytest.fixture(params=sizes)
def page(request, site, chromium):
    """A page at phone and at desktop width that remembers errors and requests; a test fails if there were any it should
    not make."""
    width, height = sizes[request.param]
    page = chromium.new_page(viewport={"width": width, "height": height}, base_url=site, has_touch=width < 500)
    page.set_default_timeout(20_000)
    page.size, page.wrong = request.param, []
    page.on(
        "console",
        lambda m: page.wrong.append(f"console: {m.text} {m.location}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.wrong.append(f"script error: {e}"))
    page.on(
        "request",
        lambda r: None if r.url.startswith((site, "data:", "blob:")) else page.wrong.append(f"request to {r.url}"))
    page.on("response", lambda r: page.wrong.append(f"{r.status} for {r.url}") if r.status >= 400 else None)
    failed = request.session.testsfailed
    yield page
    if request.session.testsfailed > failed or page.wrong:
        (root / "_site" / "failures").mkdir(exist_ok=True)
        page.screenshot(path=root / "_site" / "failures" / f"{re.sub(r'[^a-z0-9]+', '_', request.node.name)}.png")
    wrong = page.wrong
    page.close()
    assert not wrong

def fits(page):
    "Nothing is wider than the window, so that the page can't be pushed sideways."
    return page.evaluate("""() => { const w = document.documentElement.clientWidth
        return document.documentElement.scrollWidth <= w && document.body.scrollWidth <= w }""")

def rendered(page):
    """How many formulas there are, and how many of them were drawn; waits for MathJax, which only pages with formulas
    load."""
    if not page.locator(".math").count():
        return 0, 0
    page.wait_for_function("window.MathJax?.startup?.promise")
    page.evaluate("MathJax.startup.promise")
    drawn = page.locator(".math mjx-container > svg")              # inside of one, a wide brace is another
    return page.locator(".math").count(), drawn.count()

def test_home(page):
    page.goto("index.html")
    assert "diffnb" in page.title() and page.locator("article h1").inner_text().startswith("diffnb")
    for name in lessons:
        assert page.locator(f"article a[href='{name}.html']").count(), f"the home page has no link to {name}"
    assert fits(page)

@pytest.mark.parametrize("name", lessons)
def test_lesson(page, name):
    page.goto(f"{name}.html")
    formulas, drawn = rendered(page)
    assert drawn == formulas
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert fits(page)
    widths = page.evaluate(
        "Promise.all([...document.querySelectorAll('article img')].map(i => i.decode().then(() => "
        "i.naturalWidth, () => 0)))")
    assert widths and all(widths), f"{widths.count(0)} of {len(widths)} pictures can't be drawn"

def test_mathematics_is_drawn_and_spoken(page):
    page.goto("02_schedule.html")
    formulas, drawn = rendered(page)
    assert formulas == drawn > 10
    box = page.locator("div.math mjx-container svg").first.bounding_box()
    assert box["width"] > 80 and box["height"] > 15
    assert page.locator("mjx-assistive-mml math").count() == formulas       # what a screen reader reads

def test_search(page):
    page.goto("search.html?q=DDIM")
    found = page.locator("#search-results li a")
    page.wait_for_function("document.querySelectorAll('#search-results li a').length > 2")
    links = [a.get_attribute("href") for a in found.all()]
    assert any("05_sample" in a for a in links) and any("api/" in a for a in links), links
    page.wait_for_load_state("networkidle")
    found.filter(has_text="Sampling").first.click()
    page.wait_for_url("**/05_sample.html*")
    assert fits(page)

def test_search_from_a_lesson(page):
    page.goto("01_data.html")
    page.locator("button.search-button, button.search-button-field").locator("visible=true").first.click()
    box = page.locator("input[name=q]").locator("visible=true")
    box.fill("alpha_bar")
    box.press("Enter")
    page.wait_for_function("document.querySelectorAll('#search-results li a').length > 0")
    page.wait_for_load_state("networkidle")

def test_next_and_previous_walk_through_all_lessons(page):
    page.goto("index.html")
    seen = []
    for _ in lessons:
        with page.expect_navigation(wait_until="domcontentloaded"):
            page.locator("a.right-next").click()
        seen.append(urlsplit(page.url).path.strip("/").removesuffix(".html"))
    assert seen == lessons
    for name in [*lessons[-2::-1], "index"]:
        with page.expect_navigation(wait_until="domcontentloaded"):
            page.locator("a.left-prev").click()
        assert urlsplit(page.url).path == f"/{name}.html"

def test_reference(page):
    import inspect
    from diffnb.sample import ddim
    page.goto("api/sample.html")
    entry = page.locator("section#ddim")
    text = entry.inner_text()
    for name in inspect.signature(ddim).parameters:
        assert name in text, name
    assert "Returns: x0" in text and "steps=50: transitions" in text
    assert fits(page)
    page.locator("article a[href='../05_sample.html']").first.click()
    page.wait_for_url("**/05_sample.html")

def test_every_reference_and_tool_page_fits(page, built):
    for path in sorted([*(built / "api").glob("*.html"), *(built / "workshop").rglob("*.html")]):
        page.goto(str(path.relative_to(built)))
        assert fits(page), path.name

def test_keyboard(page):
    "The first stop of the Tab key jumps over the menus, and code boxes that scroll can be reached."
    page.goto("05_sample.html")
    page.keyboard.press("Tab")
    assert "main" in page.evaluate("document.activeElement.getAttribute('href')")
    overflowing = page.evaluate(
        "[...document.querySelectorAll('article pre')].filter(p => p.scrollWidth > p.clientWidth + 1 && "
        "p.tabIndex < 0).length")
    assert overflowing == 0
