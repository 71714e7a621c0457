"""Metrics, benchmark files, altered scenes, and a checkpoint beside a stock model in the same command."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from wallvla import cli
from wallvla.evaluation.grounding import (
    Question,
    Reply,
    evaluate_grounding,
    evaluate_questions,
    exact_match,
    on_mask,
    score_reply,
)
from wallvla.evaluation.grounding_benchmarks import load_questions
from wallvla.evaluation.grounding_scenes import AlteredEnv, altered_scenes
from wallvla.evaluation.grounding_subjects import CheckpointSubject, VLMSubject, read_coordinates
from wallvla.evaluation.metaworld import EVALUATION_SEED_START
from wallvla.grounding_report import GroundingOptions
from wallvla.grounding_wallvla import grounding_prompt
from wallvla.quickstart import QuickstartConfig, build_model, build_processor, embodiment


IMAGE = np.zeros((20, 30, 3), np.uint8)
MASK = np.zeros((20, 30), bool)
MASK[4:8, 2:6] = True


class Scripted:
    """A subject that gives prepared replies by question."""

    def __init__(self, replies: dict[str, Reply]):
        self.replies = replies
        self.batches = []

    def prompt(self, kind: str, subject: str) -> str:
        return grounding_prompt(kind, subject)

    def ask(self, questions):
        self.batches.append({question.kind for question in questions})
        return [self.replies[question.text] for question in questions]


# Metrics


def test_points_on_masks():
    assert on_mask(MASK, (2.0, 4.0)) and on_mask(MASK, (5.9, 7.9))
    assert not on_mask(MASK, (6.0, 4.0)) and not on_mask(MASK, (1.9, 4.0))
    for outside in ((-0.5, 5), (31, 5), (3, 20.5), (float("nan"), 5)):
        assert not on_mask(MASK, outside)
    full = np.ones((20, 30), bool)
    assert on_mask(full, (30.0, 20.0)) and on_mask(full, (0, 0))


@pytest.mark.parametrize(
    "question, reply, scores",
    [
        (Question("point", "", [IMAGE], MASK, (2, 4, 6, 8)), Reply("", [(3, 5)]), (1, 1)),
        (Question("point", "", [IMAGE], MASK, (2, 4, 6, 8)), Reply("", [(9, 5), (3, 5)]), (0, 0)),
        (Question("point", "", [IMAGE], MASK, (2, 4, 6, 8)), Reply("there is none", refused=True), (0, 0)),
    ],
)
def test_point_scores(question, reply, scores):
    assert tuple(score_reply(question, reply).values()) == scores


def test_other_scores():
    box = score_reply(Question("box", "", [IMAGE], MASK, (2, 4, 6, 8)), Reply("", boxes=[(4, 4, 8, 8)]))
    assert box == {"point_in_mask": 0, "point_in_box": 1, "iou": pytest.approx(1 / 3), "iou_50": 0}
    free = Question("free_space", "", [IMAGE], MASK)
    assert score_reply(free, Reply("", [(3, 5), (9, 5), (4, 6), (29, 19)]))["points_in_mask"] == 0.5
    assert score_reply(free, Reply(""))["points_in_mask"] == 0
    assert score_reply(Question("vqa", "", [IMAGE], answer="B"), Reply("(b) the left one")) == {"exact_match": 1}


@pytest.mark.parametrize(
    "text, answer, same",
    [
        ("B", "B", True),
        ("b.", "B", True),
        ("(B) the red one", "B", True),
        ("Answer: B", "B", True),
        ("The correct answer is B.", "B", True),
        ("A", "B", False),
        ("Because", "B", False),
        ("a big B", "B", False),
        ("Yes.", "yes", True),
        ("Two  cups", "two cups", True),
        ("3", "4", False),
        ("", "B", False),
    ],
)
def test_exact_match(text, answer, same):
    assert exact_match(text, answer) == same


def test_report_counts_and_averages():
    questions = [
        Question("vqa", "one?", [IMAGE], answer="A", category="x"),
        Question("free_space", "where?", [IMAGE], MASK, category="y"),
        Question("vqa", "two?", [IMAGE], answer="B", category="x"),
    ]
    replies = {
        "one?": Reply("A"),
        "two?": Reply("", problem="the answer is empty"),
        "where?": Reply("", [(3, 5), (0, 0)]),
    }
    subject = Scripted(replies)
    report = evaluate_questions(subject, questions, batch_size=8, progress=False)
    assert sorted(map(sorted, subject.batches)) == [["free_space"], ["vqa"]]
    assert report["metrics"]["exact_match"]["rate"] == 0.5 and report["metrics"]["exact_match"]["count"] == 2
    assert report["metrics"]["points_in_mask"]["rate"] == 0.5 and report["malformed_rate"] == pytest.approx(1 / 3)
    assert report["by_category"] == {"x": {"exact_match": 0.5}, "y": {"point_in_mask": 1.0, "points_in_mask": 0.5}}
    assert [answer["question"] for answer in report["answers"]] == ["one?", "where?", "two?"]
    with pytest.raises(ValueError, match="no grounding questions"):
        evaluate_questions(subject, [], progress=False)


# Benchmark files, in the published layouts


def png(value: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def mask_png() -> bytes:
    pixels = np.zeros((30, 40), np.uint8)
    pixels[10:20, 5:15] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def column(data: bytes) -> dict:
    return {"bytes": data, "path": None}


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


SUFFIX = "Your answer should be formatted as a list of tuples, i.e. [(x1, y1)]."


def test_where2place(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(png(number))
        (tmp_path / "masks" / f"{number:02d}.jpg").write_bytes(mask_png())
    rows = [
        {"question_id": n, "image": f"{n:02d}.jpg", "text": f"Point to free space left of cup {n}. {SUFFIX}"}
        for n in range(2)
    ]
    (tmp_path / "point_questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    questions = load_questions("where2place", tmp_path)
    assert [question.text for question in questions] == [f"Point to free space left of cup {n}." for n in range(2)]
    assert questions[1].kind == "free_space" and questions[1].mask.sum() == 100
    assert score_reply(questions[0], Reply("", [(10, 15), (30, 15)]))["points_in_mask"] == 0.5
    assert len(load_questions("where2place", tmp_path, limit=1)) == 1
    (tmp_path / "masks" / "01.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"row 1 of .*names the image .*01.jpg"):
        load_questions("where2place", tmp_path)
    row = {"question": f"Where? {SUFFIX}", "image": column(png(3)), "mask": column(mask_png())}
    (question,) = load_questions("where2place", write_parquet(tmp_path / "test.parquet", [row]))
    assert question.text == "Where?" and question.mask[15, 10]


def test_refspatial(tmp_path):
    row = {
        "id": 0,
        "image": column(png(9)),
        "mask": column(mask_png()),
        "object": "the orange box",
        "prompt": "Please point out the orange box.",
        "suffix": SUFFIX,
        "step": 2,
    }
    (question,) = load_questions("refspatial", write_parquet(tmp_path / "location-00000-of-00001.parquet", [row]))
    assert question.text == "Please point out the orange box." and question.category == "2 steps"
    row["mask"] = column(png(0, (10, 10)))
    with pytest.raises(ValueError, match=r"mask of shape \(10, 10\) for an image of shape \(30, 40, 3\)"):
        load_questions("refspatial", write_parquet(tmp_path / "other.parquet", [row]))


def test_question_answering_files(tmp_path):
    row = {"image": column(png(1)), "question": "Which way?\n\nA. left\nB. right", "answer": "A"}
    (question,) = load_questions("realworldqa", write_parquet(tmp_path / "real.parquet", [row]))
    assert (question.kind, question.answer, question.images[0].shape) == ("vqa", "A", (30, 40, 3))
    row = {
        "question_id": "ERQA_1",
        "question": "Which image?",
        "question_type": "Trajectory Reasoning",
        "images": [column(png(1)), column(png(2))],
        "answer": "C",
    }
    (question,) = load_questions("erqa", write_parquet(tmp_path / "erqa.parquet", [row]))
    assert len(question.images) == 2 and question.images[1][0, 0, 0] == 2 and question.category == row["question_type"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(7))
    row = {
        "id": 1,
        "question": "A, B, C or D?",
        "question_type": "Visual Grounding",
        "answer": "D",
        "num_images": 1,
        "image_paths": ["images/1.png"],
    }
    (tmp_path / "benchmark_v1.jsonl").write_text(json.dumps(row))
    (question,) = load_questions("eobench", tmp_path / "benchmark_v1.jsonl")
    assert question.answer == "D" and question.images[0][0, 0, 0] == 7


def test_benchmark_errors(tmp_path):
    with pytest.raises(ValueError, match="Unknown benchmark 'mmlu': use one of where2place"):
        load_questions("mmlu", tmp_path)
    with pytest.raises(FileNotFoundError, match="parquet"):
        load_questions("erqa", tmp_path)
    path = write_parquet(tmp_path / "a.parquet", [{"image": column(png(1)), "answer": "A"}])
    with pytest.raises(ValueError, match="has no question. It has: image, answer"):
        load_questions("realworldqa", path)
    path = write_parquet(tmp_path / "b.parquet", [{"image": column(b"no"), "question": "?", "answer": "A"}])
    with pytest.raises(ValueError, match="row 0 of .*b.parquet: the image cannot be read"):
        load_questions("realworldqa", path)
    with pytest.raises(ValueError, match="Unknown benchmark 'simulator/dark'.*simulator/unseen.*erqa=PATH"):
        GroundingOptions("somewhere", ["reach-v3"], ["simulator/dark"])
    with pytest.raises(ValueError, match="'erqa' or no PATH"):
        GroundingOptions("somewhere", ["reach-v3"], ["erqa"])


# The simulator's scenes


def test_altered_scenes_keep_the_truth():
    """Colours change every object and no mask; a distractor hides what is behind it, in picture and mask alike."""
    seed = EVALUATION_SEED_START + 3
    with AlteredEnv("button-press-topdown-v3", ("front",), 64) as env:
        before = env.reset(seed)["images"]["front"]
        masks = env.object_masks("front")
        env.recolor(np.random.default_rng(1))
        recolored = env.observe()["images"]["front"]
        after = env.object_masks("front")
        assert all((masks[name] == after[name]).all() for name in masks) and masks.keys() == after.keys()
        change = np.abs(recolored.astype(int) - before).sum(axis=2)
        assert np.median(change[masks["button box"]]) > 60 and change[masks["robot hand"]].max() == 0
        env.restore_looks()
        assert (env.observe()["images"]["front"] == before).all()
        # One on the line of sight to the button box
        target = env.body_position("button")
        place = target + 0.3 * (env._env.data.camera("corner2").xpos - target)
        kind = env._mujoco.mjtGeom.mjGEOM_ELLIPSOID
        env._distractors.append((kind, np.full(3, 0.05), place, np.array([0.0, 0.0, 1.0, 1.0])))
        env._images.clear()
        hidden = masks["button box"] & ~env.object_masks("front")["button box"]
        column, row = np.floor(env.project("front", target[None])[0]).astype(int)
        assert hidden[row, column] and hidden.sum() > 20
        blue = env.observe()["images"]["front"][hidden].astype(int)
        assert (blue[:, 2] > blue[:, 0] + 40).mean() > 0.9


def test_altered_scenes_are_reproducible():
    arguments = (["button-press-topdown-v3"], [EVALUATION_SEED_START], "distractors", 64)
    first, second = ([s for scene in altered_scenes(*arguments, progress=False) for s in scene] for _ in range(2))
    assert all((a.image == b.image).all() and a.box == b.box for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="Seed 7 is one of training"):
        next(altered_scenes(["button-press-topdown-v3"], [7], "unseen"))
    with pytest.raises(ValueError, match="'dark'.*unseen, colors, distractors"):
        next(altered_scenes(["button-press-topdown-v3"], [EVALUATION_SEED_START], "dark"))


# Subjects


@pytest.mark.parametrize(
    "text, points, boxes",
    [
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]\n```', [], [(1, 2, 3, 4)]),
        ('[{"point_2d": [5, 6]}, {"point_2d": [7, 8.5]}]', [(5, 6), (7, 8.5)], []),
        ("[(0.25, 0.5), (0.3, 0.6)]", [(0.25, 0.5), (0.3, 0.6)], []),
        ("The cup is at [10, 20].", [(10, 20)], []),
        ("(1, 2, 30, 40)", [], [(1, 2, 30, 40)]),
        ('[{"bbox_2d": [1, 2, 3]}]', [], []),
        ("on the left", [], []),
    ],
)
def test_answers_of_other_models(text, points, boxes):
    assert read_coordinates(text) == (points, boxes)


@pytest.fixture(scope="module")
def processor():
    bounds = {"q01": [-1.0] * 4, "q99": [1.0] * 4}
    config = QuickstartConfig()
    return build_processor(config, embodiment(config, {"state": bounds, "action": bounds}))


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    """Folder of a random WallVLA checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(processor, tmp_path_factory):
    """Folder of a random Qwen2.5-VL as transformers would save it: no code, no class of ours."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(build_model(processor).config.vlm_config)
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    return folder


def test_stock_answers_are_scaled_to_the_picture(processor):
    """Pixels of the resized picture for Qwen2.5-VL, thousandths for others; the size is read from the inputs."""

    class Fixed:
        """Answers the same whatever it sees."""

        device = torch.device("cpu")

        def eval(self):
            return self

        def generate(self, input_ids, max_new_tokens, do_sample, **inputs):
            return torch.cat([input_ids, torch.zeros(len(input_ids), 1, dtype=torch.long)], dim=1)

    def encode(images, texts):
        assert all('Answer in JSON: [{"bbox_2d"' in text for text in texts)
        return processor(images=images, text=texts, return_tensors="pt")

    def decode(tokens):
        return ['[{"bbox_2d": [16, 8, 32, 16]}]'] * len(tokens)

    images = [np.zeros((100, 200, 3), np.uint8), np.zeros((640, 640, 3), np.uint8)]
    questions = [Question("box", "Where is it?", [image]) for image in images]
    subject = VLMSubject(Fixed(), encode, decode, grounding_prompt, patch_size=8)
    first, second = subject.ask(questions)
    assert processor.resized_size((200, 100)) == (64, 32)
    assert first.boxes == [(50, 25, 100, 50)] and second.boxes == [(160, 80, 320, 160)]
    subject = VLMSubject(Fixed(), encode, decode, grounding_prompt, coordinate_scale=1000)
    assert subject.ask(questions)[1].boxes == [pytest.approx((10.24, 5.12, 20.48, 10.24))]
    subject = VLMSubject(Fixed(), lambda *_: encode(*_).__class__({"input_ids": torch.zeros(2, 3)}), decode, None)
    with pytest.raises(ValueError, match="without image_grid_thw.*--baseline-scale"):
        subject.ask(questions)


def test_constrained_subject_is_never_malformed(processor):
    torch.manual_seed(0)
    model = build_model(processor)
    scenes = altered_scenes(["button-press-topdown-v3"], [EVALUATION_SEED_START], "unseen", 64, progress=False)
    samples = [sample for scene in scenes for sample in scene]
    assert len(samples) >= 3
    free = evaluate_grounding(CheckpointSubject(model, processor), samples, "point", progress=False)
    forced = evaluate_grounding(CheckpointSubject(model, processor, True), samples, "point", progress=False)
    assert free["malformed_rate"] == 1 and forced["malformed_rate"] == 0


def test_command_with_a_stock_baseline(checkpoint, stock, tmp_path, capsys):
    """Table 7's form: both subjects in one run, on the simulator and on a file."""
    rows = [{"image": column(png(1)), "question": "Left or right?\nA. left\nB. right", "answer": "A"}] * 2
    path = write_parquet(tmp_path / "real.parquet", rows)
    cli.main(
        f"eval-grounding {checkpoint} --baseline {stock} --benchmark simulator/unseen realworldqa={path} --scenes 1 "
        f"--task button-press-topdown-v3 --constrained --output {tmp_path / 'out'}".split()
    )
    text = capsys.readouterr().out
    assert "checkpoint" in text and "baseline" in text and "realworldqa, 2 questions" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert set(results) == {"simulator/unseen", "realworldqa"}
    assert results["simulator/unseen"]["checkpoint"]["malformed_rate"] == 0
    assert results["realworldqa"]["baseline"]["questions"] == 2


def test_command_errors(checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval-grounding", str(checkpoint), "--benchmark", "erqa=nowhere"])
    assert "nowhere" in capsys.readouterr().err
