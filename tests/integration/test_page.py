"""The web page in a browser: its text, its figures, and its accessibility."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import regex
import torch
from helpers.browser import chromium, finish, firefox, opened, select, write
from helpers.servers import free_port, process
from helpers.workspace import make_workspace, params_with, python

from minigpt import ops
from minigpt.data.tokenizer import Tokenizer
from minigpt.export import load_model
from minigpt.generation.generator import Generator
from minigpt.model import GPT
from minigpt.page.facts import PageModel, build_page
from minigpt.params import SamplingParams

pytestmark = pytest.mark.slow

BLOCK = 16
"""Context length of the model."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def trained(browser, tmp_path_factory, project_files):
    """A workspace with a small model of the songs, in Devanagari, after all stages that the page reads."""
    folder = make_workspace(tmp_path_factory.mktemp("page") / "work", project_files)
    stages = "import stages.prepare, stages.train, stages.evaluate"  # in one process, which imports torch once
    run = "stages.prepare.main(); stages.train.main(); stages.evaluate.main()"
    ran = python("-c", f"{stages}; {run}", cwd=folder, MINIGPT_CPU="off", OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def path(trained):
    build_page([PageModel.load(trained / "models/gpt")], trained / "page.html")
    return trained / "page.html"


@pytest.fixture
def tab(browser, path):
    with opened(browser, path) as tab:
        yield tab


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model(trained / "models/gpt")


@pytest.fixture(scope="module")
def songs(trained):
    return (trained / "data/songs.txt").read_text(encoding="utf-8")


def make_page(path, characters, *architectures, sampling=None):
    """Write a page with models with random weights for a vocabulary, one for each architecture."""
    tokenizer = Tokenizer("".join(sorted(characters)))
    pages = []
    for number, architecture in enumerate(architectures or ({},)):
        torch.manual_seed(number)
        model = GPT(params_with(model=architecture).model, tokenizer.vocab_size).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        pages.append(PageModel(f"model {number}", model, tokenizer))
    build_page(pages, path, sampling=sampling)
    return path


def written_by_python(folder, prompt, sampling):
    generator = Generator.load(folder / "models/gpt", torch.device("cpu"), "float32", compile="never")
    return generator.generate(prompt, sampling)[0]


@pytest.mark.parametrize("seed", [1, 2**60])
def test_page_writes_the_text_of_python(tab, trained, songs, seed):
    expected = written_by_python(
        trained, songs[:7], SamplingParams(max_new_tokens=100, seed=seed, repetition_penalty=1.1)
    )
    assert write(tab, songs[:7], max_new_tokens=100, seed=str(seed), repetition_penalty=1.1) == expected


def test_firefox_writes_the_text_of_python(tmp_path, trained, path, songs):
    code = f"""(async () => {{
      document.getElementById("prompt").value = {json.dumps(songs[:7])};
      desk.settings.set({{ ...desk.settings.values, max_new_tokens: 100, seed: "1" }});
      document.getElementById("write").click();
      do await new Promise((resolve) => setTimeout(resolve, 20));
      while (document.body.classList.contains("writing"));
      desk.sheets[0].select(9);
      return JSON.stringify([desk.sheets[0].string(), document.querySelectorAll(".candidate").length]);
    }})()"""
    with firefox(tmp_path) as evaluate:
        written, candidates = evaluate(path, code)
    assert written == written_by_python(trained, songs[:7], SamplingParams(max_new_tokens=100, seed=1))
    assert candidates in (10, 11)


def test_text_can_be_stopped_continued_and_undone(tab, songs):
    tab.fill("#prompt", songs[:3])
    tab.evaluate("desk.settings.set({ ...desk.settings.values, max_new_tokens: 100000 })")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("body.writing .c[style*='--s'] >> nth=20")
    tab.click("#stop")
    stopped = finish(tab)
    assert stopped.startswith(songs[:3]) and len(stopped) > 20
    tab.evaluate("desk.settings.set({ ...desk.settings.values, max_new_tokens: 30 })")
    tab.click("#continue")
    continued = finish(tab)
    assert continued.startswith(stopped) and len(continued) == len(stopped) + 30
    tab.click("#undo")
    assert finish(tab) == stopped


def test_continued_text_does_not_depend_on_its_lengths(tab, songs):
    whole = write(tab, songs[:3], max_new_tokens=3 * BLOCK)
    write(tab, songs[:3], max_new_tokens=BLOCK + 1)
    tab.evaluate(
        "desk.settings.set({ ...desk.settings.values, max_new_tokens: 2 * desk.models[0].config.block_size - 1 })"
    )
    tab.click("#continue")
    assert finish(tab) == whole


def test_character_of_an_undone_text_can_be_inspected(tab):
    write(tab, max_new_tokens=40)
    select(tab, 9)
    before = tab.inner_text("#candidates")
    write(tab, max_new_tokens=10)
    tab.click("#undo")
    finish(tab)
    select(tab, 9)
    tab.wait_for_selector("#inspector[aria-busy=false]")
    assert tab.inner_text("#candidates") == before


def test_stop_text_ends_the_text(tab):
    written = write(tab, "", max_new_tokens=400, stop=["\n\n", "।"])
    assert len(written) < 401 and "।" not in written


def test_text_continues_after_a_stop_text_with_the_random_numbers_that_follow(tab):
    tab.evaluate("desk.settings.set({ ...desk.settings.values, stop: [] })")
    whole = write(tab, "", max_new_tokens=60, temperature=1)
    stop = whole[20]
    first = write(tab, "", max_new_tokens=60, temperature=1, stop=[stop])
    assert first == whole[: whole.index(stop, 1)]
    drawn = tab.evaluate("desk.sheets[0].drawn")
    assert drawn == len(first)  # the prompt has one character, and the stop text one draw
    tab.evaluate("desk.settings.set({ ...desk.settings.values, stop: [], max_new_tokens: 5 })")
    for count in (1, 2):
        tab.click("#continue")
        finish(tab)
        assert tab.evaluate("desk.sheets[0].drawn") == drawn + 5 * count
    tab.click("#undo")
    finish(tab)
    assert tab.evaluate("desk.sheets[0].drawn") == drawn + 5


@pytest.mark.parametrize("stop", [["|"], ["a|b", "\n\n"], ["a\\nb"], ["\r\n", "\\"], []])
def test_stop_texts_survive_their_field(tab, stop):
    tab.evaluate("stop => desk.settings.set({ stop })", stop)
    assert tab.evaluate("desk.settings.values.stop") == stop


@pytest.mark.parametrize("overflow", ["reread", "slide", "roll"])
def test_inspected_character_is_read_in_the_context_of_the_writer(tab, overflow):
    """The inspector reads a character in the context from which the writer predicted the next one."""
    tab.evaluate("desk.settings.set({ ...desk.settings.values, stop: [] })")
    write(tab, "", max_new_tokens=2 * BLOCK, overflow=overflow)
    starts = tab.evaluate("""async () => {
        const sheet = desk.sheets[0], starts = [], inspector = new Inspector(desk);
        for (const reader of inspector.readers.values()) {
            const read = reader.read.bind(reader);
            reader.read = (ids, index, start) => (starts.push([index, start]), read(ids, index, start));
        }
        for (let i = 1; i < sheet.length; i++) await inspector.probe(sheet, i, () => true);
        return starts;
    }""")
    assert (tab.evaluate("desk.sheets[0].starts.at(-1)") is None) == (overflow == "roll")
    reads = {}
    for index, start in starts:
        reads.setdefault(index, set()).add(start)
    for index, found in reads.items():
        assert max(found) <= index
        assert overflow == "roll" or index - min(found) < BLOCK
        assert len(found) == 1, (index, found)  # as the last of a context, and as the first of the next prediction


def test_unknown_characters_are_named(tab):
    tab.fill("#prompt", "ab\u0301")
    note = tab.inner_text("#prompt-note")
    assert "U+0061" in note and "U+0301" in note
    tab.keyboard.press("Control+Enter")
    assert tab.evaluate("desk.sheets[0].length") == 0


def test_candidates_are_those_of_the_model(tab, loaded):
    model, tokenizer = loaded
    text = write(tab, max_new_tokens=40)
    select(tab, 9)
    logits = model(torch.tensor(tokenizer.encode(text[:9]).astype(int))[None])[0, -1]
    expected = logits.softmax(-1).sort(descending=True)
    shown = tab.evaluate("[...document.querySelectorAll('.candidate')].map((row) => row.getAttribute('aria-label'))")
    assert len(shown) in (10, 11)
    assert sum("this is the character of the text" in label for label in shown) == 1
    glyphs = tab.evaluate("[...document.querySelectorAll('.candidate .glyph')].map((glyph) => glyph.textContent)")
    likeliest = tokenizer.characters[int(expected.indices[0])]
    assert glyphs[0].removeprefix("\N{DOTTED CIRCLE}") in (likeliest, "␣", "↵")


def test_choosing_a_candidate_rewrites_the_text_from_there(tab):
    text = write(tab, max_new_tokens=60)
    select(tab, 20)
    tab.locator(".candidate:not(.own)").first.click()
    rewritten = finish(tab)
    assert rewritten[:20] == text[:20] and rewritten[20] != text[20] and len(rewritten) == len(text)
    assert tab.evaluate("inspector.index") == 20
    tab.click("#undo")
    assert finish(tab) == text


def attention_of(model, ids, monkeypatch):
    """Return the attention of the last of ``ids``, (layers, heads, characters)."""
    rows = []

    def causal_attention(q, k, v, mask, **options):
        rows.append((q[0, :, -1:] @ k[0].transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1)[:, 0])
        return attention(q, k, v, mask, **options)

    attention = ops.causal_attention
    monkeypatch.setattr(ops, "causal_attention", causal_attention)
    with torch.no_grad():
        model(torch.tensor(ids)[None])
    return torch.stack(rows)


def test_attention_equals_that_of_the_model(tab, loaded, monkeypatch):
    model, tokenizer = loaded
    text = write(tab, max_new_tokens=40)
    select(tab, 12, "attention")
    expected = attention_of(model, tokenizer.encode(text[:12]).astype(int).tolist(), monkeypatch)
    shown = tab.evaluate("inspector.probes.before.attention.map((heads) => heads.map((row) => Array.from(row)))")
    assert (torch.tensor(shown) - expected).abs().max() < 1e-3

    tab.locator(".head").nth(2).click()  # after the mean of all heads: block 1, head 2
    assert tab.is_checked("input[name=shade][value=attention]")
    shades = tab.evaluate(
        "desk.sheets[0].clusters.map("
        "({ first, count, element }) => [first, count, element.style.getPropertyValue('--s')])"
    )
    row = expected[0, 1] / expected[0, 1].max()
    for first, count, strength in shades:
        weight = min(1, float(row[first : first + count].sum())) if first < 12 else 0
        assert abs(float(strength or 0) - weight) < (0.021 if weight < 0.021 else 1e-3)


def test_lens_and_units_are_shown(tab):
    write(tab, max_new_tokens=40)
    select(tab, 12, "inside")
    assert tab.locator(".lens tbody tr").count() == 2
    difference = tab.evaluate(
        "Math.max(...inspector.probes.before.lens[1].map((z, i) => Math.abs(z - desk.sheets[0].logits[12][i])))"
    )
    assert difference < 1e-4
    tab.locator(".unit").first.click()
    tab.wait_for_selector(".unit[aria-pressed=true]")
    tab.wait_for_selector(".c[style*='--s']")
    assert "unit" in tab.inner_text("#legend")


def test_copied_text_is_underlined(tab, songs):
    tab.click("#tab-measure")
    tab.fill("#measure-text", songs[100:160])
    tab.click("#measure")
    tab.click("text=Inspect it in the view Write")
    tab.wait_for_selector(".c.copied")
    select(tab, 3, "copied")
    assert tab.evaluate("document.querySelectorAll('#text0 .c:not(.copied)').length") == 0
    assert f"line {songs[:100].count(chr(10)) + 1} " in tab.inner_text(".run")


def test_measured_loss_is_that_of_the_model(tab, loaded, songs):
    model, tokenizer = loaded
    text = songs[-500:]
    tab.click("#tab-measure")
    tab.fill("#measure-text", text + "\u2603")
    assert "U+2603" in tab.inner_text("#measure-note")
    tab.click("#measure")
    tab.wait_for_selector("#measured:not([hidden])")
    ids = torch.tensor(tokenizer.encode(text).astype(int))
    with torch.no_grad():
        nats = [
            torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
            for begin in range(0, len(ids) - 1, BLOCK)
            if len(window := ids[begin : begin + BLOCK + 1]) > 1
        ]
    bits = torch.cat(nats).double().mean().item() / math.log(2)
    assert abs(tab.evaluate("mean(measure.sheet.bits)") - bits) < 1e-3
    assert f"{bits:.2f} bits per character" in tab.inner_text("#figures .headline")
    assert "bigram" in tab.inner_text("#figures") and tab.locator("#figures .run").count() == 10
    assert tab.locator("#figures svg[role=img]").count() == 1


def test_slider_shows_the_evaluations_of_the_training(tab, trained):
    history, samples = (
        list(csv.DictReader((trained / f"results/train/{name}.csv").open(encoding="utf-8", newline="")))
        for name in ("history", "samples")
    )
    tab.click("#tab-training")
    tab.focus("#evaluation")
    tab.keyboard.press("Home")
    assert "After step 0:" in tab.inner_text("#view-training")
    assert tab.text_content("#view-training .text") == samples[0]["prompt"] + samples[0]["text"]
    tab.keyboard.press("ArrowRight")
    shown = tab.get_attribute("#evaluation", "aria-valuetext")
    assert f"step {history[1]['step']}," in shown
    assert f"{float(history[1]['val_loss']) / math.log(2):.2f} bits" in shown


def test_keys_select_characters(tab, songs):
    text = write(tab, songs[:10], max_new_tokens=200)
    tab.focus("#text0")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("inspector.index") == 1
    assert tab.get_attribute("#text0", "aria-activedescendant") == "text0-selected"
    tab.keyboard.press("Control+End")
    assert tab.evaluate("inspector.index") == len(text) - 1
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("inspector.index") < len(text) - 1
    tab.keyboard.press("Escape")
    assert tab.evaluate("inspector.index") == -1 and tab.is_visible("#inspector-hint")


def test_graphemes_of_devanagari_are_not_split(tab, songs):
    text = songs[:120]
    tab.evaluate("(text) => { $('measure-text').value = text; return measure.measure(); }", text)
    parts = tab.evaluate("measure.sheet.clusters.map(({ element }) => element.textContent)")
    assert "".join(parts) == text
    assert not any(regex.match(r"\p{M}", part) for part in parts)
    assert len(parts) <= len(regex.findall(r"\X", text))


def test_left_arrow_moves_forward_in_hebrew(browser, tmp_path):
    with opened(browser, make_page(tmp_path / "hebrew.html", "\n אבגדה")) as tab:
        write(tab, "אב גד", max_new_tokens=20, temperature=1)
        tab.evaluate("desk.sheets[0].select(1)")
        tab.focus("#text0")
        for index in (2, 3):  # a space, and the letter after it
            tab.keyboard.press("ArrowLeft")
            assert tab.evaluate("inspector.index") == index
        boxes = tab.evaluate(
            "desk.sheets[0].clusters.slice(0, 2).map(({ element }) => element.getBoundingClientRect().x)"
        )
        assert boxes[0] > boxes[1]


def test_two_models_write_side_by_side(browser, tmp_path):
    with opened(browser, make_page(tmp_path / "two.html", "\nabc", {}, {})) as tab:
        write(tab, "ab", max_new_tokens=50, temperature=1)
        texts = tab.evaluate("desk.sheets.map((sheet) => sheet.string())")
        assert [len(text) for text in texts] == [52, 52] and texts[0] != texts[1]
        tab.evaluate("desk.sheets[1].select(4)")
        assert tab.evaluate("inspector.sheet === desk.sheets[1]")
        tab.wait_for_selector(".candidate")


def test_chosen_head_and_unit_are_forgotten_for_a_model_that_may_not_have_them(browser, tmp_path):
    larger, smaller = {"n_layer": 2, "n_head": 2}, {"n_layer": 1, "n_head": 1, "mlp_ratio": 1}
    with opened(browser, make_page(tmp_path / "two.html", "\nabc", larger, smaller)) as tab:
        write(tab, "ab", max_new_tokens=20, temperature=1)
        select(tab, 9, "attention")
        tab.locator(".head").last.click()
        select(tab, 9, "inside")
        tab.evaluate("inspector.chooseUnit({ layer: 1, unit: desk.models[0].config.n_embd })")
        for panel in ("attention", "inside"):
            tab.click(f"#tab-{panel}")
            tab.evaluate("desk.sheets[1].select(9)")
            tab.wait_for_selector("#inspector[aria-busy=false]")
            assert tab.locator(".head").count() == 2  # the mean of all, and the only one


def test_page_rolls_only_if_all_its_models_can(browser, tmp_path):
    rotary, learned = {"positions": "rotary"}, {"positions": "learned"}
    sampling = params_with(sample={"overflow": "roll"}).sample
    with opened(browser, make_page(tmp_path / "two.html", "\nabc", rotary, learned, sampling=sampling)) as tab:
        assert len(write(tab, "ab", max_new_tokens=20)) == 22
        assert tab.evaluate("desk.settings.values.overflow") == "reread"


def test_selected_character_is_not_behind_the_inspector(browser, path):
    with opened(browser, path, width=360, height=640) as tab:
        write(tab, max_new_tokens=600)
        tab.focus("#text0")
        for _ in range(12):
            tab.keyboard.press("ArrowDown")
            tab.wait_for_selector("#inspector[aria-busy=false]")
            box, inspector = (tab.locator(part).bounding_box() for part in ("#text0-selected", "#inspector"))
            assert box["y"] >= 0 and box["y"] + box["height"] <= inspector["y"]


def test_damaged_page_says_so(browser, path, tmp_path):
    content = path.read_text(encoding="utf-8")
    middle = content.index('id="weights0">') + 1000
    damaged = tmp_path / "damaged.html"
    damaged.write_text(content[:middle] + "AAAA" + content[middle + 4 :], encoding="utf-8")
    with opened(browser, damaged) as tab:
        assert "damaged" in tab.inner_text("#subtitle")


def test_saved_page_is_the_page(browser, tab, path, tmp_path):
    text = write(tab, max_new_tokens=50)
    tab.click("#theme")
    tab.click("#tab-about")
    with tab.expect_download() as download:
        tab.click("#save-page")
    download.value.save_as(tmp_path / "saved.html")
    with opened(browser, tmp_path / "saved.html") as saved:
        assert write(saved, max_new_tokens=50) == text
    with tab.expect_download() as download:
        tab.click("#download-text")
    assert Path(download.value.path()).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_views_have_no_accessibility_violations(browser, path, tmp_path, width, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    with opened(browser, path, width=width, theme=theme) as tab:

        def check(name):
            violations = axe.run(tab).response["violations"]
            assert not [(rule["id"], rule["nodes"][0]["html"], rule["nodes"][0]["any"]) for rule in violations], name
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            picture = tab.screenshot(path=tmp_path / f"{name}.png", full_page=True)
            assert len(picture) > 10_000

        check("open")
        write(tab, max_new_tokens=120)
        tab.click("summary")
        check("written")
        for panel in ("candidates", "attention", "inside", "copied"):
            select(tab, 12, panel)
            check(panel)
        tab.click("#tab-measure")
        tab.click("#measure-written")
        tab.wait_for_selector("#measured:not([hidden])")
        check("measure")
        for view in ("training", "about"):
            tab.click(f"#tab-{view}")
            check(view)


def test_page_works_in_the_artifact_view_of_mlflow(browser, path, tmp_path):
    import mlflow

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(store)
    experiment = client.create_experiment("pages", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifact(run.info.run_id, str(path), "sample")
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--port",
        url.rsplit(":", maxsplit=1)[-1],
        "--backend-store-uri",
        store,
    ]
    with process(*command, url=f"{url}/health", cwd=tmp_path):
        tab = browser.new_page(viewport={"width": 1600, "height": 1000})
        tab.goto(f"{url}/#/experiments/{experiment}/runs/{run.info.run_id}/artifacts/sample/page.html")
        frame = tab.frame_locator("iframe")
        frame.locator("#prompt").wait_for(timeout=60_000)
        assert "allow-scripts" in tab.locator("iframe").get_attribute("sandbox")
        frame.locator("#write").click()
        frame.locator("#continue[aria-disabled=false]").wait_for(timeout=60_000)
        frame.locator(".c").nth(5).click()
        frame.locator(".candidate").first.wait_for()
        tab.screenshot(path=tmp_path / "mlflow.png")
        tab.close()
