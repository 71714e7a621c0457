"""A Space that shows what a WallVLA checkpoint sees and what it would do.

    WALLVLA_MODEL=path/or/repo-id python app.py

    WALLVLA_MODEL     the repository, by default the published one
    WALLVLA_COMPARE   more repositories, separated by commas, for the tab that compares. A visitor cannot name others,
                      because a repository brings its own code.

It uses a repository as any user does, with `AutoModel`, `AutoProcessor` and `trust_remote_code`, and nothing else of
the project: questions, answer formats and robots are those of the checkpoint.
"""

try:
    from spaces import GPU  # ZeroGPU; has to come before anything that touches CUDA
except ImportError:  # anywhere else there is no GPU to borrow

    def GPU(duration: int):
        return lambda function: function


import base64
import binascii
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin, TextIteratorStreamer


DEFAULT_MODEL = "x-square/wall-oss"
EXAMPLES = Path(__file__).parent / "examples"
MAX_PIXELS = 50_000_000
MAX_NEW_TOKENS = 128
SHOWN_SIDE = 640  # pictures are shown with this longer side, so that lines and numbers look alike on all of them
COLORS = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#a06cd5", "#4f86f7")
KINDS = [
    ("Box around one object", "box"),
    ("Point to one object", "point"),
    ("Boxes around all of a kind", "boxes"),
    ("Points on all of a kind", "points"),
    ("Free space: where to place", "free_space"),
    ("Trajectory of the hand for a task", "trajectory"),
    ("Task progress", "progress"),
    ("Next step of a task", "next_step"),
    ("Question in my own words", "vqa"),
]
WITH_COORDINATES = ("box", "point", "boxes", "points", "free_space", "trajectory")
PRESETS = [
    ("button.png", "box", "button"),
    ("button.png", "point", "robot hand"),
    ("drawer.png", "box", "drawer handle"),
    ("drawer.png", "point", "cabinet"),
    ("window.png", "box", "window"),
    ("window.png", "point", "window handle"),
]
CSS = """
.gradio-container {max-width: 1180px !important; width: 100%; margin: 0 auto !important}
.note p {font-size: var(--text-md)}
.picture img {object-fit: contain}
"""
LAUNCH_OPTIONS = {
    # System fonts: a page of this app asks no other server for anything
    "theme": gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="teal"
    ),
    "css": CSS,
    "max_file_size": "40mb",
    "ssr_mode": False,
    "footer_links": ["api"],
}


@dataclass
class Checkpoint:
    """A loaded repository."""

    model: PreTrainedModel
    processor: ProcessorMixin


