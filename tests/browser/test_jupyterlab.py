"""The course as its reader meets it: opened, run and moved in JupyterLab. See conftest.py."""
import json, pathlib

import pytest

from diffnb.workshop.folder import columns

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(
    str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def source(name): return json.loads((ROOT / "nbs" / name).read_text())["cells"]


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_opens(open_notebook, page, name):
    nb = open_notebook(f"nbs/{name}")
    page.wait_for_function("n => document.querySelectorAll('.jp-Notebook .jp-Cell').length == n", arg=len(source(name)))
    page.wait_for_selector(".jp-MarkdownCell h1", timeout=30_000)
    assert page.locator(".jp-Dialog").count() == 0 and not page.trouble and not nb.errors()
    page.wait_for_function("[...document.querySelectorAll('.jp-Notebook img')].every(i => i.complete)")
    broken = page.evaluate("[...document.querySelectorAll('.jp-Notebook img')].filter(i => !i.naturalWidth).length")
    assert broken == 0, f"{broken} pictures do not load"
    nameless = page.evaluate(
        "[...document.querySelectorAll('.jp-Notebook img')].filter(i => !i.alt || i.alt == 'Image').length")
    assert nameless == 0, f"{nameless} pictures have no alt text"


LIVE = ".jp-OutputArea-output .widget-vbox:has(> .widget-html)"


def moved(widget, page):
    "Move every control of a live widget with the keyboard; each must change the picture or its caption."
    widget.scroll_into_view_if_needed()
    shown = lambda: widget.locator("> .widget-html").inner_html()
    def changes(act, before):
        act()
        for _ in range(50):
            if shown() != before:
                return True
            page.wait_for_timeout(100)
        return False
    sliders, choices, buttons = (
        widget.locator(".noUi-handle"), widget.locator("select"), widget.locator(".widget-vbox button"))
    assert sliders.count() + choices.count() > 0
    for i in range(sliders.count()):
        sliders.nth(i).focus()
        key = (
            "ArrowLeft"
            if sliders.nth(i).get_attribute("aria-valuenow") == sliders.nth(i).get_attribute("aria-valuemax")
            else "ArrowRight")
        assert changes(lambda: page.keyboard.press(key), shown()), f"slider {i} changes nothing"
        label, value = (
            sliders.nth(i)
            .locator(f"xpath=ancestor::*[contains(@class, 'widget-inline-hbox')]//*[contains(@class, '{part}')]")
            .inner_text()
            for part in ("widget-label", "widget-readout"))
        page.wait_for_function(
            "([handle, label, value]) => handle.getAttribute('aria-label') == label && "
            "handle.getAttribute('aria-valuetext') == value",
            arg=[sliders.nth(i).element_handle(), label, value],
            timeout=10_000,
        )  # what a screen reader says
    for i in range(choices.count()):
        if choices.nth(i).locator("option").count() > 1:
            assert changes(lambda: choices.nth(i).select_option(index=1), shown()), f"choice {i} changes nothing"
    if buttons.count():
        assert changes(lambda: buttons.last.click(), shown()), "a clicked pixel changes nothing"
    picture = widget.locator("> .widget-html img").first
    assert len(picture.get_attribute("alt")) > 20 and picture.evaluate("i => i.naturalWidth > 0")


@pytest.mark.parametrize(
    "name, widgets, seconds",
    [("index.ipynb", 0, 300), ("02_schedule.ipynb", 1, 300), ("workshop/widgets.ipynb", 5, 300)])
def test_run_all_and_move(open_notebook, page, name, widgets, seconds):
    nb = open_notebook(f"nbs/{name}")
    nb.run_all(seconds)
    assert nb.errors() == [] and not page.trouble
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
    cells = [c for c in source(name) if c["cell_type"] == "code"]
    # folded ones may show no number
    open_ones = [c for c in cells if not c["metadata"].get("jupyter", {}).get("source_hidden")]
    assert len(prompts) == len(cells) and sum(any(d.isdigit() for d in p) for p in prompts) >= len(open_ones)
    live = page.locator(LIVE)
    assert live.count() == widgets
    for i in range(widgets):
        moved(live.nth(i), page)


def test_dashboard_follows_a_run(open_notebook, page, notebooks):
    cells = ["from diffnb.workshop.widgets import replay", "replay('watched')"]
    nbformat = pytest.importorskip("nbformat")
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, notebooks / "watch.ipynb")
    def row(step):
        values = {"step": step, "images": 64 * step, "lr": 1e-3, "grad_norm": 0.5}
        return ",".join(str(values.get(name, 1 / step)) for name in columns) + "\n"
    (notebooks / "watched").mkdir()
    log = notebooks / "watched" / "metrics.csv"
    log.write_text(",".join(columns) + "\n" + row(5) + row(10) + row(20))
    lab = open_notebook("nbs/watch.ipynb")
    lab.run_all(300)
    assert lab.errors() == []
    moved(page.locator(LIVE), page)
    with log.open("a") as f:
        f.write(row(30))
    page.get_by_role("button", name="Refresh").click()
    page.locator(LIVE).get_by_text("step 30, 1,920 images seen").wait_for(timeout=15_000)


