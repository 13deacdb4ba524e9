"""Charts as PNG or SVG files, drawn from the plots in ``dvc.yaml``.

``dvc.yaml`` has titles, labels and columns, and ``.dvc/plots`` has Vega-Lite templates. They are filled in as by
``dvc plots show``, but with one color per column, while DVC has one per revision.

``python -m minigpt.evaluation.charts`` draws the charts that a :class:`Renderer` in another process requests.
"""

from __future__ import annotations

import functools
import html
import json
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from minigpt.errors import UserError
from minigpt.files import parse_csv

Rows = list[dict[str, Any]]

ROOT = Path(__file__).parents[2]
"""The repository, in which minigpt is installed in editable mode."""

COLORS = ["#945dd6", "#f46837"]
"""Purple and orange of DVC's palette, which color-blind readers can tell apart."""

FIELDS = {
    "batch_loss": ("batches", "#b9bec7"),
    "train_loss": ("training split", COLORS[1]),
    "val_loss": ("validation split", COLORS[0]),
}
"""Names and colors of the columns of the loss chart."""

MAX_CHARACTERS = 15
"""Characters in a chart, those with the largest share of the loss."""

VEGA_LITE = "5.21"
"""Release of Vega-Lite that renders. The templates are written for major version 5, as DVC's own templates are."""


class Renderer:
    """Another process that draws charts while this one works. Its start takes half a second.

    It ends with this one, and if a chart aborts it, this one continues. ``folder`` has the pictures.
    """

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="minigpt-")
        self.folder = Path(self._temporary.name)
        command = [sys.executable, "-m", "minigpt.evaluation.charts"]
        self._process: subprocess.Popen[str] | None = None
        try:
            # In a session of its own, so that Ctrl-C reaches only this process. It ends with its input.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, encoding="utf-8", start_new_session=True)
        except OSError as error:
            print(f"minigpt: no charts, because no process can be started: {error.strerror}", file=sys.stderr)
            return
        weakref.finalize(self, self._process.kill)  # before the folder is removed

    def draw(self, chart: Callable[..., None], *arguments: Any, name: str) -> None:
        """Begin to draw one of :data:`CHARTS`, whose last argument is the file ``name``. A failure is reported."""
        if self._process and self._process.stdin:
            with suppress(BrokenPipeError):  # `finish` reports it
                request = json.dumps([chart.__name__, *arguments, str(self.folder / name)])
                print(request, file=self._process.stdin, flush=True)

    def finish(self) -> None:
        """Wait until all charts are drawn."""
        if self._process:
            self._process.communicate()
            if code := self._process.returncode:
                print(f"minigpt: the process that draws charts has ended with code {code}", file=sys.stderr)


def loss_chart(training: str, title: str, target: Path) -> None:
    """Draw the losses in ``history.csv`` and ``batches.csv`` of the folder ``training`` over the step."""
    tables = {name: parse_csv(Path(training, f"{name}.csv").read_text("utf-8")) for name in ("history", "batches")}
    (chart,) = _charts(tables, "loss")
    # By default, the legend has a circle for each series. The series are a line, triangles and circles.
    names = [name for name, _ in FIELDS.values()]
    shapes = ["M-1,-.15h2v.3h-2Z", "triangle-up", "circle"]
    chart["layer"][1]["encoding"]["shape"] = {
        "field": "rev",
        "type": "nominal",
        "title": None,
        "scale": {"domain": names, "range": shapes},
    }
    render([[{**chart, "width": 560}]], title, target)


def evaluation_chart(tables: dict[str, Rows], title: str, target: Path) -> None:
    """Draw the tables of an evaluation by name: those of its breakdown, and the losses of models (``baselines``)."""
    characters = sorted(tables["characters"], key=lambda row: -row["share"])[:MAX_CHARACTERS]
    rows = [("baselines", "calibration", "positions"), ("characters", "confusions")]
    render([_charts(tables | {"characters": characters}, *names) for names in rows], title, target)


CHARTS: dict[str, Callable[..., None]] = {chart.__name__: chart for chart in (loss_chart, evaluation_chart)}
"""Charts by name."""


def main() -> None:
    """Draw the charts that a :class:`Renderer` requests, one line of standard input each."""
    import vl_convert

    vl_convert.vegalite_to_svg({"mark": "point", "data": {"values": []}}, vl_version=VEGA_LITE)  # the slow start
    for line in sys.stdin:
        name, *arguments, target = json.loads(line)
        try:
            Path(target).parent.mkdir(exist_ok=True)
            CHARTS[name](*arguments, Path(target))
        except Exception as error:
            print(f"minigpt: {name.replace('_', ' ')} failed: {error}", file=sys.stderr)


