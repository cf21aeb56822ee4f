"""Guides and reference as pages: `make docs`. Read by Sphinx."""

import re

project = "salcl_jax"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Saliency-guided pre-training in JAX", "page_width": "1100px"}
html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
myst_heading_anchors = 3
smartquotes = False

# Docstrings are plain text: shapes such as [*n, 4] and choices such as 'a' | 'b' are no markup.
_MARKUP = re.compile(r"([*|_\\])")


def _plain(app, what, name, obj, options, lines) -> None:
    """Keep `code` and examples as they are, show indented blocks of modules as code, the rest as text."""
    found: list[str] = []
    example = block = False
    for line in lines:
        example = line.startswith(">>>") or (example and bool(line.strip()))
        if what == "module" and line.startswith("    ") and not block:
            found += ["::", ""]
        block = what == "module" and (line.startswith("    ") or (block and not line.strip()))
        found.append(line if example or block else _text(line))
    lines[:] = found


def _text(line: str) -> str:
    parts = line.split("`")
    if len(parts) % 2 == 0:  # a lone backtick
        return _MARKUP.sub(r"\\\1", line).replace("`", r"\`")
    return "``".join(part if i % 2 else _MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _plain)
