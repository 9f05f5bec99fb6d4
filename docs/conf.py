"""Sphinx configuration. `make docs` builds the site and treats warnings as errors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sphinx.util.nodes import make_refnode

from pytorch_accelerated import __version__

if TYPE_CHECKING:
    from docutils.nodes import Element, reference
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "pytorch-accelerated"
author = "pytorch-accelerated contributors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pytorch-accelerated {version}"
copybutton_prompt_text = "$ "

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

default_role = "code"  # single backticks in docstrings mark code, not references
nitpicky = True
nitpick_ignore_regex = [
    # Names from Python and other projects. No inventory is downloaded, so the site builds offline.
    (
        r"py:.*",
        r"(abc|accelerate|argparse|collections|contextlib|datetime|enum|logging|matplotlib|nn|np|numpy|os|pathlib|torch|tqdm"
        r"|types|typing)\..*",
    ),
    (r"py:class", r"(Accelerator|DataLoader|Dataset|Figure|Fraction|Optimizer|Path|PathLike|tqdm)"),
    # Private base classes and type aliases that appear in signatures but not in the reference.
    (r"py:class", r"pytorch_accelerated\.(.*\.)?_\w.*"),
    (r"py:class", r"(ArrayLike|Callbacks|CurveSource|Interval|KnownValues|Number|NumberOrPlaceholder|Template|Unit)"),
    # `_types.py`
    (
        r"py:class",
        r"(Batch|BatchOutput|LossFunction|MaybeNone|MetricValue|Metrics|ParameterGroup|Optimizers|SchedulerFactory|StateDict"
        r"|StateMapping)",
    ),
]

OWN_NAME = "pytorch_accelerated."
ATTRIBUTES = {"attribute", "data", "property"}
_attribute_docstrings: dict[str, list[str]] = {}


def find_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element) -> reference | None:
    """Resolve a short name, or a name qualified by its defining module, to the place where it is documented.

    The reference documents each object once, under its public import path. Other spellings need resolving: annotations
    name `Trainer` under `TYPE_CHECKING` only, base classes appear under their defining module, and a docstring may name
    an inherited method. An ambiguous short name stays unresolved, which produces a warning.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or ("." in target and not target.startswith(OWN_NAME)):
        return None
    name_only = target.rpartition(".")[2]
    objects = env.domains["py"].objects
    found = [name for name in objects if name.endswith(f".{name_only}")]
    if len(found) > 1:
        found = inherited(found, node, name_only)
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, found[0])


def inherited(names: list[str], node: pending_xref, method: str) -> list[str]:
    """Return the name in `names` that is `method` of the class that contains the reference, or of a base class."""
    if not node.get("py:class"):
        return []
    owner = getattr(importlib.import_module(node["py:module"]), node["py:class"])
    for base in owner.__mro__:
        of_base = [name for name in names if name.endswith(f".{base.__name__}.{method}")]
        if of_base:
            return of_base
    return []


def keep_attribute_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Save the docstring of an attribute, because napoleon would parse `words: more` as `type: description`."""
    if what in ATTRIBUTES:
        _attribute_docstrings[name] = list(lines)


def restore_attribute_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Restore the docstring that `keep_attribute_docstring` saved. Types come from annotations."""
    if what in ATTRIBUTES:
        lines[:] = _attribute_docstrings.pop(name)


def setup(app: Sphinx) -> None:
    """Register the event handlers of this file with Sphinx."""
    app.connect("missing-reference", find_public_name)
    app.connect("autodoc-process-docstring", keep_attribute_docstring, priority=100)  # napoleon: 500
    app.connect("autodoc-process-docstring", restore_attribute_docstring, priority=900)