def load(repository: str) -> Checkpoint:
    """The model and processor of a repository or folder, with its own code."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModel.from_pretrained(repository, dtype=dtype, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    return Checkpoint(model.to("cuda" if cuda else "cpu").eval(), processor)


def repositories() -> list[str]:
    """What WALLVLA_MODEL and WALLVLA_COMPARE name, in that order, each once."""
    names = [os.environ.get("WALLVLA_MODEL", DEFAULT_MODEL), *os.environ.get("WALLVLA_COMPARE", "").split(",")]
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def shown_name(repository: str) -> str:
    """A repository's id, or the last two parts of a folder: where it lies on the server is nobody's business."""
    return "/".join(Path(repository).parts[-2:])


# On ZeroGPU the models have to be loaded when the module is
MODELS = {shown_name(repository): load(repository) for repository in repositories()}


# --- input


def open_image(path: str | None) -> Image.Image:
    """The picture of an upload in RGB, upright. Raises gr.Error with what is wrong with it."""
    if path is None:
        raise gr.Error("There is no picture yet. Upload one, or pick an example below.", title="No picture")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise gr.Error(
                    f"The picture has {width} x {height} pixels, at most {MAX_PIXELS // 10**6} million fit. "
                    "Make it smaller; the model sees a few hundred pixels of each side anyway.",
                    title="Picture too large",
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        message = f"This file cannot be read as a picture ({type(error).__name__}). Use a PNG, JPEG or WebP file."
        raise gr.Error(message, title="No picture") from error


def question(checkpoint: Checkpoint, kind: str, subject: str | None) -> str:
    """The words that the checkpoint is asked with."""
    if not (subject or "").strip():
        raise gr.Error("Say what to look for, for instance: button.", title="No words")
    return checkpoint.processor.grounding_prompt(kind, subject)


# --- answers


def stream(checkpoint: Checkpoint, image: Image.Image, text: str, kind: str, constrained: bool) -> Iterator[str]:
    """The answer as far as it is there, again and again until it is complete."""
    processor = checkpoint.processor
    try:
        inputs = processor(images=[image], text=text, return_tensors="pt").to(checkpoint.model.device)
    except ValueError as error:  # such as a picture that is a hundred times wider than high
        raise gr.Error(str(error), title="This picture does not fit the model") from error
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    if constrained and kind in WITH_COORDINATES:
        constraint = processor.answer_constraint(kind, [image.size])
        options |= {"logits_processor": [constraint], "max_new_tokens": constraint.max_new_tokens}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate() -> None:
        try:
            checkpoint.model.generate(**inputs, **options, streamer=streamer)
        finally:
            streamer.end()  # a failure must not leave the reader waiting

    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(generate)
        answer = ""
        for piece in streamer:
            answer += piece
            yield answer
        running.result()  # raises what went wrong in the thread


def note(answer, seconds: float) -> str:
    """One line about an answer: what was read, how long it took."""
    if answer.refused:
        found = "The model says that it is not there."
    elif answer.problem is not None:
        found = f"The answer does not fit the question: {answer.problem}."
    elif answer.progress is not None:
        found = f"{answer.progress:g}% done."
    else:
        counts = {"point": len(answer.points), "box": len(answer.boxes)}
        names = [f"{count} {name}{'es' if name == 'box' else 's'}" for name, count in counts.items() if count > 1]
        names += [f"1 {name}" for name, count in counts.items() if count == 1]
        found = f"{' and '.join(names)} found." if names else "Answered in words."
    return f"{found} {seconds:.2f} s"


def coordinates(answer) -> dict:
    """Points and boxes in pixels of the uploaded picture, for people who use the API."""
    return {
        "points": [[round(value, 1) for value in point] for point in answer.points],
        "boxes": [[round(value, 1) for value in box] for box in answer.boxes],
        "progress": answer.progress,
        "refused": answer.refused,
        "problem": answer.problem,
    }


def answers(
    name: str, path: str | None, kind: str, subject: str | None, constrained: bool
) -> Iterator[tuple[Image.Image, str, str, dict | None]]:
    """(picture, raw text, note, coordinates) while the text grows and once it is complete."""
    image = open_image(path)
    checkpoint = MODELS[name]
    text = question(checkpoint, kind, subject)
    started = time.perf_counter()
    words = ""
    for words in stream(checkpoint, image, text, kind, constrained):
        yield gr.skip(), words, f"Asked: “{text}” …", gr.skip()
    answer = checkpoint.processor.parse_answer(words, kind, image.size)
    line = note(answer, time.perf_counter() - started)
    yield draw(image, answer), words, f"Asked: “{text}”  \n{line}", coordinates(answer)


@GPU(duration=30)
def ask(path: str | None, kind: str, subject: str, constrained: bool):
    """Asks the first model about a picture."""
    yield from answers(next(iter(MODELS)), path, kind, subject, constrained)


@GPU(duration=60)
def compare(path: str | None, kind: str, subject: str, constrained: bool, second: str):
    """Asks the first model, then another one, the same question."""
    if second not in MODELS:
        raise gr.Error(f"There is no model {second}. This Space has {', '.join(MODELS)}.", title="Unknown model")
    for left in answers(next(iter(MODELS)), path, kind, subject, constrained):
        yield *left[:3], gr.skip(), gr.skip(), gr.skip()
    for right in answers(second, path, kind, subject, constrained):
        yield *left[:3], *right[:3]


@GPU(duration=30)
def what_is_at(path: str | None, x: float | None, y: float | None):
    """Asks what is at a pixel (x, y) of a picture."""
    image = open_image(path)
    if x is None or y is None or not (0 <= x <= image.width and 0 <= y <= image.height):
        message = f"Click into the picture, or give x from 0 to {image.width} and y from 0 to {image.height}."
        raise gr.Error(message, title="No point")
    checkpoint = next(iter(MODELS.values()))
    text = question(checkpoint, "what_is_at", checkpoint.processor.format_point((x, y), image.size))
    started = time.perf_counter()
    picture = draw_points(shown(image), [(x, y)], shown(image).width / image.width)
    words = ""
    for words in stream(checkpoint, image, text, "what_is_at", False):
        yield picture, words, f"Asked: “`{text}`” …"
    yield picture, words, f"Asked: “`{text}`”  \n{time.perf_counter() - started:.2f} s"


# --- pictures


def shown(image: Image.Image) -> Image.Image:
    """The picture at the size at which it is shown."""
    factor = SHOWN_SIDE / max(image.size)
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def draw(image: Image.Image, answer) -> Image.Image:
    """The picture with numbered boxes and points, a trajectory as a line through its points."""
    picture = shown(image)
    factor = picture.width / image.width, picture.height / image.height
    canvas = ImageDraw.Draw(picture)
    if answer.kind == "trajectory" and len(answer.points) > 1:
        line = [(x * factor[0], y * factor[1]) for x, y in answer.points]
        canvas.line(line, fill="white", width=9, joint="curve")
        canvas.line(line, fill=COLORS[0], width=5, joint="curve")
    for index, box in enumerate(answer.boxes):
        corners = [value * factor[axis % 2] for axis, value in enumerate(box)]
        # A box of no width is still a line of one pixel, inside the picture
        corners = [min(value, side - 1) for value, side in zip(corners, picture.size * 2, strict=True)]
        canvas.rectangle(corners, outline="white", width=6)
        canvas.rectangle(corners, outline=COLORS[index % len(COLORS)], width=4)
        if len(answer.boxes) > 1:
            _number(canvas, corners[:2], index)
    return draw_points(picture, answer.points, *factor)


def draw_points(
    picture: Image.Image, points: list[tuple[float, float]], x_factor: float, y_factor: float | None = None
) -> Image.Image:
    """Rings around points, with numbers if there are several; changes the picture and returns it."""
    canvas = ImageDraw.Draw(picture)
    for index, (x, y) in enumerate(points):
        x, y = x * x_factor, y * (x_factor if y_factor is None else y_factor)
        for radius, color, width in ((13, "white", 7), (12, COLORS[index % len(COLORS)], 5)):
            canvas.ellipse([x - radius, y - radius, x + radius, y + radius], outline=color, width=width)
        canvas.ellipse([x - 3, y - 3, x + 3, y + 3], fill=COLORS[index % len(COLORS)])
        if len(points) > 1:
            _number(canvas, (x + 10, y + 10), index)
    return picture


def _number(canvas: ImageDraw.ImageDraw, corner: tuple[float, float], index: int) -> None:
    text, font = str(index + 1), ImageFont.load_default(size=18)
    left, top, right, bottom = canvas.textbbox(corner, text, font=font)
    canvas.rectangle([left - 5, top - 4, right + 5, bottom + 4], fill=COLORS[index % len(COLORS)])
    canvas.text(corner, text, fill="black", font=font)


def figure_picture(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


# --- actions


@dataclass
class Observation:
    """A recorded observation; README.md describes its file."""

    embodiment: str
    instruction: str
    state: np.ndarray  # (S,) robot units
    images: dict[str, Image.Image]
    action_names: list[str]
    path_channels: list[int]
    path_start: np.ndarray  # (3,) metres
    path_scale: float | None  # metres that an action of 1 moves, None if actions are positions
    camera: str
    projection: np.ndarray  # (3, 4) world -> pixels of that camera's image, homogeneous
    demonstrated: np.ndarray | None  # (H, D) robot units


def open_observation(path: str | None) -> Observation:
    """Reads and checks a file. Raises gr.Error with what is wrong with it."""
    if path is None:
        raise gr.Error("There is no observation yet. Upload a file.", title="No observation")
    try:
        values = json.loads(Path(path).read_text())
        demonstrated = values.get("demonstrated")
        observation = Observation(
            embodiment=values["embodiment"],
            instruction=values["instruction"],
            state=np.asarray(values["state"], dtype=np.float64),
            images={
                key: Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
                for key, data in values["images"].items()
            },
            action_names=list(values["action_names"]),
            path_channels=list(values["path"]["channels"]),
            path_start=np.asarray(values["path"]["start"], dtype=np.float64),
            path_scale=values["path"]["scale"],
            camera=values["camera"]["image"],
            projection=np.asarray(values["camera"]["projection"], dtype=np.float64),
            demonstrated=None if demonstrated is None else np.asarray(demonstrated, dtype=np.float64),
        )
    except KeyError as error:
        raise gr.Error(f"The file has no entry {error}. The README says what it holds.", title="Bad file") from error
    except (ValueError, TypeError, AttributeError, UnidentifiedImageError, binascii.Error) as error:
        raise gr.Error(f"This is no recorded observation: {error}", title="Bad file") from error
    if observation.camera not in observation.images or observation.projection.shape != (3, 4):
        raise gr.Error("`camera` needs the name of one of the images and a 3 x 4 projection.", title="Bad file")
    return observation


@GPU(duration=30)
def act(path: str | None, seed: int):
    """Predicts the chunk of actions for a recorded observation and draws it."""
    observation = open_observation(path)
    checkpoint = next(iter(MODELS.values()))
    processor, device = checkpoint.processor, checkpoint.model.device
    state, name = observation.state, observation.embodiment
    started = time.perf_counter()
    try:
        inputs = processor(
            images=observation.images,
            instruction=observation.instruction,
            state=state,
            embodiment=name,
            return_tensors="pt",
        ).to(device)
        generator = torch.Generator(device).manual_seed(int(seed))
        chunk = checkpoint.model.sample_actions(**inputs, generator=generator)
        actions = processor.decode_actions(chunk, state=state, embodiment=name)[0]  # (H, D) robot units
    except ValueError as error:  # the processor's messages say what does not fit: robot, camera or state
        raise gr.Error(str(error), title="This observation does not fit the model") from error
    seconds = time.perf_counter() - started
    frequency = processor.embodiments[name].control_frequency
    line = (
        f"“{observation.instruction}”: {len(actions)} actions, {len(actions) / frequency:.2f} s at {frequency} a "
        f"second, predicted in {seconds:.2f} s"
    )
    named = dict(zip(observation.action_names, actions.T.round(5).tolist(), strict=True))
    positions = end_effector_path(observation, actions)
    return (
        draw_path(observation, positions),
        plot_path(observation, positions),
        plot_curves(observation, actions, frequency),
        line,
        {"frequency": frequency, "actions": named, "end_effector": positions.round(5).tolist()},
    )


def end_effector_path(observation: Observation, actions: np.ndarray) -> np.ndarray:
    """Positions of the end effector (H + 1, 3) in metres, if the robot followed the actions (H, D) exactly."""
    values = actions[:, observation.path_channels]
    if observation.path_scale is not None:
        values = observation.path_start + np.cumsum(values * observation.path_scale, axis=0)
    return np.vstack([observation.path_start, values])


def project(projection: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """World positions (N, 3) to pixels (N, 2)."""
    homogeneous = np.hstack([positions, np.ones((len(positions), 1))]) @ projection.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def draw_path(observation: Observation, positions: np.ndarray) -> Image.Image:
    """The camera's picture with the path of the end effector; a ring marks where it is now."""
    image = observation.images[observation.camera]
    picture = shown(image)
    factor = picture.width / image.width
    pixels = [tuple(pixel) for pixel in project(observation.projection, positions) * factor]
    canvas = ImageDraw.Draw(picture)
    canvas.line(pixels, fill="white", width=9, joint="curve")
    canvas.line(pixels, fill=COLORS[0], width=5, joint="curve")
    x, y = pixels[-1]
    canvas.ellipse([x - 6, y - 6, x + 6, y + 6], fill=COLORS[0], outline="white", width=2)
    return draw_points(picture, pixels[:1], 1.0)


