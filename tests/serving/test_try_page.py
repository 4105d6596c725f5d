"""The page at / in headless Chromium: prompts in, images as they finish, who shared, what was saved, errors."""

import json

import pytest
from browser import chromium
from served import without_model
from waiting import wait_for

pytestmark = pytest.mark.slow

FIGURES = "[...document.querySelectorAll('figure')]"


@pytest.fixture(scope="module")
def page():
    with chromium() as found:
        yield found


def fill(page, prompts, **fields):
    for name, value in {"prompts": "\n".join(prompts), **fields}.items():
        page.value(f"find({json.dumps(name)}).value = {json.dumps(value)}")


def text(page, id):
    return page.value(f"find({json.dumps(id)}).innerText")


def test_a_person_gets_images_as_they_finish_and_sees_who_shared_and_what_was_saved(page, tmp_path):
    with without_model(tmp_path, "--seconds", "0.5") as server:
        server.wait()
        page.open(server.url)
        page.wait("find('model').textContent.includes('6 steps')")
        prompts = ["red cat", "blue sea", "red dog", "poison", "<b onclick=alert(1)>red</b> owl"]
        fill(page, prompts, seed="1")
        page.value("find('draw').click()")
        # The first image is there before the last.
        page.wait("document.querySelectorAll('figure img').length === 1")
        assert page.value("find('draw').disabled && !find('stop').disabled && !find('progress').hidden")
        page.wait("!find('draw').disabled")
        assert "18 evaluations instead of 24: 25% saved" in text(page, "state")
        captions = page.value(f"{FIGURES}.map(figure => figure.innerText)")
        assert [caption.splitlines()[0] for caption in captions] == prompts
        assert "shared with image 3" in captions[0] and "shared with image 1" in captions[2]
        assert "drawn alone" in captions[1] and "poison" in captions[3].splitlines()[1:]
        groups = page.value(f"{FIGURES}.map(figure => figure.dataset.group ?? null)")
        assert groups == ["1", None, "1", None, None]
        loaded = page.value(f"{FIGURES}.map(figure => figure.querySelector('img')?.naturalWidth ?? 0)")
        assert loaded == [1, 1, 1, 0, 1]
        assert page.value("document.querySelectorAll('figure b, [onclick]').length") == 0
        assert page.console == []


def test_a_person_sees_an_error_and_can_stop(page, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:secret\n")
    with without_model(tmp_path, "--seconds", "0.5", "--tokens", str(tokens)) as server:
        server.wait()
        page.open(server.url)
        fill(page, ["a"])
        page.value("find('draw').click()")
        page.wait("find('error').innerText !== ''")
        assert "valid token" in text(page, "error") and page.value(f"{FIGURES}.length") == 0
        fill(page, ["a"] * 50, token="secret", steps="6")
        page.value("find('draw').click()")
        page.wait("document.querySelectorAll('figure img').length > 1")
        assert text(page, "error") == ""
        page.value("find('stop').click()")
        page.wait("!find('draw').disabled")
        assert text(page, "state") == "stopped"
        wait_for(lambda: server.metric("sage_images_open") == 0, 60)
        assert server.metric('sage_images_total{outcome="cancelled"}') > 30
        fill(page, ["a"] * 5)
        page.value("find('draw').click()")
        page.wait("document.querySelectorAll('figure img').length > 1")
        server.process.kill()
        page.wait("find('error').innerText !== ''")
        assert page.value("!find('draw').disabled")
