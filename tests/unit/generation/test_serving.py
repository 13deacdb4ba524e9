import json
import subprocess
import sys
import uuid

import mlflow.pyfunc
import pandas
import pytest
import requests
import torch
import yaml
from helpers.models import export_small
from helpers.servers import TOKEN, free_port, process
from helpers.workspace import FULL, ROOT
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from minigpt.generation import serving
from minigpt.generation.generator import Generator
from minigpt.generation.package import REQUIREMENTS, package
from minigpt.params import SamplingParams
from minigpt.tracking.journal import Journal
from minigpt.tracking.uploader import Uploader


@pytest.fixture(autouse=True)
def without_compiler(tmp_path, monkeypatch):
    """Leave all texts to PyTorch: a decoder compiled meanwhile would round bfloat16 sums otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-compiler")


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """An exported model, and its package."""
    folder = tmp_path_factory.mktemp("serving")
    package(export_small(folder / "gpt"), folder / "model")
    return folder / "gpt", folder / "model"


def test_a_packaged_model_writes_the_same_text(packaged):
    model, folder = packaged
    wanted = {"temperature": 0.9, "top_k": 3, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.1, "stop": ["bac"]}
    wanted["seed"] = 5
    texts = mlflow.pyfunc.load_model(str(folder)).predict(
        pandas.DataFrame({"prompt": ["ab", "c\n"]}), wanted | {"max_new_tokens": 30}
    )
    generator = Generator.load(model, torch.device("cpu"))
    assert texts == [generator.generate(p, SamplingParams(**wanted, max_new_tokens=30))[0] for p in ("ab", "c\n")]


def contents(folder):
    """Return the files of a package by their paths, read if they are YAML, and without its identity."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = {name: content for name, content in files.items() if "__pycache__" not in name}  # the first use adds it
    for name in ("MLmodel", "conda.yaml", "python_env.yaml"):
        files[name] = yaml.safe_load(files[name])
    for key, length in (("model_uuid", 32), ("utc_time_created", 26)):
        assert len(files["MLmodel"].pop(key)) == length
    return files


def test_package_equals_that_of_mlflow(packaged, tmp_path):
    model, folder = packaged
    kinds = {int: DataType.long, float: DataType.double, str: DataType.string, list: DataType.string}
    params = [
        ParamSpec(name, kinds[type(value)], value, (-1,) if isinstance(value, list) else None)
        for name, value in SamplingParams().model_dump().items()
    ]
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=serving.__file__,
        artifacts={"model": str(model)},
        code_paths=[str(ROOT / "minigpt")],
        pip_requirements=REQUIREMENTS,
        signature=ModelSignature(
            Schema([ColSpec(DataType.string, "prompt")]), Schema([ColSpec(DataType.string)]), ParamSchema(params)
        ),
        input_example=pandas.DataFrame({"prompt": ["\n"]}),
    )
    assert contents(folder) == contents(tmp_path / "model")


@pytest.mark.slow
def test_a_packaged_model_works_without_the_repository(packaged, tmp_path):
    code = (
        "import sys, mlflow.pyfunc; print(len(mlflow.pyfunc.load_model(sys.argv[1]).predict([{'prompt': 'ab'}])[0]));"
        "import minigpt; print(minigpt.__file__)"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", code, packaged[1]], cwd=tmp_path, capture_output=True, text=True)
    length, file = ran.stdout.split()
    assert int(length) == 2 + SamplingParams().max_new_tokens, ran.stderr
    assert file.startswith(str(packaged[1]))


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ("xyz", {}, "character 1, 'x'"),
        ("a", {"top_p": 1.5}, "top_p: must be at most 1"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens: must be at least 0"),
        ("a", {"max_new_tokens": 10**6}, "max_new_tokens: must be at most 100000"),
        ("a", {"min_p": 2.0}, "min_p: must be at most 1"),
        ("a", {"stop": [""]}, "stop.0: must not be empty"),
        ("a", {"temprature": 1.0}, r"^temprature: unknown key; did you mean temperature\?$"),
        ("a", {"a]'b": 1.0}, "^a]'b: unknown key$"),
        (
            "a",
            {"temperature": "hot"},
            r"^Invalid parameters found: \{\('temperature', [^()]*\(default: 0.8\)[^()]*\)\}$",
        ),
        ("a", {"temperature": 1e-45}, "temperature: must be 0, or at least"),
        ("a" * 100_000, {}, "a request can have 100,000 characters, but 1 prompts and max_new_tokens 500 are 100,500"),
        ("", {}, "the prompt: empty"),
    ],
)
def test_bad_requests_are_client_errors(packaged, prompt, params, message):
    loaded = mlflow.pyfunc.load_model(str(packaged[1]))
    with pytest.raises(MlflowException, match=message) as error:
        loaded.predict(pandas.DataFrame({"prompt": [prompt]}), params)
    assert error.value.get_http_status_code() == 400