def plot_path(observation: Observation, positions: np.ndarray) -> Image.Image:
    """The path in space, in centimetres from where the end effector is now."""
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axis = figure.add_subplot(projection="3d")
    moved = 100 * (positions - observation.path_start)
    axis.plot(*moved.T, color=COLORS[0], linewidth=2, marker=".", label="predicted")
    if observation.demonstrated is not None:
        shown_path = 100 * (end_effector_path(observation, observation.demonstrated) - observation.path_start)
        axis.plot(*shown_path.T, color="#555555", linewidth=1.5, linestyle="--", label="demonstrated")
        moved = np.vstack([moved, shown_path])
    axis.scatter([0], [0], [0], color="black", s=30, label="now")
    # The same scale on the three axes, or a straight push would look like a curve
    middle, half = (moved.max(0) + moved.min(0)) / 2, max(0.5, np.ptp(moved, axis=0).max() / 2)
    limits = [(center - half, center + half) for center in middle]
    axis.set(xlim=limits[0], ylim=limits[1], zlim=limits[2], xlabel="x [cm]", ylabel="y [cm]", zlabel="z [cm]")
    axis.tick_params(labelsize=8)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure_picture(figure)


def plot_curves(observation: Observation, actions: np.ndarray, frequency: float) -> Image.Image:
    """One curve for each channel of the action over time."""
    columns = 2 if len(observation.action_names) <= 8 else 4
    rows = -(-len(observation.action_names) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.7 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    times = np.arange(len(actions)) / frequency
    for index, name in enumerate(observation.action_names):
        axis = axes[index]
        if observation.demonstrated is not None:
            axis.plot(times, observation.demonstrated[: len(times), index], color="#555555", linestyle="--")
        axis.plot(times, actions[:, index], color=COLORS[0], marker=".")
        axis.set_title(name, fontsize=10)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(observation.action_names) :]:
        axis.set_visible(False)
    figure.supxlabel("time [s]", fontsize=9)
    return figure_picture(figure)


