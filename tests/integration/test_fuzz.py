"""Damaged and odd inputs of the stages and the command: text, params, models and checkpoints.

Each input is accepted, or refused in one line: no traceback, no hang, no file outside the workspace.
"""

import hashlib
import json
import shutil
import struct
import sys

import pytest
import torch
import yaml
from helpers.fuzzing import changed_bytes, changed_json, changed_tree, enter_workspace, fuzz, kinds, place, run_program
from helpers.models import export_small
from helpers.workspace import ROOT, SMALL, overlay, params_with
from hypothesis import strategies as st

from minigpt.cli import main as command
from minigpt.data.dataset import load_corpus
from minigpt.data.encode import encode_corpus
from minigpt.files import workspace
from minigpt.runtime.distributed import ProcessGroup
from minigpt.training.checkpoint import Checkpoints
from minigpt.training.trainer import Trainer
from stages import prepare

pytestmark = pytest.mark.slow

PARAMS = overlay(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")), SMALL)
TEXT = (ROOT / "data/songs.txt").read_bytes()[:3000]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Return an empty workspace, the current directory."""
    enter_workspace(monkeypatch, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINIGPT_CPU", "off")
    return tmp_path


def run_command(monkeypatch, here, *arguments):
    """Run `minigpt` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["minigpt", *map(str, arguments)])
    return run_program(command, here)


names = st.sampled_from(
    ["a.txt", "b.txt", "sub/c.txt", "sub/dir.txt/d.txt", "रोज\n.txt", "$x '.txt", "\udcff.txt", "e.TXT", ".txt"]
)
encodings = st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "shift-jis", "utf-7"])
contents = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda text, encoding: text.encode(encoding, "replace"), st.text(max_size=200), encodings),
    st.builds(
        lambda piece, count: (piece * count).encode("utf-8", "surrogatepass"),
        st.text(min_size=1, max_size=4) | st.text("\u0301\u0327\u0f71\u1100\u1161가e\r\n", min_size=1, max_size=5),
        st.sampled_from([1, 30, 5000, 60_000]),
    ),
    changed_bytes(TEXT),
).map(lambda content: content + b"a\n")  # the prompt
sources = st.fixed_dictionaries({
    "files": st.dictionaries(names, st.tuples(kinds, contents), min_size=1, max_size=3),
    "source": st.sampled_from(["text"] * 8 + ["text/a.txt", "text/sub", "text/../text"]),
    "val_fraction": st.sampled_from([0.1, 0.2, 0.3, 0.5, 5e-324, 1 - 1e-9]),
    "test_fraction": st.sampled_from([0.0] * 4 + [0.1, 0.5, 5e-324]),
    "split": st.sampled_from(["end", "each_file"]),
    "normalize": st.sampled_from(["none", "NFC"]),
})  # fmt: skip


def test_any_text_is_encoded_or_refused(here):
    accepted = 0

    def case(drawn):
        nonlocal accepted
        shutil.rmtree("text", ignore_errors=True)
        for name, (kind, content) in drawn.pop("files").items():
            place(here / "text" / name, kind, content)
        tree = overlay(PARAMS, {"data": drawn, "model": {"block_size": 2}, "sample": {"prompts": ["a"]}})
        (here / "params.yaml").write_text(json.dumps(tree))
        code, _ = run_program(prepare.main, here)
        if not code:
            accepted += 1
            corpus = load_corpus(here / "data/prepared", with_test=True)
            splits = (corpus.train, corpus.val, *([corpus.test] if corpus.test else []))
            text = corpus.tokenizer.decode(torch.cat([split.tokens for split in splits]).numpy())
            assert "\r" not in text
            # A file may start with a mark, which composes with the end of another file's part.
            assert drawn["split"] == "each_file" or corpus.tokenizer.normalized(text) == text

    fuzz(sources, case)
    assert accepted > 20


