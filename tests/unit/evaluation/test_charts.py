import warnings

import matplotlib
import torch

from minigpt.data.dataset import EvalBatch
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluation import charts
from minigpt.evaluation.breakdown import Breakdown


def test_the_loss_is_drawn(tmp_path):
    history = [{"step": step, "train_loss": 3 / (step + 1), "val_loss": abs(step - 3) + 1.0} for step in range(6)]
    charts.loss(history, "a title", tmp_path / "loss.svg")
    drawn = (tmp_path / "loss.svg").read_text()
    assert "<svg" in drawn
    charts.loss(history, "another", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_an_evaluation_are_drawn_in_any_script(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "FONTS", ["DejaVu Sans", "no such font"])
    report = Breakdown(4, Tokenizer("\n $_a\u0915\u093f\u4e00"), "cpu")
    targets = torch.randint(8, (50, 4), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(50, 4, 8, generator=torch.Generator().manual_seed(1))
    report.add(EvalBatch(targets, targets, 0), logits, -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0])
    rows = [{"model": "this model", "loss": 1.5}, {"model": "uniform", "loss": 2.0}]
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none"}):
        warnings.simplefilter("error")  # matplotlib warns of glyphs that its font lacks
        charts.evaluation(report, rows, "a $title_ of$", tmp_path / "evaluation.svg")
    drawn = (tmp_path / "evaluation.svg").read_text()
    for text in (
        "this model",
        "1.500",
        f"error {report.calibration_error:.4f}",
        "newline",
        "a $title_ of$",
        "U+0915",
        "U+093F",
    ):
        assert text in drawn, text


def test_a_character_is_drawn_in_the_first_font_that_has_it(monkeypatch):
    monkeypatch.setattr(charts, "FONTS", ["DejaVu Sans", "STIXGeneral"])
    fonts = charts._fonts()
    only_there = chr(min(fonts["STIXGeneral"] - fonts["DejaVu Sans"]))
    assert charts._drawn(only_there, fonts) == only_there
    assert charts._drawn(only_there, {"DejaVu Sans": fonts["DejaVu Sans"]}) == f"U+{ord(only_there):04X}"
