import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from helpers.workspace import ROOT, overlay, python
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import profiles
from minigpt.errors import UserError
from minigpt.params import ModelParams, Params, SamplingParams, flatten, load, parse, read_yaml, validate

SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())


def load_changed(tmp_path, changes):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(overlay(SHIPPED, changes)))
    return load(path)


@pytest.mark.parametrize("name", profiles.names(ROOT))
def test_every_profile_is_valid_with_another_width(name):
    params = profiles.load_profile(name, ROOT)
    wider = overlay(params.model_dump(), {"model": {"n_embd": 512}})
    assert Params.model_validate(wider).model.n_embd == 512


def test_reference_is_the_published_system():
    params = profiles.load_profile("reference", ROOT)
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
        ({"model": {"head_size": 7}}, "model.positions: rotary positions rotate pairs of channels"),
        ({"model": {"activation": "no"}}, "model.activation: expected 'relu', 'relu2', 'gelu'"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: expected a finite number, got nan"),
        (
            {"train": {"init_from": "a\0b"}},
            "train.init_from: expected a path, which has no NUL character, got",
        ),
        ({"train": {"device": "mps"}}, "train.device: expected 'auto', 'cpu', 'cuda'"),
        ({"train": {"device": "gpu"}}, "train.device: expected 'auto', 'cpu', 'cuda'"),
        ({"train": {"grad_accum": 5}}, "train.grad_accum: must divide batch_size"),
        ({"train": {"beta1": 1}}, "train.beta1: must be less than 1"),
        ({"evaluate": {"stride": 10_000}}, "evaluate: its stride must be at most model.block_size"),
        ({"evaluate": {"train_chars": 0}}, "evaluate.train_chars: must be at least 1, got 0"),
        ({"sample": {"prompts": []}}, "sample.prompts: must not be empty"),
        ({"sample": {"prompts": [3]}}, "sample.prompts.0: expected a text, got 3"),
        ({"data": {"val_fraction": 1.0}}, "data.val_fraction: must be less than 1, got 1.0"),
        (
            {"data": {"val_fraction": 0.7, "test_fraction": 0.3}},
            "data.test_fraction: data.val_fraction + data.test_fraction must be less than 1, or no training split",
        ),
        ({"data": {"split": "each"}}, "data.split: expected 'end' or 'each_file', got 'each'"),
        ({"sample": {"overflow": "hop"}}, "sample.overflow: hop was renamed reread"),
        ({"sample": {"overflow": "skip"}}, "sample.overflow: expected 'reread', 'slide' or 'roll', got 'skip'"),
        ({"sample": {"temperature": 1e-45}}, "sample.temperature: must be 0, or at least 1e-06, got 1e-45"),
        ({"sample": {"repetition_penalty": 1e-300}}, "sample.repetition_penalty: must be at least 0.001, got 1e-300"),
        ({"sample": {"stop": ["a"] * 101}}, "sample.stop: must have at most 100 entries"),
        ({"sample": {"stop": ["a" * 1001]}}, "sample.stop.0: must have at most 1000 characters"),
        ({"train": {"schedule": "step"}}, "train.schedule: expected 'constant', 'linear' or 'cosine', got 'step'"),
    ],
)
def test_wrong_value_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load_changed(tmp_path, changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NUMBERS = [
    (section, key)
    for section, values in SHIPPED.items()
    for key, value in values.items()
    if type(value) in (int, float)
]


@pytest.mark.parametrize("section, key", NUMBERS, ids=lambda name: name)
def test_every_number_has_limits(tmp_path, section, key):
    for huge in (10**30, 1e300) if type(SHIPPED[section][key]) is float else (10**30,):
        with pytest.raises(UserError, match=rf"{section}\.{key}: must be (at most|less than) .*, got 1"):
            load_changed(tmp_path, {section: {key: huge}})


def test_all_mistakes_are_reported_together(tmp_path):
    with pytest.raises(UserError) as error:
        load_changed(tmp_path, {"model": {"n_embd": "abc", "n_layers": 1}, "sample": {"top_p": 0}})
    assert all(name in str(error.value) for name in ("model.n_embd", "model.n_layers", "sample.top_p", "3 mistakes"))


@pytest.mark.parametrize("text", ["", "- 1\n", "model: [\n", "model: 3\n", "\xff", "a: &a [*a]\n", "{}", "1: 2\n"])
def test_file_of_another_form_is_one_clear_message(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"params\.yaml"):
        load(path)


def test_missing_file_names_the_folder_to_run_in(tmp_path):
    with pytest.raises(UserError, match="no such file; run from the root of the repository"):
        load(tmp_path / "params.yaml")


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "params.yaml"
    shipped = (ROOT / "params.yaml").read_text()
    path.write_text(shipped.replace("learning_rate: 0.03", "learning_rate: 3e-4"))
    assert load(path).train.learning_rate == 3e-4


SCALARS = [
    "010", "0o10", "0x1F", "1:30", "1:30.5", "1_000", "1,000", "+1", "-0", ".5", "5.", "1e3", "3e-4", "1.e+3", ".inf",
    "-.INF", ".NaN", "1e400", "yes", "No", "ON", "off", "y", "True", "~", "Null", "2001-01-01", "2001-12-14t21:59:43",
    "'010'", '"\\n"', "!!str 010", '!!int "8"', "!!float 1", "=", "<<",
]  # fmt: skip
CHARACTERS = "0123456789.:_eExo+-[]{},&*!|>#%@ynNfT~\n'\""


def agree(text):
    """Return whether both readers reject a text, or return the same values of the same types."""
    results = []
    for read in (read_yaml, parse_yaml):
        try:
            results.append(repr(read(text, "params.yaml") or {}))
        except Exception:
            results.append("rejected")
    return results[0] == results[1]


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.sampled_from(SCALARS) | st.text(CHARACTERS, max_size=9)))
def test_text_means_the_same_for_dvc(values):
    text = "".join(f"key{number}: {value}\n" for number, value in enumerate(values))
    assert agree(text), text


