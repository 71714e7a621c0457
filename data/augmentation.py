"""Random changes of training samples: images, proprioception, cameras and wording.

An augmentation is called as `augment(sample, rng)`, returns the sample to use and leaves the given one as it is. All
randomness comes from `rng`. Samples of the other kind pass through unchanged: boxes and points in the answers of
multimodal samples would no longer fit a moved image.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image


Augmentation = Callable[[dict, np.random.Generator], dict]

MOST_STATE_CHANNELS = 128


def compose(*augmentations: Augmentation) -> Augmentation:
    """One augmentation that applies several, in the given order."""
    return partial(_compose, augmentations=augmentations)


def _compose(sample: dict, rng: np.random.Generator, *, augmentations: tuple[Augmentation, ...]) -> dict:
    for augmentation in augmentations:
        sample = augmentation(sample, rng)
    return sample


def random_shift(pixels: int) -> Augmentation:
    """Moves every camera image of an action sample by up to `pixels` in each direction, repeating the edge.

    Cameras move independently: a common shift would leave their relation unchanged, so a policy could still read exact
    distances from it. Multimodal samples stay as they are, because their answers may hold pixel positions.
    """
    if pixels < 0:
        raise ValueError(f"pixels is {pixels}; it must not be negative.")
    return partial(_random_shift, pixels=pixels)


def _random_shift(sample: dict, rng: np.random.Generator, *, pixels: int) -> dict:
    if not _is_action_sample(sample):
        return sample
    shifted = {}
    for camera, image in sample["images"].items():
        image = np.asarray(image)
        down, right = rng.integers(-pixels, pixels + 1, size=2)
        rows = np.clip(np.arange(image.shape[0]) - down, 0, image.shape[0] - 1)
        columns = np.clip(np.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
        shifted[camera] = image[rows[:, None], columns]
    return sample | {"images": shifted}


def drop_state(probability: float) -> Augmentation:
    """Marks action samples, with the given probability, as seen without proprioception.

    Adds `state_is_dropped` (bool), with which the processor leaves the state out of the prompt. The state itself stays
    in the sample: relative actions are measured from it.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}; it must be between 0 and 1.")
    return partial(_drop_state, probability=probability)


def _drop_state(sample: dict, rng: np.random.Generator, *, probability: float) -> dict:
    if not _is_action_sample(sample):
        return sample
    return sample | {"state_is_dropped": bool(rng.random() < probability)}


def perturb_state(fraction: float) -> Augmentation:
    """Asks for Gaussian noise on the proprioception that the prompt shows (Wall-OSS-0.5, section 2.2.3).

    Adds `state_noise` (K,), which the processor adds to the normalised state before it writes it into the prompt: so
    one number fits robots in metres, radians and degrees. `state` stays as it is: relative actions are measured from
    it.

    Args:
        fraction: standard deviation of the noise, as a fraction of half of each number's range (the normalised state
            lies in [-1, 1]).
    """
    if fraction < 0:
        raise ValueError(f"fraction is {fraction}; it must not be negative.")
    return partial(_perturb_state, fraction=fraction)


def _perturb_state(sample: dict, rng: np.random.Generator, *, fraction: float) -> dict:
    if not _is_action_sample(sample):
        return sample
    # More numbers than any state has: how many channels a robot fills is known to the processor only.
    return sample | {"state_noise": (rng.normal(size=MOST_STATE_CHANNELS) * fraction).astype(np.float32)}


