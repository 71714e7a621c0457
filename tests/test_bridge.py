"""Questions about images: conventions of coordinates, other datasets' rows, and what trajectories tell."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla import cli
from wallvla.action_space_wallvla import Embodiment
from wallvla.data.bridge import (
    LEVELS,
    BridgeFrame,
    Camera,
    annotate,
    boxes_of_answer,
    bridge_samples,
    color_name,
    frames_of_demonstration,
    frames_of_episode,
    gripper_closings,
    relation,
    write_bridge_samples,
)
from wallvla.data.conversations import ConversationDataset, JsonLines
from wallvla.data.coordinates import CONVENTIONS, convert_text, from_pixels, to_pixels
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.multimodal import MultimodalDataset, MultimodalWriter
from wallvla.evaluation.demonstrations import record_demonstrations
from wallvla.processing_wallvla import WallVLAProcessor


settings.register_profile("wallvla", max_examples=60, deadline=None)
settings.load_profile("wallvla")

SIDE = 160  # of square images, a multiple of the processor's patches


@pytest.fixture(scope="module")
def processor() -> WallVLAProcessor:
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["Where is the cup? user assistant"], vocab_size=300)
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=64, max_pixels=512 * 512)
    return WallVLAProcessor(images, tokenizer, longest_side=256)


# ---- coordinates -------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(16, 2000), st.integers(16, 2000))


@given(sizes, st.sampled_from(sorted(CONVENTIONS)), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_conventions_are_invertible(size, convention, shares):
    pixels = [share * size[axis % 2] for axis, share in enumerate(shares)]
    np.testing.assert_allclose(to_pixels(from_pixels(pixels, convention, size), convention, size), pixels, atol=1e-9)


SPELLINGS = {
    "<box>[{x1}, {y1}, {x2}, {y2}]</box>": "box",
    "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>": "box",
    '{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "cup"}}': "box",
    "<point>[{x1}, {y1}]</point>": "point",
    '{{"point_2d": [{x1}, {y1}], "label": "cup"}}': "point",
    '<point x="{x1}" y="{y1}" alt="cup">cup</point>': "point",
    "[({x1}, {y1})]": "point",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_every_spelling_reads_back_as_the_same_pixels(processor, spelling, convention):
    size, box = (640, 480), (64.0, 120.0, 320.0, 360.0)
    names = ("x1", "y1", "x2", "y2")
    written = dict(zip(names, (f"{value:.6f}" for value in from_pixels(box, convention, size)), strict=True))
    text = convert_text("Look: " + spelling.format(**written) + " there.", convention, size, processor)
    points, boxes = processor.parse_grounding(text, size)
    found = boxes[0] if SPELLINGS[spelling] == "box" else points[0]
    np.testing.assert_allclose(found, box[: len(found)], atol=1.5)
    assert text.startswith("Look: ") and text.endswith(" there.")
    assert len(points) + len(boxes) == 1


def test_wrong_conventions_are_errors(processor):
    with pytest.raises(ValueError, match="as 'unit': .* lies outside an image of 640 x 480"):
        convert_text("<point>[500, 20]</point>", "unit", (640, 480), processor)
    with pytest.raises(ValueError, match="known are pixel, unit"):
        to_pixels([1, 2], "inches", (10, 10))


# ---- rows of other datasets ----------------------------------------------------------------------------------------


def picture(number: int, size=(48, 32)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.fixture
def jsonl(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / "images" / f"{number}.png")
    rows = [
        {"image": "images/0.png", "question": "Where is the cup?", "answer": "<point>[500, 250]</point>"},
        {
            "images": ["images/1.png", "images/2.png"],
            "messages": [
                {"role": "system", "content": "You are kind."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "A cup."},
                {"role": "user", "content": "Which colour?"},
                {"role": "assistant", "content": "Red."},
            ],
        },
        {"conversations": [{"from": "human", "value": "<image>\nHello"}, {"from": "gpt", "value": "Hi."}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_rows_and_chats_become_samples(jsonl, processor):
    dataset = ConversationDataset(JsonLines(jsonl), coordinates="thousand", processor=processor)
    assert len(dataset) == 4  # the chat of two answers gives two
    first = dataset[0]
    np.testing.assert_array_equal(first["images"][0], picture(0))
    np.testing.assert_allclose(processor.parse_grounding(first["answer"], (48, 32))[0], [(24, 8)], atol=1)
    assert [len(dataset[i]["images"]) for i in range(4)] == [1, 2, 2, 0]
    assert (dataset[1]["text"], dataset[1]["answer"]) == ("What is it?", "A cup.")
    assert dataset[2]["answer"] == "Red." and dataset[2]["text"].endswith("<|im_start|>user\nWhich colour?")
    assert (dataset[3]["text"], dataset[-1]["answer"]) == ("Hello", "Hi.")


def test_loss_is_on_the_last_answer_only(jsonl, processor):
    dataset = ConversationDataset(JsonLines(jsonl))
    batch = processor.encode([dataset[2]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "Red.<|im_end|>"
    assert "What is it?<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n<|im_start|>user\nWhich colour?" in (
        processor.tokenizer.decode(ids)
    )


def test_tables_of_the_datasets_library(tmp_path, processor):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture(n)) for n in range(3)], "prompt": ["What?"] * 3, "caption": list("abc")},
        features=datasets.Features(
            {"image": datasets.Image(), "prompt": datasets.Value("string"), "caption": datasets.Value("string")}
        ),
    )
    sample = ConversationDataset(table)[2]
    np.testing.assert_array_equal(sample["images"][0], picture(2))
    assert (sample["text"], sample["answer"]) == ("What?", "c")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "row 0 is '.1.'; every row is a JSON object"),
        ("{", "row 0 is not valid JSON"),
        ('{"image": "x.png", "question": "a"}', "row 0 has columns image, question; it needs a chat"),
        ('{"question": "a", "answer": " "}', "it needs a chat"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the chat does not end in an answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "out of place"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "found a robot turn 'a' out of place"),
    ],
)
def test_broken_rows_are_named(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(ValueError, match=message):
        ConversationDataset(JsonLines(tmp_path / "rows.jsonl"))


def test_broken_rows_are_counted_where_they_may_be(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)]
    lines = [json.dumps(row) for row in rows]
    lines[1], lines[2] = "{", json.dumps({"question": "q"})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="row 1 is not valid JSON"):
        ConversationDataset(JsonLines(tmp_path / "rows.jsonl"))
    dataset = ConversationDataset(JsonLines(tmp_path / "rows.jsonl"), skip_errors=True)
    assert [dataset[i]["answer"] for i in range(len(dataset))] == ["a0", "a3"]
    assert dataset.skipped.keys() == {1, 2} and "needs a chat" in dataset.skipped[2]


def test_missing_images_and_wrong_options(jsonl, processor):
    (jsonl.parent / "images" / "0.png").unlink()
    dataset = ConversationDataset(JsonLines(jsonl))
    with pytest.raises(ValueError, match="rows.jsonl, row 0: an image cannot be read"):
        dataset[0]
    with pytest.raises(ValueError, match="coordinates is 'feet'; known are text, pixel"):
        ConversationDataset(JsonLines(jsonl), coordinates="feet")
    with pytest.raises(ValueError, match="needs a processor"):
        ConversationDataset(JsonLines(jsonl), coordinates="pixel")
    wrong = ConversationDataset(JsonLines(jsonl), coordinates="unit", processor=processor)
    Image.fromarray(picture(0)).save(jsonl.parent / "images" / "0.png")
    with pytest.raises(ValueError, match="row 0: Found coordinates .500.0, 250.0. as 'unit'"):
        wrong[0]


def test_parquet_with_several_images_and_other_coordinates(tmp_path, processor):
    with MultimodalWriter(tmp_path / "q.parquet") as writer:
        writer.add(picture(0), "a", "<point>[0.5, 0.25]</point>")
        writer.add(picture(1), "b", "c", more_images=[picture(2), picture(3)])
    dataset = MultimodalDataset(tmp_path / "q.parquet", coordinates="unit", processor=processor)
    np.testing.assert_allclose(processor.parse_grounding(dataset[0]["answer"], (48, 32))[0], [(24, 8)], atol=1)
    assert len(dataset[0]["images"]) == 1
    for image, number in zip(dataset[1]["images"], (1, 2, 3), strict=True):
        np.testing.assert_array_equal(image, picture(number))


# ---- bridge samples ------------------------------------------------------------------------------------------------


def frame(**changes) -> BridgeFrame:
    image = np.full((120, 160, 3), 128, np.uint8)
    boxes = {"cup": (10.0, 40.0, 30.0, 60.0), "lid": (100.0, 42.0, 130.0, 62.0)}
    masks = {}
    for (name, box), color in zip(boxes.items(), ((220, 20, 20), (20, 40, 230)), strict=True):
        masks[name] = np.zeros((120, 160), bool)
        masks[name][int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        image[masks[name]] = color
    facts = {
        "boxes": boxes,
        "masks": masks,
        "path": np.stack([np.linspace(20, 120, 40), np.full(40, 50.0)], axis=1),
        "grasp": np.array([115.0, 52.0]),
        "progress": 0.42,
        "next_step": "close the lid",
        "other_view": (image[:, ::-1].copy(), {"cup": (140.0, 50.0)}),
    }
    return BridgeFrame(image, "Put the lid on the cup.", **(facts | changes))


def made(kind: str, processor, seed: int = 0, **changes):
    samples = bridge_samples(frame(**changes), processor, np.random.default_rng(seed), [kind])
    return samples[0] if samples else None


def test_all_kinds_and_levels(processor):
    samples = bridge_samples(frame(), processor, np.random.default_rng(0))
    assert [sample.kind for sample in samples] == list(LEVELS) and len(LEVELS) == 11
    assert {sample.level for sample in samples} == {"object", "spatial", "scene", "task"}
    bare = BridgeFrame(np.zeros((8, 8, 3), np.uint8), "wave")
    assert bridge_samples(bare, processor, np.random.default_rng(0)) == []
    with pytest.raises(ValueError, match="Found kinds dance; known are grounding"):
        bridge_samples(bare, processor, np.random.default_rng(0), ["dance"])


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_the_ground_truth(processor, seed):
    facts, size = frame(), (160, 120)

    def asked(sample) -> str:
        return next(name for name in facts.boxes if re.search(rf"\b{name}\b", sample.text))

    sample = made("grounding", processor, seed)
    np.testing.assert_allclose(
        processor.parse_grounding(sample.answer, size)[1][0], facts.boxes[asked(sample)], atol=1
    )
    sample = made("pointing", processor, seed)
    x, y = processor.parse_grounding(sample.answer, size)[0][0]
    assert facts.masks[asked(sample)][int(y), int(x)]
    sample = made("trajectory", processor, seed)
    points = np.array(processor.parse_grounding(sample.answer, size)[0])
    np.testing.assert_allclose(points, np.stack([np.linspace(20, 120, 5), np.full(5, 50)], axis=1), atol=1)
    sample = made("attribute", processor, seed)
    assert sample.answer == {"cup": "The cup is red.", "lid": "The lid is blue."}[asked(sample)]
    sample = made("relation", processor, seed)
    first = re.search(r"the (cup|lid)", sample.text)[1]
    other = {"cup": "lid", "lid": "cup"}[first]
    side = {"cup": "left of", "lid": "right of"}[first]
    question = re.search(r"Is the \w+ (left of|right of|above|below) the", sample.text)
    assert (sample.answer == "Yes.") == (question is not None and question[1] == side)
    assert sample.answer == "Yes." or f"is {side} the {other}." in sample.answer
    sample = made("multi_view", processor, seed)
    np.testing.assert_allclose(processor.parse_grounding(sample.text, size)[0], [(20, 50)], atol=1)
    np.testing.assert_allclose(processor.parse_grounding(sample.answer, size)[0], [(140, 50)], atol=1)
    sample = made("question", processor, seed)
    thing = re.search(r"Is there a (.*) in the image", sample.text)[1]
    assert sample.answer.startswith("Yes") == (thing in facts.boxes)
    assert made("progress", processor, seed).answer == "40%"
    assert made("next_step", processor, seed).answer == "close the lid"
    answer = processor.parse_grounding(made("affordance", processor, seed).answer, size)[0]
    np.testing.assert_allclose(answer, [(115, 52)], atol=1)
    assert made("caption", processor, seed).answer.startswith("From left to right: the cup and the lid.")


def test_kinds_without_clear_facts_give_no_sample(processor):
    assert made("trajectory", processor, path=np.full((30, 2), 50.0)) is None  # it does not move
    assert made("trajectory", processor, path=np.full((30, 2), -50.0)) is None  # outside the image
    assert made("affordance", processor, grasp=np.array([-5.0, 3.0])) is None
    assert made("relation", processor, boxes={"cup": (10, 10, 60, 60), "lid": (15, 12, 62, 61)}) is None
    assert made("attribute", processor, masks={}) is None
    assert made("multi_view", processor, other_view=None) is None


def test_relations_are_antisymmetric():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(500):
        corners = rng.uniform(0, 100, size=(2, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 30, size=(2, 2))], axis=1)
        forward = relation(boxes[0], boxes[1])
        assert relation(boxes[1], boxes[0]) == opposite[forward]
        found.add(forward)
    assert found == set(opposite)


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ((200, 30, 30), "red"), ((240, 130, 20), "orange"), ((230, 220, 30), "yellow"), ((40, 180, 60), "green"),
        ((30, 60, 220), "blue"), ((150, 40, 200), "purple"), ((250, 250, 250), "white"), ((10, 10, 10), "black"),
        ((120, 120, 120), "grey"), ((128, 200, 20), None),
    ],
)  # fmt: skip
def test_color_names(color, name):
    noise = np.random.default_rng(0).normal(0, 4, (400, 3))
    assert color_name(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)) == name


def test_color_of_a_patchwork_is_unclear():
    pixels = np.repeat(np.array([[220, 20, 20], [20, 40, 230], [30, 200, 30]], np.uint8), 100, axis=0)
    assert color_name(pixels) is None


def test_gripper_closings_ignore_noise():
    opening = np.array([1, 0.9, 0.55, 0.45, 0.55, 0.3, 0.1, 0.45, 0.39, 0.7, 1.0, 0.2, 0.0])
    assert gripper_closings(opening).tolist() == [5, 11]
    assert gripper_closings(np.zeros(5)).tolist() == []


# ---- from trajectories ---------------------------------------------------------------------------------------------


def test_projection():
    camera = Camera.from_dict(
        {
            "intrinsics": [[100, 0, 80], [0, 100, 60], [0, 0, 1]],
            # The camera looks along x: its right is -y, its down is -z; it stands one metre behind the base.
            "extrinsics": [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 1], [0, 0, 0, 1]],
            "size": [160, 120],
        }
    )
    points = np.array([[1.0, 0, 0], [1.0, 0.2, 0], [1.0, 0, 0.4], [-2.0, 0, 0]])
    found = camera.project(points, (160, 120))
    np.testing.assert_allclose(found[:3], [[80, 60], [70, 60], [80, 40]])
    assert np.isnan(found[3]).all()
    np.testing.assert_allclose(camera.project(points[:3], (320, 240)), 2 * found[:3])
    for wrong in ({}, {"intrinsics": [[1]], "extrinsics": np.eye(4).tolist(), "size": [1, 1]}):
        with pytest.raises(ValueError, match="intrinsics"):
            Camera.from_dict(wrong)


def test_recorded_episodes_give_paths_grasps_progress_and_steps(tmp_path, processor):
    length = 40
    camera = "observation.images.front"
    features = {
        camera: {"dtype": "image", "shape": (120, 160, 3)},
        "observation.state": {"dtype": "float32", "shape": (7,)},
        "action": {"dtype": "float32", "shape": (7,)},
    }
    states = np.zeros((length, 7), dtype=np.float32)
    states[:, 0], states[:, 1], states[:, 6] = 1.0, np.linspace(0.5, -0.5, length), np.arange(length) < 25
    with LeRobotWriter(tmp_path / "d", fps=10, features=features) as writer:
        for state in states:
            writer.add_frame({camera: picture(0, (160, 120)), "observation.state": state, "action": state})
        writer.save_episode("Open the box.")
    layout = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]
    robot = Embodiment.from_dict(
        {
            "cameras": [[camera, "front view"]],
            "control_frequency": 10,
            "action_horizon": 4,
            "state_layout": layout,
            "action_layout": layout,
        }
    )
    calibration = Camera(
        np.array([[100.0, 0, 80], [0, 100, 60], [0, 0, 1]]),
        np.array([[0, -1.0, 0, 0], [0, 0, -1, 0], [1, 0, 0, 1], [0, 0, 0, 1]]),
        (160, 120),
    )
    dataset = LeRobotDataset(tmp_path / "d", embodiment="r", action_horizon=1)
    found = list(frames_of_episode(dataset, 0, robot, {camera: calibration}, stride=10))
    assert [round(each.progress, 3) for each in found] == [0, 0.256, 0.513, 0.769]
    expected = 80 - 100 * states[:, 1] / 2
    np.testing.assert_allclose(found[1].path, np.stack([expected[10:31], np.full(21, 60)], axis=1), atol=1e-4)
    np.testing.assert_allclose([each.grasp[0] for each in found[:3]], [expected[25]] * 3, atol=1e-4)
    assert found[3].grasp is None  # it has closed for the last time
    plain = next(frames_of_episode(dataset, 0, robot, {camera: None}))
    assert plain.path is None and plain.progress == 0 and not plain.points and plain.other_view is None
    answers = []

    def annotator(images, question):
        answers.append(question)
        return " a red cup " if "Describe" in question else "lift the cup"

    counts = write_bridge_samples(iter(found), tmp_path / "b.parquet", processor, annotator=annotator)
    assert counts == {"pointing": 4, "trajectory": 4, "caption": 4, "progress": 4, "affordance": 3, "next_step": 4}
    samples = MultimodalDataset(tmp_path / "b.parquet")
    kinds = [samples[i]["metadata"]["kind"] for i in range(len(samples))]
    assert kinds.count("caption") == 4 and "a red cup" in {samples[i]["answer"] for i in range(len(samples))}
    assert any("Open the box." in question for question in answers)


def test_two_calibrated_cameras_show_the_gripper_in_both(tmp_path, processor):
    """Through the command: the same point of the robot in two images, and no question where one does not see it."""
    cameras = ["observation.images.front", "observation.images.side"]
    features = {camera: {"dtype": "image", "shape": (SIDE, SIDE, 3)} for camera in cameras}
    features |= {name: {"dtype": "float32", "shape": (3,)} for name in ("observation.state", "action")}
    path = np.stack([np.full(4, 1.0), np.array([-0.2, 0.0, 0.2, 5.0]), np.linspace(0, 0.1, 4)], axis=1)
    with LeRobotWriter(tmp_path / "d", fps=10, features=features) as writer:
        for position in path:
            images = {camera: picture(0, (SIDE, SIDE)) for camera in cameras}
            writer.add_frame(images | {"observation.state": position, "action": position})
        writer.save_episode("Reach.")
    layout = [["left_ee_position", 3]]
    robot = {"cameras": [[camera, camera] for camera in cameras], "control_frequency": 10, "action_horizon": 4}
    processor = WallVLAProcessor(processor.image_processor, processor.tokenizer, longest_side=SIDE)
    processor.add_embodiment("arm", robot | {"state_layout": layout, "action_layout": layout})
    intrinsics = [[50, 0, SIDE / 2], [0, 50, SIDE / 2], [0, 0, 1]]
    front = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 1], [0, 0, 0, 1]]  # one metre behind the base, looks along x
    side = [[1, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 2], [0, 0, 0, 1]]  # two metres to the right, looks along y
    for name, extrinsics in (("front", front), ("side", side)):
        values = {"intrinsics": intrinsics, "extrinsics": extrinsics, "size": [SIDE, SIDE]}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    processor.save_pretrained(tmp_path / "hub")
    command = ["data", "bridge", tmp_path / "hub", "--dataset", tmp_path / "d", "--embodiment", "arm", "--every", 1]
    files = [tmp_path / "front.json", tmp_path / "side.json"]
    command += ["--camera", "front", "side", "--output", tmp_path / "b.parquet", "--calibration"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(word) for word in [*command, files[0]]])
    cli.main([str(word) for word in [*command, *files]])
    samples = MultimodalDataset(tmp_path / "b.parquet")
    found = [samples[i] for i in range(len(samples)) if samples[i]["metadata"]["kind"] == "multi_view"]
    assert len(found) == 3  # in the fourth frame the gripper is beside the first image
    for sample, (_, y, z) in zip(found, path[:3], strict=True):
        assert len(sample["images"]) == 2 and "robot's gripper" in sample["text"]
        (seen,), _ = processor.parse_grounding(sample["text"], (SIDE, SIDE))
        (answer,), _ = processor.parse_grounding(sample["answer"], (SIDE, SIDE))
        np.testing.assert_allclose(seen, [SIDE / 2 - 50 * y / 2, SIDE / 2 - 50 * z / 2], atol=1)
        np.testing.assert_allclose(answer, [SIDE / 2, SIDE / 2 - 50 * z / (y + 2)], atol=1)


def test_steps_and_plans_of_language_columns_become_questions(processor):
    """Files of lerobot 0.6 with language columns: what is done now, and the whole plan."""
    root = Path(__file__).parent / "fixtures" / "lerobot_real_v3_lang"
    dataset = LeRobotDataset(root, embodiment="r", action_horizon=1, cameras=[])
    with_plan = [position for position, language in enumerate(dataset.language) if language.plan]
    assert with_plan
    language = dataset.language[with_plan[0]]
    frame = BridgeFrame(picture(0), "Reach.", next_step=language.steps[0][1], plan=language.plan)
    found = {
        (sample.text.split(". ")[1], sample.answer)
        for seed in range(20)
        for sample in bridge_samples(frame, processor, np.random.default_rng(seed), ["next_step"])
    }
    assert found == {
        ("What should the robot do next?", language.steps[0][1]), ("What are the steps?", language.plan),
    }  # fmt: skip


@pytest.mark.parametrize(("coordinates", "factor"), [("pixel", 1.0), ("unit", 1 / 200), ("thousand", 5.0)])
def test_boxes_of_an_annotator_become_questions(processor, coordinates, factor):
    boxes = [("Red cup", [20, 40, 60, 100]), ("plate", [120, 30, 190, 90])]
    boxes += [("fork", [1, 2, 3, 50]), ("fork", [9, 9, 30, 30])]
    entries = [{"bbox_2d": [factor * number for number in box], "label": name} for name, box in boxes]
    entries += [{"bbox_2d": [0, 0, 1e6, 3], "label": "table"}, {"bbox_2d": [1, 2], "label": "spoon"}, {"label": 3}]
    answer = f"Sure:\n```json\n{json.dumps(entries)}\n```"
    found = boxes_of_answer(answer, coordinates, (200, 200))
    assert found.keys() == {"red cup", "plate"}  # two forks: which one? The table does not fit, the spoon has no box
    np.testing.assert_allclose(found["red cup"], [20, 40, 60, 100])
    assert boxes_of_answer("I see nothing.", coordinates, (200, 200)) == {}
    frame = BridgeFrame(picture(0, (200, 200)), "Put the cup on the plate.")
    asked = annotate(frame, lambda images, question: answer if "JSON" in question else "x", coordinates)
    kinds = {sample.kind for sample in bridge_samples(asked, processor, np.random.default_rng(0))}
    assert {"grounding", "pointing", "relation", "question"} <= kinds
    assert annotate(frame, lambda images, question: answer).boxes == {}  # not asked for


def test_simulator_ground_truth_becomes_bridge_data(tmp_path, processor):
    (demonstration,) = record_demonstrations(
        ["drawer-open-v3"], 1, image_size=96, grounding_every=30, num_processes=1, progress=False, all_views=True
    )
    assert demonstration.effector_pixels.shape == (len(demonstration.states), 2)
    frames = list(frames_of_demonstration(demonstration, fps=80))
    assert len(frames) >= 3
    for each in frames:
        # The path begins at the hand: where its box is.
        x1, y1, x2, y2 = each.boxes["robot hand"]
        assert x1 - 12 <= each.path[0, 0] <= x2 + 12 and y1 - 12 <= each.path[0, 1] <= y2 + 12
    counts = write_bridge_samples(iter(frames), tmp_path / "b.parquet", processor)
    assert {"grounding", "pointing", "trajectory", "multi_view", "progress", "caption", "question"} <= counts.keys()
    samples = MultimodalDataset(tmp_path / "b.parquet")
    batch = processor.encode([samples[index] for index in range(len(samples))])
    assert (batch["labels"] != -100).any(axis=1).all()
