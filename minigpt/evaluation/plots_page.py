"""Page template for ``dvc plots show`` and ``dvc plots diff`` that works without a network.

DVC's default page loads its scripts from a CDN. ``minigpt plots-page`` writes a page that contains the scripts of the
package vl-convert-python, and sets it as DVC's template in ``.dvc/config.local``. Git ignores both files.
"""

from pathlib import Path

from minigpt.evaluation.charts import VEGA_LITE
from minigpt.files import require_root

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
"""The page: DVC fills in ``{refresh_tag}`` and ``{plot_divs}``; a scripts bundle takes the place of DVC's tags."""


def write_page() -> None:
    """Write the page and set it as the template of the DVC repository in the working directory."""
    import vl_convert
    from dvc.config import Config

    require_root()
    scripts = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    temporary = PAGE.with_suffix(".tmp")
    temporary.parent.mkdir(exist_ok=True)
    temporary.write_text(HTML % scripts, encoding="utf-8")
    temporary.replace(PAGE)
    with Config(Path(".dvc").resolve()).edit("local") as local:
        local["plots"]["html_template"] = PAGE.relative_to(".dvc").as_posix()
