"""The page in real Chromium (Debian's), against a stand-in for the server: what users can do, by mouse and by keys."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.page_server import MODEL, PAGE, PageServer

HTML = PAGE.read_text()
CHROMIUM = shutil.which("chromium")


def test_is_one_small_file_that_loads_nothing() -> None:
    assert len(HTML.encode()) <= 200 * 1024
    assert len(re.findall(r"<script\b", HTML)) == len(re.findall(r"<style\b", HTML)) == 1
    assert not re.search(r"\s(on\w+|style)=[\"']", HTML), "the policy forbids inline handlers and styles"
    assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML|srcdoc|write)\b|\beval\(|new Function", HTML)
    assert set(re.findall(r"https?://[^\s'\"]+", HTML)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.close()


class Tab:
    """One open page, with short names for what the tests do again and again."""

    def __init__(
        self, browser, server: PageServer, path: str = "/", phone: bool = False, scheme: str = "light"
    ) -> None:
        from playwright.sync_api import expect

        size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 800}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=phone, is_mobile=phone)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.expect = expect
        self.errors: list[str] = []
        self.urls: list[str] = []
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.goto(server.origin + path)
        self.prompt = self.page.get_by_label("Message", exact=True)
        self.answer = self.page.locator(".assistant").last
        self.body = self.answer.locator(".body")

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, text: str, wait: bool = True) -> None:
        self.prompt.fill(text)
        self.prompt.press("Enter")
        if wait:
            self.expect(self.button("Send")).to_be_visible()

    def clipboard(self) -> str:
        return self.page.evaluate("navigator.clipboard.readText()")


@pytest.fixture
def open_tab(browser, server: PageServer) -> Iterator[object]:
    """Opens tabs; at the end none has asked another origin or logged an error, but for the expected HTTP statuses."""
    tabs: list[Tab] = []

    def open_tab(**options) -> Tab:
        tabs.append(Tab(browser, server, **options))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.context.close()
        unexpected = [error for error in tab.errors if "server responded with a status of" not in error]
        assert not unexpected
        assert all(url.startswith((server.origin, "data:")) for url in tab.urls)


@pytest.mark.slow
def test_a_streamed_answer_is_whole(server: PageServer, open_tab) -> None:
    code = "if a < b:\n    print('<b>')"
    server.answer = f"# Zählen\n\nEins, zwei 🙂 and `x < 3`:\n\n- **one**\n\n```python\n{code}\n```\nDone."
    server.reasoning = "Let me think."
    tab = open_tab()
    tab.expect(tab.page.locator("#status")).to_have_text("serving")
    tab.ask("Zähle")
    tab.expect(tab.body.locator("h3")).to_have_text("Zählen")
    tab.expect(tab.body.locator("p").first).to_have_text("Eins, zwei 🙂 and x < 3:")
    tab.expect(tab.body.locator(".item strong")).to_have_text("one")
    assert tab.body.locator("pre").text_content() == code
    tab.expect(tab.body.locator("p").last).to_have_text("Done.")
    assert tab.answer.locator(".thinking p").text_content() == "Let me think."
    tab.expect(tab.answer.locator(".stats")).to_have_text(
        re.compile(r"^\d+ tokens · [\d.,]+ tokens/s · first token \d+ ms$")
    )
    tab.expect(tab.page.locator("#announcer")).to_contain_text("Answer complete.")
    tab.answer.get_by_role("button", name="Copy", exact=True).click()
    tab.expect(tab.answer.get_by_role("button", name="Copied")).to_be_visible()
    assert tab.clipboard() == server.answer
    assert not tab.errors
    tab.page.reload()
    tab.expect(tab.body.locator("h3")).to_have_text("Zählen")  # kept for the tab


@pytest.mark.slow
def test_works_below_a_root_path(server: PageServer, open_tab) -> None:
    tab = open_tab(path="/some/root/")
    tab.ask("Hi")
    tab.expect(tab.body).to_have_text("Hello there.")
    assert all(url.startswith((f"{server.origin}/some/root/", "data:")) for url in tab.urls)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_keeps_what_came_and_hangs_up(server: PageServer, open_tab, way: str) -> None:
    server.answer, server.delay = "word " * 500, 0.02
    tab = open_tab()
    tab.ask("Go on for ever", wait=False)
    tab.expect(tab.body).to_contain_text("word word")
    tab.expect(tab.button("Regenerate")).to_be_disabled()
    if way == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.button("Stop").click()
    tab.expect(tab.answer.locator(".stats")).to_have_text(re.compile(r"^\d+ tokens · .* · stopped$"))
    tab.expect(tab.prompt).to_be_focused()
    assert server.hung_up.wait(5)
    server.answer, server.delay = "Short.", 0
    tab.button("Regenerate").click()
    tab.expect(tab.body).to_have_text("Short.")
    assert server.asked[0] == server.asked[1]
    tab.button("Undo").click()
    tab.expect(tab.body).to_contain_text("word word")


@pytest.mark.slow
def test_errors_are_words(server: PageServer, open_tab) -> None:
    error = {"message": "top_p must be in (0, 1].", "type": "invalid_request_error", "param": "top_p", "code": None}
    tab = open_tab()
    alert = tab.answer.get_by_role("alert")
    server.refusal = (400, {}, {"error": error})
    tab.ask("a")
    tab.expect(alert).to_contain_text("top_p must be in (0, 1].")
    tab.expect(alert).to_contain_text("HTTP 400 · invalid_request_error · field top_p")
    server.refusal = (429, {"Retry-After": "7"}, "not an error object")
    tab.button("Try again").click()
    tab.expect(alert).to_contain_text("The server is busy. Try again in 7 seconds.")
    server.refusal, server.event_error = None, {"message": "The engine stopped.", "type": "internal_error", "code": 503}
    tab.button("Try again").click()
    tab.expect(alert).to_contain_text("The engine stopped.")
    tab.expect(tab.body).to_have_text("Hello there.")
    server.event_error, server.cut = None, True
    tab.button("Try again").click()
    tab.expect(alert).to_contain_text("The connection ended before the answer was complete.")
    server.cut, server.finish = False, "length"
    tab.button("Try again").click()
    tab.expect(tab.answer.locator(".stats")).to_contain_text("cut at the token limit")
    tab.expect(alert).to_have_count(0)


@pytest.mark.slow
def test_a_server_that_goes_away(server: PageServer, open_tab) -> None:
    tab = open_tab()
    tab.expect(tab.page.locator("#status")).to_have_text("serving")
    tab.page.route("**/*", lambda route: route.abort())
    tab.ask("Anyone?")
    tab.expect(tab.answer.get_by_role("alert")).to_contain_text("Cannot reach the server.")
    tab.expect(tab.page.locator("#status")).to_have_text("not reachable")
    tab.page.unroute("**/*")
    tab.expect(tab.page.locator("#status")).to_have_text("serving")
    tab.errors = [error for error in tab.errors if "net::ERR_FAILED" not in error]


@pytest.mark.slow
def test_markup_in_answers_stays_text(server: PageServer, open_tab) -> None:
    attacks = [
        "<script>window.hacked = 1</script>",
        "<img src=x onerror='window.hacked = 1'>",
        "**<svg onload=alert(1)>** `<iframe srcdoc='<script>1</script>'>`",
        "[click](javascript:alert(1)) </p></article><h1>fake</h1>",
    ]
    hostile = "\n\n".join([*attacks, f"```<img src=x onerror=alert(1)>\n{attacks[0]}\n```"])
    server.answer, server.reasoning = hostile, attacks[1]
    server.event_error = {"message": attacks[1], "type": attacks[0]}
    tab = open_tab()
    tab.ask(attacks[1])
    shown = tab.answer.text_content()
    assert all(attack.replace("**", "").replace("`", "") in shown for attack in attacks)
    names = tab.page.eval_on_selector_all("#messages *", "all => [...new Set(all.map((e) => e.localName))]")
    assert set(names) <= {
        "article",
        "div",
        "p",
        "strong",
        "code",
        "pre",
        "span",
        "button",
        "details",
        "summary",
        "small",
    }
    assert tab.page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_a_key_is_asked_for_and_forgotten_with_the_tab(server: PageServer, open_tab) -> None:
    server.key = "sk-right"
    tab = open_tab()
    field = tab.page.get_by_label("Key", exact=True)
    tab.expect(field).to_be_focused()
    tab.page.keyboard.type("sk-wrong")
    tab.page.keyboard.press("Enter")
    tab.expect(tab.page.get_by_role("alert")).to_have_text("The server did not accept that key.")
    field.fill("sk-right")
    tab.page.keyboard.press("Enter")
    tab.expect(field).to_be_hidden()
    tab.expect(tab.page.locator("#status")).to_have_text("serving")
    tab.ask("Hi")
    tab.expect(tab.body).to_have_text("Hello there.")
    assert server.authorizations == ["Bearer sk-right"]
    assert tab.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    tab.button("Copy as curl").click()
    assert "sk-right" not in tab.clipboard()
    assert "$NYBBLE_API_KEY" in tab.clipboard()
    server.key = "sk-new"  # it changes while the tab is open: the chat asks again, and goes on by itself
    tab.ask("Still there?", wait=False)
    tab.expect(field).to_be_focused()
    field.fill("sk-new")
    tab.page.keyboard.press("Enter")
    tab.expect(tab.page.locator(".assistant .body")).to_have_text(["Hello there."] * 2)
    other = open_tab()
    other.expect(other.page.get_by_label("Key", exact=True)).to_be_focused()
    other.page.keyboard.press("Escape")
    other.expect(other.page.locator("#status")).to_have_text("needs a key")


SHOWS_FOCUS = """(({ activeElement: e }) => e === document.body || e.closest(".entry") !== null
  || getComputedStyle(e).outlineStyle !== "none")(document)"""


@pytest.mark.slow
def test_by_keyboard_alone(server: PageServer, open_tab) -> None:
    tab = open_tab()
    keys = tab.page.keyboard
    tab.expect(tab.prompt).to_be_focused()
    keys.type("two")
    keys.press("Shift+Enter")
    keys.type("lines")
    keys.press("Enter")
    tab.expect(tab.body).to_have_text("Hello there.")
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "two\nlines"}]
    visited = []
    for _ in range(40):
        keys.press("Tab")
        visited.append(tab.page.evaluate("document.activeElement.textContent.trim() || document.activeElement.name"))
        assert tab.page.evaluate(SHOWS_FOCUS), f"{visited[-1]} shows no focus"
    assert {"Send", "Regenerate", "Clear", "temperature", "stop", "Copy as curl", "API key…"} <= set(visited)
    assert {"Copy", "Edit", "Delete"} <= set(visited)
    tab.page.locator(".user").get_by_role("button", name="Edit").focus()
    keys.press("Enter")
    keys.press("Control+A")
    keys.type("one line")
    keys.press("Control+Enter")
    tab.expect(tab.body).to_have_text("Hello there.")
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "one line"}]
    tab.page.locator(".assistant").get_by_role("button", name="Delete").press("Enter")
    tab.expect(tab.prompt).to_be_focused()
    tab.button("Clear").press("Enter")
    tab.expect(tab.page.locator(".message")).to_have_count(0)
    tab.button("Undo").press("Enter")
    tab.expect(tab.page.locator(".message")).to_have_count(1)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.slow
def test_settings_reach_the_request_and_the_copied_code(server: PageServer, open_tab) -> None:
    tab = open_tab()
    tab.expect(tab.page.get_by_label("Model", exact=True)).to_have_value(MODEL)
    tab.page.get_by_label("System prompt").fill('Be "brief", it\'s late.\nPlease.')
    values = {"Temperature": "0.5", "Top p": "0.9", "Top k": "20", "Min p": "0.05", "Max tokens": "64", "Seed": "7"}
    for label, value in values.items():
        tab.page.get_by_label(label).fill(value)
    tab.page.get_by_label("Stop strings").fill("END\n\\n\\n")
    tab.ask("What's $HOME? 🙂")
    asked = server.asked[-1]
    assert asked == {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": 'Be "brief", it\'s late.\nPlease.'},
            {"role": "user", "content": "What's $HOME? 🙂"},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "max_tokens": 64,
        "seed": 7,
        "stop": ["END", "\n\n"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    del asked["stream_options"]
    if shutil.which("curl"):
        tab.button("Copy as curl").click()
        out = run("bash", "-c", tab.clipboard())
        assert out.rstrip().endswith("data: [DONE]")
        assert {**server.asked[-1], "stream_options": None} == {**asked, "stream_options": None}
    pytest.importorskip("openai")
    tab.button("Copy as Python").click()
    out = run(sys.executable, "-c", tab.clipboard())
    assert out == "Hello **there**.\n"
    assert server.asked[-1] == asked
    tab.page.get_by_label("Top p").fill("2")
    tab.ask("Again")
    tab.expect(tab.answer.get_by_role("alert")).to_contain_text("Top p: Value must be less than or equal to 1")
    tab.expect(tab.page.get_by_label("Top p")).to_be_focused()


@pytest.mark.slow
def test_live_numbers(server: PageServer, open_tab) -> None:
    tab = open_tab()
    panel = tab.page.locator("#panel")
    tab.expect(panel.locator("[data-live=rate]")).to_have_text(re.compile(r"^[1-4]\d\d$"))  # 400 a poll, each second
    for name, text in {"running": "3", "waiting": "2", "kv": "31 %", "ttft": "125 ms"}.items():
        tab.expect(panel.locator(f"[data-live={name}]")).to_have_text(text)
    assert len(tab.page.locator("#spark polyline").get_attribute("points").split()) >= 2
    assert tab.page.locator("#kv-bar rect").get_attribute("width").startswith("31.4")


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => { // whatever notation the browser computes
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = (color) => [...color].slice(0, 3)
    .map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { while (e && rgba(getComputedStyle(e).backgroundColor)[3] < 255) e = e.parentElement;
    return rgba(getComputedStyle(e ?? document.body).backgroundColor); };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.placeholder;
    if (!text || !e.checkVisibility() || e.disabled || e.closest(".hidden-text, .skip, script")) continue;
    const [low, high] = [rgba(getComputedStyle(e).color), behind(e)].map(luminance).sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push([e.outerHTML.slice(0, 80), ratio]);
  }
  return poor;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("phone", [False, True], ids=["wide", "phone"])
def test_fits_the_screen_and_can_be_read(server: PageServer, open_tab, tmp_path, phone: bool, scheme: str) -> None:
    server.answer = f"Look at `this`:\n\n```python\nx = '{'long ' * 60}'\n```\n\n{'unbroken' * 40}"
    server.event_error = {"message": "The engine stopped.", "type": "internal_error"}
    tab = open_tab(phone=phone, scheme=scheme)
    tab.ask("What is in a code block? " * 8)
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.page.evaluate("document.querySelector('#scroller').scrollWidth <= innerWidth")
    assert tab.page.evaluate(CONTRAST) == []
    if phone:
        toggle = tab.button("Settings")
        toggle.click()
        tab.expect(tab.button("Done")).to_be_focused()
        tab.expect(tab.page.get_by_label("Temperature")).to_be_visible()
        assert tab.page.evaluate(CONTRAST) == []
        tab.page.keyboard.press("Escape")
        tab.expect(toggle).to_be_focused()
    picture = tab.page.screenshot(path=tmp_path / "page.png")
    assert picture.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_long_fast_answer_stays_smooth(server: PageServer, open_tab) -> None:
    server.answer = "\n\n".join(f"Paragraph {i} has a few words and `code`." for i in range(700))
    tab = open_tab()
    tab.page.evaluate("window.longest = 0; new PerformanceObserver((l) => l.getEntries().forEach((e) => "
                      "{ longest = Math.max(longest, e.duration); })).observe({ type: 'longtask' })")  # fmt: skip
    tab.ask("A lot, please", wait=False)
    tab.expect(tab.button("Send")).to_be_visible(timeout=60_000)
    tab.expect(tab.body.locator("p")).to_have_count(700)
    assert json.loads(tab.page.evaluate("sessionStorage.getItem('nybble:/:chat')"))[1]["content"] == server.answer
    assert tab.page.evaluate("document.querySelector('#scroller').scrollTop") > 10_000  # the end stays in view
    assert tab.page.evaluate("longest") < 500