# --- page


def _picture(label: str) -> gr.Image:
    image = gr.Image(
        label=label,
        type="filepath",
        format="png",
        height=380,
        sources=["upload", "clipboard"],
        elem_classes="picture",
        buttons=["fullscreen"],
    )
    # Otherwise gradio opens an upload before we can, and reports what it cannot open as a bug of ours
    image.preprocess = _upload_path
    return image


def _upload_path(payload) -> str | None:
    return None if payload is None else payload.path


def _result(label: str, height: int | None = 420) -> gr.Image:
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        height=height,
        elem_classes="picture",
        buttons=["download", "fullscreen"],
    )


def _question_inputs() -> list[gr.components.Component]:
    """Picture, kind of question, words, and whether to constrain."""
    image = _picture("Picture")
    kind = gr.Dropdown(KINDS, value="box", label="What do you want?")
    subject = gr.Textbox(label="Of what, or for which task?", placeholder="button", lines=1)
    constrained = gr.Checkbox(False, label="Force well-formed coordinates (the model cannot decline then)")
    return [image, kind, subject, constrained]


def _presets(inputs: list[gr.components.Component]) -> None:
    rows = [[str(EXAMPLES / file), kind, subject] for file, kind, subject in PRESETS]
    words = {kind: label for label, kind in KINDS}
    # Labels, because a table with pictures is wider than a phone
    labels = [f"{words[kind]}: {subject}" for _, kind, subject in PRESETS]
    gr.Examples(rows, inputs[:3], label="Examples from the simulator", example_labels=labels)


