"""`tokenprune demo`: choices become strategies, and the page answers over the loopback interface."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from PIL import Image

from tokenprune.cli.demo import prepare_page
from tokenprune.cli.demo.choices import (
    NONE,
    Choice,
    DemoConfig,
    build_reducer,
    format_command,
    format_python,
    list_strategies,
)
from tokenprune.cli.demo.links import PageState, format_link, format_query, parse_query
from tokenprune.cli.demo.results import answer, name_upload, open_image
from tokenprune.cli.options import parse_reducer
from tokenprune.experiments.evaluation.loading import load
from tokenprune.models import mini
from tokenprune.reducer import Composed
from tokenprune.strategies import HiRED

QUESTION = "How many shapes are there?"
CONFIG = DemoConfig(max_new_tokens=4)
COMPOSED = Choice(budget=40, selection="RandomSelection", inside="FastV")


@pytest.fixture(scope="module")
def mini_model() -> tuple[Any, Any]:
    """Return the embedded model and its processor."""
    return load("mini", "cpu", "float32")


def test_choices_become_strategies() -> None:
    assert build_reducer(Choice()) == HiRED(0.2)
    assert build_reducer(Choice(budget=100)).budget == 1.0
    composed = build_reducer(COMPOSED)
    assert isinstance(composed, Composed)
    assert composed.label == "HiRED+FastV"
    assert type(composed.parts[0].selection).__name__ == "RandomSelection"
    assert (composed.parts[0].budget, composed.parts[1].budget, composed.parts[1].layer) == (0.4, 0.5, 2)


@pytest.mark.parametrize("name", list_strategies(is_inside=False))
def test_every_strategy_before_the_llm_can_be_chosen(name: str) -> None:
    assert type(build_reducer(Choice(before=name, budget=30))).__name__ == name


@pytest.mark.parametrize("name", list_strategies(is_inside=True))
def test_every_strategy_inside_the_llm_can_be_chosen(name: str) -> None:
    assert type(build_reducer(Choice(before=NONE, inside=name))).__name__ == name


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(before=NONE), "choose a strategy"),
        (Choice(before="evil.py:Evil"), "no strategy 'evil.py:Evil'"),
        (Choice(before=NONE, inside="evil.py:Evil"), "no strategy 'evil.py:Evil'"),
        (Choice(selection="evil.py:Evil"), "no selection component"),
        (Choice(before="FastV"), "no strategy 'FastV'"),
        (Choice(before="Random", allocation="HiREDAllocation"), "allocation component"),
    ],
)
def test_invalid_choices_are_rejected(choice: Choice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reducer(choice)


def test_strategies_without_layers_for_their_cuts_are_not_offered() -> None:
    """TransPrune cuts at layers 7, 9 and 12; the layer of FastV is chosen on the page."""
    assert list_strategies(is_inside=True).keys() - list_strategies(is_inside=True, layers=3).keys() == {"TransPrune"}
    assert list_strategies(is_inside=True, layers=13) == list_strategies(is_inside=True)
    assert list_strategies(is_inside=False, layers=2) == list_strategies(is_inside=False)


STATE = PageState("what? & <b>", True, Choice(budget=35, inside="FastV", layer=1), Choice("DivPrune", budget=7))


def test_links_reproduce_the_state() -> None:
    assert parse_query(dict(parse_qsl(format_query(STATE))), layers=3) == STATE
    assert format_query(PageState()) == ""
    assert parse_query({"utm_source": "mail"}, layers=3) == PageState()
    link = format_link(STATE, "<i>.png")
    assert "<i>" not in link
    assert "upload" not in format_link(STATE, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first.before", "evil.py:Evil"),
        ("second.inside", "TransPrune"),
        ("first.selection", "Random"),
        ("first.budget", "0"),
        ("first.budget", "101"),
        ("first.inside_budget", "nan"),
        ("second.layer", "3"),
        ("is_compared", "yes"),
    ],
)
def test_impossible_links_are_rejected(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"the link has {name}={value}"):
        parse_query({name: value}, layers=3)


def test_answers_agree_with_the_command_and_the_script(
    mini_model: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    choice = Choice(budget=30, inside="FastV")
    table, pages = answer(*mini_model, CONFIG, None, QUESTION, [choice])
    assert [row.strategy for row in table.rows] == ["all tokens", "HiRED+FastV"]
    assert table.rows[0].kept == table.rows[0].valid
    kept = int(table.runs[1].cuts[0].selections[0].kept.sum())
    assert pages[0].count(": kept") == kept
    assert "rank 1<" in pages[0]
    words = shlex.split(format_command(choice, CONFIG, "", QUESTION))
    assert parse_reducer(words[words.index("--reducer") :]) == build_reducer(choice)
    script = format_python(choice, CONFIG, "", QUESTION)
    exec(compile(script, "script", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].strip() == table.rows[1].answers[0]
    assert str(table.runs[1].account) in printed


def test_text_from_visitors_is_escaped(mini_model: tuple[Any, Any]) -> None:
    text = "'; rm <b>"
    assert shlex.split(format_command(Choice(), CONFIG, text, text))[5:8] == [text, "--question", text]
    compile(format_python(Choice(), CONFIG, text, text), "script", "exec")
    for question in (" ", "<image>", "x" * 2001):
        with pytest.raises(ValueError, match="ask a question"):
            answer(*mini_model, CONFIG, None, question, [Choice()])


def test_images_are_checked_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (3000, 2000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="3000 x 2000 pixels; the limit is 5 million"):
        open_image(str(tmp_path / "large.png"), DemoConfig(max_megapixels=5))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="not an image"):
        open_image(str(tmp_path / "text.png"), CONFIG)


def test_the_bundled_board_needs_no_file_name(tmp_path: Path) -> None:
    shutil.copy(mini.image_path(), tmp_path / "copy.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    names = [name_upload(None), name_upload(str(tmp_path / "copy.png")), name_upload(str(tmp_path / "photo.png"))]
    assert names == ["", "", "photo.png"]


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page on a free port of the loopback interface and return its address."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('needs the extra "demo"')
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")
        config = DemoConfig(max_new_tokens=4, max_megabytes=1, device="cpu")
        page, options = prepare_page(config, str(tmp_path_factory.mktemp("demo")))
        _, url, _ = page.launch(**options, prevent_thread_lock=True, quiet=True)
        yield url
        page.close()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    with pytest.raises(ValueError, match="pip install"):
        prepare_page(CONFIG, str(tmp_path))


def values(first: Choice, second: Choice | None = None) -> list[Any]:
    """Return the values of the inputs after image and question."""
    choices = (first, second or Choice())
    return [second is not None, *(getattr(c, name) for c in choices for name in Choice.__dataclass_fields__)]


def test_page_listens_on_the_loopback_interface_only(page_url: str) -> None:
    assert page_url.startswith("http://127.0.0.1:")


@pytest.fixture(scope="module")
def browser(page_url: str) -> Iterator[Any]:
    """Return a headless Chromium."""
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if importlib.util.find_spec("selenium") is None or driver is None or binary is None:
        pytest.skip("needs selenium, chromedriver and Chromium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1600"):
        options.add_argument(argument)
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def wait_for_link(browser: Any, query: str) -> Any:
    """Wait until the page has answered and shows a link with a query, and return the link."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    selector = f'a.state[href="?{query}"]'
    return WebDriverWait(browser, 90).until(lambda page: page.find_element(By.CSS_SELECTOR, selector))