def test_one_exercise_as_a_learner_does_it(open_notebook, page, notebooks):
    "From the learner's copy: Run All with nothing solved, then exercise 2.1 wrong, then right."
    from diffnb.workshop.workbook import make_workbook
    make_workbook(notebooks.parent / "workbook")
    nb = open_notebook("workbook/02_schedule.ipynb")
    assert page.locator(".jp-Cell", has_text='assert check("2.1"').count() == 0, (
        "the learner's copy gives the answer away")
    nb.run_all(300)
    assert nb.errors() == [] and not page.trouble
    moved(page.locator(LIVE).first, page)
    stub, check = nb.code("def my_alpha_bar"), nb.code('check("2.1", my_alpha_bar)')
    assert stub.count() == check.count() == 1 and "not yet" in check.locator(".jp-OutputArea").text_content()
    def answer(line):
        stub.locator(".cm-content").click()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(
            "def my_alpha_bar(x0: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:\n"
            f"    a = (x_t * x0).flatten(1).mean(1) / x0.square().flatten(1).mean(1)\n    return {line}")
        nb.run(stub)
        nb.run(check)
        return check.locator(".jp-OutputArea").text_content()
    wrong = answer("a")
    assert "an amplitude" in wrong and "✓" not in wrong
    hint = page.get_by_text("Hint 1", exact=True).first
    hint.click()
    assert page.locator("details[open]").count() == 1, "hints open one at a time"
    assert "✓ 2.1" in answer("a ** 2") and nb.errors() == []


# ---- without a kernel ----

FRAMES = [
    (name, i, j, "".join(output["data"]["text/html"]))
    for name in NAMES
    for i, cell in enumerate(source(name))
    for j, output in enumerate(cell.get("outputs", []))
    if "data-axes" in "".join(output.get("data", {}).get("text/html", ""))]


def visible(page):
    return page.locator("[data-frame]:visible img").evaluate_all("all => all.map(i => [i.src, i.alt, i.naturalWidth])")


def test_frames_on_a_page_with_scripts(page):
    "As on the course's site: one picture, and a labelled control for each axis that changes it from the keyboard."
    assert len({name for name, *_ in FRAMES}) >= 5
    for name, i, _, html in FRAMES:
        page.set_content(f"<body>{html}</body>")
        page.wait_for_selector("[data-ready]")
        assert len({alt for _, alt, _ in visible(page)}) == 1, f"{name} cell {i}: more than one frame is shown"
        for k in range(page.locator("label input[type=range], label select").count()):
            control, before = page.locator("label input[type=range], label select").nth(k), visible(page)
            if control.evaluate("c => c.tagName == 'SELECT' ? c.length < 2 : +c.max == 0"):
                continue
            control.focus()
            page.keyboard.press("ArrowRight")
            if visible(page) == before:
                page.keyboard.press("ArrowLeft")
            if visible(page) == before:
                page.keyboard.press("ArrowDown")
            assert visible(page) != before and all(width for *_, width in visible(page)), (
                f"{name} cell {i}: control {k} changes nothing")
    assert not page.trouble


def test_frames_without_scripts(chromium):
    "As on GitHub: every frame with its caption, and no control that does nothing."
    context = chromium.new_context(java_script_enabled=False)
    for name, i, _, html in FRAMES:
        page = context.new_page()
        page.set_content(f"<body>{html}</body>")
        assert (
            page.locator("[data-frame] img").count() == page.locator("[data-frame] img[alt]").count() >= 3
            and page.locator("input, select, button").count() == 0)
        page.close()
    context.close()


def test_frames_before_a_cell_is_run(open_notebook, page):
    "A notebook from somebody else: JupyterLab removes scripts, the film strip stays."
    nb = open_notebook("nbs/workshop/widgets.ipynb")
    strip = page.locator(".jp-OutputArea-output [aria-label], .jp-OutputArea-output div:has(> span > img)").first
    strip.wait_for(timeout=30_000)
    assert (
        strip.locator("img:visible").count() >= 3
        and page.locator(".jp-OutputArea-output input:enabled, .jp-OutputArea-output select").count() == 0)
    assert not nb.errors() and page.get_by_text("Error displaying widget").count() == 0
