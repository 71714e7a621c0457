"""A first look at a checkpoint: one chunk for one recorded observation, one answer about one image."""

from pathlib import Path

import numpy as np
from PIL import Image

from .grounding import generate_answer, parse_answer
from .policy import HubPolicy


def sample_chunk(path: str, sample: dict, num_inference_steps: int | None = None, seed: int = 0) -> str:
    """A table of the predicted and the demonstrated actions of a dataset sample, in robot units, step by step.

    Args:
        path: checkpoint whose classes are registered.
        sample: an action sample of `LeRobotDataset`.
        num_inference_steps: Euler steps; default: the checkpoint's own.
        seed: of the noise.
    """
    policy = HubPolicy.from_pretrained(
        path, embodiment=sample["embodiment"], num_inference_steps=num_inference_steps, seed=seed
    )
    images = {key.rsplit(".", 1)[-1]: image for key, image in sample["images"].items()}
    predicted = policy.act({"images": images, "state": sample["state"]}, sample["instruction"])
    lines = [f"instruction: {sample['instruction']}", "step  predicted | demonstrated (robot units)"]
    demonstrated = zip(sample["actions"], sample["action_is_pad"], strict=True)
    for step, (action, (target, is_pad)) in enumerate(zip(predicted, demonstrated, strict=False)):
        told = "past the end of the episode" if is_pad else _numbers(target)
        lines.append(f"{step:>4}  {_numbers(action)} | {told}")
    return "\n".join(lines)


def answer_question(path: str, image_path: str, question: str) -> dict:
    """A checkpoint's answer to a question about a picture: `text`, and `point` and `box` in its pixels or None."""
    from transformers import AutoModel, AutoProcessor  # seconds to import

    model, processor = AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    with Image.open(Path(image_path)) as picture:
        image = np.asarray(picture.convert("RGB"))
    text = generate_answer(model, processor, image, question)
    point, box = parse_answer(processor, text, image)
    return {"text": text, "point": point, "box": box}


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:+.3f}" for value in values)
