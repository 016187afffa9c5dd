"""The page at `/` in a real browser: chromium, controlled over the WebDriver protocol of chromedriver."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo.openai.info_routes import PAGE
from tests.http_backend import MODEL, Call, Site, site
from tests.ports import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="the browser test needs chromium and chromedriver (Debian: chromium-driver)"
)
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=900,760",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, from the WebDriver standard
ENTER, ESCAPE = "\ue007", "\ue00c"


class Browser:
    """A minimal WebDriver client."""

    def __init__(self, http: httpx.AsyncClient, session: str) -> None:
        self._http, self._session = http, session

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._http.request(method, f"/session/{self._session}{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    async def script(self, text: str) -> Any:
        return await self.call("POST", "/execute/sync", {"script": text, "args": []})

    async def type(self, css: str, keys: str) -> None:
        found = await self.call("POST", "/element", {"using": "css selector", "value": css})
        await self.call("POST", f"/element/{found[_ELEMENT]}/value", {"text": keys})

    async def click(self, css: str) -> None:
        found = await self.call("POST", "/element", {"using": "css selector", "value": css})
        await self.call("POST", f"/element/{found[_ELEMENT]}/click", {})

    async def until(self, expression: str) -> Any:
        for _ in range(200):
            found = await self.script(f"return {expression}")
            if found:
                return found
            await asyncio.sleep(0.03)
        raise AssertionError(
            f"never true: {expression}; the page says {await self.script('return document.body.innerText')}"
        )

    async def screenshot(self, name: str) -> None:
        """Save a screenshot in the folder DYNAMO_SCREENSHOTS, if it is set."""
        folder = os.environ.get("DYNAMO_SCREENSHOTS")
        if folder:
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(await self.call("GET", "/screenshot")))

    async def dark(self, value: str) -> None:
        await self.call(
            "POST", "/goog/cdp/execute",
            {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [{"name": "prefers-color-scheme", "value": value}]}},
        )  # fmt: skip


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    assert DRIVER is not None
    port = free_port()
    driver = await asyncio.create_subprocess_exec(
        DRIVER, f"--port={port}", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http:
            for _ in range(200):
                try:
                    await http.get("/status")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
            options = {"binary": CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={tmp_path / 'profile'}"]}
            wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
            answer = await http.post("/session", json=wanted)
            assert answer.status_code == 200, answer.text
            found = Browser(http, answer.json()["value"]["sessionId"])
            yield found
            await found.call("DELETE", "")
    finally:
        driver.terminate()
        await driver.wait()


def talk(call: Call) -> None:
    """An answer over some steps; "forever" never ends, "die" fails on the way."""
    question = call.request.messages[-1]["content"]
    words = ["<b>You</b>", " asked", ": ", question, "\nwith", " ümläuts 🌍"]
    loop = asyncio.get_running_loop()
    if question == "forever":
        call.push("so it begins")
        return
    if question == "die":
        call.push("half an ans")
        loop.call_later(0.05, call.channel.end, RuntimeError("the worker died"))
        return
    for i, word in enumerate(words):
        loop.call_later(0.02 * i, lambda w=word, i=i: call.push(w, prompt=9 if i == 0 else None))  # type: ignore[misc]
    loop.call_later(0.02 * len(words), lambda: (call.push("", end=True), call.channel.end()))  # type: ignore[func-returns-value]


@pytest.fixture
async def served() -> AsyncIterator[Site]:
    async with site(talk) as found:
        yield found


@needs_browser
async def test_a_conversation(served: Site, browser: Browser) -> None:
    await browser.call("POST", "/url", {"url": served.url + "/"})
    assert await browser.until("document.getElementById('model').value") == MODEL.name
    await browser.until("document.getElementById('health').textContent.startsWith('healthy · Processor × 1')")
    assert await browser.script("return document.activeElement.id") == "text"  # one can type at once
    await browser.type("#text", "what is it?" + ENTER)
    await browser.until("document.querySelector('article.assistant small')")
    shown = await browser.script("return document.querySelector('article.assistant p').textContent")
    assert shown == "<b>You</b> asked: what is it?\nwith ümläuts 🌍"
    figures = await browser.script("return document.querySelector('article.assistant small').textContent")
    assert re.fullmatch(r"TTFT \d+ ms · [\d.]+ tokens/s · 9 \+ 6 tokens · [\d.]+ s", figures)
    await browser.screenshot("light")
    # the second question carries the first
    await browser.type("#text", "and then?" + ENTER)
    await browser.until("document.querySelectorAll('article.assistant small').length == 2")
    sent = served.backend.calls[1].request
    assert [m["role"] for m in sent.messages] == ["user", "assistant", "user"]
    assert (sent.sampling.temperature, sent.sampling.max_tokens) == (0, 256)
    # an error inside a stream is shown
    await browser.type("#text", "die" + ENTER)
    await browser.until("document.querySelector('.error')?.textContent.includes('the worker died')")
    await browser.dark("dark")
    await browser.screenshot("dark")
    assert await browser.script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    # Esc stops an answer, at the backend too
    await browser.type("#text", "forever" + ENTER)
    await browser.until("document.body.innerText.includes('so it begins')")
    assert await browser.script("return document.getElementById('send').textContent") == "Stop"
    await browser.type("#text", ESCAPE)
    await asyncio.wait_for(served.backend.calls[-1].cancelled.wait(), 2)
    await browser.until("document.body.innerText.includes('stopped')")
    assert await browser.script("return document.getElementById('send').textContent") == "Send"
    await browser.click("#clear")
    assert await browser.script("return document.querySelectorAll('article').length") == 0
    served.backend.served = []
    await browser.until("document.getElementById('health').dataset.state == 'starting'")
    log = await browser.call("POST", "/se/log", {"type": "browser"})
    assert [entry for entry in log if "503" not in entry["message"]] == []


@needs_browser
async def test_a_key_is_asked_for(browser: Browser) -> None:
    async with site(talk, api_keys=["sesame"]) as guarded:
        await browser.call("POST", "/url", {"url": guarded.url + "/"})
        await browser.until("document.getElementById('model').value")
        await browser.type("#text", "hi" + ENTER)
        await browser.until("document.querySelector('.error')?.textContent.includes('API key')")
        await browser.until("!document.getElementById('key-field').hidden")
        await browser.type("#key", "sesame")
        await browser.type("#text", "hi" + ENTER)
        await browser.until("document.querySelectorAll('article.assistant small').length == 2")
        assert "asked: hi" in await browser.script("return document.body.innerText")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = PAGE.read_text("utf-8")
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text)
    assert "@import" not in text
    assert "innerHTML" not in text
    for name in re.findall(r"<(?:input|select|textarea)[^>]*id=\"(\w+)\"", text):
        assert re.search(rf"<label[^>]*>[^<]*<(?:input|select) id=\"{name}\"|<label[^>]*for=\"{name}\"", text), name