def test_a_link_opens_the_page_with_its_state(page_url: str, browser: Any) -> None:
    """The controls have the values of the link, and the strategies of the link answer."""
    from selenium.webdriver.common.by import By

    browser.get(f"{page_url}?{format_query(STATE)}")
    link = wait_for_link(browser, format_query(STATE))
    assert link.get_attribute("href") == f"{page_url}?{format_query(STATE)}"
    values = [field.get_attribute("value") for field in browser.find_elements(By.CSS_SELECTOR, "input")]
    assert {STATE.question, "35", "FastV"} <= set(values)
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "HiRED+FastV" in text
    assert "DivPrune" in text
    assert len(browser.find_elements(By.CSS_SELECTOR, ".tiles")) == 2


def test_a_wrong_link_opens_the_initial_page_with_a_warning(page_url: str, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(f"{page_url}?first.inside=TransPrune")
    message = "the link has first.inside=TransPrune, which this page does not offer"
    WebDriverWait(browser, 90).until(lambda page: message in page.find_element(By.TAG_NAME, "body").text)
    assert "without TransPrune: the LLM has only 3 layers" in browser.find_element(By.TAG_NAME, "body").text
    assert not browser.find_elements(By.CSS_SELECTOR, ".tiles")


def test_two_sessions_answer_at_once(page_url: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    Image.fromarray(np.full((80, 120, 3), 90, np.uint8)).save(tmp_path / "gray.png")
    clients = [Client(page_url, verbose=False, download_files=False) for _ in range(2)]
    arguments = [
        (handle_file(str(tmp_path / "gray.png")), QUESTION, *values(Choice(budget=10))),
        (handle_file(str(tmp_path / "gray.png")), QUESTION, *values(Choice(budget=50), Choice("Random", budget=30))),
    ]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(c.predict, *a, api_name="/answer") for c, a in zip(clients, arguments, strict=True)]
        first, second = [job.result() for job in jobs]
    assert first[0].count("<tr>") == 3
    assert second[0].count("<tr>") == 4
    assert first[1].count(": kept") < second[1].count(": kept")
    assert "gray.png: the embedded model (mini) was trained on drawn boards only" in first[0]
    assert "HiRED(0.1)" in first[2]
    assert "Random(0.3)" in second[3]


def test_a_file_that_is_no_image_is_refused(page_url: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "text.png").write_text("no image")
    client = Client(page_url, verbose=False)
    with pytest.raises(Exception, match="not an image"):
        client.predict(handle_file(str(tmp_path / "text.png")), QUESTION, *values(Choice()), api_name="/answer")


@pytest.mark.parametrize(("size", "status"), [(2**19, 200), (2**20 + 2**16, 413)])
def test_large_files_are_not_stored(page_url: str, size: int, status: int) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    request = urllib.request.Request(
        f"{page_url}gradio_api/upload",
        data=head + bytes(size) + b"\r\n--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    expected = nullcontext() if status == 200 else pytest.raises(urllib.error.HTTPError, match=str(status))
    with expected, urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == status


def post_answer(url: str, image: dict[str, str] | None) -> str:
    """Send a request without gradio's client, which would upload the file, and return the events of the result."""
    data = json.dumps({"data": [image, QUESTION, *values(Choice())]}).encode()
    request = urllib.request.Request(
        f"{url}gradio_api/call/answer", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/answer/{event}", timeout=60) as response:
        return response.read().decode()


def test_files_outside_the_temporary_folder_are_not_read(page_url: str, tmp_path: Path) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "private.png")
    assert "event: complete" in post_answer(page_url, None)
    events = post_answer(page_url, {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}})
    assert "event: error" in events
    assert "event: complete" not in events
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page_url}gradio_api/file={tmp_path / 'private.png'}", timeout=60)


@pytest.mark.parametrize(("model", "tower"), [("mini", "mini"), ("mini-pages", "mini-pages"), ("folder", None)])
def test_the_text_tower_is_the_one_of_the_embedded_model(model: str, tower: str | None) -> None:
    choice = Choice("CDPruner")
    reducer = build_reducer(choice, DemoConfig(model=model).text_tower)
    assert reducer.text_model == tower
    assert f"mini.image_path({model!r})" in format_python(choice, DemoConfig(model=model), "", "What?")
