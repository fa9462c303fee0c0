"""How Sphinx builds the site; `docs/make_site.py` lays out what it reads."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):")

project = "fxkfac"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fxkfac"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "inherited-members": "Mapping,Operator,Optimizer,BaseException,tuple",
}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
python_maximum_signature_line_length = 80


class CodeLines(Directive):
    """Python code with an anchor `line-N` for each line."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The code as HTML."""
        shown = HtmlFormatter(linespans="line", linenos="inline", wrapcode=True)
        html = highlight("\n".join(self.content), PythonLexer(), shown)
        return [nodes.raw("", html, format="html")]


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown but for their sections: code in single backticks, or indented."""
    made = [""] if what in ("attribute", "property") else []  # else napoleon finds a type there
    in_section = False
    for line in lines:
        if line and not line.startswith(" "):
            in_section = bool(SECTION.fullmatch(line))
        before = made[-1] if made else ""
        if line.startswith("    ") and not before and not in_section and not is_code(made):
            made += ["::", ""]
        made.append(line if is_code([*made, line]) else _inline(line))
    lines[:] = made


def is_code(lines: list[str]) -> bool:
    """Whether the last line is in a block that begins with `::`."""
    for line in reversed(lines):
        if line and not line.startswith(" "):
            return line == "::"
    return False


def _inline(line: str) -> str:
    """Code as such, public names as links, and asterisks as they are."""
    parts = re.split(r"`([^`]+)`", line)  # every second one is code
    for k, part in enumerate(parts):
        if k % 2:
            public = part.startswith("fxkfac.") and part.replace(".", "").isidentifier()
            parts[k] = f":py:obj:`{part}`" if public else f"``{part}``"
        else:
            parts[k] = part.replace("*", "\\*")
    return "".join(parts)


def without_fields(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """The fields of a named tuple are in its signature, and say nothing else."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def readable(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, back: Any
) -> Any:
    """A default that a dataclass makes anew is no Python, which Sphinx reads signatures as."""
    return (signature.replace("<factory>", "..."), back) if signature else None


def setup(app: Any) -> None:
    """Register what is above; the docstrings come before napoleon sees them."""
    app.connect("autodoc-skip-member", without_fields)
    app.connect("autodoc-process-signature", readable)
    app.add_directive("code-lines", CodeLines)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
