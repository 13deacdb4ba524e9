import json

import pytest
import torch
from helpers.workspace import params_with

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import export, load_model
from minigpt.model import GPT

OLD_CONFIG = {
    "vocab_size": 3,
    "model": {
        "n_layer": 2, "n_head": 2, "head_size": 8, "n_embd": 20, "block_size": 16, "attention_window": 0,
        "positions": "rotary", "rotary_base": 1024.0, "activation": "relu2", "mlp_ratio": 4.0, "norm_affine": False,
        "embd_norm": True, "qk_norm": True, "embd_conv": 4, "bias": False, "tied_head": False, "init": "zero",
        "dropout": 0.1, "dropout_kind": "channel",
    },
}  # fmt: skip
"""config.json as version 0.1.0 wrote it."""


@pytest.fixture(params=[False, True], ids=["head of its own", "tied head"])
def exported(request, tmp_path):
    """A model, and the folder it was exported to."""
    torch.manual_seed(0)
    model = GPT(params_with(model={"tied_head": request.param, "init": "normal"}).model, 3).eval()
    export(tmp_path / "gpt", model.config, model.state_dict(), Tokenizer("abc"))
    return model, tmp_path / "gpt"


def test_a_loaded_model_gives_the_same_logits(exported):
    model, folder = exported
    loaded, tokenizer = load_model(folder)
    ids = torch.randint(3, (2, 16))
    assert torch.equal(loaded(ids), model(ids))
    assert tokenizer.characters == "abc"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_a_config_of_an_earlier_version_still_loads(tmp_path):
    torch.manual_seed(0)
    model = GPT(params_with(model=OLD_CONFIG["model"]).model, 3).eval()
    export(tmp_path / "gpt", model.config, model.state_dict(), Tokenizer("abc"))
    (tmp_path / "gpt/config.json").write_text(json.dumps(OLD_CONFIG))
    loaded, _ = load_model(tmp_path / "gpt")
    assert loaded.config == model.config


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "remove"])
def test_a_damaged_file_is_named(exported, name, damage):
    _, folder = exported
    data = (folder / name).read_bytes()
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match=name):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named(exported):
    _, folder = exported
    described = json.loads((folder / "config.json").read_text())
    described["model"]["n_embd"] += 1
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"weight is \(.*config.json requires"):
        load_model(folder)


def test_a_missing_model_names_the_command_that_trains_one(tmp_path):
    with pytest.raises(UserError, match="dvc repro train"):
        load_model(tmp_path / "gpt")
