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
from minigpt.evaluation.charts import COLORS, FIELDS, Renderer, evaluation_chart, loss_chart
from minigpt.files import write_csv

HISTORY = [{"step": step, "train_loss": 3 / (step + 1), "val_loss": abs(step - 3) + 1.0} for step in range(6)]
BATCHES = [{"step": step, "batch_loss": 3.5 / (step + 1)} for step in range(1, 6)]
COMPARED = [{"model": "this model", "loss": 1.5}, {"model": "uniform", "loss": 2.0}]


def tables(breakdown):
    """Return the tables of an evaluation by name."""
    return {"baselines": COMPARED, **breakdown.tables()}


@pytest.fixture
def breakdown():
    """Breakdown of random predictions over characters of three scripts."""
    filled = Breakdown(4, Tokenizer("\n $_a\u0915\u093f\u4e00"), "cpu")
    targets = torch.randint(8, (50, 4), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(50, 4, 8, generator=torch.Generator().manual_seed(1))
    filled.add(EvalBatch(targets, targets, 0), logits, -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0])
    return filled


@pytest.fixture
def training(tmp_path):
    """Folder with the curves of a training."""
    write_csv(tmp_path / "history.csv", HISTORY)
    write_csv(tmp_path / "batches.csv", BATCHES)
    return tmp_path


def test_loss_chart_names_both_losses_and_marks_the_best_step(training, tmp_path):
    loss_chart(training, "a <title>", tmp_path / "loss.svg")
    found = texts(tmp_path / "loss.svg")
    assert {"a <title>", "Loss during training", "step", "loss (nats per character)"} <= set(found)
    assert [text for text in found if text in ("batches", "training split", "validation split")] == [
        "batches", "training split", "validation split"
    ]  # fmt: skip
    assert [text for text in found if text.startswith("best")] == ["best: 1.0000 at step 3"]


@pytest.mark.parametrize("title", ["a$b ${c} $$", "<DVC_METRIC_DATA>", "q'\"\\x\n&lt;", "\U0001f600", "x" * 3000])
def test_title_may_have_any_characters(training, tmp_path, title):
    loss_chart(training, title, tmp_path / "loss.svg")
    assert title in texts(tmp_path / "loss.svg")


def test_control_characters_in_a_title_are_code_points(training, tmp_path):
    for suffix in ("png", "svg"):  # a PNG would end the process
        loss_chart(training, "a\0\x07\x1b\ud800\ufffe\x7fb", tmp_path / f"loss.{suffix}")
    assert any(text.startswith("aU+0000U+0007U+001BU+D800U+FFFE") for text in texts(tmp_path / "loss.svg"))


def test_loss_chart_as_png_shows_each_loss_in_its_color(training, tmp_path):
    loss_chart(training, "a title", tmp_path / "both.png")
    write_csv(training / "history.csv", [row | {"val_loss": None} for row in HISTORY])
    loss_chart(training, "a title", tmp_path / "one.png")
    with Image.open(tmp_path / "both.png") as image:
        assert image.width > 1000
        assert image.height > 600
    colors = [color for _, color in FIELDS.values()]
    assert min(pixels(tmp_path / "both.png", color) for color in colors) > 100
    validation = FIELDS["val_loss"][1]
    assert pixels(tmp_path / "one.png", validation) < pixels(tmp_path / "both.png", validation) - 100


def test_evaluation_chart_shows_every_table(breakdown, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "_has_glyph", lambda character: character != "\u4e00")
    evaluation_chart(tables(breakdown), "a $title_ of$", tmp_path / "evaluation.svg")
    found = texts(tmp_path / "evaluation.svg")
    plots = {
        name: plot for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for name, plot in entry.items()
    }
    for plot in (plot for name, plot in plots.items() if name != "loss"):
        assert {plot["title"], plot["x_label"], plot["y_label"]} - {""} <= set(found), plot
    assert {"a $title_ of$", "this model", "uniform", "1.5000"} <= set(found)
    labels = {"newline", "space", "$", "_", "a", "\u0915", "\u25cc\u093f", "U+4E00"}
    assert labels <= set(found)
    pairs = [row["pair"].replace("\u4e00", "U+4E00") for row in breakdown.confusions()]
    assert set(pairs[: charts.MAX_CHARACTERS]) <= set(found)


