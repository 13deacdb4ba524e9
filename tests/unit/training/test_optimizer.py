import json

import pytest
import torch
from helpers.workspace import ROOT, params_with, python

from minigpt.model import GPT
from minigpt.training.optimizer import AdamW, Muon, Optimizers, learning_rate, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 24), (2, 24, 6), (1, 1, 5)])
def test_orthogonalize_keeps_directions_with_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(1), (u @ v).flatten(1)).min() > 0.95


@pytest.mark.parametrize("row_norm", [False, True])
def test_muon_updates_a_batch_like_single_matrices(row_norm):
    torch.manual_seed(0)
    weights = [torch.randn(12, 4), torch.randn(4, 4), torch.randn(4, 4), torch.randn(16, 4), torch.randn(4, 16)]
    weights.append(torch.randn(20, 4))
    maps = [3, 1, 1, 1, 1, 2]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    matrices = list(zip(ours, maps, strict=True))
    muon = Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.2, row_norm=row_norm, dtype=torch.float32)
    expected, means = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    for _ in range(3):
        for index, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            means[index] = 0.9 * means[index] + 0.1 * p.grad
            nesterov = 0.1 * p.grad + 0.9 * means[index]
            directions = []
            for m in nesterov.chunk(maps[index]):
                direction = orthogonalize(m[None])[0]
                norms = direction.norm(dim=1, keepdim=True) if row_norm else min(1, m.size(1) / m.size(0)) ** 0.5
                directions.append(direction / norms)
            expected[index] = expected[index] * (1 - 0.1 * 0.2) - 0.1 * torch.cat(directions)
        muon.step()
    for p, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(p.data, value, rtol=1e-4, atol=1e-5)


def model_and_optimizers(**train):
    params = params_with(train=train)
    torch.manual_seed(0)
    model = GPT(params.model, 11)
    return model, Optimizers(model, params.train, torch.float32)


def fill_gradients(model, value=None):
    for p in model.parameters():
        p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_by_exactly_one_optimizer(optimizer):
    model, optimizers = model_and_optimizers(optimizer=optimizer, warmup_iters=0)
    updated = [p for optimizer in optimizers.all for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, updated)) == sorted(map(id, model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    fill_gradients(model)
    optimizers.step(0)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_adamw_without_weight_decay_equals_torch_adam():
    model, optimizers = model_and_optimizers(
        optimizer="adamw", weight_decay=0.0, schedule="constant", warmup_iters=0, learning_rate=1e-3, epsilon=1e-8
    )
    twin = GPT(model.config, 11)
    twin.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(3):
        fill_gradients(model)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        optimizers.step(step)
        adam.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_with_found_inf_changes_no_weight(optimizer):
    model, optimizers = model_and_optimizers(optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    fill_gradients(model, float("nan"))
    optimizers.step(5, torch.ones(()))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_optimizers_do_not_import_the_compiler_of_torch():
    code = """if True:
        import sys, torch
        from minigpt.training.optimizer import AdamW, Muon
        weight = torch.nn.Parameter(torch.eye(2))
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "row_norm": False, "dtype": torch.float32}
        for optimizer in (AdamW([weight], fused=True), Muon([(weight, 1)], **settings)):
            weight.grad = torch.ones(2, 2)
            optimizer.step()
            optimizer.state_dict()
        print(weight.requires_grad, "torch._dynamo" in sys.modules)
    """
    assert python("-c", code, cwd=ROOT).stdout.strip() == "True False"


def test_adamw_equals_torch_adamw_bitwise():
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    weights = []
    for kind in (AdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, weight_decay=0.2, fused=True)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], start)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loaded_state_continues_bitwise(optimizer):
    model, optimizers = model_and_optimizers(optimizer=optimizer)
    other, others = model_and_optimizers(optimizer=optimizer)
    torch.manual_seed(1)
    for step in range(2):
        fill_gradients(model)
        optimizers.step(step)
    other.load_state_dict(model.state_dict())
    others.load({name: value.clone() for name, value in optimizers.tensors().items()})
    fill_gradients(model)
    for p, twin in zip(model.parameters(), other.parameters(), strict=True):
        twin.grad = p.grad.clone()
    optimizers.step(2)
    others.step(2)
    assert all(torch.equal(p, twin) for p, twin in zip(model.parameters(), other.parameters(), strict=True))


def test_learning_rate_follows_schedule():
    def rates(**train):
        section = params_with(train={"max_iters": 110, "warmup_iters": 10, **train}).train
        return [learning_rate(step, section) for step in range(111)]

    linear = rates(schedule="linear", final_lr_fraction=0)
    assert linear[0] == pytest.approx(0.1)
    assert (linear[9], linear[10], linear[60], linear[110]) == (1.0, 1.0, pytest.approx(0.5), 0.0)
    cosine = rates(schedule="cosine", final_lr_fraction=0.1)
    assert (cosine[10], cosine[60], cosine[110]) == (1.0, pytest.approx(0.55), pytest.approx(0.1))
    assert set(rates(schedule="constant", warmup_iters=0)) == {1.0}


def test_an_entry_in_the_table_is_all_that_a_new_schedule_needs():
    code = (
        "import json, sys; from minigpt.choices import SCHEDULES\n"
        "SCHEDULES['square'] = lambda done: (1 - done) ** 2\n"
        "from minigpt.params import Params; from minigpt.training.optimizer import learning_rate\n"
        "train = Params.model_validate(json.loads(sys.argv[1])).train\n"
        "print(json.dumps([learning_rate(step, train) for step in range(111)]))"
    )
    tree = params_with(train={"max_iters": 110, "warmup_iters": 10, "final_lr_fraction": 0.1}).model_dump()
    tree["train"]["schedule"] = "square"
    ran = python("-c", code, json.dumps(tree), cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    rates = json.loads(ran.stdout)
    assert (rates[10], rates[60], rates[110]) == (1.0, pytest.approx(0.1 + 0.9 * 0.25), pytest.approx(0.1))


def test_unknown_schedule_is_rejected():
    with pytest.raises(ValueError, match=r"train\.schedule\n.*'constant', 'linear' or 'cosine'"):
        params_with(train={"schedule": "square"})
