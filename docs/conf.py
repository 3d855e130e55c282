"""Settings of the documentation site, which ``make docs`` builds from Markdown pages and the package's docstrings."""

from __future__ import annotations

import visattn_fast

project = "visattn_fast"
version = release = visattn_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"visattn_fast {version}"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
myst_heading_anchors = 3

default_role = "py:obj"  # `FastSE` in a docstring is a link if the site has such a name
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app):
    """Leaves out the fields of named tuples, which their class describes."""

    def skip(app, what, name, member, skip, options):
        return skip or (getattr(member, "__doc__", None) or "").startswith("Alias for field number")

    app.connect("autodoc-skip-member", skip)