def test_evaluation_chart_as_png_highlights_the_model(breakdown, tmp_path):
    evaluation_chart(tables(breakdown), "a title", tmp_path / "with.png")
    others = {"baselines": [COMPARED[1], COMPARED[1] | {"model": "unigram"}]}
    evaluation_chart(tables(breakdown) | others, "a title", tmp_path / "without.png")
    assert pixels(tmp_path / "with.png", COLORS[1]) > pixels(tmp_path / "without.png", COLORS[1]) + 5000
    assert pixels(tmp_path / "with.png", COLORS[0]) > 5000


def test_only_the_characters_with_the_largest_share_are_drawn(breakdown, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MAX_CHARACTERS", 2)
    evaluation_chart(tables(breakdown), "a title", tmp_path / "evaluation.svg")
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
    known = {"history": HISTORY, "batches": BATCHES, **tables(breakdown)}
    names = ["loss", "baselines", "calibration", "positions", "characters", "confusions"]
    assert "<DVC_METRIC" not in json.dumps(charts._charts(known, *names))


def test_missing_plots_are_reported(training, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"dvc.yaml: cannot draw the plots loss: FileNotFoundError"):
        loss_chart(training, "a title", tmp_path / "loss.png")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with pytest.raises(UserError, match="Template 'loss' not found"):
        loss_chart(training, "a title", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_renderer_draws_in_another_process(breakdown, training, capfd):
    renderer = Renderer()
    renderer.draw(loss_chart, str(training), "a title", name="train/loss.svg")
    renderer.draw(evaluation_chart, tables(breakdown), "a title", name="evaluate/evaluation.svg")
    renderer.finish()
    assert "best: 1.0000 at step 3" in texts(renderer.folder / "train" / "loss.svg")
    assert {"a title", "this model"} <= set(texts(renderer.folder / "evaluate" / "evaluation.svg"))
    assert capfd.readouterr().err == ""


def test_renderer_reports_a_chart_that_it_cannot_draw_and_draws_the_next(breakdown, training, capfd):
    (training / "history.csv").write_bytes(b"step\n\xff\n")
    renderer = Renderer()
    renderer.draw(loss_chart, str(training), "a title", name="train/loss.svg")
    renderer.draw(evaluation_chart, tables(breakdown), "a title", name="evaluation.svg")
    renderer.finish()
    assert [file.name for file in renderer.folder.rglob("*.svg")] == ["evaluation.svg"]
    assert "minigpt: loss chart failed: 'utf-8' codec can't decode byte 0xff" in capfd.readouterr().err


def test_renderer_that_was_killed_is_reported(training, capfd):
    renderer = Renderer()
    renderer._process.kill()
    renderer._process.wait()
    renderer.draw(loss_chart, str(training), "a title", name="loss.svg")
    renderer.finish()
    assert "minigpt: the process that draws charts has ended with code -9" in capfd.readouterr().err


def test_renderer_ends_with_its_owner(training):
    renderer = Renderer()
    renderer.draw(loss_chart, str(training), "a title", name="loss.svg")
    process, folder = renderer._process, renderer.folder
    del renderer
    assert process.wait(10) < 0
    assert not folder.exists()


def test_without_a_process_there_are_no_charts(monkeypatch, capsys):
    monkeypatch.setattr(charts.sys, "executable", "/missing/python")
    renderer = Renderer()
    renderer.draw(loss_chart, "training", "a title", name="loss.svg")
    renderer.finish()
    problem = "no charts, because no process can be started: No such file or directory"
    assert capsys.readouterr().err == f"minigpt: {problem}\n"
