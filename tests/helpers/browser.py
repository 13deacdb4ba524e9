"""Pages of the project in real browsers: Debian's Chromium, driven by Playwright, and Debian's Firefox."""

import contextlib
import itertools
import json
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def chromium():
    """Start a browser. Skip the test where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium, such as Debian's package chromium")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, because root, as in a container, cannot use it.
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def firefox(profile):
    """Start Firefox with a new profile, and yield a function that opens a file and evaluates JavaScript in it.

    Playwright drives only its own build of Firefox. The protocol is https://w3c.github.io/webdriver-bidi.
    """
    client = pytest.importorskip("websockets.sync.client", reason="needs websockets")
    executable = shutil.which("firefox-esr") or shutil.which("firefox")
    if executable is None:
        pytest.skip("needs Firefox, such as Debian's package firefox-esr")
    arguments = ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"]
    process = subprocess.Popen([executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = next(line.split()[-1] for line in process.stdout if "WebDriver BiDi listening on" in line)
        with client.connect(f"{address}/session", max_size=None) as socket:
            numbers = itertools.count()

            def call(method, **params):
                number = next(numbers)
                socket.send(json.dumps({"id": number, "method": method, "params": params}))
                answer = next(answer for answer in map(json.loads, socket) if answer.get("id") == number)
                assert answer["type"] == "success", answer
                return answer["result"]

            def evaluate(path, code):
                call("browsingContext.navigate", context=tab, url=path.as_uri(), wait="complete")
                result = call("script.evaluate", expression=code, target={"context": tab}, awaitPromise=True)
                assert result["type"] == "success", result["exceptionDetails"]["text"]
                return json.loads(result["result"]["value"])

            call("session.new", capabilities={})
            tab = call("browsingContext.getTree")["contexts"][0]["context"]
            yield evaluate
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def opened(browser, path, width=1600, height=1000, theme="light"):
    """Open a page from its file. Check that it makes no request, reports no error and sets no cookie."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce"
    )
    tab = context.new_page()
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(path.as_uri())
    yield tab
    cookies = context.cookies()
    context.close()
    assert [url for url in requests if not url.startswith("blob:")] == [path.as_uri()]
    assert (errors, cookies) == ([], [])


def write(tab, prompt=None, **settings):
    """Write a text after a prompt, with changed settings, and return it."""
    if prompt is not None:
        tab.fill("#prompt", prompt)
    tab.evaluate("(values) => desk.settings.set({ ...desk.settings.values, ...values })", settings)
    tab.click("#write")
    return finish(tab)


def finish(tab):
    """Wait until the page has stopped writing, and return its text."""
    tab.wait_for_selector("body:not(.writing)")
    return tab.evaluate("desk.sheets[0].string()")


def select(tab, index, panel="candidates"):
    """Select a character and show a panel about it."""
    tab.evaluate("(index) => desk.sheets[0].select(index)", index)
    tab.click(f"#tab-{panel}")
    tab.wait_for_selector("#candidates > *" if panel == "candidates" else f"#panel-{panel} > *")
