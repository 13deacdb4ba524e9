import copy

import numpy as np
import pytest
import torch
from helpers.workspace import params_with

from minigpt.data.dataset import EvalBatch, Split
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
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


def broken_down(model, tokens, stride=None):
    tables = Breakdown(16, Tokenizer(CHARACTERS), "cpu")
    return tables, score(model, Split(tokens), stride, callback=tables.add)


def score_one_by_one(model, tokens, stride):
    """Yield the position, the target and the probabilities of each target, one window at a time."""
    done, start = 0, 0
    while done < len(tokens) - 1:
        stop = min(start + 16, len(tokens) - 1)
        with torch.no_grad():
            probabilities = model(tokens[None, start:stop]).softmax(-1)[0]
        for index in range(done, stop):
            yield index - start, int(tokens[index + 1]), probabilities[index - start]
        done, start = stop, start + stride


@pytest.mark.parametrize("stride", [16, 5])
def test_tables_match_brute_force(model, tokens, stride):
    tables, _ = broken_down(model, tokens, stride)
    positions, characters, confusions, bins = {}, {}, {}, {}
    for position, target, probabilities in score_one_by_one(model, tokens, stride):
        nats, guess = -probabilities[target].log().item(), int(probabilities.argmax())
        positions.setdefault(position + 1, []).append(nats)
        characters.setdefault(target, []).append(nats)
        if guess != target:
            confusions[target, guess] = confusions.get((target, guess), 0) + 1
        likeliest = probabilities.max().item()
        bins.setdefault(min(int(likeliest * BINS), BINS - 1), []).append((likeliest, guess == target))

    rows = tables.positions()
    assert [(row["position"], row["count"]) for row in rows] == [(k, len(positions[k])) for k in sorted(positions)]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(positions[k]) for k in sorted(positions)], rel=1e-10)

    rows = {row["character"]: row for row in tables.characters()}
    assert set(rows) == {label(CHARACTERS[index]) for index in characters}
    total = sum(map(sum, characters.values()))
    for index, nats in characters.items():
        row = rows[label(CHARACTERS[index])]
        assert (row["count"], row["code_point"]) == (len(nats), f"U+{ord(CHARACTERS[index]):04X}")
        assert (row["loss"], row["share"]) == (pytest.approx(np.mean(nats)), pytest.approx(sum(nats) / total))
    counts = [row["count"] for row in tables.characters()]
    assert counts == sorted(counts, reverse=True)

    rows = tables.confusions()
    assert [row["count"] for row in rows] == sorted(confusions.values(), reverse=True)[: breakdown.MAX_PAIRS]
    named = {
        (label(CHARACTERS[t]), label(CHARACTERS[g])): (n, n / len(characters[t])) for (t, g), n in confusions.items()
    }
    for row in rows:
        assert named[row["target"], row["guess"]] == (row["count"], pytest.approx(row["share"]))
        assert row["pair"] == f"{row['target']} → {row['guess']}"

    rows = tables.calibration()
    assert [row["count"] for row in rows] == [len(bins[k]) for k in sorted(bins)]
    for row, k in zip(rows, sorted(bins), strict=True):
        predicted, observed = np.mean(bins[k], axis=0)
        assert (row["predicted"], row["observed"]) == (pytest.approx(predicted), pytest.approx(observed))
    error = sum(abs(sum(p - correct for p, correct in members)) for members in bins.values()) / 1002
    assert tables.calibration_error == pytest.approx(error, rel=1e-10)
    assert tables.accuracy == pytest.approx(np.mean([correct for members in bins.values() for _, correct in members]))


def test_tables_sum_to_the_exact_loss(model, tokens):
    tables, scored = broken_down(model, tokens)
    assert scored == score(model, Split(tokens))
    for rows in (tables.positions(), tables.characters()):
        assert sum(row["count"] for row in rows) == scored.count
        assert sum(row["loss"] * row["count"] for row in rows) == pytest.approx(scored.nats, rel=1e-12)
    assert sum(row["share"] for row in tables.characters()) == pytest.approx(1)


