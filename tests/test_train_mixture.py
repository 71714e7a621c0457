"""`wallvla train` on a mixture: robots come along, epochs are exact, and a run resumes with another batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from wallvla import cli
from wallvla.data.annotator import TransformersAnnotator
from wallvla.data.bridge import BridgeFrame, annotate
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.mixture import CoTrainingMixture
from wallvla.data.multimodal import MultimodalWriter
from wallvla.data.statistics import compute_statistics
from wallvla.quickstart import QuickstartConfig, build_model, build_processor, embodiment


ROOT = Path(__file__).resolve().parents[1]
CAMERA = "observation.images.front"
SIZE = 32


def write_dataset(root: Path, episodes: int, task: str) -> Path:
    rng = np.random.default_rng(0)
    features = {name: {"dtype": "float32", "shape": (4,)} for name in ("observation.state", "action")}
    features[CAMERA] = {"dtype": "image", "shape": (SIZE, SIZE, 3)}
    with LeRobotWriter(root, fps=80, features=features) as writer:
        for _ in range(episodes):
            for _ in range(6):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                writer.add_frame(
                    {CAMERA: pixels, "observation.state": rng.normal(size=4), "action": rng.normal(size=4)}
                )
            writer.save_episode(task)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny checkpoint, two datasets, questions, and a recipe that brings its robot along."""
    folder = tmp_path_factory.mktemp("train")
    config = QuickstartConfig(image_size=SIZE)
    for name, episodes, task in (("first", 2, "press the button"), ("second", 8, "close the window")):
        write_dataset(folder / name, episodes, task)
    dataset = LeRobotDataset(folder / "first", embodiment="r", action_horizon=8)
    robot = embodiment(config, compute_statistics(dataset, embodiment(config), progress=False))
    set_seed(0)
    processor = build_processor(config, robot)
    build_model(processor).save_pretrained(folder / "hub")
    processor.save_pretrained(folder / "hub")
    (folder / "robot.json").write_text(json.dumps(robot.to_dict()))
    with MultimodalWriter(folder / "questions.parquet") as writer:
        for _ in range(4):
            writer.add(np.zeros((SIZE, SIZE, 3), np.uint8), "Where is the button?", "<point>[3, 4]</point>")
    (folder / "mixture.yaml").write_text(
        "multimodal_fraction: 0.25\nbudget: 5\nrobots: {visitor: robot.json}\nactions:\n"
        "  - {dataset: first, embodiment: visitor}\n  - {dataset: second, embodiment: metaworld_sawyer}\n"
        "multimodal: [{path: questions.parquet}]\n"
    )
    return folder


def train(folder: Path, output: Path, **options) -> None:
    arguments = {
        "model": folder / "hub", "mixture": folder / "mixture.yaml", "output_dir": output, "use_cpu": True,
        "bf16": False, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True,
    } | options  # fmt: skip
    cli.main(["train", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))])


@pytest.fixture
def draws(monkeypatch) -> list[int]:
    """Numbers of the draws that are read, in order."""
    numbers = []
    original = CoTrainingMixture._read

    def spy(self, number):
        numbers.append(number)
        return original(self, number)

    monkeypatch.setattr(CoTrainingMixture, "_read", spy)
    return numbers


