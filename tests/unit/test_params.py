import pytest
import yaml
from helpers.workspace import ROOT, overlay

from minigpt.errors import UserError
from minigpt.params import Params, flatten, load

SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())


def load_changed(tmp_path, changes):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(overlay(SHIPPED, changes)))
    return load(path)


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "configs").glob("*.yaml"))], ids=lambda p: p.name
)
def test_every_shipped_file_is_valid_and_takes_another_width(path):
    params = load(path)
    wider = overlay(params.model_dump(), {"model": {"n_embd": 512}})
    assert Params.model_validate(wider).model.n_embd == 512


def test_reference_is_the_published_system():
    params = load(ROOT / "configs/reference.yaml")
    model, train = params.model, params.train
    assert (model.n_layer, model.n_head, model.head_size, model.n_embd, model.block_size) == (6, 6, 64, 384, 256)
    assert (model.positions, model.activation, model.dropout, model.norm_affine) == ("learned", "relu", 0.3, True)
    assert (train.max_iters, train.eval_interval, train.batch_size, train.learning_rate) == (5000, 300, 64, 3e-4)
    assert (train.optimizer, train.weight_decay, train.schedule) == ("adamw", 0, "constant")
    assert (params.sample.max_new_tokens, params.data.val_fraction) == (5000, 0.1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"n_embd": "abc"}}, "model.n_embd: expected an integer, got 'abc'"),
        ({"model": {"n_embd": 3.5}}, "model.n_embd: expected an integer, got 3.5"),
        ({"model": {"n_embd": True}}, "model.n_embd: expected an integer, got True"),
        ({"model": {"n_layer": 0}}, "model.n_layer: must be at least 1, got 0"),
        ({"model": {"n_layers": 2}}, "model.n_layers: unknown key; did you mean n_layer?"),
        ({"model": {"head_size": 7}}, "model.positions: rotary positions turn pairs of channels"),
        (
            {"model": {"activation": "tanh"}},
            "model.activation: expected 'relu', 'relu2', 'gelu' or 'swiglu', got 'tanh'",
        ),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: expected a finite number, got nan"),
        ({"train": {"device": "gpu"}}, "train.device: expected 'auto', 'cpu', 'cuda'"),
        ({"train": {"grad_accum": 5}}, "train.grad_accum: must divide batch_size"),
        ({"train": {"beta1": 1}}, "train.beta1: must be less than 1"),
        ({"evaluate": {"stride": 10_000}}, "evaluate: its stride must be at most model.block_size"),
        ({"evaluate": {"train_chars": 0}}, "evaluate.train_chars: must be at least 1, got 0"),
        ({"sample": {"prompts": []}}, "sample.prompts: must not be empty"),
        ({"sample": {"prompts": [3]}}, "sample.prompts.0: expected a text, got 3"),
        ({"data": {"val_fraction": 1.0}}, "data.val_fraction: must be less than 1"),
    ],
)
def test_a_mistake_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load_changed(tmp_path, changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_reported_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_changed(tmp_path, {"model": {"n_embd": "abc", "n_layers": 1}, "sample": {"top_p": 0}})
    assert all(name in str(error.value) for name in ("model.n_embd", "model.n_layers", "sample.top_p", "3 mistakes"))


@pytest.mark.parametrize("text", ["", "- 1\n", "model: [\n", "model: 3\n", "\xff", "a: &a [*a]\n", "{}", "1: 2\n"])
def test_a_file_of_another_form_is_one_clear_message(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"params\.yaml"):
        load(path)


def test_a_missing_file_says_where_to_be(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "params.yaml")


def test_floats_are_read_as_dvc_reads_them(tmp_path):
    path = tmp_path / "params.yaml"
    shipped = (ROOT / "params.yaml").read_text()
    path.write_text(shipped.replace("learning_rate: 0.03", "learning_rate: 3e-4"))
    assert load(path).train.learning_rate == 3e-4


def test_flatten_gives_dotted_names():
    flat = flatten(Params.model_validate(SHIPPED))
    assert flat["model.n_embd"] == SHIPPED["model"]["n_embd"]
    assert len(flat) == sum(len(section) for section in SHIPPED.values())