def test_standard_errors_by_context_are_those_of_a_ratio_of_sums(model, tokens):
    tables, scored = broken_down(model, tokens)
    rows, windows = tables.context(), [tokens[start : start + 17] for start in range(0, 1002, 16)]
    assert [(row["first"], row["last"]) for row in rows] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 5),
        (6, 7),
        (8, 11),
        (12, 15),
        (16, 16),
    ]
    assert sum(row["loss"] * row["count"] for row in rows) == pytest.approx(scored.nats, rel=1e-12)
    for row in rows:
        nats, counts = [], []
        for window in windows:
            with torch.no_grad():
                losses = -model(window[None, :-1]).log_softmax(-1)[0].gather(-1, window[1:, None])[:, 0]
            inside = losses[row["first"] - 1 : row["last"]]
            if len(inside):
                nats.append(inside.sum().item())
                counts.append(len(inside))
        n, loss = len(nats), sum(nats) / sum(counts)
        residuals = np.subtract(nats, np.multiply(loss, counts))
        error = np.sqrt(n / (n - 1) * (residuals**2).sum()) / sum(counts)
        assert (row["loss"], row["standard_error"]) == (pytest.approx(loss), pytest.approx(error))


def test_merging_pairs_early_does_not_change_them(model, tokens, monkeypatch):
    expected = broken_down(model, tokens)[0].confusions()
    monkeypatch.setattr(breakdown, "MERGE_AT", 40)
    tables, _ = broken_down(model, tokens)
    assert sum(map(len, tables._pairs)) < 40 + 16 + len(CHARACTERS) ** 2
    assert tables.confusions() == expected


def test_calibration_error_is_zero_for_true_probabilities_only():
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 200_000, 5, generator=random)
    targets = torch.multinomial(logits[0].softmax(-1), 1, generator=random)[None, :, 0]
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    batch = breakdown.EvalBatch(targets, targets, 0)
    calibrated, overconfident = (Breakdown(200_000, Tokenizer("abcde"), "cpu") for _ in range(2))
    calibrated.add(batch, logits, nats)
    overconfident.add(batch, 2 * logits, -(2 * logits).log_softmax(-1).gather(-1, targets[..., None])[..., 0])
    assert calibrated.calibration_error < 0.005
    assert overconfident.calibration_error > 0.05
    assert calibrated.accuracy == overconfident.accuracy


def test_loss_that_is_not_finite_is_an_error(model, tokens):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.head.weight, torch.finfo(torch.float64).max)
    with pytest.raises(UserError, match="the loss of a character is not finite"):
        broken_down(broken, tokens)


def test_vocabulary_of_thousands_needs_no_square_matrix():
    V = 9000
    tokenizer = Tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + V))))
    tables = Breakdown(8, tokenizer, "cpu")
    targets = torch.arange(V).view(-1, 8)
    logits = torch.zeros(V // 8, 8, V).scatter_(-1, (targets[..., None] + 1) % V, 5.0)
    tables.add(breakdown.EvalBatch(targets, targets, 0), logits, torch.full((V // 8, 8), 2.0))
    assert len(tables.characters()) == V
    assert tables.accuracy == 0
    assert tables.confusions()[0] == {"pair": "一 → 丁", "target": "一", "guess": "丁", "count": 1, "share": 1.0}


def test_tables_are_named_after_their_functions(model, tokens):
    tables, _ = broken_down(model, tokens)
    assert list(tables.tables()) == ["positions", "context", "characters", "confusions", "calibration"]
    assert tables.tables()["characters"] == tables.characters()


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
def test_labels_are_visible(character, name):
    assert label(character) == name


def test_model_that_is_certain_of_every_character_has_no_loss():
    tables = Breakdown(4, Tokenizer("ab"), "cpu")
    targets, logits = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([200.0, 0.0]).expand(2, 4, 2)
    nats = -logits.log_softmax(-1)[..., 0]
    tables.add(EvalBatch(targets, targets, 0), logits, nats)
    assert not nats.any()
    assert [(row["loss"], row["share"]) for row in tables.characters()] == [(0, 0)]
    assert tables.tables()["confusions"] == []