def test_text_to_action(folder, tmp_path):
    """Whole trajectories of a robot without cameras: no batch has an image, and the losses are finite."""
    robot = json.loads((folder / "robot.json").read_text()) | {"cameras": []}
    (folder / "blind.json").write_text(json.dumps(robot))
    (folder / "t2a.yaml").write_text(
        "multimodal_fraction: 0.0\nrobots: {blind: blind.json}\nactions:\n"
        "  - {dataset: first, embodiment: blind, weight: 0.2, full_sequence: true}\n"
        "  - {dataset: second, embodiment: blind, weight: 0.8, full_sequence: true, one_group: true}\n"
    )
    train(folder, tmp_path / "t2a", mixture=folder / "t2a.yaml", max_steps=3, per_device_train_batch_size=5,
          logging_steps=1, save_steps=3)  # fmt: skip
    history = json.loads((tmp_path / "t2a" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all() and min(losses) > 0


def test_a_run_resumes_exactly_with_another_batch_size(folder, tmp_path, draws):
    augmentations = {"color_jitter": 0.2, "random_crop": 0.9, "drop_cameras": 0.5, "perturb_state": 0.1}
    train(folder, tmp_path / "run", max_steps=3, per_device_train_batch_size=4, save_steps=3, **augmentations)
    assert draws == list(range(12))
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "mixture_state.json").read_text())
    assert state["draws"] == 12 and set(state["sources"]) == {"action", "multimodal"}
    robots = json.loads((tmp_path / "run" / "processor_config.json").read_text())["embodiments"]
    assert set(robots) == {"metaworld_sawyer", "visitor"}
    draws.clear()
    train(folder, tmp_path / "run", max_steps=5, per_device_train_batch_size=2, save_steps=5, **augmentations)
    assert draws == list(range(12, 16))
    draws.clear()
    train(
        folder, tmp_path / "run", max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        **augmentations,
    )  # fmt: skip
    assert draws == list(range(16, 22))


TWO_RANKS = """
import json, os, sys
from pathlib import Path
from wallvla import cli
from wallvla.data.mixture import CoTrainingMixture
original = CoTrainingMixture._read
def spy(self, number):
    with open(Path(sys.argv[1]) / f"rank{os.environ['RANK']}", "a") as file:
        print(number, file=file)
    return original(self, number)
CoTrainingMixture._read = spy
cli.main(sys.argv[2:])
"""


def test_two_ranks_share_the_draws_and_one_goes_on(folder, tmp_path, draws):
    """Two processes (gloo) use every draw once between them; one process then goes on with another batch size."""
    (tmp_path / "wallvla").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    options = {"model": folder / "hub", "mixture": folder / "mixture.yaml", "output_dir": tmp_path / "run"}
    options |= {"max_steps": 2, "per_device_train_batch_size": 3, "save_steps": 2, "ddp_backend": "gloo"}
    options |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "report_to": "none"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py", "."]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [*launch, "train", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    used = [list(map(int, (tmp_path / f"rank{rank}").read_text().split())) for rank in range(2)]
    assert used == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    draws.clear()
    train(folder, tmp_path / "run", max_steps=4, per_device_train_batch_size=2, dataloader_num_workers=0)
    assert draws == list(range(12, 16))


def test_epochs_are_exact(folder, tmp_path, draws):
    """5 trajectories of 6 frames, and one question for every three of them: 40 draws an epoch."""
    train(folder, tmp_path / "run", num_train_epochs=2, per_device_train_batch_size=8, save_strategy="no")
    assert draws == list(range(80))


def test_options_that_exclude_each_other(folder, tmp_path, capsys):
    for options, message in (
        ({"dataset": folder / "first"}, "Give either a dataset or a mixture"),
        ({"clean": "clean.json"}, "Found clean beside mixture"),
        ({"resample": True, "state_key": "qpos"}, "Found state_key, resample beside mixture"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train(folder, tmp_path / "run", **options)
        assert message in capsys.readouterr().err


def test_annotator_asks_an_image_text_model(tmp_path):
    """A random LLaVA of a few thousand parameters: the answer is noise, the way to it is the real one."""
    tokenizer = build_processor(
        QuickstartConfig(image_size=SIZE), embodiment(QuickstartConfig(image_size=SIZE))
    ).tokenizer
    size = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **size)
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=32, **size)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    set_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token)
    ).save_pretrained(tmp_path)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
        "<|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        image_token="<|image_pad|>", num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    annotator = TransformersAnnotator(str(tmp_path), max_new_tokens=6)
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    answers = [annotator([image], "What is it?") for image in pixels]
    assert all(isinstance(answer, str) for answer in answers) and annotator([pixels[0]], "What is it?") == answers[0]
    frame = annotate(BridgeFrame(pixels[0], "Press the button", caption="a button"), lambda images, question: " go ")
    assert (frame.caption, frame.next_step) == ("a button", "go")
