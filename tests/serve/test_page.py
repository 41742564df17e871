"""The page in a real browser: Debian's or any other Chromium that is installed."""

import re
import shutil

import pytest

import lmm_jax

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_ask_stop_and_look(start, browser, media):
    server = start(page=True)
    page, asked = browser.new_page(viewport={"width": 1000, "height": 800}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    box, chat = page.locator("#question textarea"), page.locator("#chat")

    page.get_by_text("What colour is the circle?").first.click()
    page.locator("#question img").first.wait_for()
    box.press("Enter")
    chat.locator(".timing").wait_for(timeout=60_000)
    assert "red" in chat.inner_text()
    assert re.search(r"encoded in [\d.]+ s · first token after [\d.]+ s", chat.inner_text())

    page.locator("#where").click()
    page.locator("#map img").wait_for(timeout=60_000)

    box.fill("What colour is the square?")  # the picture is still there
    box.press("Enter")
    chat.locator(".timing").nth(1).wait_for(timeout=60_000)
    alone = lmm_jax.load().chat()
    alone.ask("What colour is the circle?", [str(media / "shapes.png")])
    assert f"What colour is the square?\n\n{alone.ask('What colour is the square?')}\n" in chat.inner_text()

    page.locator("#new").click()
    page.get_by_text("Nothing was asked yet.").wait_for()
    page.locator("#question input[type=file]").set_input_files(str(media / "moving.mp4"))
    page.locator("#question").get_by_role("button", name=re.compile("remove", re.I)).or_(
        page.locator("#question .thumbnail-item")
    ).first.wait_for()
    box.fill("Which way does the circle move?")
    box.press("Enter")
    chat.locator(".timing").wait_for(timeout=60_000)
    assert "right" in chat.inner_text()

    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked), "everything comes from the server"


def test_stop_ends_the_answer(start, browser, monkeypatch):
    from lmm_jax.serve import page as page_module

    sampling = page_module.Sampling
    monkeypatch.setattr(page_module, "Sampling", lambda **of: sampling(**of | {"ignore_eos": True, "max_new_tokens": 2000}))
    server = start(page=True)
    page = browser.new_page()
    page.goto(server.url)
    box = page.locator("#question textarea")
    box.fill("Describe it.")
    box.press("Enter")
    page.locator("#chat .bot").first.wait_for(timeout=60_000)
    page.locator("#stop").click()
    page.get_by_text("stopped: this turn is forgotten").wait_for()
    from serve.conftest import until

    until(server.is_idle, 5)


def test_a_file_that_is_no_picture_is_told(start, browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    server = start(page=True)
    page = browser.new_page()
    page.goto(server.url)
    page.locator("#question input[type=file]").set_input_files(str(tmp_path / "broken.png"))
    page.locator("#question .thumbnail-item").first.wait_for()
    box = page.locator("#question textarea")
    box.fill("What is this?")
    box.press("Enter")
    page.get_by_text("is not a picture").or_(page.get_by_text("cannot be read as a picture")).first.wait_for(timeout=60_000)


def test_the_page_wants_the_key(start):
    server = start(page=True, api_key="s3cret")
    with server.http() as client:
        assert "s3cret" not in client.get("/").text
        assert client.post("/login", data={"username": "a", "password": "wrong"}).status_code == 400
        assert client.get("/gradio_api/info").status_code == 401
        assert client.post("/login", data={"username": "a", "password": "s3cret"}).status_code == 200


def test_nothing_of_the_servers_disk_or_network_comes_through_the_page(start):
    """What Gradio offers beside the page itself."""
    server = start(page=True)
    with server.http(follow_redirects=False) as client:
        for path in ("/etc/passwd", "pyproject.toml", "../../etc/passwd", "http://127.0.0.1:1/x", "//etc/passwd"):
            for route in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/proxy={path}"):
                response = client.get(route)
                assert response.status_code >= 300 and "root:" not in response.text and "[project]" not in response.text
        assert client.get("/gradio_api/info").json().get("named_endpoints") in ({}, None)
