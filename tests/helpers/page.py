"""The scripts of the web page in an embedded V8, and models for them."""

import base64
import json

import pytest

from minigpt.page.build import pack
from minigpt.page.html import FOLDER


class Engine:
    """A V8 with gpt.js and writer.js, and with a model as ``gpt``."""

    def __init__(self, model=None, dtype="float32"):
        self.v8 = pytest.importorskip("py_mini_racer", reason="needs mini-racer").MiniRacer()
        for name in ("gpt.js", "writer.js"):
            self.v8.eval((FOLDER / name).read_text(encoding="utf-8"))
        if model is not None:
            tensors, packed = pack(model, dtype)
            self.load({"config": model.config.model_dump(), **tensors}, packed)

    def load(self, facts, packed):
        content = json.dumps(base64.b64encode(packed).decode())
        self.v8.eval(f"gpt = GPT.fromFacts({json.dumps(facts)}, decodeBase64({content}))")

    def run(self, code, **values):
        """Return the value of the body of a function whose arguments are ``values``, through JSON."""
        arguments = ", ".join(map(json.dumps, values.values()))
        body = f"JSON.stringify(((({', '.join(values)}) => {{{code}}})({arguments})), (_, value) => numbers(value))"
        return json.loads(self.v8.eval(f"numbers = (v) => ArrayBuffer.isView(v) ? Array.from(v) : v; {body}"))

    def logits(self, ids):
        """Return the logits after each of ``ids``, read one after the other with a cache."""
        return self.run("const cache = gpt.makeCache(); return ids.map((id) => gpt.forward(id, cache))", ids=ids)

    def write(self, characters, prompt, sampling):
        """Return the text of the page after a prompt."""
        return self.run(
            """
            const writer = new Writer(gpt, sampling);
            writer.start(Array.from(prompt, (character) => characters.indexOf(character)));
            return Array.from({ length: sampling.max_new_tokens }, () => characters[writer.next().id]).join("");
            """,
            characters=list(characters), prompt=prompt, sampling=sampling.model_dump(),
        )  # fmt: skip
