import json

import pytest
import torch
import yaml
from helpers.pictures import pixels, texts
from helpers.workspace import ROOT
from PIL import Image

from minigpt.data.dataset import EvalBatch
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.evaluation import charts
from minigpt.evaluation.breakdown import Breakdown
from minigpt.evaluation.charts import COLORS, FIELDS, evaluation_chart, loss_chart

HISTORY = [{"step": step, "train_loss": 3 / (step + 1), "val_loss": abs(step - 3) + 1.0} for step in range(6)]
BATCHES = [{"step": step, "batch_loss": 3.5 / (step + 1)} for step in range(1, 6)]
COMPARED = [{"model": "this model", "loss": 1.5}, {"model": "uniform", "loss": 2.0}]


@pytest.fixture
def breakdown():
    """Tables of random predictions over characters of three scripts."""
    tables = Breakdown(4, Tokenizer("\n $_a\u0915\u093f\u4e00"), "cpu")
    targets = torch.randint(8, (50, 4), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(50, 4, 8, generator=torch.Generator().manual_seed(1))
    tables.add(EvalBatch(targets, targets, 0), logits, -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0])
    return tables


def test_loss_chart_names_both_losses_and_marks_the_best_step(tmp_path):
    loss_chart(HISTORY, BATCHES, "a <title>", tmp_path / "loss.svg")
    found = texts(tmp_path / "loss.svg")
    assert {"a <title>", "Loss during training", "step", "loss (nats per character)"} <= set(found)
    assert [text for text in found if text in ("batches", "training split", "validation split")] == [
        "batches", "training split", "validation split"
    ]  # fmt: skip
    assert [text for text in found if text.startswith("best")] == ["best: 1.0000 at step 3"]


@pytest.mark.parametrize("title", ["a$b ${c} $$", "<DVC_METRIC_DATA>", "q'\"\\x\n&lt;", "\U0001f600", "x" * 3000])
def test_title_may_have_any_characters(tmp_path, title):
    loss_chart(HISTORY, BATCHES, title, tmp_path / "loss.svg")
    assert title in texts(tmp_path / "loss.svg")


def test_control_characters_in_a_title_are_code_points(tmp_path):
    for suffix in ("png", "svg"):  # a PNG would end the process
        loss_chart(HISTORY, BATCHES, "a\0\x07\x1b\ud800\ufffe\x7fb", tmp_path / f"loss.{suffix}")
    assert any(text.startswith("aU+0000U+0007U+001BU+D800U+FFFE") for text in texts(tmp_path / "loss.svg"))


def test_loss_chart_as_png_shows_each_loss_in_its_color(tmp_path):
    loss_chart(HISTORY, BATCHES, "a title", tmp_path / "both.png")
    loss_chart([row | {"val_loss": None} for row in HISTORY], BATCHES, "a title", tmp_path / "one.png")
    with Image.open(tmp_path / "both.png") as image:
        assert image.width > 1000
        assert image.height > 600
    colors = [color for _, color in FIELDS.values()]
    assert min(pixels(tmp_path / "both.png", color) for color in colors) > 100
    validation = FIELDS["val_loss"][1]
    assert pixels(tmp_path / "one.png", validation) < pixels(tmp_path / "both.png", validation) - 100


def test_evaluation_chart_shows_every_table(breakdown, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "_has_glyph", lambda character: character != "\u4e00")
    evaluation_chart(breakdown, COMPARED, "a $title_ of$", tmp_path / "evaluation.svg")
    found = texts(tmp_path / "evaluation.svg")
    plots = {
        name: plot for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for name, plot in entry.items()
    }
    for plot in (plot for name, plot in plots.items() if name != "loss"):
        assert {plot["title"], plot["x_label"], plot["y_label"]} - {""} <= set(found), plot
    assert {"a $title_ of$", "this model", "uniform", "1.5"} <= set(found)
    labels = {"newline", "space", "$", "_", "a", "\u0915", "\u25cc\u093f", "U+4E00"}
    assert labels <= set(found)
    pairs = [row["pair"].replace("\u4e00", "U+4E00") for row in breakdown.confusions()]
    assert set(pairs[: charts.MAX_CHARACTERS]) <= set(found)


def test_evaluation_chart_as_png_highlights_the_model(breakdown, tmp_path):
    evaluation_chart(breakdown, COMPARED, "a title", tmp_path / "with.png")
    evaluation_chart(breakdown, [COMPARED[1], COMPARED[1] | {"model": "unigram"}], "a title", tmp_path / "without.png")
    assert pixels(tmp_path / "with.png", COLORS[1]) > pixels(tmp_path / "without.png", COLORS[1]) + 5000
    assert pixels(tmp_path / "with.png", COLORS[0]) > 5000


def test_only_the_characters_with_the_largest_share_are_drawn(breakdown, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MAX_CHARACTERS", 2)
    evaluation_chart(breakdown, COMPARED, "a title", tmp_path / "evaluation.svg")
    rows = sorted(breakdown.characters(), key=lambda row: -row["share"])
    first, second, *others = [charts._drawable(row["character"]) for row in rows]
    found = texts(tmp_path / "evaluation.svg")
    assert {first, second} <= set(found)
    assert not set(others) & set(found)


def test_characters_without_a_font_are_drawn_as_code_points(monkeypatch):
    assert charts._has_glyph("a")
    assert charts._has_glyph("<")
    assert not charts._has_glyph("\u0379")  # not assigned, so no font has it
    monkeypatch.setattr(charts, "_has_glyph", lambda character: character < "\u0900" or character in "\u25cc\u2192")
    assert charts._drawable("\u25cc\u093f \u2192 \u0915") == "U+093F → U+0915"
    assert charts._drawable("\u25cc") == "\u25cc"


def test_every_anchor_of_the_templates_is_filled(breakdown):
    tables = {"history": HISTORY, "batches": BATCHES, "baselines": COMPARED, **breakdown.tables()}
    names = ["loss", "baselines", "calibration", "positions", "characters", "confusions"]
    assert "<DVC_METRIC" not in json.dumps(charts._charts(tables, *names))


def test_missing_plots_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"dvc.yaml: cannot draw the plots loss: FileNotFoundError"):
        loss_chart(HISTORY, BATCHES, "a title", tmp_path / "loss.png")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with pytest.raises(UserError, match="Template 'loss' not found"):
        loss_chart(HISTORY, BATCHES, "a title", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