def drop_cameras(probability: float, always_keep: Sequence[str] = ()) -> Augmentation:
    """Leaves each camera of an action sample out with the given probability, but never all of them.

    Adds `dropped_cameras` (list of keys), whose images and labels the processor leaves out of the prompt.

    Args:
        probability: of each camera, between 0 and 1.
        always_keep: cameras that stay, by the key that the samples have.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}; it must be between 0 and 1.")
    return partial(_drop_cameras, probability=probability, always_keep=tuple(always_keep))


def _drop_cameras(sample: dict, rng: np.random.Generator, *, probability: float, always_keep: tuple[str, ...]) -> dict:
    if not _is_action_sample(sample) or not sample["images"]:
        return sample
    cameras = list(sample["images"])
    draws = rng.random(len(cameras))
    dropped = [key for key, draw in zip(cameras, draws, strict=True) if draw < probability and key not in always_keep]
    if len(dropped) == len(cameras):
        # The survivor is a uniform choice: keeping the first one would teach the model that it is always there.
        dropped.pop(int(rng.integers(len(cameras))))
    return sample | {"dropped_cameras": dropped}


def color_jitter(brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> Augmentation:
    """Scales brightness, contrast and saturation of an action sample by factors from [1 - x, 1 + x].

    The cameras of a sample get the same factors: they look at the same scene in the same light, and a colour that the
    instruction names must not differ between them.
    """
    for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be between 0 and 1.")
    return partial(_color_jitter, ranges=(brightness, contrast, saturation))


def _color_jitter(sample: dict, rng: np.random.Generator, *, ranges: tuple[float, float, float]) -> dict:
    if not _is_action_sample(sample):
        return sample
    factors = 1 + np.asarray(ranges) * rng.uniform(-1, 1, size=3)
    return sample | {"images": {key: _jittered(np.asarray(image), factors) for key, image in sample["images"].items()}}


def _jittered(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3): brightness, contrast about the mean grey and saturation about each pixel's grey, scaled."""
    brightness, contrast, saturation = factors.astype(np.float32)
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as in Pillow's ImageEnhance
    pixels = image.astype(np.float32) * brightness
    mean = (pixels @ luma).mean()
    pixels = mean + (pixels - mean) * contrast
    grey = (pixels @ luma)[..., None]
    return np.clip(grey + (pixels - grey) * saturation + 0.5, 0, 255).astype(np.uint8)


def random_crop(fraction: float, same_for_all_cameras: bool = False) -> Augmentation:
    """Cuts a window of `fraction` of each side out of every image of an action sample and scales it back to full size.

    Args:
        fraction: side of the window, above 0 and at most 1.
        same_for_all_cameras: whether the window has the same relative place in all images. Necessary where the images
            are aligned with each other (stereo pairs); otherwise independent places hide more.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1.")
    return partial(_random_crop, fraction=fraction, same=same_for_all_cameras)


def _random_crop(sample: dict, rng: np.random.Generator, *, fraction: float, same: bool) -> dict:
    if not _is_action_sample(sample):
        return sample
    place = rng.random(2)
    cropped = {}
    for number, (key, image) in enumerate(sample["images"].items()):
        if number and not same:
            place = rng.random(2)
        image = np.asarray(image)
        height, width = image.shape[:2]
        rows, columns = max(1, round(height * fraction)), max(1, round(width * fraction))
        top, left = (int(p * (room + 1)) for p, room in zip(place, (height - rows, width - columns), strict=True))
        window = Image.fromarray(image[top : top + rows, left : left + columns])
        cropped[key] = np.asarray(window.resize((width, height), Image.Resampling.BILINEAR))
    return sample | {"images": cropped}


def vary_instruction(step_probability: float = 0.5, paraphrases: Mapping[str, Sequence[str]] | None = None):
    """Chooses the wording of an action sample: goal or current step, then one of its paraphrases.

    "One granularity is sampled per step" (Wall-OSS-0.5, section 2.2.3).

    Args:
        step_probability: probability of the step-level instruction `subtask`, for samples that have one.
        paraphrases: other wordings by instruction; the original and each paraphrase are equally likely.
    """
    if not 0 <= step_probability <= 1:
        raise ValueError(f"step_probability is {step_probability}; it must be between 0 and 1.")
    lists = {}
    for text, others in (paraphrases or {}).items():
        if isinstance(others, str) or not all(isinstance(other, str) and other.strip() for other in others):
            raise ValueError(f"The paraphrases of {text!r} are {others!r}; they must be a list of non-empty texts.")
        lists[text] = [text, *others]
    return partial(_vary_instruction, step_probability=step_probability, lists=lists)


def _vary_instruction(sample: dict, rng: np.random.Generator, *, step_probability: float, lists: dict) -> dict:
    if not _is_action_sample(sample):
        return sample
    use_step, choice = rng.random() < step_probability, rng.random()  # drawn in any case: later draws stay aligned
    text = sample["subtask"] if use_step and sample.get("subtask") else sample["instruction"]
    wordings = (
        [*lists.get(text, [text]), *sample.get("paraphrases", [])]
        if text == sample["instruction"]
        else (lists.get(text, [text]))
    )
    return sample | {"instruction": wordings[int(choice * len(wordings))]}


def _is_action_sample(sample: dict) -> bool:
    return "instruction" in sample  # the processor's own criterion
