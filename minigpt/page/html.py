"""Self-contained HTML files: templates with their data, styles and scripts. Never imports torch."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# "<" could close the element of the facts or open a comment. UTF-8 cannot encode surrogates. Browsers or editors may
# change the others.
_UNSAFE = re.compile("[<>&\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def script_json(value: Any) -> str:
    """Return ``value`` as JSON that nothing in it can end early, inside an HTML element ``script``."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def fill(
    body: Path, title: str, facts: Any, scripts: Sequence[Path], *, styles: Sequence[Path] = (), data: str = ""
) -> bytes:
    """Return a page as UTF-8: head.html and ``body``, with title, facts, styles and scripts in their slots.

    ``data`` are further elements of the head. The Content-Security-Policy of the page allows its own scripts, by their
    digests, and no request.
    """
    sources = [script.read_text(encoding="utf-8") for script in scripts]
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {allowed}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    slots = {
        "policy": policy,
        "title": html.escape(title.replace("\0", "")),
        "facts": script_json(facts),
        "data": data,
        "style": "\n".join(style.read_text(encoding="utf-8") for style in (FOLDER / "style.css", *styles)),
        "scripts": "\n".join(f"<script>{source}</script>" for source in sources),
    }
    template = "".join(part.read_text(encoding="utf-8") for part in (FOLDER / "head.html", body))
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)
    return page.encode("utf-8", "replace")  # a file name, and so a title, can have lone surrogates
