import pytest
import torch
from helpers.models import ARCHITECTURES, build

from minigpt.generation.cuda_graph import GraphCache, GraphedGPT
from minigpt.quantize import quantize, rounded_copy


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_step_from_tensors_gives_the_same_logits(architecture):
    gpt = build(**architecture).double().eval()
    block_size = gpt.config.block_size
    slots = block_size if architecture.get("positions") == "learned" else 2 * block_size
    ids = torch.randint(0, 11, (2, slots))
    plain, graphed = gpt.make_cache(2, slots), GraphCache(gpt, 2, slots)
    for cache in (plain, graphed):
        gpt(ids[:, :3], cache)
    for number in range(3, slots):
        expected = gpt(ids[:, number : number + 1], plain)
        with graphed.from_tensors(ids[:, number : number + 1]):
            logits = gpt(graphed.next_ids, graphed)
        graphed.advance(1)
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_captured_graph_gives_the_logits_of_the_rounded_copy(architecture, dtype):
    gpt, ids = build(**architecture | {"block_size": 64}).cuda().eval(), torch.randint(0, 11, (3, 64)).cuda()
    decoder = GraphedGPT(quantize(gpt, dtype))
    cache = decoder.make_cache(3)
    logits = torch.cat([decoder(piece, cache).clone() for piece in ids.split(1, 1)], 1)
    exact = rounded_copy(gpt, dtype)(ids)
    assert cache.graph is not None
    assert (logits - exact).abs().max() < (0.001 if dtype == "float32" else 0.05) * exact.abs().max()
