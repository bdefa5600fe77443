"""Fails if diffnb/ differs from what the notebooks export, or if a notebook is not clean. Run by `make test`."""
import pathlib, shutil, subprocess, sys, tempfile

root = pathlib.Path(__file__).resolve().parent.parent
with tempfile.TemporaryDirectory() as d:
    copy = pathlib.Path(d)
    for name in ("nbs", "diffnb"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(root / name, copy)
    for module in (copy / "diffnb").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()          # a module whose notebook is gone must not survive
    tool = pathlib.Path(sys.executable).with_name
    subprocess.run([tool("nbdev_export")], cwd=copy, check=True)
    subprocess.run([tool("nbdev_clean")], cwd=copy, check=True)
    stale = [
        str(p.relative_to(root))
        for name, pattern in (("diffnb", "*.py"), ("nbs", "*.ipynb"))
        for p in sorted(
            {*(root / name).rglob(pattern), *(root / q.relative_to(copy) for q in (copy / name).rglob(pattern))})
        if ".ipynb_checkpoints" not in p.parts
        and (not p.exists() or not (q := copy / p.relative_to(root)).exists() or p.read_bytes() != q.read_bytes())]
if stale:
    sys.exit("these files differ from what nbdev_export and nbdev_clean make:\n  " + "\n  ".join(stale)
             + "\nchange the notebook, then run: .venv/bin/nbdev_export && .venv/bin/nbdev_clean")
print("diffnb/ is what the notebooks export, and the notebooks are clean")