def _ask_tab() -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            inputs = _question_inputs()
            button = gr.Button("Ask", variant="primary")
        with gr.Column(min_width=300):
            picture = _result("Answer")
            line = gr.Markdown(elem_classes="note")
            words = gr.Textbox(label="Raw text of the model", lines=2)
            with gr.Accordion("Coordinates in pixels of the picture", open=False):
                found = gr.JSON(show_label=False)
    _presets(inputs)
    outputs = [picture, words, line, found]
    button.click(ask, inputs, outputs, api_name="ask", show_progress_on=picture)
    inputs[2].submit(ask, inputs, outputs, api_visibility="private", show_progress_on=picture)


def _compare_tab() -> None:
    names = list(MODELS)
    if len(names) == 1:
        gr.Markdown(
            f"Only {names[0]} is loaded. To compare, start with WALLVLA_COMPARE=another/repository "
            "(or `wallvla demo PATH --compare ANOTHER`)."
        )
        return
    with gr.Row():
        with gr.Column(min_width=300):
            inputs = _question_inputs()
        with gr.Column(min_width=300):
            gr.Markdown(f"First model: **{names[0]}**")
            second = gr.Dropdown(names[1:], value=names[1], label="Second model")
            button = gr.Button("Ask both", variant="primary")
            _presets(inputs)
    outputs = []
    with gr.Row():
        for label in ("First model", "Second model"):
            with gr.Column(min_width=300):
                outputs += [
                    _result(label),
                    gr.Textbox(label="Raw text", lines=2),
                    gr.Markdown(elem_classes="note"),
                ]
    button.click(compare, [*inputs, second], outputs, api_name="compare", show_progress_on=[outputs[0], outputs[3]])


