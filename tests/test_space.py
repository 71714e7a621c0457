"""The Space: its functions, its API over HTTP, and the page in a real browser.

    pytest -m slow tests/test_space.py        the browser; screenshots are in the folder that the test prints

`WALLVLA_TEST_CHECKPOINT=FOLDER` shows a trained model in the screenshots instead of random weights.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from wallvla import cli
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, build_model, build_processor, embodiment


gr = pytest.importorskip("gradio")
SPACE = Path(__file__).resolve().parents[1] / "spaces" / "grounding"
EXAMPLES = SPACE / "examples"
BROWSER = shutil.which("chromium")


def random_checkpoint(folder: Path, seed: int) -> Path:
    """A repository of the quickstart's architecture with random weights and made-up statistics."""
    bounds = {"q01": [-1.0] * 4, "q99": [1.0] * 4}
    config = QuickstartConfig()
    processor = build_processor(config, embodiment(config, {"state": bounds, "action": bounds}))
    torch.manual_seed(seed)
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> ModuleType:
    """The module of the Space with two checkpoints, as `python app.py` would load it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    first = os.environ.get("WALLVLA_TEST_CHECKPOINT") or random_checkpoint(folder / "first", 0)
    patch = pytest.MonkeyPatch()
    patch.setenv("WALLVLA_MODEL", str(first))
    patch.setenv("WALLVLA_COMPARE", str(random_checkpoint(folder / "second", 1)))
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "space_app", module)
    spec.loader.exec_module(module)
    yield module
    patch.undo()


@pytest.fixture(scope="module")
def url(app) -> str:
    """The running page, on this machine only."""
    demo = app.create_app()
    _, address, _ = demo.launch(
        **app.LAUNCH_OPTIONS, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False
    )
    yield address
    demo.close()


# Functions


def test_drawn_boxes_are_where_the_answer_is(app):
    """Known rectangles in pictures of odd sizes: what is drawn lies on them, within a pixel of the shown picture."""
    for width, height in ((64, 64), (333, 101), (57, 399), (1291, 867)):
        box = (width // 5, height // 4, width // 2, height - height // 5)
        checkpoint = next(iter(app.MODELS.values()))
        text = checkpoint.processor.format_box(box, (width, height))
        answer = checkpoint.processor.parse_answer(text, "box", (width, height))
        picture = np.asarray(app.draw(Image.new("RGB", (width, height)), answer)).astype(int)
        factor = picture.shape[1] / width
        drawn = np.abs(picture - [0xE4, 0x57, 0x2E]).sum(axis=2) < 30
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        resized = checkpoint.processor.resized_size((width, height))
        tolerance = max(width / resized[0], height / resized[1], 1) * factor + 1
        found = np.array([columns[0], rows[0], columns[-1], rows[-1]])
        assert np.abs(found - np.array(box) * factor).max() <= tolerance


def test_projection_and_path(app):
    """The recorded hand lies where the matrix of its camera says: on the robot hand that the simulator drew."""
    observation = app.open_observation(str(EXAMPLES / "observation.json"))
    positions = app.end_effector_path(observation, observation.demonstrated)
    assert positions.shape == (9, 3)
    np.testing.assert_allclose(positions[1] - positions[0], 0.01 * observation.demonstrated[0, :3], atol=1e-9)
    pixels = app.project(observation.projection, positions)
    assert (pixels > 8).all() and (pixels < 56).all()
    identity = np.hstack([np.eye(3), np.zeros((3, 1))])
    np.testing.assert_allclose(app.project(identity, np.array([[2.0, 4.0, 2.0]])), [[1, 2]])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda values: values.pop("state"), "no entry 'state'"),
        (lambda values: values["images"].update(front="%%%"), "no recorded observation"),
        (lambda values: values["camera"].update(image="top"), "name of one of the images"),
    ],
)
def test_bad_observations(app, tmp_path, change, message):
    values = json.loads((EXAMPLES / "observation.json").read_text())
    change(values)
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(gr.Error, match=message):
        app.open_observation(str(tmp_path / "bad.json"))


def test_observation_of_another_robot(app, tmp_path):
    values = json.loads((EXAMPLES / "observation.json").read_text()) | {"embodiment": "franka"}
    (tmp_path / "other.json").write_text(json.dumps(values))
    with pytest.raises(gr.Error, match=f"'franka'. Known: {EMBODIMENT}"):
        app.act(str(tmp_path / "other.json"), 0)


def test_bad_pictures_and_words(app, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    cut = (EXAMPLES / "button.png").read_bytes()[:900]
    (tmp_path / "cut.png").write_bytes(cut)
    Image.new("L", (10_000, 6_000)).save(tmp_path / "huge.png")
    button = str(EXAMPLES / "button.png")
    for path, subject, message in (
        (None, "button", "no picture yet"),
        (str(tmp_path / "text.png"), "button", "cannot be read as a picture"),
        (str(tmp_path / "cut.png"), "button", "cannot be read as a picture"),
        (str(tmp_path / "huge.png"), "button", "10000 x 6000 pixels"),
        (button, "  ", "Say what to look for"),
        (button, None, "Say what to look for"),
    ):
        with pytest.raises(gr.Error, match=message):
            list(app.ask(path, "box", subject, False))


def test_answers_stream(app):
    """The text grows, and only the last step has the picture."""
    steps = list(app.ask(str(EXAMPLES / "button.png"), "boxes", "button", True))
    texts = [step[1] for step in steps]
    assert len(texts) > 3 and all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert isinstance(steps[-1][0], Image.Image) and not any(isinstance(step[0], Image.Image) for step in steps[:-1])


def test_failures_while_generating_are_not_swallowed(app, monkeypatch):
    checkpoint = next(iter(app.MODELS.values()))

    def broken(**inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(app.ask(str(EXAMPLES / "button.png"), "box", "button", False))


def test_paths_of_the_server_stay_private(app):
    assert list(app.MODELS)[1].endswith("/second") and list(app.MODELS)[1].count("/") == 1
    assert app.shown_name("x-square/wall-oss") == "x-square/wall-oss"


def test_the_space_needs_nothing_of_ours():
    """It runs on its own: no import of the package, and every import is in requirements.txt or comes with the SDK."""
    source = (SPACE / "app.py").read_text()
    assert "import wallvla" not in source and "from wallvla" not in source
    listed = (SPACE / "requirements.txt").read_text()
    for package in ("torch", "transformers", "matplotlib", "numpy", "pillow"):
        assert f"\n{package}" in listed
    assert not (SPACE.parent / "__init__.py").exists()


def test_demo_command(tmp_path, monkeypatch, capsys):
    """`wallvla demo` loads what it is told and serves the page; a folder that is no checkpoint is named."""
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.update(options, page=self))
    monkeypatch.setenv("WALLVLA_MODEL", "")  # restored afterwards
    monkeypatch.setenv("WALLVLA_COMPARE", "")
    monkeypatch.setitem(sys.modules, "space", None)
    cli.main(["demo", str(random_checkpoint(tmp_path / "policy", 0)), "--port", "7999"])
    assert launched["server_port"] == 7999 and launched["ssr_mode"] is False
    assert isinstance(launched["page"], gr.Blocks)
    assert [name.rsplit("/")[-1] for name in sys.modules["space"].MODELS] == ["policy"]
    with pytest.raises(SystemExit):
        cli.main(["demo", str(tmp_path / "nowhere")])
    assert "nowhere, and a Hub id would be OWNER/NAME" in capsys.readouterr().err


# Over HTTP


def test_api(app, url):
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    picture, text, note, found = client.predict(
        handle_file(EXAMPLES / "button.png"), "box", "button", True, api_name="/ask"
    )
    (box,) = found["boxes"]
    assert text.startswith("<box>[") and 0 <= box[0] <= box[2] <= 64 and 0 <= box[1] <= box[3] <= 64
    assert "Where is the button? Answer with a box." in note and " s" in note and found["problem"] is None
    with Image.open(picture) as image:
        assert max(image.size) == 640
    second = list(app.MODELS)[1]
    left, right = [
        client.predict(handle_file(EXAMPLES / "button.png"), "box", "button", True, second, api_name="/compare")[i]
        for i in (1, 4)
    ]
    assert left == text and right.startswith("<box>[") and right != left
    picture, text, note = client.predict(handle_file(EXAMPLES / "drawer.png"), 20, 30, api_name="/what_is_at")
    assert "What is at <point>[20, 30]</point>?" in note
    *_, line, numbers = client.predict(handle_file(EXAMPLES / "observation.json"), 0, api_name="/act")
    assert "press the button" in line and "8 actions, 0.10 s" in line
    assert len(numbers["actions"]["dx"]) == 8 and len(numbers["end_effector"]) == 9


# In a browser


class Page:
    """A page of the Space in Chromium that remembers what must not happen: requests elsewhere and errors."""

    def __init__(self, browser, url: str, width: int, height: int):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.page.goto(url)
        self.page.get_by_role("button", name="Ask", exact=True).wait_for()

    def _console(self, message) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _request(self, request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            self.problems.append(f"request to {request.url}")

    def tab(self, name: str):
        """Opens a tab and returns what it shows."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        return self.page.locator("[role=tabpanel]:visible")

    def upload(self, panel, path: Path) -> None:
        remove = panel.get_by_label("Clear", exact=True)
        if remove.count() and remove.first.is_visible():
            remove.first.click()
        panel.locator("input[type=file]").first.set_input_files(path)
        self.page.wait_for_timeout(800)

    def error(self, text: str) -> None:
        """Waits for the message with this text and closes it."""
        toasts = self.page.get_by_test_id("toast-body")
        toasts.filter(has_text=text).first.wait_for(timeout=20_000)
        self.page.get_by_test_id("toast-close").first.click()
        toasts.first.wait_for(state="hidden", timeout=20_000)

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium: apt-get install -y chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("WALLVLA_TEST_ARTIFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


SCREENS = pytest.mark.parametrize("screen, size", [("desktop", (1280, 900)), ("phone", (390, 844))])


@pytest.mark.slow
@SCREENS
def test_ask_in_a_browser(browser, url, artifacts, tmp_path, screen, size):
    page = Page(browser, url, *size)
    page.page.screenshot(path=artifacts / f"{screen}-start.png", full_page=True)
    panel = page.tab("Ask")
    ask = panel.get_by_role("button", name="Ask", exact=True)
    words = panel.get_by_label("Raw text of the model")
    ask.click()
    page.error("no picture yet")
    page.upload(panel, EXAMPLES / "button.png")
    ask.click()
    page.error("Say what to look for")
    panel.get_by_label("Of what, or for which task?").fill("button")
    panel.get_by_label("Force well-formed").check()
    ask.click()
    panel.locator("img[src*=png]").nth(1).wait_for(timeout=30_000)
    page.page.wait_for_function("document.body.innerText.includes('1 box found')", timeout=30_000)
    assert words.input_value().startswith("<box>[")
    page.page.screenshot(path=artifacts / f"{screen}-ask.png", full_page=True)
    (tmp_path / "text.png").write_text("no picture")
    page.upload(panel, tmp_path / "text.png")
    ask.click()
    page.error("cannot be read as a picture")
    Image.new("L", (10_000, 6_000)).save(tmp_path / "huge.png")
    page.upload(panel, tmp_path / "huge.png")
    page.page.wait_for_timeout(3000)
    ask.click()
    page.error("10000 x 6000 pixels")
    page.page.screenshot(path=artifacts / f"{screen}-errors.png", full_page=True)
    panel.get_by_text("drawer handle").first.click()  # a preset brings its picture and words along
    page.page.wait_for_timeout(1000)
    assert panel.get_by_label("Of what, or for which task?").input_value() == "drawer handle"
    assert page.fits() and not page.problems


@pytest.mark.slow
@SCREENS
def test_other_tabs_in_a_browser(browser, url, artifacts, screen, size):
    page = Page(browser, url, *size)
    panel = page.tab("Compare")
    page.upload(panel, EXAMPLES / "drawer.png")
    panel.get_by_label("Of what, or for which task?").fill("cabinet")
    panel.get_by_label("Force well-formed").check()
    panel.get_by_role("button", name="Ask both").click()
    panel.get_by_text("1 box found").nth(1).wait_for(timeout=30_000)
    page.page.wait_for_timeout(800)
    page.page.screenshot(path=artifacts / f"{screen}-compare.png", full_page=True)

    panel = page.tab("Click")
    page.upload(panel, EXAMPLES / "window.png")
    picture = panel.locator("img").first
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    panel.get_by_text("What is at <point>").first.wait_for(timeout=30_000)
    x, y = (float(panel.get_by_label(f"{axis} [pixels]").input_value()) for axis in "xy")
    assert abs(x - 32) <= 2 and abs(y - 32) <= 2
    page.page.wait_for_timeout(1500)
    page.page.screenshot(path=artifacts / f"{screen}-click.png", full_page=True)

    panel = page.tab("Actions")
    panel.get_by_role("button", name="Predict").click()
    panel.get_by_text("8 actions, 0.10 s").wait_for(timeout=30_000)
    page.page.wait_for_timeout(1500)
    page.page.screenshot(path=artifacts / f"{screen}-actions.png", full_page=True)
    assert page.fits() and not page.problems
