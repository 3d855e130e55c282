"""Settings of the documentation site, which ``make docs`` builds from Markdown pages and the package's docstrings."""

from __future__ import annotations

import re

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
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_attr_annotations = False  # the signature above has the types
napoleon_use_rtype = False


def without_tuple_fields(app, what, name, member, skip, options):
    """Leaves out the fields of named tuples, which their class describes."""
    return skip or (getattr(member, "__doc__", None) or "").startswith("Alias for field number")


def sizes_as_code(app, what, name, obj, options, lines):
    """Keeps napoleon from taking "channels: C." for item C of a list."""
    lines[:] = [re.sub(r"^(\s+[\w, ]+: )([A-Z])\.$", r"\1``\2``.", line) for line in lines]


def from_the_top(app, env, node, contnode):
    """Looks a name up from the top of the package: a docstring says `reference.SE` or `se` wherever it stands."""
    for package in ("visattn_fast", "visattn_fast.functional") if node["refdomain"] == "py" else ():
        name, place = f"{package}.{node['reftarget']}", (env, node["refdoc"], app.builder)
        if link := env.domains["py"].resolve_xref(*place, "obj", name, node, contnode):
            return link
    return None


def setup(app):
    app.connect("autodoc-skip-member", without_tuple_fields)
    app.connect("autodoc-process-docstring", sizes_as_code, priority=100)  # before napoleon
    app.connect("missing-reference", from_the_top)
