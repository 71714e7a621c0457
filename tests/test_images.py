"""Images to pixel values: bit for bit what the stock image processors make of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from wallvla.images_wallvla import (
    PatchedImages,
    SquareImages,
    florence2_image_processor,
    images_of,
    internvl_image_processor,
    qwen3_image_processor,
    resize,
)


SIZES = [(56, 56), (56, 56), (112, 80), (64, 64), (57, 90), (224, 224), (448, 448), (300, 20)]


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("make", [florence2_image_processor, internvl_image_processor])
def test_squares_are_those_of_the_image_processor(make, side):
    stock = make() if side is None else make(side)
    images = images_of(stock)
    frames = [resize(frame, images.final_size(frame.shape[1::-1]), stock.resample) for frame in pictures()]
    found = images.pixels(frames)
    expected = stock(pictures(), return_tensors="pt")["pixel_values"]
    assert found.shape == (len(SIZES), 3, images.side, images.side) and found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), expected)


def test_patches_of_qwen3_are_those_of_the_image_processor():
    stock = qwen3_image_processor()
    images = images_of(stock)
    sizes = [images.final_size(frame.shape[1::-1]) for frame in pictures()]
    found = images.pixels([resize(frame, size, stock.resample) for frame, size in zip(pictures(), sizes, strict=True)])
    expected = stock(pictures(), return_tensors="pt")
    tokens, layout = images.layout(sizes)
    assert torch.equal(torch.from_numpy(found), expected["pixel_values"])
    assert torch.equal(torch.from_numpy(layout["image_grid_thw"]), expected["image_grid_thw"])
    assert tokens.sum() * 4 == len(found) and found.shape[1] == 3 * 2 * 16 * 16
    assert found.min() == -1 and found.max() == 1


def test_tokens_of_squares():
    """7 x 7 places and their mean in Florence-2 at 224; 1024 patches of 14, four to a token, in InternVL at 448."""
    for stock, tokens in ((florence2_image_processor(), 50), (internvl_image_processor(), 256)):
        counts, layout = images_of(stock).layout([(9, 9)] * 3)
        assert counts.tolist() == [tokens] * 3 and layout == {}
        assert images_of(stock).layout([])[0].size == 0


def test_class_of_the_image_processor_chooses():
    assert type(images_of(qwen3_image_processor())) is PatchedImages
    assert type(images_of(internvl_image_processor())) is SquareImages

    class CLIPImageProcessor(CLIPImageProcessorPil.__base__):  # as the torchvision twin is called
        size = {"height": 32, "width": 32}
        resample = Image.Resampling.BICUBIC
        image_mean = image_std = [0.5] * 3
        do_resize = do_rescale = do_normalize = True
        image_seq_length = 2

    twin = images_of(CLIPImageProcessor(image_seq_length=2, do_center_crop=False))
    assert type(twin.image_processor) is CLIPImageProcessorPil and (twin.side, twin.tokens) == (32, 2)


@pytest.mark.parametrize(
    ("stock", "message"),
    [
        (CLIPImageProcessorPil(size={"height": 32, "width": 64}, do_center_crop=False), "one square"),
        (CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False), "one square"),
        (CLIPImageProcessorPil(size={"height": 64, "width": 64}), "crops {'height': 224"),
        (GotOcr2ImageProcessorPil(crop_to_patches=True, image_seq_length=4), "crop_to_patches True"),
        (GotOcr2ImageProcessorPil(), "without image_seq_length.*256 for InternVL"),
    ],
)
def test_image_processors_that_do_not_fit(stock, message):
    with pytest.raises(ValueError, match=message):
        images_of(stock)


def test_unknown_image_processor():
    class Unknown(CLIPImageProcessorPil.__base__):
        size = {"height": 32, "width": 32}

    with pytest.raises(ValueError, match="image processor Unknown. Known: Qwen2VLImageProcessorPil"):
        images_of(Unknown())
