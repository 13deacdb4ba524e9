from minigpt import charts


def test_the_loss_is_drawn(tmp_path):
    history = [{"step": step, "train_loss": 3 / (step + 1), "val_loss": abs(step - 3) + 1.0} for step in range(6)]
    charts.loss(history, "a title", tmp_path / "loss.svg")
    drawn = (tmp_path / "loss.svg").read_text()
    assert "<svg" in drawn
    charts.loss(history, "another", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
