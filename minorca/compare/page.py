"""A comparison as a page that needs nothing else, and runs no script but its own."""

from pathlib import Path
from typing import Any

import jinja2

from minorca.page_policy import inline_source

TEMPLATE = Path(__file__).parent / "page.html"
# what the template begins its title with, by which a page is known
TITLE = "<title>minorca: "
# Nats from which on a token is marked, in five shades.
SHADES = (0.01, 0.05, 0.2, 0.5, 1.0)


def render_page(result: dict[str, Any]) -> str:
    """The page of a comparison, as `comparison.compare` returns it; all its text is escaped."""
    source = TEMPLATE.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["zip"] = zip
    environment.filters["number"] = _number
    environment.filters["shade"] = lambda nats: sum((nats or 0) >= limit for limit in SHADES)
    own = f"script-src {inline_source(source, 'script')}; style-src {inline_source(source, 'style')}"
    policy = f"default-src 'none'; {own}; img-src data:; base-uri 'none'; form-action 'none'"
    return environment.from_string(source).render(result, policy=policy)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
