"""Self-contained HTML files: a template with its data, style and scripts in its slots. Never imports torch."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
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
    template: Path, title: str, facts: Any, scripts: Sequence[Path], slots: Mapping[str, str] | None = None
) -> bytes:
    """Return a template as UTF-8, with the title, the facts, the style, the scripts and other ``slots`` filled in.

    The Content-Security-Policy of the page allows its own scripts, by their digests, and no request.
    """
    sources = [script.read_text(encoding="utf-8") for script in scripts]
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {allowed}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    content = {
        "policy": policy,
        "title": html.escape(title.replace("\0", "")),
        "facts": script_json(facts),
        "style": (FOLDER / "style.css").read_text(encoding="utf-8"),
        "scripts": "\n".join(f"<script>{source}</script>" for source in sources),
        **(slots or {}),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: content[match[1]], template.read_text(encoding="utf-8"))
    return page.encode("utf-8", "replace")  # a file name, and so a title, can have lone surrogates