SECOND = (ROOT / "params.yaml").read_text().partition("  max_iters:")[0].count("\n") + 2
"""Line of a second max_iters, after the first."""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("bias: false", "bias: yes", "model.bias: expected true or false, got 'yes'"),
        ("max_iters: 600", "max_iters: 1:30", "train.max_iters: expected an integer, got '1:30'"),
        ("  max_iters: 600", "  max_iters: 6\n  max_iters: 600", f'line {SECOND}: found duplicate key "max_iters"'),
        ("evaluate:", "model: {}\nevaluate:", 'found duplicate key "model"'),
        ("max_iters: 600", "max_iters: !!int x", "not readable as YAML: ValueError: invalid literal"),
        ("max_iters: 600", "max_iters: !!bool x", "not readable as YAML: KeyError: 'x'"),
        ('prompts: ["\\n"]', 'prompts: ["\\ud800"]', "sample.prompts.0: Input should be a valid string"),
    ],
)
def test_value_that_yaml_1_2_reads_otherwise_is_rejected(old, new, message):
    text = (ROOT / "params.yaml").read_text()
    assert old in text
    with pytest.raises(UserError) as error:
        parse(text.replace(old, new), "params.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_leading_zero_does_not_mean_octal():
    text = (ROOT / "params.yaml").read_text().replace("max_iters: 600", "max_iters: 010")
    assert parse(text, "params.yaml").train.max_iters == 10


def bomb(levels, start="[x, x]", each="[{0}, {0}, {0}, {0}]"):
    lines = [f"a0: &a0 {start}", *(f"a{n}: &a{n} {each.format(f'*a{n - 1}')}" for n in range(1, levels))]
    return "\n".join(lines) + "\n"


HUGE = {
    "value": bomb(30) + "model: {n_layer: *a29}\n",
    "key": bomb(30) + "? *a29\n: 1\n",
    "repeated key": bomb(30) + "model: *a29\nmodel: *a29\n",
    "merged": bomb(30, "{x: 1}", "{{<<: [{0}, {0}, {0}]}}"),
    "cycle": "model: &a [*a]\n",
    "small bomb": bomb(8) + "model: {n_layer: *a7, activation: *a7, bias: *a7}\n",
    "deep": "model: " + "[" * 1200,
    "wide": "model: {n_layer: [" + "[], " * 5000 + "]}\n",
    "many keys": "".join(f"k{n}: 1\n" for n in range(6000)),
    "many mistakes": "sample: {stop: [" + "1, " * 5000 + "]}\n",
    "long number": "model: {n_layer: " + "9" * 60_000 + "}\n",
    "long text": "model: {n_layer: " + "x" * 60_000 + "}\n",
    "long key": "model: {? " + "x" * 60_000 + " : 1}\n",
    "large": "# comment\n" * 10_000,
}


@pytest.mark.parametrize("kind", HUGE)
def test_huge_values_are_a_short_message(tmp_path, kind):
    (tmp_path / "params.yaml").write_text(HUGE[kind])
    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml")
    assert max(map(len, str(error.value).splitlines())) < 300 + len(str(tmp_path))
    assert len(str(error.value)) < 10_000


def test_command_reports_a_yaml_bomb(workspace):
    for name in ("params.yaml", "configs/mine.yaml"):
        (workspace / name).write_text(HUGE["value"])
        ran = python("-m", "minigpt", "check", name, cwd=workspace)
        assert ran.stderr.startswith(f"minigpt: {name}: its aliases stand for more than 100,000 values")
        assert ran.stderr.count("\n") == 1
        assert ran.returncode == 1
        (workspace / "params.yaml").write_text((ROOT / "params.yaml").read_text())


def test_flatten_returns_dotted_names():
    flat = flatten(Params.model_validate(SHIPPED))
    assert flat["model.n_embd"] == SHIPPED["model"]["n_embd"]
    assert len(flat) == sum(len(section) for section in SHIPPED.values())


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, values in SHIPPED.items() for key in values])
def test_missing_key_is_named_even_if_it_has_a_default(tmp_path, key):
    section, _, name = key.partition(".")
    tree = overlay(SHIPPED, {})
    del tree[section][name]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml")
    assert str(error.value) == f"{tmp_path}/params.yaml: {key}: missing"


