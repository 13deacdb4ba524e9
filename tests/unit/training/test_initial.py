import pytest
import torch
from helpers.models import build
from helpers.workspace import params_with

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import export
from minigpt.training.checkpoint import fingerprint
from minigpt.training.initial import initialize

OLD, NEW = Tokenizer("\nabcdefghij"), Tokenizer("\nacegikmoq!")


@pytest.fixture(params=[{}, {"bias": True, "positions": "learned"}, {"tied_head": True}], ids=str)
def architecture(request):
    return request.param


@pytest.fixture
def exported(tmp_path, architecture):
    model = build(seed=1, **architecture)
    export(tmp_path / "base", model.config, model.state_dict(), OLD)
    return model, tmp_path / "base"


def test_model_of_the_same_text_has_the_same_logits(exported, architecture):
    source, folder = exported
    model = build(seed=2, **architecture, dropout=0.3)
    ids = torch.arange(11)[None]
    assert not torch.equal(model.eval()(ids), source.eval()(ids))
    initialize(model, OLD, folder)
    assert torch.equal(model(ids), source(ids))


def test_shared_characters_keep_their_rows_and_new_ones_are_drawn(exported, architecture):
    source, folder = exported
    model, drawn = build(seed=2, **architecture), build(seed=2, **architecture)
    initialize(model, NEW, folder)
    for name in ("embedding.weight", "head.weight", *(["head.bias"] if architecture.get("bias") else [])):
        rows = [tensors.state_dict()[name] for tensors in (model, source, drawn)]
        for row, character in enumerate(NEW.characters):
            shared = character in OLD.characters
            assert torch.equal(rows[0][row], rows[1][OLD.encode(character)[0]] if shared else rows[2][row]), character
    ids = [tokenizer.encode("\naceg") for tokenizer in (NEW, OLD)]
    new, old = (
        gpt.eval()(torch.tensor(each.tolist())[None])[..., each.tolist()]
        for gpt, each in zip((model, source), ids, strict=True)
    )
    assert torch.allclose(new, old, atol=1e-5)  # the same text and the same candidates


def test_other_architectures_missing_models_and_foreign_scripts_are_refused(exported, tmp_path, architecture):
    _, folder = exported
    with pytest.raises(UserError, match=r"base has another architecture: model.n_embd is \d+ there and 68 here"):
        initialize(build(**architecture, n_embd=68), OLD, folder)
    with pytest.raises(UserError, match=r"nowhere: no such model.*name a copy of models/gpt, .*add it to git or DVC"):
        initialize(build(**architecture), OLD, tmp_path / "nowhere")
    with pytest.raises(UserError, match="base has no character of this text"):
        initialize(build(**architecture), Tokenizer("0123456789!"), folder)


def test_other_weights_are_another_training(exported):
    source, folder = exported
    params = params_with(train={"init_from": str(folder)})
    first = fingerprint(params, "digest")
    assert first == fingerprint(params, "digest")
    export(folder, source.config, {name: value + 1 for name, value in source.state_dict().items()}, OLD)
    assert fingerprint(params, "digest") != first
