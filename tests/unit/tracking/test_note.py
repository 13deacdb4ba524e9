"""Tests of the description of a run."""

import json

from helpers.tracking import find_run

from minigpt.tracking import store
from minigpt.tracking.note import describe_results
from minigpt.tracking.run import Tracker

KEY = "e" * 32
METRICS = {
    "train": {"parameters": 1000, "steps": 12, "train_seconds": 1.4, "best_step": 10},
    "evaluate": {
        "val": {"loss": 1.5, "bits_per_character": 2.16, "standard_error": 0.01},
        "baselines": {"uniform": 1.7, "2-gram": 2.5, "5-gram": 1.75},
        "versus_ngram": {"name": "5-gram", "loss": 1.75, "difference": -0.25},
    },
    "sample": {},
}


def write_results(folder):
    for stage, metrics in METRICS.items():
        (folder / stage).mkdir()
        (folder / stage / "metrics.json").write_text(json.dumps(metrics))
    (folder / "sample/samples.txt").write_text("===== prompt =====\n\nROMEO:\nA ``` fence\n", encoding="utf-8")
    (folder / "sample/page.html").touch()


def described(folder):
    """Return the tracker of a run of these results, described once: after the training."""
    write_results(folder)
    tracker = Tracker(KEY)
    tracker.journal.name("a run")
    tracker.note(folder, "train")
    tracker.upload()
    return tracker


def note():
    _, run = find_run(store.resolve_tracking_uri(), KEY)
    return run.data.tags[store.NOTE_TAG], run


def test_run_describes_loss_sample_page_and_serving(here):
    tracker = described(here)
    assert "Validation loss" not in note()[0]
    tracker.note(here, "train", "evaluate", "sample")
    tracker.upload()
    text, run = note()
    assert "1,000 parameters, 12 steps in 1 s; the best step is 10." in text
    assert "**Validation loss 1.5000 ± 0.0100 nats** (2.1600 bits per character), 0.2500 better than" in text
    assert "a 5-gram with 1.7500" in text
    assert "```text\nROMEO:\nA ''' fence\n```" in text
    assert "sample/page.html" in text
    assert f"runs:/{run.info.run_id}/model" in text


def test_loss_of_a_test_split_comes_first(here):
    write_results(here)
    test = {"loss": 1.625, "bits_per_character": 2.34, "standard_error": 0.02}
    (here / "evaluate/metrics.json").write_text(json.dumps(METRICS["evaluate"] | {"test": test}))
    text = describe_results(here, ("train", "evaluate"))
    assert "**Test loss 1.6250 ± 0.0200 nats** (2.3400 bits per character).\n\n**Validation loss 1.5000" in text


def test_description_that_a_user_edited_stays(here):
    tracker = described(here)
    client, run = find_run(store.resolve_tracking_uri(), KEY)
    client.set_tag(run.info.run_id, store.NOTE_TAG, "my own words")
    tracker.note(here, "train", "evaluate")
    tracker.upload()
    assert note()[0] == "my own words"


def test_missing_results_are_reported_and_do_not_end_the_stage(here, capsys):
    Tracker(KEY).note(here, "train")
    assert "minigpt: description of the run failed: " in capsys.readouterr().err
