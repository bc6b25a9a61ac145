"""The page in Chromium: two adapters answer what was typed once, by keyboard alone, and what goes wrong is said."""

import dataclasses
import re
import shutil

import pytest

from tests import fakes
from tests.serving.fakes import QV, adapter, small_llama
from tests.serving.http.fakes import FILES, RunningServer, greedy
from veratune.formats import native
from veratune.serving.engine.scheduler import SchedulerConfig

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as made:
        found = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    found = RunningServer(tmp_path_factory.mktemp("page"), open=True)
    with found.http() as http:
        for name in ("alice", "bob"):
            assert http.put(f"/v1/adapters/{name}", content=FILES[name]).status_code == 201
    yield found
    found.stop()


@pytest.fixture
def page(browser, served):
    made = browser.new_page(
        viewport={"width": 1280, "height": 800}, bypass_csp=True
    )  # for wait_for_function
    wrong = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    made.goto(served.url)
    made.wait_for_function("document.getElementById('right').options.length > 0")
    yield made
    made.close()
    assert not [text for text in wrong if "status of 40" not in text]


def said(page, side):
    return page.locator(f"#{side}-talk .assistant").last


def test_two_adapters_answer_side_by_side_by_keyboard(page, served):
    tokenizer = fakes.tokenizer()
    talk = tokenizer.apply_chat_template(
        [{"role": "user", "content": "turn the light on"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(talk, add_special_tokens=False)["input_ids"]
    assert page.locator("#left option").all_inner_texts() == ["base", "alice", "bob"]
    page.keyboard.press("Alt+1")
    page.keyboard.type("alice")
    page.keyboard.press("Alt+2")
    page.keyboard.type("bob")
    page.locator("#tokens").fill("8")
    page.locator("#clear").focus()
    page.keyboard.press("/")
    page.keyboard.type("turn the light on")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelectorAll('.note').length == 2 && !document.getElementById('send').disabled"
    )
    answers = {side: said(page, side).text_content() for side in ("left", "right")}
    assert answers == {"left": greedy("alice", ids), "right": greedy("bob", ids)}
    assert answers["left"] != answers["right"]
    assert re.search(
        r"alice · first after \d+ ms · \d tokens", page.locator("#left-talk .note").inner_text()
    )
    page.wait_for_function("document.getElementById('loaded').textContent == '2'", timeout=10_000)
    assert page.locator("#memory").inner_text().endswith("KiB")
    page.keyboard.type("and off")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelectorAll('.user').length == 4 && !document.getElementById('send').disabled"
    )
    page.locator("#clear").click()
    assert page.locator(".turn").count() == 0


def test_escape_stops_both(page, served):
    page.locator("#tokens").fill("110")
    page.locator("#temperature").fill("1.5")
    before = served.engine.stats.finished["cancelled"]
    with served.slow(0.2):  # answers of 22 seconds
        page.locator("#prompt").fill("go")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "[...document.querySelectorAll('.note')].filter(n => /first after/.test(n.textContent)).length == 2"
        )
        page.keyboard.press("Escape")
        page.wait_for_function("!document.getElementById('send').disabled")
        served.until_idle()
    assert all("stopped" in note for note in page.locator(".note").all_inner_texts())
    assert served.engine.stats.finished["cancelled"] == before + 2


def test_what_goes_wrong_is_said_in_its_column(page, served):
    with served.http() as http:
        http.put("/v1/adapters/gone", content=FILES["new"])
        page.reload()
        page.wait_for_function("document.getElementById('right').options.length == 4")
        page.locator("#right").select_option("gone")
        http.delete("/v1/adapters/gone")
    page.locator("#tokens").fill("4")
    page.locator("#prompt").fill("hi")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelectorAll('.error').length == 1 && !document.getElementById('send').disabled"
    )
    assert "does not exist" in said(page, "right").inner_text()
    assert "error" not in said(page, "left").get_attribute("class")
    page.locator("#right").select_option("bob")
    page.locator("#tokens").fill("500")
    page.locator("#prompt").fill("hi")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelectorAll('.error').length == 2 && !document.getElementById('send').disabled"
    )
    assert "over the 128" in said(page, "right").inner_text()


