"""What all HTML pages share: templates of this package, text from outside escaped, names that do not exist refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def environment() -> Environment:
    """Templates of ``prefopt/templates`` with the filter ``slug``, a text as the name of a CSS class or an anchor."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("prefopt"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["slug"] = slug
    return made


def slug(text: str) -> str:
    """A text with hyphens for its spaces."""
    return text.replace(" ", "-")
