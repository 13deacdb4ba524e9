"""The page of ``dvc plots show`` and ``dvc plots diff``, whole in itself, so that it opens without a network.

DVC's own page fetches the scripts that draw it. ``python -m minigpt.page`` writes them into a page of this machine
and tells DVC of it in ``.dvc/config.local``; git ignores both. The scripts come from the package vl-convert-python.
"""

from __future__ import annotations

from pathlib import Path

from minigpt.errors import UserError, run

PAGE = Path(".dvc/plots/page.html")

HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>minigpt: plots</title>
<style>body { display: flex; flex-wrap: wrap; gap: 2rem; font-family: sans-serif; }</style>
<script>(() => {%s})();</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""
"""What DVC fills in; in place of its scripts from the network, those of this machine."""


def main() -> None:
    """Write the page, and have DVC use it.

    Raises:
        UserError: this is no DVC repository.
    """
    import vl_convert
    from dvc.config import Config

    if not Path(".dvc").is_dir():
        raise UserError(".dvc: no such folder; run this from the root of the repository")
    version = next(one for one in reversed(vl_convert.get_vegalite_versions()) if one.startswith("5."))  # DVC's
    scripts = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    temporary = PAGE.with_suffix(".tmp")
    temporary.parent.mkdir(exist_ok=True)
    temporary.write_text(HTML % scripts, encoding="utf-8")
    temporary.replace(PAGE)
    with Config(Path(".dvc").resolve()).edit("local") as local:
        local["plots"]["html_template"] = PAGE.relative_to(".dvc").as_posix()


if __name__ == "__main__":
    run(main)
