"""Hooks of mkdocs; run by itself, this prints the table of weights in docs/models.md."""

import os
import re
from pathlib import Path
from typing import Any

from loftup.weights.catalogue import CATALOGUE

# Docstrings are written for people and for Sphinx's roles, whose names the pages leave out.
ROLES = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code)")
# Images of README, which PyPI shows too and so have an address, are those beside the pages.
OWN = re.compile(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/main/docs/")
PAGES = re.compile(r"https://github\.com/[^/]+/[^/]+/blob/main/docs/([\w-]+\.md)")
COLAB = (
    '<p><a href="https://colab.research.google.com/github/{repository}/blob/main/docs/{file}">'
    '<img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open in Colab"></a></p>\n'
)


def on_config(config: Any) -> Any:
    """Run the notebooks where that is asked for, so that their pages show what comes out."""
    config.plugins["mkdocs-jupyter"].config["execute"] = "LOFTUP_DOCS_RUN_NOTEBOOKS" in os.environ
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Take README as the first page, with its addresses as those of the site, which mkdocs then checks."""
    if page.file.src_uri != "index.md":
        return markdown
    readme = (Path(__file__).parent / "README.md").read_text("utf-8")
    return PAGES.sub(r"\1", OWN.sub("", readme))


def on_page_content(html: str, *, page: Any, config: Any, **_: Any) -> str:
    """Drop the roles before code, and put a link to Colab above notebooks."""
    html = ROLES.sub("", html)
    if page.file.src_uri.endswith(".ipynb"):
        repository = config.repo_url.removeprefix("https://github.com/").rstrip("/")
        html = COLAB.format(repository=repository, file=page.file.src_uri) + html
    return html


def weights_table() -> str:
    """The catalogue of weights in Markdown."""
    rows = [
        "| name | channels | patch | where | backbone in timm | also as | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in CATALOGUE.values():
        where = "in the package"
        if each.repo:
            where = f"[`{each.repo}`](https://huggingface.co/{each.repo})"
        names = ", ".join(f"`{name}`" for name in each.backbones)
        facts = (each.channels or "any", each.patch_size or "any", where, f"`{each.timm}`" if each.timm else "any")
        rows.append(f"| `{each.name}` | " + " | ".join(map(str, facts)) + f" | {names} | {each.licence} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(weights_table())
