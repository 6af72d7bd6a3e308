"""How Sphinx makes the site. `build.py` beside this file calls it."""

import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dllm  # noqa: E402

project = "dllm"
release = dllm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["docs/images"]
language = "en"

myst_heading_anchors = 6
"""Headings have the anchors that GitHub gives them."""

autodoc_default_options = {"exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_title = f"dllm {release}"
html_copy_source = False
html_show_copyright = False

MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


def docstring_is_markdown(app, what, name, obj, options, lines: list[str]) -> None:
    """Replaces the lines of a docstring, which is Markdown, by what it looks like."""
    html = MARKDOWN.render("\n".join(lines)).strip()
    html = html.replace("<pre><code", '<div class="highlight"><pre><code').replace(
        "</code></pre>", "</code></pre></div>"
    )
    html = re.sub(r"(?<!<pre>)<code>", '<code class="literal">', html)
    lines[:] = [".. raw:: html", "", *("   " + line for line in html.splitlines()), ""] if html else []


def contents_open_where_the_reader_is(app, page, template, context: dict, doctree) -> None:
    """Leaves out of the contents at the left what is below another page: hundreds of modules, on every page."""
    contents = context["toctree"]
    context["toctree"] = lambda **options: contents(**options | {"collapse": True})


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", docstring_is_markdown)
    app.connect("html-page-context", contents_open_where_the_reader_is, priority=400)  # the theme's comes at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
