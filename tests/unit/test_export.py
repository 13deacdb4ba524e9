import json
import os
import re
import resource
import shutil

import pytest
import torch
from helpers.workspace import params_with
from safetensors.torch import load_file, save_file

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import export, load_model
from minigpt.model import GPT

OLD_CONFIG = {
    "vocab_size": 3,
    "model": {
        "n_layer": 2, "n_head": 2, "head_size": 8, "n_embd": 20, "block_size": 16, "attention_window": 0,
        "positions": "rotary", "rotary_base": 1024.0, "activation": "relu2", "mlp_ratio": 4.0, "norm_affine": False,
        "embd_norm": True, "qk_norm": True, "embd_conv": 4, "mlp_conv": 1, "bias": False, "tied_head": False,
        "init": "zero", "dropout": 0.1, "dropout_kind": "channel",
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


def edit(**changes):
    """Return a function that changes config.json."""

    def tamper(folder):
        described = json.loads((folder / "config.json").read_text())
        described |= {name: value for name, value in changes.items() if name in described}
        described["model"] |= {name: value for name, value in changes.items() if name not in described}
        (folder / "config.json").write_text(json.dumps(described))

    return tamper


def write(name, content):
    """Return a function that replaces a file; None makes it a folder."""

    def tamper(folder):
        (folder / name).unlink()
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)

    return tamper


def change(name, function):
    """Return a function that changes one tensor; None removes it."""

    def tamper(folder):
        tensors = load_file(folder / "model.safetensors")
        changed = function(tensors.pop(name))
        save_file(tensors | ({} if changed is None else {name: changed}), folder / "model.safetensors")

    return tamper


def fifo(name):
    def tamper(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return tamper


def sparse(name):
    """Return a function that makes a file of 1 TB, which takes no space on the disk."""
    return lambda folder: os.truncate(folder / name, 10**12)


def set_first(value):
    def function(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return function


def linked(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


DEEP = b"[" * 10**6
HEAD = "embedding.weight"
HUGE_HEADER = (2**62).to_bytes(8, "little") + b"{}"
TAMPERED = [
    (edit(n_layer=10**9), "config.json: model.n_layer: must be at most 1000, got 1000000000"),
    (edit(n_layer=999), "model.safetensors: the shape of blocks.10.attention.out.weight is missing, but config.json"),
    (edit(n_embd=10**30), "config.json: model.n_embd: must be at most 100000"),
    (edit(n_embd=99_999), "model.safetensors: the shape of .* but config.json requires"),
    (edit(n_embd=20.0), "config.json: model.n_embd: expected an integer, got 20.0"),
    (edit(mlp_ratio=1e300), "config.json: model.mlp_ratio: must be at most 100, got 1e.300"),
    (edit(mlp_ratio=float("inf")), "config.json: model.mlp_ratio: expected a finite number"),
    (edit(block_size=10**9), "config.json: model.block_size: must be at most 100000"),
    (edit(positions="learned", block_size=10**5), "model.safetensors: the shape of position.weight is missing"),
    (edit(activation="swiglu"), "model.safetensors: the shape of blocks.0.feed_forward.up.weight"),
    (edit(activation="rm"), "config.json: model.activation: expected 'relu'"),
    (edit(vocab_size=10**12), "config.json: the model has 1000000000000 characters, but its tokenizer 3"),
    (edit(vocab_size=3.0), "config.json: vocab_size: expected an integer"),
    (edit(vocab_size="3"), "config.json: vocab_size: expected an integer"),
    (write("config.json", b'{"vocab_size": 3, "model": null}'), "config.json: model: expected a section"),
    (write("config.json", b'{"vocab_size": 3, "model": {}}'), "config.json: 19 mistakes"),
    (write("config.json", DEEP), "config.json: not the description of a model"),
    (write("config.json", b"[1]"), "config.json: not the description of a model"),
    (write("config.json", b"1" * 5000), "config.json: not the description of a model"),
    (write("config.json", b"\xff\xfe{}"), "config.json: not the description of a model"),
    (write("config.json", None), "config.json: expected a file, but this is a folder"),
    (write("tokenizer.json", DEEP), "tokenizer.json: not a vocabulary"),
    (write("tokenizer.json", b'"abc"'), "tokenizer.json: not a vocabulary"),
    (write("tokenizer.json", b'{"normalize": [], "characters": "abc"}'), "tokenizer.json: not a vocabulary"),
    (write("tokenizer.json", b'{"normalize": "none", "characters": "ab\\ud800"}'), "tokenizer.json: not a vocabulary"),
    (write("tokenizer.json", None), "tokenizer.json: expected a file, but this is a folder"),
    (write("model.safetensors", None), "model.safetensors: expected a file, but this is a folder"),
    (write("model.safetensors", b"\x80\x04K\x01."), "model.safetensors: damaged or incomplete"),
    (write("model.safetensors", HUGE_HEADER), "model.safetensors: damaged or incomplete"),
    (sparse("config.json"), "config.json: 1,000,000,000,000 bytes are too many"),
    (sparse("tokenizer.json"), "tokenizer.json: 1,000,000,000,000 bytes are too many"),
    (sparse("model.safetensors"), "model.safetensors: damaged or incomplete"),
    (fifo("config.json"), "config.json: expected a file, but this is none"),
    (fifo("tokenizer.json"), "tokenizer.json: expected a file, but this is none"),
    (fifo("model.safetensors"), "model.safetensors: expected a file, but this is none"),
    (linked, "config.json: expected a file, but this is none"),
    (shutil.rmtree, "no such model"),
    *((change(HEAD, lambda tensor, dtype=dtype: tensor.to(dtype)), rf"{HEAD} has the type \w+, but weights must be F32")
      for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64)),
    *((change(HEAD, set_first(value)), f"{HEAD} has values that are not finite")
      for value in (float("nan"), float("inf"), float("-inf"))),
    (change(HEAD, lambda tensor: tensor[:2].clone()), r"the shape of embedding.weight is \(2, 20\)"),
    (change(HEAD, lambda tensor: tensor.flatten()), r"the shape of embedding.weight is \(60,\)"),
    (change(HEAD, lambda tensor: None), "the shape of embedding.weight is missing"),
]  # fmt: skip
"""Changes of an exported model, and the message for each."""


@pytest.mark.parametrize("tamper, message", TAMPERED)
def test_tampered_model_is_one_line_without_large_memory(exported, tamper, message):
    _, folder = exported
    tamper(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    text = str(error.value)
    assert str(folder) in text
    assert len(text) < 2000
    assert "\n" not in text or "mistakes" in text


def test_command_reports_a_tampered_model(minigpt, exported):
    _, folder = exported
    tamper, message = TAMPERED[16]
    tamper(folder)
    ran = minigpt("write", "a", "--model", folder)
    (line,) = ran.stderr.splitlines()
    assert re.match(f"minigpt: {re.escape(str(folder))}/.*{message}", line)
    assert (ran.returncode, ran.stdout) == (1, "")
