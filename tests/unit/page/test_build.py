import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from helpers.models import build
from hypothesis import given
from hypothesis import strategies as st

from minigpt.errors import UserError
from minigpt.page import build as page_build
from minigpt.page.build import SCRIPTS, choose_dtype, pack, render, write_page
from minigpt.page.html import FOLDER, script_json

HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "]]>", "\u2028\u2029", "\0\x01\x7f\x85", "\ud800",
    "\udc00\ud800", "'\"`\\", "&lt;&amp;", "{{style}}{{facts}}", "\\1\\g<0>", "\ufeff\ufffe\uffff", "\r\n\r",
    "نص", "नमस्ते", "\U0001f600",
]  # fmt: skip


class Elements(html.parser.HTMLParser):
    """The scripts of a page with their attributes and content, its title, and its policy."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.title, self.policy, self.open = [], "", "", None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open, attributes = tag, dict(attributes)
        if tag == "script":
            self.scripts.append([attributes, ""])
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1][1] += data
        elif self.open == "title":
            self.title += data


def facts_of(gpt, dtype="float32", **more):
    tensors, packed = pack(gpt, dtype)
    model = {"name": "songs", "config": gpt.config.model_dump(), "characters": "abcdefghijk", "weights": "weights0"}
    model["run"] = {}
    return {"models": [model | tensors], "sampling": {}, **more}, packed


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_no_text_breaks_out_of_its_place(hostile):
    facts, packed = facts_of(build(), corpus=hostile, prompts=[hostile], samples=[{"text": hostile}])
    facts["models"][0] |= {"name": hostile, "characters": list(hostile)}
    content = render(facts, [packed])
    page = Elements(content.decode("utf-8"))
    assert [attributes.get("id") for attributes, _ in page.scripts] == ["facts", "weights0", *[None] * len(SCRIPTS)]
    assert json.loads(page.scripts[0][1]) == facts
    assert base64.b64decode(page.scripts[1][1]) == packed
    assert [script for _, script in page.scripts[2:]] == [(FOLDER / name).read_text("utf-8") for name in SCRIPTS]
    shown = hostile.replace("\0", "").encode("utf-8", "replace").decode()
    assert page.title == f"minigpt: {shown}".replace("\r\n", "\n").replace("\r", "\n") or "\r" in hostile


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_json_in_a_script_is_safe_and_exact(text):
    content = script_json({"text": text})
    assert json.loads(content) == {"text": text}
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff\0]", content)


def test_scripts_are_allowed_by_their_digests_and_requests_are_not():
    facts, packed = facts_of(build())
    page = Elements(render(facts, [packed]).decode())
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for _, script in page.scripts[2:]]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_self_contained(name):
    script = (FOLDER / name).read_text("utf-8")
    assert not re.search(r"</script|<!--", script, re.IGNORECASE)
    assert not re.search(
        r"\beval\(|new Function|\bfetch\(|XMLHttpRequest|\bimport\b|document\.cookie|Storage\b", script
    )
    assert not re.search(r"https?://(?!www\.w3\.org/)", script)


@pytest.mark.parametrize("parameters, dtype", [(10**6, "float32"), (10**6 + 1, "bfloat16"), (5 * 10**6 + 1, "int8")])
def test_dtype_follows_the_size_of_the_model(parameters, dtype, monkeypatch):
    gpt = build()
    monkeypatch.setattr(gpt, "num_parameters", lambda: parameters)
    assert choose_dtype(gpt) == dtype
    assert choose_dtype(gpt, "bfloat16") == "bfloat16"


@pytest.mark.parametrize("tied_head", [False, True])
def test_float32_weights_are_exact_and_stored_once(tied_head):
    gpt = build(tied_head=tied_head)
    described, packed = pack(gpt, "float32")
    assert described["bytes"] == len(packed) == 4 * gpt.num_parameters()
    for name, tensor in described["tensors"].items():
        value = gpt.state_dict()[name].numpy()
        stored = np.frombuffer(packed, "<f4", value.size, tensor["offset"]).reshape(tensor["shape"])
        assert np.array_equal(stored, value), name
    assert ("head.weight" in described["tensors"]) != tied_head


@pytest.mark.parametrize(
    "dtype, fix", [("float32", "use --dtype int8"), ("bfloat16", "use --dtype int8"), ("int8", "use a smaller model")]
)
def test_a_page_that_is_too_large_is_refused_with_the_way_out(dtype, fix, tmp_path, monkeypatch):
    monkeypatch.setattr(page_build, "MAX_BYTES", 10_000)
    facts, packed = facts_of(build(), dtype)
    with pytest.raises(UserError, match=rf"^the page would have 0.\d MB with {dtype} weights, .*; {fix}"):
        write_page(tmp_path / "page.html", facts, [packed])
    assert not list(tmp_path.iterdir())


def test_page_is_written_to_a_new_folder(tmp_path):
    facts, packed = facts_of(build())
    output = tmp_path / "a" / "b" / "page.html"
    size = write_page(output, facts, [packed])
    assert output.stat().st_size == size
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_folder_in_the_place_of_the_page_is_refused(tmp_path):
    facts, packed = facts_of(build())
    with pytest.raises(UserError, match=r"is a folder; expected a file, such as .*page.html"):
        write_page(tmp_path, facts, [packed])
    assert not list(tmp_path.iterdir())