yaml_files = st.one_of(
    changed_json(PARAMS),
    changed_tree(PARAMS).map(lambda tree: yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")),
    changed_bytes(yaml.dump(PARAMS).encode()),
)


def test_any_params_are_accepted_or_refused(here, monkeypatch):
    (here / "data").mkdir()
    (here / "data/drama.txt").write_bytes(TEXT)

    def case(drawn):
        kind, content = drawn
        place(here / "params.yaml", kind, content)
        code, message = run_command(monkeypatch, here, "check")
        assert not code or "params.yaml" in message or "training split" in message or "data." in message, message

    fuzz(st.tuples(kinds, yaml_files), case)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The files of an exported model."""
    folder = tmp_path_factory.mktemp("model") / "gpt"
    return {path.name: path.read_bytes() for path in export_small(folder).iterdir()}


def changed_safetensors(data):
    """Return a strategy for a safetensors file with a changed header or changed bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    sizes = st.sampled_from([0, 0, 0, 1, -1, 2**20, 2**63 - 1])

    def assemble(changed, difference, size=None):
        length = (len(changed) + difference) % 2**64
        return struct.pack("<Q", length) + changed + body

    return st.builds(assemble, changed_json(header), sizes) | changed_bytes(data)


def test_any_model_folder_is_read_or_refused(here, monkeypatch, model):
    changes = {
        "config.json": changed_json(json.loads(model["config.json"])),
        "tokenizer.json": changed_json(json.loads(model["tokenizer.json"])),
        "model.safetensors": changed_safetensors(model["model.safetensors"]),
    }
    changed = {name: st.tuples(kinds, change) for name, change in changes.items()}
    one_file = st.one_of(*(st.tuples(st.just(name), change) for name, change in changed.items()))
    write = ("write", "--model", "gpt", "--max-new-tokens", "3", "--compile", "never", "--device", "cpu", "a")
    page = ("page", "--model", "gpt", "--output", "page.html")

    def case(drawn):
        files, arguments = drawn
        for name, content in model.items():
            place(here / "gpt" / name, "file", content)
        for name, (kind, content) in files:
            place(here / "gpt" / name, kind, content)
        code, message = run_command(monkeypatch, here, *arguments)
        assert not code or "gpt" in message or "logits that are not finite" in message or "prompt" in message, message

    fuzz(st.tuples(st.lists(one_file, min_size=1, max_size=2), st.sampled_from([write, write, write, page])), case)


@pytest.fixture
def train(here, monkeypatch):
    """Return a function that trains for six steps, in the folder .checkpoints, and returns the weights."""
    (here / "a.txt").write_bytes(TEXT)
    (here / "corpus").mkdir()
    encode_corpus(here / "a.txt", 0.1, here / "corpus")
    corpus, group = load_corpus(here / "corpus"), ProcessGroup(0, 1, torch.device("cpu"))
    params = params_with(train={"max_iters": 6, "eval_interval": 3, "eval_chars": 100, "sample_chars": 0})
    monkeypatch.setenv("MINIGPT_CHECKPOINT_STEPS", "2")

    def run():
        checkpoints = Checkpoints(workspace(), "f00d")
        with checkpoints.locked():
            checkpoints.run_key()
            return Trainer(params, corpus, group, None, checkpoints).run().weights

    return run


def write_files(folder, files):
    """Replace a folder by these files, by their relative path."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        place(folder / name, "file", content)


def test_any_checkpoint_folder_is_resumed_or_ignored(here, train):
    folder, trained = here / ".checkpoints", []
    expected = train()
    shutil.rmtree(folder / "f00d/step-000006")
    original = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    step = "f00d/step-000004"
    state = json.loads(original[f"{step}/state.json"])
    others = [name for name in original if not name.endswith(("state.json", ".safetensors"))]
    damage = st.one_of(
        st.tuples(st.just(f"{step}/state.json"), kinds, changed_json(state)),
        st.tuples(
            st.just(f"{step}/state.safetensors"),
            kinds,
            changed_safetensors(original[f"{step}/state.safetensors"]),
        ),
        *(st.tuples(st.just(name), kinds, changed_bytes(original[name])) for name in others),
        st.tuples(st.sampled_from([step, f"{step}/extra", "f00d/step-000009", "f00d"]), kinds, st.just(b"x")),
    )

    def case(drawn):
        damaged, sign = drawn
        write_files(folder, original)
        for name, kind, content in damaged:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            if (folder / name).parent.is_dir():  # unless an earlier change has replaced it
                place(folder / name, kind, content)
        if sign:  # as if a program had written the damaged files
            sign_checkpoint(folder / step)
        trained.clear()
        code, message = run_program(lambda: trained.append(train()), here)
        assert not code or sign, message
        if not sign:
            assert all(torch.equal(value, expected[name]) for name, value in trained[0].items()), message

    fuzz(st.tuples(st.lists(damage, min_size=1, max_size=3), st.booleans()), case)


def sign_checkpoint(folder):
    """Write the digests of a checkpoint's files, if it is a folder of files."""
    if folder.is_dir() and (folder / "digests.json").is_file():
        (folder / "digests.json").unlink()
        files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        (folder / "digests.json").write_text(json.dumps(digests))
