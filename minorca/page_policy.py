"""Content-Security-Policy of pages that carry their own script and style."""

import base64
import hashlib
import re


def inline_source(page: str, tag: str) -> str:
    """What a policy calls the only script or style (`tag`) in a page: allowed by its hash, and no other."""
    match = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert match, f"the page has no <{tag}>"
    digest = hashlib.sha256(match[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
