"Everything this file says is read from settings.ini; pip needs a setup.py to find it there."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("notebook", "dev", "site", "bench")}
# for `diffnb workbook`, where there is no checkout
notebooks = {"diffnb.nbs": "nbs", "diffnb.nbs.workshop": "nbs/workshop"}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0",
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"].split(),
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    classifiers=["Framework :: Jupyter", "Intended Audience :: Education", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3"], project_urls={"Source": cfg["git_url"]},
    packages=[*find_packages(include=["diffnb", "diffnb.*"]), *notebooks], package_dir=notebooks,
    package_data={"diffnb": ["datasets/*", "weights/*.safetensors", "weights/*/*", "stats/*.npz"],
                  "diffnb.workshop": ["templates/*", "gallery/*"],
                  **{name: ["*.ipynb"] for name in notebooks}},
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(),
    extras_require={**extras, "all": sum(extras.values(), [])},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["diffnb=diffnb._modidx:d"]},
)
