"""Tests of the connection to DagsHub, against real servers at DagsHub's addresses."""

import json
import re
import secrets
import subprocess

import pytest
from helpers.servers import TOKEN, Files, Proxy, environment, free_port, process
from helpers.tracking import SEND, find_run
from helpers.workspace import ROOT, command, make_repository, python


@pytest.fixture
def repository(tmp_path, project_files):
    """Return a repository with prepared data in DVC's cache."""
    folder = make_repository(tmp_path / "work", project_files)
    assert command("dvc", "repro", "prepare", cwd=folder).returncode == 0
    return folder


HOST = "https://me:s3cret@dagshub.example.com"
CONNECT = """\
import sys
from minigpt import program
from minigpt.tracking.dagshub import connect, read_token
program.run(lambda: connect(sys.argv[1], read_token()))
"""


def connect(folder, host, token=TOKEN, repo="user/repo", **variables):
    return python("-c", CONNECT, repo, cwd=folder, DAGSHUB_CLIENT_HOST=host, DAGSHUB_USER_TOKEN=token, **variables)


def push_and_pull(folder, **variables):
    """Push, delete all data, pull; return whether the data are restored."""
    before = {path.name: path.read_bytes() for path in (folder / "data/prepared").iterdir()}
    pushed = command("dvc", "push", cwd=folder, **variables)
    assert pushed.returncode == 0, pushed.stderr
    for lost in ("data/prepared", ".dvc/cache"):
        subprocess.run(["rm", "-rf", folder / lost], check=True)
    pulled = command("dvc", "pull", "prepare", cwd=folder, **variables)
    assert pulled.returncode == 0, pulled.stderr
    return {path.name: path.read_bytes() for path in (folder / "data/prepared").iterdir()} == before


def files_with_token(folder):
    """Return the files of a folder that contain the token."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)) for path in files if TOKEN.encode() in path.read_bytes()}


@pytest.mark.slow
def test_dvc_and_mlflow_work_over_http(tmp_path, repository, current_server, logged_in):
    with (
        Files(tmp_path / "stored") as files,
        Proxy({"/user/repo.dvc": files.url, "/user/repo.mlflow": current_server}) as dagshub,
    ):
        tried = command(
            "dvc", "exp", "run", "--name", "halved", "-S", "data.val_fraction=0.5", "prepare", cwd=repository
        )
        assert tried.returncode == 0, tried.stdout + tried.stderr
        ran = connect(repository, dagshub.url)
        assert ran.returncode == 0, ran.stderr
        assert f"{dagshub.url}/user/repo\n" in ran.stdout
        assert f"{dagshub.url}/user/repo.mlflow\n" in ran.stdout
        assert TOKEN not in ran.stdout + ran.stderr
        assert push_and_pull(repository)
        assert files_with_token(repository) == {".dvc/config.local"}
        assert (repository / ".dvc/config.local").stat().st_mode & 0o777 == 0o600
        assert "config.local" not in command("git", "status", "--short", "--ignored=no", cwd=repository).stdout

        key = secrets.token_hex(16)
        sent = python("-c", SEND, key, cwd=repository)  # a later shell, without variables
        assert sent.returncode == 0, sent.stderr
        find_run(current_server, key)
        assert not (repository / "mlflow.db").exists()
        sent = python("-c", SEND, key, cwd=repository, MINIGPT_TRACKING="local")
        assert (repository / "mlflow.db").exists()

        bare = tmp_path / "bare.git"
        command("git", "init", "--quiet", "--bare", bare, cwd=tmp_path)
        command("git", "remote", "set-url", "dagshub", bare, cwd=repository)
        command("git", "commit", "--quiet", "--all", "--message", "connect", cwd=repository)
        pushed = command("dvc", "exp", "push", "dagshub", "halved", cwd=repository)  # created before the remote
        assert pushed.returncode == 0, pushed.stderr
        assert "failed to push" not in pushed.stdout + pushed.stderr
        assert "halved" in command("dvc", "exp", "list", "dagshub", "--all-commits", cwd=repository).stdout


@pytest.mark.slow
def test_dvc_uses_s3_if_its_plugin_is_installed(tmp_path, repository, current_server):
    interpreter = environment("dvc-s3", "moto[server]", "--constraint", str(ROOT / "constraints.txt"), extends=True)
    asked = subprocess.run(
        [interpreter, "-c", "import json, site; print(json.dumps(site.getsitepackages()))"], capture_output=True
    )
    plugin = {"PYTHONPATH": ":".join(json.loads(asked.stdout)), "AWS_EC2_METADATA_DISABLED": "true"}
    port = free_port()
    with (
        process(
            interpreter.with_name("moto_server"), "--host", "127.0.0.1", "--port", port,
            url=f"http://127.0.0.1:{port}", cwd=tmp_path,
        ) as s3,
        Proxy({"/user/repo.s3": s3, "/user/repo.mlflow": current_server}) as dagshub,
    ):  # fmt: skip
        make_bucket = "import sys, boto3; boto3.client('s3', endpoint_url=sys.argv[1]).create_bucket(Bucket='dvc')"
        keys = {"AWS_ACCESS_KEY_ID": TOKEN, "AWS_SECRET_ACCESS_KEY": TOKEN, "AWS_DEFAULT_REGION": "us-east-1"}
        made = subprocess.run([interpreter, "-c", make_bucket, s3], env=keys, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        ran = connect(repository, dagshub.url, **plugin)
        assert ran.returncode == 0, ran.stderr
        assert f"wrote to {dagshub.url}/user/repo.s3" in ran.stdout
        assert push_and_pull(repository, **plugin)
        assert files_with_token(repository) == {".dvc/config.local"}
        assert any("/user/repo.s3/dvc/files/md5/" in path for _, path in dagshub.requests)

        dagshub.fault, dagshub.during = 501, ".s3"  # the response of old stores to unknown headers
        with Files(tmp_path / "stored") as files:
            dagshub.upstreams["/user/repo.dvc"] = files.url
            ran = connect(repository, dagshub.url, **plugin)
            assert ran.returncode == 0, ran.stderr
            assert "repo.s3: DVC cannot use this storage" in ran.stderr
            assert f"wrote to {dagshub.url}/user/repo.dvc" in ran.stdout
            assert push_and_pull(repository, **plugin)
            assert files_with_token(repository) == {".dvc/config.local"}


PRINT_MODES = """\
import json, os, stat, sys
from minigpt.tracking.dagshub import write_config
os.umask(0)
modes = []
def record(event, arguments):
    if event == "open" and str(arguments[0]).endswith("config.local") and os.path.exists(arguments[0]):
        modes.append(stat.S_IMODE(os.stat(arguments[0]).st_mode))