def _click_tab() -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            image = _picture("Click into the picture")
            with gr.Row():
                x = gr.Number(label="x [pixels]", minimum=0, min_width=100)
                y = gr.Number(label="y [pixels]", minimum=0, min_width=100)
            button = gr.Button("What is here?", variant="primary")
            gr.Examples([[str(EXAMPLES / name)] for name in ("button.png", "drawer.png", "window.png")], [image])
        with gr.Column(min_width=300):
            picture = _result("Where you asked")
            line = gr.Markdown(elem_classes="note")
            words = gr.Textbox(label="Raw text of the model", lines=2)

    def clicked(event: gr.SelectData) -> tuple[float, float]:
        return event.index[0], event.index[1]

    inputs, outputs = [image, x, y], [picture, words, line]
    button.click(what_is_at, inputs, outputs, api_name="what_is_at", show_progress_on=picture)
    chosen = image.select(clicked, None, [x, y], api_visibility="private")
    chosen.then(what_is_at, inputs, outputs, api_visibility="private", show_progress_on=picture)


def _action_tab() -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("What would the robot do next? A recorded observation in, the predicted chunk of actions out.")
            file = gr.File(
                label="Recorded observation (.json)", file_types=[".json"], value=str(EXAMPLES / "observation.json")
            )
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
            button = gr.Button("Predict", variant="primary")
            line = gr.Markdown(elem_classes="note")
        with gr.Column(min_width=300):
            picture = _result("Path of the end effector in the picture")
    with gr.Row():
        with gr.Column(min_width=300):
            space = _result("Path in space", None)
        with gr.Column(min_width=300):
            curves = _result("Every channel", None)
    with gr.Accordion("Numbers", open=False):
        numbers = gr.JSON(show_label=False)
    outputs = [picture, space, curves, line, numbers]
    button.click(act, [file, seed], outputs, api_name="act", show_progress_on=outputs[:3])


def create_app() -> gr.Blocks:
    """The page; `create_app().launch(**LAUNCH_OPTIONS)` serves it."""
    with gr.Blocks(title="WallVLA", analytics_enabled=False) as app:
        gr.Markdown(f"# WallVLA\nAsk **{next(iter(MODELS))}** where things are, and see what it would do.")
        with gr.Tab("Ask"):
            _ask_tab()
        with gr.Tab("Compare"):
            _compare_tab()
        with gr.Tab("Click"):
            _click_tab()
        with gr.Tab("Actions"):
            _action_tab()
    return app.queue(default_concurrency_limit=1)


if __name__ == "__main__":
    create_app().launch(**LAUNCH_OPTIONS)
