"""The documentation site: `make docs` builds it in build/docs, and warnings are errors there."""

import shiftnet

project = "shiftnet"
author = "the shiftnet developers"
version = release = shiftnet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the checkout, see below

html_theme = "furo"
html_title = "shiftnet"

# Docstrings name types in words; signatures show the annotations.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
