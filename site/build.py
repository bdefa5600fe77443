"""The course as a static site: prepares pages from the notebooks and docstrings in _site/pages, builds _site/html with
Sphinx."""
import importlib, inspect, pathlib, re, sys, warnings

import nbformat
from fastcore.docments import docments
from sphinx.cmd.build import main as sphinx

root = pathlib.Path(__file__).resolve().parent.parent
pages, html = root / "_site" / "pages", root / "_site" / "html"
written = set()

def write(name, text):
    "Write a page, unless it is there already: Sphinx reads only what has changed."
    path = pages / name
    written.add(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    changed = not path.exists() or path.read_text(encoding="utf-8") != text
    if changed:
        path.write_text(text, encoding="utf-8")
    return changed

def prepare(nb, depth):
    """A notebook for readers: solutions folded, the cell that names the module gone, widgets left to their still
    pictures. Links to lessons in outputs of type HTML lead to the pages.
    `#| export` stays, as a comment: the course explains it, and a copied cell is the notebook's own."""
    nb.cells = [c for c in nb.cells if not re.fullmatch(r"\s*#\|\s*default_exp.*\s*", c.source)]
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.metadata["tags"] = [*tags, "hide-cell"]
            cell.metadata["mystnb"] = {"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if len(data) > 1:
                data.pop("application/vnd.jupyter.widget-view+json", None)
            if "text/html" in data:
                data["text/html"] = re.sub(
                    r'href="(\d\d_\w+)\.ipynb', rf'href="{"../" * depth}\1.html', "".join(data["text/html"]))
    nb.metadata.pop("widgets", None)
    return nb

# ---- the API reference ----

def prose(text):
    "A docstring as Markdown: names in backquotes stay code, all else is plain text."
    parts = re.split(r"(`[^`]+`)", inspect.cleandoc(text or ""))
    return "".join(p if i % 2 else re.sub(r"([\\*_$<>\[\]{}|#~^])", r"\\\1", p) for i, p in enumerate(parts))

class Named:
    "A default value that prints as a name, where Python would print an address."
    def __init__(self, name): self.name = name
    def __repr__(self): return self.name

def default(p): # a parameter that has one
    if inspect.isfunction(p.default) or inspect.isclass(p.default):
        return Named(p.default.__name__)
    if type(p.default).__repr__ is object.__repr__:
        return Named(f"{type(p.default).__name__}()")
    return Named("...") if repr(p.default) == "<factory>" else p.default

def signature(f, called=True):
    "As Python writes it, with functions and factories among the defaults by their names, without `self`."
    try:
        found = inspect.signature(f)
    except (TypeError, ValueError):
        return ""
    def plain(p): return p if p.default is p.empty else p.replace(default=default(p))
    returns = inspect.Signature.empty if inspect.isclass(f) else found.return_annotation
    if isinstance(returns, str):
        returns = Named(returns)                                    # of a class, within it
    kept = [plain(p) for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=kept, return_annotation=returns))
    return text if called else text.removeprefix("()")

def details(f):
    "A line for each parameter that has a comment, and one for what is returned."
    for name, p in docments(f, full=True, returns=True).items():
        if name == "return":
            if p.docment and not inspect.isclass(f):
                yield f"\nReturns: {prose(p.docment)}"
        elif p.docment:
            given = "" if p.default is inspect.Parameter.empty else f"={default(p)!r}"
            yield f"- `{name}{given}`: {prose(p.docment)}"

def members(cls):
    "The public methods and properties of a class that have docstrings: name, function, and whether one calls it."
    for key, member in vars(cls).items():
        f = next((getattr(member, k) for k in ("__func__", "fget", "func") if hasattr(member, k)), member)
        if not key.startswith("_") and inspect.isfunction(f) and f.__doc__:
            yield key, f, f is member or hasattr(member, "__func__")

def entry(name, f, level=2, called=True):
    "Signature, docstring, parameters, what is returned; for a class also its methods and properties."
    own = f.__doc__ or ""
    if inspect.isclass(f) and own.startswith(f"{f.__name__}("):
        own = ""                                                    # made by `dataclass`
    head = f"{'#' * level} {name}\n\n```{{code-block}} python\n:class: signature\n{name}{signature(f, called)}\n```"
    parts = [head, prose(own), "\n".join(details(f))]
    if inspect.isclass(f):
        parts += [entry(f"{name}.{key}", member, level + 1, called) for key, member, called in members(f)]
    return "\n\n".join(filter(None, parts))

def api(notebook, module_name):
    "The reference page of a module: every public function and class, in the order of the lesson."
    module = importlib.import_module(module_name)
    here = [n for n in module.__all__ if getattr(getattr(module, n), "__module__", None) == module_name
            and (inspect.isclass(getattr(module, n)) or inspect.isfunction(getattr(module, n)))]
    intro = f"# {module_name}\n\nBuilt and explained in [{notebook}](../{notebook}.ipynb).\n\n"
    return intro + "\n\n".join(entry(n, getattr(module, n)) for n in here) + "\n"

def main():
    # workshop/checks stays out: it gives the answers of the exercises away
    order = ["index"] + [
        str(p.relative_to(root / "nbs").with_suffix(""))
        for p in [*sorted((root / "nbs").glob("[0-9]*.ipynb")), *sorted((root / "nbs" / "workshop").glob("*.ipynb"))]]
    references = {}
    for name in order:
        nb = nbformat.read(root / "nbs" / f"{name}.ipynb", 4)
        module = next((m[1] for c in nb.cells if (m := re.match(r"\s*#\|\s*default_exp\s+(\S+)", c.source))), None)
        if module and not module.startswith("_"):
            references[name] = f"api/{module}"
            write(f"api/{module}.md", api(name, f"diffnb.{module}"))
        write(f"{name}.ipynb", nbformat.writes(prepare(nb, name.count("/"))))
    parts = {
        "Lessons": [n for n in order[1:] if "/" not in n], "Workshop": [n for n in order if "/" in n],
        "Reference": list(references.values())}
    moved = write(
        "_toc.yml",
        "root: index\nformat: jb-book\nparts:\n"
        + "".join(
            f"- caption: {caption}\n  chapters:\n" + "".join(f"  - file: {n}\n" for n in names)
            for caption, names in parts.items()
            if names))
    for path in pages.rglob("*"):                                     # a page whose notebook is gone
        if path.is_file() and path not in written:
            path.unlink()
            (html / path.relative_to(pages)).with_suffix(".html").unlink(missing_ok=True)
    warnings.filterwarnings("ignore", module="sphinx_external_toc")   # it looks at every object, those of torch too
    options = [
        "-q", "-b", "html", "-W", "--keep-going", "-c", str(root / "site"), "-d", str(root / "_site" / "doctrees")]
    if moved:
        options += ["-E", "-a"]                                 # every page shows the list of pages
    return sphinx([*options, *sys.argv[1:], str(pages), str(html)])

if __name__ == "__main__":
    sys.exit(main())
