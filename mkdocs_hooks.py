"""Hooks of mkdocs: docstrings are written for people and for Sphinx's roles, whose names the pages leave out."""

import re
from typing import Any

ROLES = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code)")


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles before code in a rendered page."""
    return ROLES.sub("", html)
