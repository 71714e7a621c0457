"""What only a look at the image can tell, from any image-text model of `transformers`: captions, steps, objects.

An annotator is anything callable as `annotator(images, question) -> answer`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image


Annotator = Callable[[Sequence[np.ndarray], str], str]


class TransformersAnnotator:
    """Asks an image-text-to-text model.

    Args:
        model: folder or Hub id of a model with a chat template, such as a Qwen2.5-VL. (Processors that can also read
            videos need torchvision, which this package does not; transformers says so.)
        device, dtype: where and how it runs.
        max_new_tokens: longest answer.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: str = "auto", max_new_tokens: int = 128):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model)
        self._model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        self._max_new_tokens = max_new_tokens

    def __call__(self, images: Sequence[np.ndarray], question: str) -> str:
        """The greedy answer to a question about images uint8 (h, w, 3)."""
        import torch

        content = [{"type": "image", "image": Image.fromarray(image)} for image in images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        return self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
            0
        ].strip()
