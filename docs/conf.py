"""The documentation site: `make docs` builds it into build/docs, with every warning an error.

The pages of settings and of commands are written from the code when the site is built.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from pygments.lexers.special import TextLexer  # noqa: E402
from reference_pages import write_pages  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

project = "Isthmus"
author = "The Isthmus authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["**/*.json", "**/*.jsonl"]
html_theme = "furo"
html_title = "Isthmus"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"
smartquotes = False


def setup(app: Sphinx) -> None:
    """Write the pages that follow from the code, before Sphinx looks for its sources."""
    write_pages(Path(__file__).parent / "reference")
    app.add_lexer("mermaid", TextLexer)  # the diagrams of the protocol are shown as text, as in an editor
    app.connect("autodoc-process-docstring", _without_substitutions)
    app.connect("source-read", _without_ways_out)


def _without_ways_out(app: Sphinx, name: str, content: list[str]) -> None:
    """Links to files of the repository that are not on the site become their text."""
    folder = (Path(app.srcdir) / name).parent

    def text(link: re.Match[str]) -> str:
        inside = (folder / link["target"]).resolve().is_relative_to(Path(app.srcdir).resolve())
        return link[0] if inside else link["text"]

    content[0] = re.sub(r"\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#]+)[^)]*\)", text, content[0])


def _without_substitutions(app: Sphinx, what: str, name: str, about: object, options: object, lines: list[str]) -> None:
    """In our docstrings a bar is a bar, as in the norm of θ."""
    lines[:] = [line.replace("|", "\\|") for line in lines]