@pytest.mark.parametrize(
    "old, new", [("train.final_lr", "train.final_lr_fraction"), ("train.token_dropout", "train.token_noise")]
)
def test_renamed_key_is_rejected_with_its_new_name(tmp_path, old, new):
    tree = overlay(SHIPPED, {})
    tree["train"][old.removeprefix("train.")] = tree["train"].pop(new.removeprefix("train."))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml")
    assert str(error.value) == f"{tmp_path}/params.yaml: {old} was renamed {new}"


def test_sampling_params_have_defaults_and_the_same_messages_everywhere():
    assert validate(SamplingParams, {"top_k": 3}) == SamplingParams(top_k=3)
    with pytest.raises(UserError, match=r"^top_k: must be at least 0, got -1$"):
        validate(SamplingParams, {"top_k": -1})
    with pytest.raises(UserError, match=r"^top_pp: unknown key; did you mean top_p\?$"):
        validate(SamplingParams, {"top_pp": 1})


def test_model_config_of_an_earlier_version_is_valid():
    config = {
        "n_layer": 4, "n_head": 2, "head_size": 64, "n_embd": 128, "block_size": 128, "attention_window": 0,
        "positions": "rotary", "rotary_base": 1024.0, "activation": "relu2", "mlp_ratio": 4.0, "norm_affine": False,
        "embd_norm": True, "qk_norm": True, "embd_conv": 4, "mlp_conv": 1, "bias": False, "tied_head": False,
        "init": "zero", "dropout": 0.1, "dropout_kind": "channel",
    }  # fmt: skip
    assert ModelParams.model_validate(config) == load(ROOT / "params.yaml").model


def test_every_param_has_a_comment():
    lines = [line for line in (ROOT / "params.yaml").read_text().splitlines() if line.startswith("  ")]
    assert len(lines) == len(flatten(SHIPPED))
    assert all("# " in line for line in lines)
