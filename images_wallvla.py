"""Camera frames to `pixel_values`, and how many tokens of the prompt an image has.

Two kinds of vision tower, behind one interface: those that read patches of any picture (`PatchedImages`) and those
that read squares of one size (`SquareImages`). The class of the stock image processor says which; see `KINDS`.

Shapes: I images; a frame is uint8 (h, w, 3) in RGB order. Sizes are (width, height) in pixels.
"""

from itertools import groupby

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize


ImageLike = Image.Image | np.ndarray


def as_array(image: ImageLike) -> np.ndarray:
    """PIL image or uint8 array to an RGB uint8 array (h, w, 3), or ValueError."""
    if isinstance(image, Image.Image):
        return np.asarray(image) if image.mode == "RGB" else convert_to_rgb(image, return_numpy=True)
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size):
        found = f"{image.dtype} array {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"Found an image that is a {found}. Images are PIL images or uint8 arrays (height, width, 3) in RGB "
            f"order; convert it."
        )
    return image


def resize(frame: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Frame (h, w, 3) uint8 at another size (width, height)."""
    if size == frame.shape[1::-1]:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, resample))


def longest_side_size(image_size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """`image_size` with its longer side at `side`, aspect kept, whole pixels (truncated); `None` changes nothing."""
    width, height = image_size
    if side is None or max(width, height) == side:
        return width, height
    if width > height:
        return side, max(1, int(side * height / width))
    return max(1, int(side * width / height)), side


def pixel_table(image_processor: BaseImageProcessor) -> np.ndarray:
    """Colour normalisation of an image processor for every uint8 value: float32 (channels, 256).

    uint8 has 256 values, so looking the normalised ones up gives the same numbers as computing them.
    """
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(values, image_processor.image_mean, image_processor.image_std)
    return np.ascontiguousarray(values[:, 0], dtype=np.float32)


class PatchedImages:
    """Patches of pictures of any size: Qwen2.5-VL, Qwen3-VL, Qwen3.5.

    Args:
        image_processor: sizes of patches, of the blocks that the model merges into one token and in time; limits of
            the pixels; colours. Read at each call.
    """

    def __init__(self, image_processor: Qwen2VLImageProcessorPil):
        self.image_processor = image_processor
        self.pixel_table = pixel_table(image_processor)

    def final_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size of whole blocks of patches that is nearest to `image_size` and within the limits of the pixels."""
        width, height = image_size
        if self.image_processor.do_resize:
            height, width = smart_resize(
                height,
                width,
                factor=self.image_processor.patch_size * self.image_processor.merge_size,
                min_pixels=self.image_processor.size["shortest_edge"],
                max_pixels=self.image_processor.size["longest_edge"],
            )
        return width, height

    def layout(self, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Tokens of images of these final sizes, (I,) int64, and `image_grid_thw` (I, 3) int64 for the batch."""
        patch = self.image_processor.patch_size
        grids = np.array([[1, height // patch, width // patch] for width, height in sizes], dtype=np.int64)
        grids = grids.reshape(-1, 3)  # also without images
        return grids.prod(axis=1) // self.image_processor.merge_size**2, {"image_grid_thw": grids}

    def pixels(self, frames: list[np.ndarray]) -> np.ndarray:
        """What the image processor makes of frames of their final sizes, bit for bit, but in one go.

        Returns:
            (patches, channels * temporal * patch^2) float32.
        """
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        temporal = self.image_processor.temporal_patch_size
        count = sum(frame.shape[0] * frame.shape[1] for frame in frames) // patch**2
        pixels = np.empty((count, 3, temporal, patch * patch), dtype=np.float32)
        start = 0
        for (height, width, _), run in groupby(frames, key=np.shape):
            stacked = np.stack(list(run))
            rows, columns = height // patch, width // patch
            stop = start + len(stacked) * rows * columns
            # (image, row, row in block, y, column, column in block, x, channel); a block is what the model merges
            stacked = stacked.reshape(-1, rows // merge, merge, patch, columns // merge, merge, patch, 3)
            stacked = stacked.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(stop - start, 3, patch * patch)
            for channel in range(3):
                pixels[start:stop, channel] = self.pixel_table[channel][stacked[:, channel]][:, None]
            start = stop
        return pixels.reshape(count, 3 * temporal * patch * patch)


class SquareImages:
    """Pictures stretched to squares of one size: Florence-2 (X-VLA), InternVL (one tile per image).

    Args:
        image_processor: `size` (height and width, equal), colours, and `image_seq_length`, the tokens that the model
            makes of one square.
    Raises:
        ValueError: the image processor makes anything else than one square per image, or does not say its tokens.
    """

    def __init__(self, image_processor: CLIPImageProcessorPil | GotOcr2ImageProcessorPil):
        self.image_processor = image_processor
        self.pixel_table = pixel_table(image_processor)
        fields = image_processor.to_dict()  # which of these a class has differs
        height, width = image_processor.size["height"], image_processor.size["width"]
        cropped = fields["crop_size"] if fields.get("do_center_crop") else fields["size"]
        whole = {"height": height, "width": width}
        if (
            not height
            or height != width
            or cropped != whole
            or fields.get("crop_to_patches")
            or not fields["do_resize"]
        ):
            raise ValueError(
                f"Found an image processor with size {fields['size']}, crops {cropped} and crop_to_patches "
                f"{fields.get('crop_to_patches', False)}. It has to make one square of each image: equal height and "
                f"width, do_resize, and neither crops nor tiles."
            )
        if "image_seq_length" not in fields:
            raise ValueError(
                "Found an image processor without image_seq_length, the tokens of one image. Add it: 50 for "
                "Florence-2 at 224 pixels, 256 for InternVL at 448."
            )
        self.side, self.tokens = height, fields["image_seq_length"]

    def final_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The square, whatever the size."""
        return self.side, self.side

    def layout(self, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Tokens of the images, (I,) int64, and nothing more for the batch."""
        return np.full(len(sizes), self.tokens, dtype=np.int64), {}

    def pixels(self, frames: list[np.ndarray]) -> np.ndarray:
        """What the image processor makes of squares, bit for bit: (I, 3, side, side) float32."""
        stacked = np.stack(frames).transpose(0, 3, 1, 2)
        pixels = np.empty(stacked.shape, dtype=np.float32)
        for channel in range(3):
            pixels[:, channel] = self.pixel_table[channel][stacked[:, channel]]
        return pixels


# Stock image processor -> what we do with its numbers. Its torchvision twin has the same name without "Pil".
KINDS = {
    Qwen2VLImageProcessorPil: PatchedImages,
    CLIPImageProcessorPil: SquareImages,
    GotOcr2ImageProcessorPil: SquareImages,
}


def images_of(image_processor: BaseImageProcessor) -> PatchedImages | SquareImages:
    """What turns frames into the batch of this image processor.

    A torchvision image processor is replaced by its PIL twin, whose numbers do not depend on what is installed; an
    unknown class that merges patches counts as one of Qwen2-VL.
    """
    fields = image_processor.to_dict()
    for stock, kind in KINDS.items():
        if isinstance(image_processor, stock):
            return kind(image_processor)
        if type(image_processor).__name__ == stock.__name__.removesuffix("Pil"):
            return kind(stock.from_dict(fields))
    if "merge_size" not in fields:
        known = ", ".join(stock.__name__ for stock in KINDS)
        raise ValueError(f"Found an image processor {type(image_processor).__name__}. Known: {known}.")
    return PatchedImages(Qwen2VLImageProcessorPil.from_dict(fields))


def qwen3_image_processor() -> Qwen2VLImageProcessorPil:
    """Of Qwen3-VL and Qwen3.5 as published: patches of 16, colours to [-1, 1]."""
    limits = {"shortest_edge": 65536, "longest_edge": 16777216}
    return Qwen2VLImageProcessorPil(patch_size=16, size=limits, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def florence2_image_processor(side: int = 224) -> CLIPImageProcessorPil:
    """Of Florence-2 at X-VLA's resolution: stretched, ImageNet's colours; one token per 32 pixels, and their mean."""
    return CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        image_seq_length=(side // 32) ** 2 + 1,
    )


def internvl_image_processor(side: int = 448) -> GotOcr2ImageProcessorPil:
    """Of InternVL, one tile per image: ImageNet's colours; one token for each 2 x 2 patches of 14 pixels."""
    return GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        image_seq_length=(side // 28) ** 2,
    )