TOOLS = """[{"type": "function", "function": {"name": "set_light", "parameters": {"type": "object",
 "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": false}}}]"""
SCHEMA = """{"type": "object", "properties": {"room": {"enum": ["kitchen"]}}, "required": ["room"],
 "additionalProperties": false}"""
IDLE = (
    "document.querySelectorAll('.note').length == %d && !document.getElementById('send').disabled"
)


def test_tool_calls_and_structured_output(browser, tmp_path):
    """Calls are shown by name and arguments, what is typed next is their result, JSON is laid out."""
    served = RunningServer(tmp_path, open=True, max_model_len=1024)
    try:
        page = browser.new_page(viewport={"width": 1280, "height": 800}, bypass_csp=True)
        page.goto(served.url)
        page.wait_for_function("document.getElementById('right').options.length > 0")
        page.locator("#tokens").fill("200")
        page.locator("#more summary").click()
        page.locator("#tools").fill("[{")
        page.locator("#prompt").fill("light please")
        page.keyboard.press("Enter")
        assert page.locator("#said").inner_text().startswith("tools: ")
        assert page.locator(".turn").count() == 0
        page.locator("#tools").fill(TOOLS)
        page.locator("#choice").select_option("required")
        page.locator("#prompt").focus()
        page.keyboard.press("Enter")
        page.wait_for_function(IDLE % 2)
        call = page.locator("#left-talk .call").first
        assert call.locator("b").inner_text() == "set_light"
        assert '"on": ' in call.inner_text()
        page.locator("#choice").select_option("none")
        page.locator("#schema").fill(SCHEMA)
        page.locator("#prompt").fill("done")
        page.locator("#prompt").focus()
        page.keyboard.press("Enter")
        page.wait_for_function(IDLE % 4)
        assert page.locator("#left-talk .user").last.inner_text() == "result: done"
        assert said(page, "left").inner_text() == '{\n  "room": "kitchen"\n}'
        page.screenshot(path=tmp_path / "page.png")
        page.close()
    finally:
        served.stop()


def test_auto_and_a_mix_can_be_chosen(browser, tmp_path):
    served = RunningServer(tmp_path, open=True)
    only_d = dataclasses.replace(QV, vectors="d")
    try:
        for number, name in enumerate(("house", "style")):
            data = native.encode(adapter(small_llama, only_d, number))
            served.service.put("default", name, data)
        lights = [
            f"turn the light {word} in kitchen {i}" for i, word in enumerate(["on", "off"] * 6)
        ]
        served.service.put_examples("default", "house", lights)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, bypass_csp=True)
        page.goto(served.url)
        page.wait_for_function("document.getElementById('right').options.length == 4")
        page.locator("#left").select_option("auto")
        page.locator("#right-mix").fill("house:0.7+style:0.3")
        page.locator("#tokens").fill("4")
        page.locator("#prompt").fill(lights[3])
        page.locator("#prompt").press("Enter")
        page.wait_for_function(IDLE % 2)
        notes = page.locator(".note").all_inner_texts()
        assert notes[0].startswith("auto (house) · first after")
        assert notes[1].startswith("house:0.7+style:0.3 · first after")
        page.screenshot(path=tmp_path / "page.png")
        page.close()
    finally:
        served.stop()


def test_a_key_is_asked_for_where_one_is_wanted(browser, tmp_path):
    served = RunningServer(tmp_path, config=SchedulerConfig(max_num_seqs=2))
    try:
        with served.http() as http:
            http.put("/v1/adapters/alice", content=FILES["alice"])
        page = browser.new_page()
        page.goto(served.url)
        page.locator("#key").wait_for()
        assert "wants a key" in page.locator("#said").inner_text()
        page.locator("#key").fill(served.key["ann"])
        page.keyboard.press("Tab")
        page.locator("#left option").nth(1).wait_for(state="attached")
        assert page.locator("#said").inner_text() == ""
        page.close()
    finally:
        served.stop()