@pytest.mark.slow
def test_a_served_model_answers_and_names_mistakes(packaged, tmp_path):
    port = free_port()
    with process(
        sys.executable, "-m", "mlflow", "models", "serve", "-m", packaged[1], "--env-manager", "local", "-p", port,
        url=f"http://127.0.0.1:{port}/ping", cwd=tmp_path,
    ):  # fmt: skip

        def ask(body):
            answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
            return answer.status_code, answer.text

        wanted = {"temperature": 0.9, "top_k": 3, "top_p": 0.8, "seed": 5, "stop": ["bac"]}
        status, text = ask({"dataframe_records": [{"prompt": "ab"}], "params": wanted | {"max_new_tokens": 30}})
        generator = Generator.load(packaged[0], torch.device("cpu"))
        assert status == 200
        assert json.loads(text) == {
            "predictions": [generator.generate("ab", SamplingParams(**wanted, max_new_tokens=30))[0]]
        }
        for body, message in [
            ({"dataframe_records": [{"prompt": "xyz"}]}, "character 1, 'x'"),
            ({"dataframe_records": [{"text": "ab"}]}, "prompt"),
            ({"dataframe_records": [{"prompt": 7}]}, "prompt"),
            ({"dataframe_records": [{"prompt": "ab"}], "params": {"top_p": 1.5}}, "top_p: must be at most 1"),
            ({"dataframe_records": [{"prompt": "ab"}], "params": {"top_k": -1}}, "top_k: must be at least 0"),
            ({"dataframe_records": [{"prompt": "ab"}], "params": {"temperature": "hot"}}, "temperature"),
            ({"dataframe_records": [{"prompt": "ab"}], "params": {"temprature": 1}}, "did you mean temperature?"),
            ({"dataframe_records": [{"prompt": "ab"}] * 2000}, "a request can have 100,000 characters"),
        ]:
            status, text = ask(body)
            assert 400 <= status < 500, (body, text)
            assert message in text, (body, text)


@pytest.mark.slow
@pytest.mark.parametrize("age", ["old_server", "current_server"] if FULL else ["old_server"])
@pytest.mark.usefixtures("logged_in")
def test_a_model_of_a_run_on_a_server_is_served(packaged, age, request, tmp_path, monkeypatch):
    server = request.getfixturevalue(age)
    monkeypatch.chdir(tmp_path)
    journal = Journal(uuid.uuid4().hex)
    journal.name("a run")
    journal.artifact(packaged[1])
    Uploader(server).send(journal)
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("minigpt").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`minigpt.run` = '{journal.key}'")
    port = free_port()
    with process(
        sys.executable, "-m", "mlflow", "models", "serve", "-m", f"runs:/{run.info.run_id}/model",
        "--env-manager", "local", "-p", port, url=f"http://127.0.0.1:{port}/ping", cwd=tmp_path,
        MLFLOW_TRACKING_URI=server, MLFLOW_TRACKING_USERNAME=TOKEN, MLFLOW_TRACKING_PASSWORD=TOKEN,
    ):  # fmt: skip
        asked = {"dataframe_records": [{"prompt": "ab"}], "params": {"max_new_tokens": 30}}
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"][0]) == 32
