"""Sphinx settings of the course's site. `make site` runs site/build.py, which prepares the pages and then uses this
file."""
from importlib.util import find_spec

from myst_nb.core.render import NbElementRenderer

project, author, copyright = "diffnb", "the diffnb developers", "2026 the diffnb developers"
extensions = ["myst_nb", "sphinx_external_toc", "sphinx_copybutton", "sphinx.ext.mathjax"]
external_toc_path = "_toc.yml"
suppress_warnings = ["mystnb.unknown_mime_type"]  # outputs only JupyterLab can show

nb_execution_mode = "off"                         # the stored outputs are what nbdev_test checks
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp"

# Nothing comes from the network: one file of MathJax that holds its fonts; no widget manager, which a CDN would serve.
[mathjax] = find_spec("sphinx-mathjax-offline").submodule_search_locations
html_static_path = ["course.css", f"{mathjax}/static/mathjax/tex-svg.js"]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
nb_ipywidgets_js = {}

html_theme = "sphinx_book_theme"
html_title = "diffnb"
html_favicon = "favicon.svg"
html_context = {"default_mode": "auto"}
smartquotes = False                               # "eps" is a value
html_css_files = ["course.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False, "use_fullscreen_button": False, "show_navbar_depth": 1, "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light", "pygments_dark_style": "a11y-high-contrast-dark"}

render_image = NbElementRenderer.render_image

def with_alt(self, data): # MyST-NB reads the alt text of a cell; in JupyterLab each output has its own
    nodes = render_image(self, data)
    nodes[0]["alt"] = data.output_metadata.get(data.mime_type, {}).get("alt", "")
    return nodes

NbElementRenderer.render_image = with_alt
