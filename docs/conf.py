"""How Sphinx builds these pages; nothing here needs the network."""

from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import hf_reflect


project = "hf_reflect"
author = "hf_reflect developers"
copyright = author
version = release = hf_reflect.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hf_reflect {version}"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # the fields of a dataclass stand in its docstring
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' types: finding their pages would take the network.
    (r"py:.*", r"(collections|datasets|datetime|pathlib|typing)\..+"),
    (r"py:class", r"(Dataset|DatasetDict|Path)"),
    # What public functions and results also take or hold, for the package's own use.
    (r"py:class", r"(.+\.)?(CausalLM|JournaledOracle|Measures|Purse|Source|Teacher|TextTemplate)"),
]


def _by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Any:
    """Leads a reference to the one object of that name, whichever module either says that it is from."""
    name = str(node.get("reftarget", "")).rpartition(".")[2]
    domain = env.domains["py"]
    found = [full for full, *_ in domain.get_objects() if full.rpartition(".")[2] == name]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return domain.resolve_xref(env, str(node.get("refdoc")), app.builder, "obj", found[0], node, content)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _by_last_name)
