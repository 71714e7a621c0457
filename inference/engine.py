"""Buckets and CUDA graphs around `PolicyForward`: frames and an instruction in, actions out.

On a GPU the whole call is one CUDA graph per bucket (section 2.3 of Wall-OSS-0.5 captures one denoising step);
elsewhere, and with `use_graphs=False`, the same function just runs. A model that `PolicyForward` was not written for
samples by itself, behind the same interface.

Shapes: B samples, L places for prefix tokens, H action steps, D action channels.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from ..flow_matching_wallvla import identity_guidance, number_of_steps, prefix_guidance
from ..modeling_wallvla import WallVLAForConditionalGeneration
from ..ops_wallvla import Ops, fast_ops
from .forward import PolicyForward, obstacles
from .plans import plan_vision, rope_positions
from .preprocessing import FrameResizer


GUIDANCES = (identity_guidance, prefix_guidance)  # those without a backward pass
logger = logging.getLogger(__name__)
CAPTURE = threading.Lock()  # one capture at a time in a process, whichever engine it is for


class BucketKey(NamedTuple):
    """What a captured call cannot change.

    frames: (height, width) of every image. length: L. text: tokens before the first image, whose keys and values stay
    from call to call. guidance: one of `GUIDANCES` or None, and its limit, 0 if it has none.
    """

    batch: int
    frames: tuple[tuple[int, int], ...]
    length: int
    text: int
    guidance: Callable | None
    limit: float


class Bucket:
    """Static tensors of one `BucketKey` (see `PolicyForward`), and the graph that reads and writes them."""

    def __init__(self, key: BucketKey, inputs: dict[str, Tensor], forward: PolicyForward, processor):
        self.key, self.forward, device = key, forward, forward.device
        self.inputs = {name: torch.empty_like(value, device=device) for name, value in inputs.items()}
        self.resizers, grids, vision = [], [], forward.vision_config
        for height, width in key.frames:
            sizes = [(width, height), processor.longest_side_size((width, height))]
            sizes.append(processor.resized_size((width, height)))
            self.resizers.append(FrameResizer(sizes, device))
            grids.append([side // vision.patch_size for side in reversed(sizes[-1])])
        merge = vision.spatial_merge_size
        window = vision.window_size // merge // vision.patch_size
        self.plan = plan_vision(np.array(grids), merge, window, forward.visual.rotary_pos_emb.inv_freq.float())
        expert, horizon = forward.config.action_expert, forward.config.action_horizon
        places = key.batch, expert.num_key_value_heads, key.length + horizon, expert.head_dim
        self.caches = torch.zeros(expert.num_hidden_layers, 2, *places, dtype=forward.dtype, device=device)
        self.text_ids: Tensor | None = None  # (B, text) on the host: whose keys and values the caches hold
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None
        self.nbytes = self.caches.nbytes + sum(each.nbytes for each in self.inputs.values())

    def load(self, inputs: dict[str, Tensor]) -> None:
        """Copies the inputs of a call to the device; recomputes keys and values of the first text if it is another."""
        for name, value in inputs.items():
            if self.caches.is_cuda and not value.is_cuda:
                value = value.pin_memory()
            self.inputs[name].copy_(value, non_blocking=True)
        text_ids = inputs["ids"][:, : self.key.text]
        if self.key.text and (self.text_ids is None or not torch.equal(text_ids, self.text_ids)):
            self.forward.prefill(self.inputs, self.caches, 0, self.key.text)
            self.text_ids = text_ids.clone()

    def run(self) -> Tensor:
        """The call itself, (B, H, D) float32: what a graph captures, and what runs without one."""
        images = self.forward.encode_images(self.inputs, self.resizers, self.plan)
        self.forward.prefill(self.inputs, self.caches, self.key.text, self.key.length, images)
        return self.forward.denoise(self.inputs, self.caches, self.key.guidance, self.key.limit)


class WallVLAEngine:
    """Samples action chunks of one model as fast as its device allows. Safe to call from several threads.

    The engine reads the weights as they are when it is made: make a new one after changing or moving them. For a model
    with `obstacles` to `PolicyForward` it has none of that: `forward` is None, there are no buckets, and each call is
    one of `model.sample_actions`; a line in the log says so and why.

    Args:
        model: on one device; its parameters become views of stacked tensors and keep their names and numbers.
        processor: the model's `WallVLAProcessor`.
        num_inference_steps: Euler steps; None takes the checkpoint's own.
        ops: the fused operations; None asks `fast_ops` for the device's.
        fp8: products of the vision encoder and the VL expert in e4m3. Not exact: `docs/inference.md` has its error.
        use_graphs: capture CUDA graphs; None does so on a GPU.
        length_step: prefix and chunk together are padded to a multiple of this, itself a multiple of 8, so that
            prompts of similar length share a bucket.
        max_buckets, max_bytes: of the buckets that are kept, and on the device. The least recently used go first; the
            one in use stays.

    Raises:
        ValueError: adapters that are not merged, or options that do not fit the model.
    """

    def __init__(
        self,
        model: WallVLAForConditionalGeneration,
        processor,
        num_inference_steps: int | None = None,
        ops: Ops | None = None,
        fp8: bool = False,
        use_graphs: bool | None = None,
        length_step: int = 16,
        max_buckets: int = 16,
        max_bytes: int = 4 << 30,
    ):
        found = _obstacles(model, processor, fp8 or bool(use_graphs))
        self.model, self.device, self.config, self.processor = model, model.device, model.config, processor
        self.use_graphs = self.device.type == "cuda" and not found if use_graphs is None else use_graphs
        if self.use_graphs and self.device.type != "cuda":
            raise ValueError(f"Found use_graphs with a model on {self.device}. CUDA graphs need a GPU.")
        dtype = model.get_input_embeddings().weight.dtype
        if fp8 and dtype != torch.bfloat16:
            raise ValueError(f"Found a model in {dtype}. FP8 products give bfloat16: load it in that.")
        if length_step < 8 or length_step % 8:
            raise ValueError(f"Found length_step {length_step}. It is a multiple of 8: attention masks need that.")
        self.length_step, self.max_buckets, self.max_bytes = length_step, max_buckets, max_bytes
        self.num_inference_steps = number_of_steps(num_inference_steps, model.config.num_inference_steps)
        self.forward = None
        if not found:
            table, ops = torch.from_numpy(processor.pixel_table), fast_ops(self.device) if ops is None else ops
            self.forward = PolicyForward(model, table, self.num_inference_steps, ops, fp8)
        self.buckets: OrderedDict[BucketKey, Bucket] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    def act(
        self,
        images: dict,
        instruction: str,
        state: ArrayLike | None = None,
        embodiment: str | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """One chunk in robot units, float64 (H_emb, D_robot); arguments as in `processor.__call__` and below."""
        sample = {"images": images, "instruction": instruction, "state": state, "embodiment": embodiment}
        chunk = self.sample_actions([sample], noise, generator)[0]
        return self.processor.decode_actions(chunk, state, embodiment)

    def sample_actions(
        self,
        samples: list[dict],
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: partial | None = None,
    ) -> Tensor:
        """Chunks of a batch: what `model.sample_actions` gives for `processor.encode(samples)`.

        Args:
            samples: action samples as in `processor.encode`, without `actions`; frames of any size.
            noise: start of the flow, (B, H, D) float32, on any device; drawn when absent.
            generator: source of the noise, on the model's device.
            guidance: one of `GUIDANCES` with its arguments bound by `functools.partial`.

        Returns:
            Normalised actions (B, H, D) float32, 0 where the robot has none.

        Raises:
            ValueError: samples that do not fit, or a guidance with a backward pass.
        """
        self._check(samples, guidance)
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            # Without an image there is nothing to plan
            if self.forward is None or not any(sample.get("images") for sample in samples):
                noise, batch = None if noise is None else noise.to(self.device), self.processor.encode(samples)
                return self.model.sample_actions(
                    **batch.to(self.device),
                    noise=noise,
                    num_inference_steps=self.num_inference_steps,
                    generator=generator,
                    guidance=guidance,
                )
            bucket = self.bucket(*self.inputs(samples, noise, generator, guidance))
            if bucket.graph is None:
                return bucket.run()
            bucket.graph.replay()
            result = bucket.output.clone()
            # Whoever gets the lock next may be on another stream
            torch.cuda.current_stream(self.device).synchronize()
            return result

    def _check(self, samples: list[dict], guidance: partial | None) -> None:
        for index, sample in enumerate(samples):
            if "instruction" not in sample or sample.get("actions") is not None:
                raise ValueError(
                    f"Found {', '.join(sample)} in sample {index}. The engine takes observations: samples with "
                    f"`instruction` and without `actions`."
                )
        if guidance is not None and guidance.func not in GUIDANCES:
            raise ValueError(
                f"Found guidance {guidance.func.__name__}. The engine has those without a backward pass, "
                f"{', '.join(each.__name__ for each in GUIDANCES)}; `model.sample_actions` has the others."
            )

    def bucket(self, key: BucketKey, inputs: dict[str, Tensor]) -> Bucket:
        """The bucket of a key with these inputs in it: the one there is, or a new one."""
        bucket = self.buckets.pop(key, None) or Bucket(key, inputs, self.forward, self.processor)
        bucket.load(inputs)
        if self.use_graphs and bucket.graph is None:
            reserved = torch.cuda.memory_reserved(self.device)
            bucket.graph, bucket.output = capture(bucket.run, self.device, self._pool)
            bucket.nbytes += max(0, torch.cuda.memory_reserved(self.device) - reserved)
        self.buckets[key] = bucket  # now the last to go
        while len(self.buckets) > 1 and (len(self.buckets) > self.max_buckets or self.nbytes > self.max_bytes):
            self.buckets.popitem(last=False)
        return bucket

    @property
    def nbytes(self) -> int:
        """What the buckets hold on the device."""
        return sum(bucket.nbytes for bucket in self.buckets.values())

    def inputs(
        self,
        samples: list[dict],
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: partial | None = None,
    ) -> tuple[BucketKey, dict[str, Tensor]]:
        """The key of a call and its inputs, on the host; arguments as in `sample_actions`."""
        batch = self.processor.encode(samples, return_tensors="np", patches=False)
        images = [self.processor.ordered_images(sample, index) for index, sample in enumerate(samples)]
        frames = [torch.from_numpy(np.array(self.processor.as_array(image))) for image in chain.from_iterable(images)]
        length, text, arrays = self._prompts(batch, [len(row) for row in images])
        names = ("action_mask", "action_padding", "states", "state_mask")
        arrays |= {name: batch[name] for name in names if name in batch}
        shape = arrays["action_mask"].shape
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=self.device)
        if noise.shape != shape:
            raise ValueError(f"Found noise of shape {tuple(noise.shape)}. This model samples chunks of shape {shape}.")
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()} | {"noise": noise.float()}
        inputs |= {f"frame_{index}": frame for index, frame in enumerate(frames)}
        function, bound = (None, {}) if guidance is None else (guidance.func, dict(guidance.keywords))
        limit = float(bound.pop("limit", 0.0))
        sizes = tuple(tuple(frame.shape[:2]) for frame in frames)
        return BucketKey(len(samples), sizes, length, text, function, limit), inputs | bound

    def _prompts(self, batch, images: list[int]) -> tuple[int, int, dict[str, np.ndarray]]:
        """L, the tokens before the first image, and what `PolicyForward` reads of prompts with so many images each."""
        counts, horizon = batch["attention_mask"].sum(axis=1), self.config.action_horizon  # (B,)
        length = -(-(int(counts.max()) + horizon) // self.length_step) * self.length_step - horizon
        ids = np.full((len(counts), length), self.processor.tokenizer.pad_token_id)
        positions, following = np.zeros((3, *ids.shape), dtype=np.int64), np.empty_like(counts)
        grids = batch["image_grid_thw"][:, 1:] // self.config.vlm_config.vision_config.spatial_merge_size
        grids = np.split(grids, np.cumsum(images)[:-1])
        for row, count in enumerate(counts):
            ids[row, :count] = batch["input_ids"][row, -count:]
            is_image = ids[row, :count] == self.processor.image_token_id
            positions[:, row, :count], following[row] = rope_positions(is_image, grids[row])
        is_image = ids == self.processor.image_token_id
        text = int(is_image.argmax(axis=1).min())
        rows, places = np.nonzero(is_image)
        return (
            length,
            text,
            {
                "ids": ids,
                "positions": positions,
                "counts": counts,
                "following": following,
                "image_places": rows * (length - text) + places - text,
            },
        )


def _obstacles(model: WallVLAForConditionalGeneration, processor, must_be_fused: bool) -> list[str]:
    """What keeps a model from the fused passes, said in the log; an error where an option cannot do without them."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"Found parameters on {', '.join(sorted(devices))}. The engine needs one device.")
    found, resample = obstacles(model), processor.image_processor.resample
    if not found and resample != Image.Resampling.BICUBIC:
        found = [f"resampling {resample} (not bicubic)"]
    if found and must_be_fused:
        raise ValueError(
            f"Found {', '.join(found)}: the fused passes, which FP8 products and CUDA graphs need, do not compute it. "
            f"Leave fp8 and use_graphs out."
        )
    if found:
        logger.warning(
            "The engine calls model.sample_actions, without CUDA graphs, fused operations and reuse of the prompt's "
            "beginning: its own passes do not compute %s.",
            ", ".join(found),
        )
    return found


def capture(function: Callable[[], Tensor], device: torch.device, pool=None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a function without arguments, and the tensor that each replay writes."""
    with torch.cuda.device(device), CAPTURE:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their algorithms and compilers compile outside the capture
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function()
    return graph, output
