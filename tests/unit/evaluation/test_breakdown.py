import csv

import numpy as np
import pytest
import torch
from helpers.workspace import params_with

from minigpt.data.dataset import Split
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluation import breakdown
from minigpt.evaluation.breakdown import BINS, Breakdown, label
from minigpt.evaluation.loss import score
from minigpt.model import GPT

CHARACTERS = "\n ,abcdefग\u093f"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    gpt = GPT(params_with(model={"init": "normal"}).model, len(CHARACTERS)).double()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return gpt.eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(np.random.default_rng(0).choice(len(CHARACTERS), 1003, p=[0.3] + [0.07] * 10))


def reported(model, tokens, stride=None):
    report = Breakdown(16, Tokenizer(CHARACTERS), "cpu")
    return report, score(model, Split(tokens), stride, watch=report.add)


def one_by_one(model, tokens, stride):
    """Position, target and probabilities of each target, in windows one after another."""
    done, start = 0, 0
    while done < len(tokens) - 1:
        stop = min(start + 16, len(tokens) - 1)
        with torch.no_grad():
            probabilities = model(tokens[None, start:stop]).softmax(-1)[0]
        for place in range(done, stop):
            yield place - start, int(tokens[place + 1]), probabilities[place - start]
        done, start = stop, start + stride


@pytest.mark.parametrize("stride", [16, 5])
def test_every_table_by_brute_force(model, tokens, stride):
    report, _ = reported(model, tokens, stride)
    positions, characters, confusions, bins = {}, {}, {}, {}
    for position, target, probabilities in one_by_one(model, tokens, stride):
        nats, guess = -probabilities[target].log().item(), int(probabilities.argmax())
        positions.setdefault(position + 1, []).append(nats)
        characters.setdefault(target, []).append(nats)
        if guess != target:
            confusions[target, guess] = confusions.get((target, guess), 0) + 1
        likeliest = probabilities.max().item()
        bins.setdefault(min(int(likeliest * BINS), BINS - 1), []).append((likeliest, guess == target))

    rows = report.positions()
    assert [(row["position"], row["count"]) for row in rows] == [(k, len(positions[k])) for k in sorted(positions)]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(positions[k]) for k in sorted(positions)], rel=1e-10)

    rows = {row["character"]: row for row in report.characters()}
    assert set(rows) == {label(CHARACTERS[index]) for index in characters}
    total = sum(map(sum, characters.values()))
    for index, nats in characters.items():
        row = rows[label(CHARACTERS[index])]
        assert (row["count"], row["code_point"]) == (len(nats), f"U+{ord(CHARACTERS[index]):04X}")
        assert (row["loss"], row["share"]) == (pytest.approx(np.mean(nats)), pytest.approx(sum(nats) / total))
    counts = [row["count"] for row in report.characters()]
    assert counts == sorted(counts, reverse=True)

    rows = report.confusions()
    assert [row["count"] for row in rows] == sorted(confusions.values(), reverse=True)[: breakdown.PAIRS]
    named = {
        (label(CHARACTERS[t]), label(CHARACTERS[g])): (n, n / len(characters[t])) for (t, g), n in confusions.items()
    }
    for row in rows:
        assert named[row["target"], row["guess"]] == (row["count"], pytest.approx(row["share"]))
        assert row["pair"] == f"{row['target']} as {row['guess']}"

    rows = report.calibration()
    assert [row["count"] for row in rows] == [len(bins[k]) for k in sorted(bins)]
    for row, k in zip(rows, sorted(bins), strict=True):
        num_logits, observed = np.mean(bins[k], axis=0)
        assert (row["predicted"], row["observed"]) == (pytest.approx(num_logits), pytest.approx(observed))
    off = sum(abs(sum(p - hit for p, hit in held)) for held in bins.values()) / 1002
    assert report.calibration_error == pytest.approx(off, rel=1e-10)
    assert report.accuracy == pytest.approx(np.mean([hit for held in bins.values() for _, hit in held]))


def test_the_tables_add_up_to_the_exact_loss_and_do_not_change_it(model, tokens):
    report, watched = reported(model, tokens)
    assert watched == score(model, Split(tokens))
    for rows in (report.positions(), report.characters()):
        assert sum(row["count"] for row in rows) == watched.count
        assert sum(row["loss"] * row["count"] for row in rows) == pytest.approx(watched.nats, rel=1e-12)
    assert sum(row["share"] for row in report.characters()) == pytest.approx(1)


def test_pairs_are_the_same_however_few_are_held(model, tokens, monkeypatch):
    whole = reported(model, tokens)[0].confusions()
    monkeypatch.setattr(breakdown, "HELD", 40)
    report, _ = reported(model, tokens)
    assert sum(map(len, report._pairs)) < 40 + 16 + len(CHARACTERS) ** 2
    assert report.confusions() == whole


def test_a_model_that_says_what_it_knows_has_no_calibration_error():
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 200_000, 5, generator=random)
    targets = torch.multinomial(logits[0].softmax(-1), 1, generator=random)[None, :, 0]
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    part = breakdown.EvalBatch(targets, targets, 0)
    fair, bold = Breakdown(200_000, Tokenizer("abcde"), "cpu"), Breakdown(200_000, Tokenizer("abcde"), "cpu")
    fair.add(part, logits, nats)
    bold.add(part, 2 * logits, -(2 * logits).log_softmax(-1).gather(-1, targets[..., None])[..., 0])
    assert fair.calibration_error < 0.005
    assert bold.calibration_error > 0.05
    assert fair.accuracy == bold.accuracy


def test_thousands_of_characters_take_no_square():
    V = 9000
    tokenizer = Tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + V))))
    report = Breakdown(8, tokenizer, "cpu")
    targets = torch.arange(V).view(-1, 8)
    logits = torch.zeros(V // 8, 8, V).scatter_(-1, (targets[..., None] + 1) % V, 5.0)
    report.add(breakdown.EvalBatch(targets, targets, 0), logits, torch.full((V // 8, 8), 2.0))
    assert len(report.characters()) == V
    assert report.accuracy == 0
    assert report.confusions()[0] == {"pair": "一 as 丁", "target": "一", "guess": "丁", "count": 1, "share": 1.0}


def test_the_tables_are_read_back_as_written(model, tokens, tmp_path):
    report, _ = reported(model, tokens)
    report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "positions.csv", "characters.csv", "confusions.csv", "calibration.csv"
    }  # fmt: skip
    with (tmp_path / "characters.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["character"], float(row["loss"])) for row in rows] == [
        (row["character"], row["loss"]) for row in report.characters()
    ]


@pytest.mark.parametrize(
    "character, name",
    [
        ("a", "a"),
        ("\n", "newline"),
        (" ", "space"),
        ("\u093f", "\u25cc\u093f"),
        ("\u00a0", "U+00A0"),
        ("\u200d", "U+200D"),
    ],
)
def test_every_character_can_be_seen(character, name):
    assert label(character) == name
