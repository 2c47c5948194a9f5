"""The documentation site: `make docs` builds it in build/docs, and warnings are errors there."""

import os

import shiftnet

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the notebook: libtpu would look for a TPU

project = "shiftnet"
author = "the shiftnet developers"
version = release = shiftnet.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# The notebook is run in an empty folder whenever the site is built, and shown with what it prints.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell
nb_merge_streams = True
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