sys.addaudithook(record)
write_config({"url": "https://localhost/repo.dvc"}, {"auth": "basic", "user": "token", "password": "token"})
print(json.dumps(modes))
"""
"""Program that prints the permissions of config.local at the start of every access."""


def test_no_other_user_can_read_the_token_while_it_is_written(tmp_path):
    (tmp_path / ".dvc").mkdir()
    for state in ("missing", "readable"):
        if state == "readable":
            (tmp_path / ".dvc/config.local").chmod(0o644)
        ran = python("-c", PRINT_MODES, cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert ran.returncode == 0, ran.stderr
        modes = json.loads(ran.stdout)
        if state == "readable":
            assert modes.pop(0) == 0o644  # it is made private before anything is written
        assert set(modes) == {0o600}
        assert "password = token" in (tmp_path / ".dvc/config.local").read_text()
        assert (tmp_path / ".dvc/config.local").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "name, value", [("repo", "../.."), ("repo", "./."), ("repo", "a/b\n"), ("repo", "-x/y"), ("host", HOST)]
)
def test_addresses_that_leave_dagshub_or_have_a_password_are_rejected(tmp_path, name, value):
    (tmp_path / ".dvc").mkdir()
    variables = {"repo": value} if name == "repo" else {}
    ran = connect(tmp_path, value if name == "host" else "http://127.0.0.1:9", PYTHONPATH=str(ROOT), **variables)
    assert ran.returncode == 1
    assert re.fullmatch(
        r"minigpt: (DAGSHUB_REPO: expected user/repo|DAGSHUB_CLIENT_HOST: expected https).*\n", ran.stderr
    )
    assert "s3cret" not in ran.stderr


def test_errors_are_one_line_and_change_nothing(tmp_path, repository, current_server):
    config = (repository / ".dvc/config").read_text()
    with (
        Files(tmp_path / "stored") as files,
        Proxy({"/user/repo.dvc": files.url, "/user/repo.mlflow": current_server}) as dagshub,
    ):
        for ran, message in [
            (
                connect(repository, dagshub.url, token="a-wrong-token"),
                "repo.dvc: DVC cannot use this storage: HTTP status 401: wrong token or password",
            ),
            (connect(repository, dagshub.url, repo="https://dagshub.com/user/repo"), "expected user/repo, got"),
            (connect(repository, dagshub.url, token=""), "DAGSHUB_USER_TOKEN is not set"),
            (
                connect(repository, f"http://127.0.0.1:{free_port()}"),
                "repo.dvc: DVC cannot use this storage: Cannot connect to host 127.0.0.1",
            ),
        ]:
            assert ran.returncode == 1
            assert message in ran.stderr
            assert "Traceback" not in ran.stderr
            assert TOKEN not in ran.stderr + ran.stdout
            assert "a-wrong-token" not in ran.stderr + ran.stdout
        dagshub.fault, dagshub.during = 404, ".mlflow"
        ran = connect(repository, dagshub.url)
        assert ran.returncode == 1
        assert "repo.mlflow: cannot open the experiment: HTTP status 404" in ran.stderr
    assert (repository / ".dvc/config").read_text() == config
    assert files_with_token(repository) == set()
