"""JupyterLab on a copy of the notebooks, and a Chromium to open it with.

Skipped where there is no browser, unless CI is set: there a missing browser is a failure."""
import contextlib, importlib.util, json, os, pathlib, re, shutil, socket, subprocess, sys, time, urllib.error
import urllib.request

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SHOTS = HERE / "screenshots"
# all cells are in the page, also those out of sight
SETTINGS = {"@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "autoStartDefault": True},
            "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "@jupyterlab/docmanager-extension/plugin": {"autosave": False}}


def find_chromium():
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
    )


def require(found, what, how):
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and CI is set: {how}")
    pytest.skip(f"{what} is missing: {how}")


@pytest.fixture(scope="module")        # not longer: two of Playwright's loops cannot live in one process at once
def chromium():
    path = require(find_chromium(), "Chromium", "apt-get install chromium, or your system's way")
    require(importlib.util.find_spec("playwright"), "Playwright", "pip install playwright")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory):
    "The folder JupyterLab is opened on: a copy, so that nothing a browser does reaches nbs/."
    folder = tmp_path_factory.mktemp("lab") / "nbs"
    shutil.copytree(ROOT / "nbs", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    return folder


def get(url, method="GET"):
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as answer:
        return answer.read()


@pytest.fixture(scope="session")
def lab(notebooks, tmp_path_factory):
    "Address of a running JupyterLab without a token, on a port of its own."
    require(find_chromium(), "Chromium", "apt-get install chromium, or your system's way")
    home = tmp_path_factory.mktemp("home")
    for name, values in SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython")}
    log = home / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
                f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True",
                f"--ServerApp.root_dir={notebooks.parent}"],
            env=env, stdout=out, stderr=subprocess.STDOUT,
            cwd=notebooks.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                get(url + "/api/status")
                break
            if server.poll() is not None:
                break
            time.sleep(0.25)
        else:
            server.kill()
        if server.poll() is not None:
            pytest.fail("JupyterLab did not start:\n" + log.read_text()[-3000:])
        yield url
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(chromium, request):
    "A new window; what it showed is kept under screenshots/ if the test fails."
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.trouble = []
    page.on("pageerror", lambda e: page.trouble.append(str(e)))
    yield page
    if getattr(request.node, "failed", False):
        SHOTS.mkdir(exist_ok=True)
        with contextlib.suppress(Exception):
            page.screenshot(path=SHOTS / (re.sub(r"\W+", "_", request.node.name) + ".png"))
    context.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.failed = True
    return report


class Notebook:
    "One notebook in JupyterLab, as a reader handles it."
    def __init__(self, page, lab, path):
        self.page, self.lab, self.path = page, lab, path
        page.goto(f"{lab}/doc/tree/{path}", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        page.wait_for_function(
            "document.querySelectorAll('.jp-Notebook .jp-Cell:not(.jp-mod-placeholder)').length > 0", timeout=120_000)

    def cells(self): return self.page.locator(".jp-Notebook .jp-Cell")
    def code(self, containing):
        return self.page.locator(".jp-CodeCell", has=self.page.locator(".jp-InputArea", has_text=containing))

    def ready(self):
        "Wait until the kernel has started and answers."
        for _ in range(240):
            if any(
                s["path"] == self.path and s["kernel"]["execution_state"] == "idle"
                for s in json.loads(get(self.lab + "/api/sessions"))):
                break
            self.page.wait_for_timeout(250)
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120_000)

    def run_all(self, seconds):
        "The menu's Run All Cells, to its end."
        self.ready()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.finish(seconds)

    def run(self, cell, seconds=120):
        cell.locator(".jp-InputArea-editor").click()
        self.page.keyboard.press("Control+Enter")
        self.finish(seconds)

    def finish(self, seconds):
        self.page.wait_for_timeout(200)
        done = """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent);
            return prompts.some(p => /\\d/.test(p)) && !prompts.some(p => p.includes('*')); }"""
        self.page.wait_for_function(done, timeout=1000 * seconds)

    def errors(self):
        "What went wrong, as the reader sees it: tracebacks and stderr."
        return [
            e.text_content()[-600:]
            for e in self.page.locator(
                '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
            ).all()]


@pytest.fixture
def open_notebook(page, lab):
    yield lambda path: Notebook(page, lab, path)
    for session in json.loads(get(lab + "/api/sessions")):
        get(f"{lab}/api/sessions/{session['id']}", "DELETE")
