"""The documentation site: `make docs` builds it into out/docs."""

from __future__ import annotations

import sys
from pathlib import Path

import lmppl

sys.path.append(str(Path(__file__).with_name("_ext")))

project = "lmppl"
version = release = lmppl.__version__
copyright = "the authors of lmppl, MIT license"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx_design", "myst_nb"]
extensions += ["docstrings", "mathml", "printed"]  # of _ext
suppress_warnings = ["ref.python"]  # several names of which a short one may be
smartquotes_action = "D"  # dashes, and no other quotes

nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
add_module_names = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
default_role = "py:obj"  # a name between backticks is a link where there is such a name, and code elsewhere

html_theme = "furo"
html_title = f"lmppl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
