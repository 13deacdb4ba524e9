import pytest
import torch
from helpers.workspace import params_with

from minigpt.errors import UserError
from minigpt.training.memory import check_memory, lower_bounds

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"n_layer": 1000, "n_embd": 100_000}}, r"weights .*; reduce model\.n_layer \(1,000\)"),
        ({"model": {"n_head": 1000, "head_size": 10_000, "n_embd": 100_000}}, "weights "),
        ({"model": {"mlp_ratio": 100.0, "n_embd": 100_000}}, r"weights .*mlp_ratio \(100\)"),
        (
            {"train": {"batch_size": 10**6}, "model": {"block_size": 10**5}},
            r"activations .*reduce train\.batch_size \(1,000,000\)",
        ),
    ],
)
def test_impossible_training_is_refused_before_it_allocates(sections, message):
    with pytest.raises(UserError, match=rf"^params\.yaml: the {message}"):
        check_memory(params_with(**sections), 65, CPU)


def test_estimate_is_a_lower_bound_that_grows_with_the_micro_batch():
    small = params_with()
    check_memory(small, 65, CPU)
    weights, activations = lower_bounds(small, 65, CPU)
    assert weights < 10**6
    twice = params_with(train={"batch_size": 2 * small.train.batch_size})
    assert lower_bounds(twice, 65, CPU) == (weights, 2 * activations)
    split = params_with(train={"batch_size": 2 * small.train.batch_size, "grad_accum": 2})
    assert lower_bounds(split, 65, CPU) == (weights, activations)
