"""The page at /: one file, served with the policy it is written for, which lets it load and run nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from starlette.responses import HTMLResponse


def page_response() -> HTMLResponse:
    html = read_page()
    headers = {
        "content-security-policy": security_policy(html),
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


@cache
def read_page() -> str:
    return (resources.files("nybble.server") / "web" / "index.html").read_text(encoding="utf-8")


@cache
def security_policy(html: str) -> str:
    """Content-Security-Policy: only the script and the style in this file, by their hashes, and only this server."""

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
