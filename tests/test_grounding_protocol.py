"""The grounding protocol: questions, answers, exact coordinates, and decoding that can only give well-formed ones."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.grounding_wallvla import FORMS, PROMPTS, answer_tokens, grounding_prompt
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.quickstart import QuickstartConfig, build_model, build_processor, embodiment


@pytest.fixture(scope="module")
def quickstart_processor() -> WallVLAProcessor:
    """Numbers and phrases are one token each, numbers take the blank before them along."""
    config = QuickstartConfig()
    return build_processor(config, embodiment(config))


@pytest.fixture(scope="module")
def bytes_processor(quickstart_processor) -> WallVLAProcessor:
    """A tokenizer without any phrase or number: a token is about a letter, as in a vocabulary that is new to us."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["red cup point box 0 1 2"] * 4, vocab_size=280)
    names = ["im_start", "im_end", "vision_start", "vision_end", "image_pad"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    return WallVLAProcessor(Qwen2VLImageProcessorPil(), tokenizer)


# Questions and answers


def test_every_kind_has_a_question():
    assert set(FORMS) < set(PROMPTS)
    for kind in PROMPTS:
        assert "red cup" in grounding_prompt(kind, " red cup ")
    # What the published quickstart checkpoints were trained with
    assert grounding_prompt("point", "cup") == "Point to the cup."
    assert grounding_prompt("box", "cup") == "Where is the cup? Answer with a box."
    with pytest.raises(ValueError, match="'polygon'.*Known: point, box"):
        grounding_prompt("polygon", "cup")
    with pytest.raises(ValueError, match="empty subject"):
        grounding_prompt("box", "  ")


@pytest.mark.parametrize(
    "kind, text, problem",
    [
        ("point", "<point>[1, 2]</point><|im_end|>\n", None),
        ("point", "<point>[1, 2]</point><point>[3, 4]</point>", "found 2 of <point>, expected 1"),
        ("point", "<box>[1, 2, 3, 4]</box>", "found 1 elements that are no <point>"),
        ("point", "<point>[1, 2", "not closed, or does not hold 2 numbers"),
        ("box", "<box>[1, 2, 3]</box>", "does not hold 4 numbers"),
        ("box", "", "empty"),
        ("box", "on the left", "no coordinates"),
        ("trajectory", "<point>[1, 2]</point>", "expected 2 to 16"),
        ("trajectory", "<point>[1, 2]</point> <point>[3, 4]</point>", None),
        ("progress", "about 40 %", None),
        ("progress", "140%", "percentages"),
        ("progress", "half", "percentages"),
        ("next_step", "close the gripper", None),
        ("vqa", " <|im_end|>", "empty"),
    ],
)
def test_answers_are_judged(quickstart_processor, kind, text, problem):
    answer = quickstart_processor.parse_answer(text, kind, (64, 64))
    assert not answer.refused and "<|im_end|>" not in answer.text
    assert answer.problem is None if problem is None else problem in answer.problem
    if kind == "progress" and problem is None:
        assert answer.progress == 40


@pytest.mark.parametrize("text", ["There is no red cup.", "None.", "It is not visible", "I can't see it"])
def test_refusals_are_no_mistakes(quickstart_processor, text):
    answer = quickstart_processor.parse_answer(text, "box", (64, 64))
    assert answer.refused and answer.problem is None and not answer.boxes
    assert not quickstart_processor.parse_answer(text, "vqa", (64, 64)).problem


def test_trajectories_keep_their_order(quickstart_processor):
    path = [(60, 4), (32, 30), (8, 60)]
    text = quickstart_processor.format_points(path, (64, 64))
    assert text == "<point>[60, 4]</point><point>[32, 30]</point><point>[8, 60]</point>"
    assert quickstart_processor.parse_answer(text, "trajectory", (64, 64)).points == path


# Coordinates


@given(st.integers(29, 2000), st.integers(29, 2000), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_drawn_boxes_come_back_within_a_pixel(bytes_processor, width, height, seed):
    """A rectangle painted into an image of odd size, through resize, answer text and parse, as a model would see it.

    The corners are measured in the *resized pixels* that the model gets, not computed, so a shift between resizing and
    parsing would show.
    """
    if max(width, height) / min(width, height) > 8:
        return  # below the smallest side that the model can see
    rng = np.random.default_rng(seed)
    left, right = sorted(rng.choice(width + 1, 2, replace=False))
    top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
    resized_width, resized_height = bytes_processor.resized_size((width, height))
    scale = np.array([width / resized_width, height / resized_height])
    if (right - left) / scale[0] < 3 or (bottom - top) / scale[1] < 3:
        return  # thinner than the model's pixels
    image = np.zeros((height, width, 3), np.uint8)
    image[top:bottom, left:right] = 255
    seen = bytes_processor._resized(image)[..., 0] > 127
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    text = f"<box>[{columns[0]}, {rows[0]}, {columns[-1] + 1}, {rows[-1] + 1}]</box>"
    box = bytes_processor.parse_answer(text, "box", (width, height)).boxes[0]
    pixel = np.maximum(np.tile(scale, 2), 1) + 1e-6  # a pixel of the coarser image
    assert (np.abs(np.subtract(box, (left, top, right, bottom))) <= pixel).all()
    # And in the other direction, as a training sample is written
    again = bytes_processor.parse_grounding(
        bytes_processor.format_box((left, top, right, bottom), image.shape[1::-1]), image.shape[1::-1]
    )
    assert (np.abs(np.subtract(again[1][0], (left, top, right, bottom))) <= pixel / 2 + 1e-6).all()


# Constrained decoding


def random_model(processor: WallVLAProcessor, seed: int) -> WallVLAForConditionalGeneration:
    torch.manual_seed(seed)
    model = build_model(processor).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("kind", FORMS)
def test_random_weights_always_give_coordinates(quickstart_processor, kind):
    """Sampled at high temperature from random weights: without the constraint nothing of it could be read."""
    model = random_model(quickstart_processor, 0)
    sizes = [(64, 64), (50, 33), (64, 20)]
    images = [[np.full((height, width, 3), 90, np.uint8)] for width, height in sizes]
    prompt = quickstart_processor.grounding_prompt(kind, "red cup")
    inputs = quickstart_processor(images=images, text=[prompt] * 3, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    for seed in range(3):
        torch.manual_seed(seed)
        constraint = quickstart_processor.answer_constraint(kind, sizes)
        options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": constraint.max_new_tokens}
        tokens = model.generate(**inputs, logits_processor=[constraint], **options)
        for size, text in zip(sizes, quickstart_processor.batch_decode(tokens[:, start:]), strict=True):
            answer = quickstart_processor.parse_answer(text, kind, size)
            assert answer.problem is None, text
            elements = answer.points + answer.boxes
            assert FORMS[kind].min_count <= len(elements) <= FORMS[kind].max_count
            numbers = [int(number) for number in re.findall(r"\d+", text)]
            resized = quickstart_processor.resized_size(size)
            assert all(number <= resized[axis % 2] for axis, number in enumerate(numbers)), (text, resized)
            leftover = re.sub(r"<(point|box)>\[[\d, ]+\]</(point|box)>", "", text)
            assert re.fullmatch(r"(<\|\w+\|>|\s)*", leftover), text
    free = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    texts = quickstart_processor.batch_decode(free[:, start:])
    assert any(quickstart_processor.parse_answer(text, kind, (64, 64)).problem for text in texts)


def test_constraint_with_letters_for_tokens(bytes_processor):
    """Every choice of tokens that the constraint allows ends in an answer; 200 random walks without a model."""
    texts = answer_tokens(bytes_processor.tokenizer, bytes_processor.end_token_id)
    assert {"<", "0", "9", ",", " ", "]", "/"} <= set(texts.values())
    rng = np.random.default_rng(0)
    vocabulary = len(bytes_processor.tokenizer)
    for walk in range(200):
        kind = list(FORMS)[walk % len(FORMS)]
        size = tuple(int(side) for side in rng.integers(30, 900, 2))
        constraint = bytes_processor.answer_constraint(kind, [size])
        tokens = [7, 8, 9]  # the prompt
        while tokens[-1] != bytes_processor.end_token_id:
            scores = constraint(torch.tensor([tokens]), torch.zeros(1, vocabulary))
            tokens.append(int(rng.choice(torch.isfinite(scores[0]).nonzero()[:, 0].numpy())))
            assert len(tokens) <= 3 + constraint.max_new_tokens
        text = bytes_processor.tokenizer.decode(tokens[3:])
        assert bytes_processor.parse_answer(text, kind, size).problem is None, text


def test_constraint_works_with_beams(quickstart_processor):
    model = random_model(quickstart_processor, 1)
    image = np.zeros((64, 64, 3), np.uint8)
    inputs = quickstart_processor(images=[[image]] * 2, text=["Where?"] * 2, return_tensors="pt")
    constraint = quickstart_processor.answer_constraint("box", [(64, 64), (64, 64)])
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": constraint.max_new_tokens}
    tokens = model.generate(**inputs, logits_processor=[constraint], **options)
    for text in quickstart_processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :]):
        assert quickstart_processor.parse_answer(text, "box", (64, 64)).problem is None


def test_constraint_errors(quickstart_processor):
    with pytest.raises(ValueError, match="'vqa', whose answers are words.*point, box"):
        quickstart_processor.answer_constraint("vqa", [(64, 64)])
    constraint = quickstart_processor.answer_constraint("box", [(64, 64), (64, 64)])
    with pytest.raises(ValueError, match="3 rows for 2 image sizes"):
        constraint(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 700))


def test_saved_with_the_checkpoint(quickstart_processor, tmp_path):
    """The Hub copy of a processor holds the protocol: a user without this package can ask and read."""
    quickstart_processor.save_pretrained(tmp_path)
    assert (tmp_path / "grounding_wallvla.py").is_file()
    assert "from .grounding_wallvla import" in (tmp_path / "processing_wallvla.py").read_text()