def render(rows: list[Rows], title: str, target: Path) -> None:
    """Write rows of charts under a heading, as PNG or SVG by the suffix of ``target``."""
    import vl_convert

    # By default, concatenated charts share one legend, and bars leave room for the bars of the other charts.
    resolve = {"scale": {"color": "independent", "shape": "independent", "yOffset": "independent"}}
    picture = {
        "title": {"text": _without_controls(title), "anchor": "middle", "fontSize": 16, "offset": 16},
        "vconcat": [{"hconcat": charts, "resolve": resolve} for charts in rows],
        "resolve": resolve,
        "background": "white",
        "padding": 16,
    }
    if target.suffix == ".svg":
        target.write_text(vl_convert.vegalite_to_svg(picture, vl_version=VEGA_LITE), encoding="utf-8")
    else:
        target.write_bytes(vl_convert.vegalite_to_png(picture, vl_version=VEGA_LITE, scale=2))


def _without_controls(text: str) -> str:
    """Return a text with code points for the characters that XML forbids. They would abort the process."""
    return re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", lambda found: f"U+{ord(found[0]):04X}", text)


def _charts(tables: dict[str, Rows], *names: str) -> Rows:
    """Return the plots ``names`` of ``dvc.yaml``, given the rows of each CSV file by its stem."""
    from dvc_render.exceptions import DvcRenderError

    try:
        listed = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
        plots = {name: plot for entry in listed for name, plot in entry.items()}
        return [_fill_template(name, plots[name], tables) for name in names]
    except (OSError, KeyError, DvcRenderError) as error:
        raise UserError(f"{ROOT / 'dvc.yaml'}: cannot draw the plots {', '.join(names)}: {error!r}") from None


def _fill_template(name: str, plot: dict[str, Any], tables: dict[str, Rows]) -> dict[str, Any]:
    """Return the Vega-Lite chart of one plot of ``dvc.yaml``."""
    from dvc_render.vega_templates import get_template

    x, data, fields = plot["x"], [], []
    for file, columns in plot["y"].items():
        rows = [{key: _drawable(cell) for key, cell in row.items()} for row in tables[Path(file).stem]]
        for column in [columns] if isinstance(columns, str) else columns:
            fields.append(column)
            revision, _ = FIELDS.get(column, (column, ""))
            data += [row | {"value": row[column], "field": column, "rev": revision} for row in rows]
    names, colors = zip(*(FIELDS.get(field, (field, COLORS[0])) for field in fields), strict=True)
    by_column = {"field": "rev", "type": "nominal", "title": None, "scale": {"domain": names, "range": colors}}
    # With one column, the bar of the model differs from those of the n-gram models.
    highlight = {"condition": {"test": "datum.model === 'this model'", "value": COLORS[1]}, "value": COLORS[0]}
    anchors = plot | {
        "data": data,
        "x": x if isinstance(x, str) else next(iter(x.values())),
        "y": "value",
        "color": by_column if len(fields) > 1 else highlight,
        "plot_width": 300,
        "plot_height": 300,
        "zoom_and_pan": {"name": f"unused_{name}", "value": 0},  # a picture cannot zoom; names must be unique
        "stroke_dash": {},
        "tooltip": [],
    }
    template = get_template(plot["template"], str(ROOT / ".dvc" / "plots"))
    for anchor, value in anchors.items():
        template.fill_anchor(anchor, value)
    return dict(template.content)


def _drawable(cell: Any) -> Any:
    """Return a cell of a table; in a text, the code point replaces each character that no installed font has."""
    if not isinstance(cell, str):
        return cell
    # A combining mark comes after a dotted circle, which a code point does not need.
    return re.sub("\u25cc?(.)", lambda found: found[0] if _has_glyph(found[1]) else f"U+{ord(found[1]):04X}", cell)


@functools.cache
def _has_glyph(character: str) -> bool:
    """Return whether a character is drawn unlike U+0378, which Unicode has not assigned."""
    import vl_convert

    text = '<text y="30" font-family="sans-serif">{}</text>'  # Vega's font
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40">{text}</svg>'
    drawn, missing = (vl_convert.svg_to_png(svg.format(html.escape(one))) for one in (character, "\u0378"))
    return bool(drawn != missing)


if __name__ == "__main__":
    main()
