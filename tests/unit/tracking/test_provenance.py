"""Tests of the tags that name the origin of a run."""

import subprocess

import pytest

from minigpt.tracking.provenance import branch, provenance, repository_url


def git(*arguments):
    subprocess.run(["git", *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, as the working directory."""
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    git("init", "--quiet", "--initial-branch", "trunk")
    git("config", "user.name", "Ada")
    git("config", "user.email", "ada@example.com")
    (tmp_path / "repository/a.txt").write_text("1")
    git("add", "--all")
    git("commit", "--quiet", "--message", "start")
    return tmp_path / "repository"


def test_run_names_its_user_source_and_git_state(repository):
    git("remote", "add", "other", "https://example.com/other.git")
    git("remote", "add", "origin", "https://ada:s3cr3t@example.com/repo.git")
    tags = provenance()
    assert (tags["mlflow.user"], tags["mlflow.source.name"], tags["mlflow.source.type"]) == (
        "Ada", "stages/train.py", "LOCAL",
    )  # fmt: skip
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["mlflow.source.git.repoURL"] == "https://example.com/repo.git"
    assert tags["mlflow.source.git.dirty"] == "false"
    assert "git.uncommitted" not in tags
    (repository / "dvc.lock").write_text("written between two stages")
    (repository / "a.txt").write_text("2")
    assert provenance()["git.uncommitted"] == "a.txt"
    assert provenance()["mlflow.source.git.dirty"] == "true"


def test_branch_of_an_experiment_is_that_of_its_commit(repository):
    git("checkout", "--quiet", "--detach")
    assert branch(repository) == "trunk"


@pytest.mark.parametrize(
    "url, shown",
    [("git@example.com:a/b.git", "git@example.com:a/b.git"), ("https://token@example.com/b", "https://example.com/b")],
)
def test_address_of_the_repository_has_no_credentials(repository, url, shown):
    git("remote", "add", "first", url)
    assert repository_url(repository) == shown


def test_folder_without_git_has_no_git_tags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    tags = provenance()
    assert tags["git"] == "none"
    assert not [name for name in tags if name.startswith("mlflow.source.git")]
