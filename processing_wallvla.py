"""Processor of WallVLA: everything between a robot and a tensor, in both directions.

`encode` makes the batches of training and of inference, so both see the same prompt, image size and normalisation;
`decode_actions` is its inverse for action chunks, `parse_grounding` for points and boxes.

Shapes: B samples, S tokens, H action steps and D action channels of the model, H_emb and D_robot those of a robot.
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from .action_space_wallvla import DEFAULT_PROMPT, Embodiment, short_camera_key
from .action_tokens_wallvla import ActionTokens
from .baseline_codecs_wallvla import ActionCodec, load_action_codec
from .batches_wallvla import NO_IMAGE, action_arrays, state_arrays, state_values, token_arrays
from .grounding_wallvla import (
    FORMS,
    CoordinateConstraint,
    GroundingAnswer,
    answer_tokens,
    find_elements,
    grounding_prompt,
    read_answer,
    to_original,
    to_resized,
)
from .images_wallvla import ImageLike, SquareImages, as_array, images_of, longest_side_size, resize
from .prompts_wallvla import STATE_TOKEN, WALL_OSS, PromptFormat


CODEC_FOLDER = "action_codec"  # of the codec inside a repository
PROPRIOCEPTION = ("text", "projected", "expert", "none")


class WallVLAProcessor(ProcessorMixin):
    r"""
    Args:
        image_processor (`BaseImageProcessor`, *optional*, defaults to `Qwen2VLImageProcessorPil()`):
            Sizes and colours of the images; its class says whether they are patches or squares (`images_wallvla`). A
            torchvision processor is replaced by its PIL twin, whose numbers do not depend on what is installed.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the VLM, with the special tokens of the prompt format.
        embodiments (`dict[str, dict | Embodiment]`, *optional*):
            The robots of this checkpoint by name. The attribute holds `Embodiment`s; change it by `add_embodiment`.
        action_dim (`int`, *optional*, defaults to 26), action_horizon (`int`, *optional*, defaults to 32):
            Channels D and steps H of the model's action chunk.
        state_bins (`int`, *optional*, defaults to 256):
            Bins over [-1, 1] of the proprioception written into the prompt.
        longest_side (`int`, *optional*, defaults to 448):
            Images are resized to this longer side, aspect kept, before the image processor rounds the sides to whole
            patches. `None` leaves that step out, as square images need.
        state_dim (`int`, *optional*):
            Numbers of the proprioception in the prompt: the state at its canonical channels and the embodiment's
            `state_padding` in the others (Wall-OSS-0.5: 26). `None` writes only the channels that the robot has.
        max_length (`int`, *optional*):
            The longest sequence, image tokens included. A longer one is an error; nothing is ever cut off.
        text_system_prompt (`str`, *optional*):
            System turn of multimodal samples. Action samples use the prompt of their embodiment.
        action_codec (`WallVLAActionCodec`, `FASTActionCodec` or `BinningActionCodec`, *optional*):
            Adds a chunk's discrete action tokens to training samples. Its tokens are added to the tokenizer. Saved to
            `action_codec/` and restored from there; a codec other than the model's is refused.
        chat_template (`str`, *optional*):
            As in every processor; the prompts above do not use it.
        proprioception (`str`, *optional*, defaults to `"text"`):
            `"text"`: the state is written into the prompt, in bins. `"projected"`: the prompt has the token
            <|propri|> in its place, and the model gets `states` and `state_mask`. `"expert"`: nothing in the prompt,
            and the action expert gets `states` and `state_mask`. `"none"`: nothing anywhere. As in the model's
            configuration.
        prompt_format (`dict` or `PromptFormat`, *optional*):
            What is written around images, instruction and state, see `prompts_wallvla`. `None`: `WALL_OSS`.
    """

    # transformers restores only parameters that can be passed by position, so none of these is keyword-only.
    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        embodiments: dict[str, dict | Embodiment] | None = None,
        action_dim: int = 26,
        action_horizon: int = 32,
        state_bins: int = 256,
        longest_side: int | None = 448,
        state_dim: int | None = None,
        max_length: int | None = None,
        text_system_prompt: str = DEFAULT_PROMPT,
        chat_template: str | None = None,
        proprioception: str = "text",
        action_codec: ActionCodec | None = None,
        prompt_format: dict | PromptFormat | None = None,
    ):
        self._images = images_of(Qwen2VLImageProcessorPil() if image_processor is None else image_processor)
        super().__init__(self._images.image_processor, tokenizer, chat_template=chat_template)
        self.action_dim = action_dim
        self.action_horizon = action_horizon
        self.state_bins = state_bins
        self.longest_side = longest_side
        self.state_dim = state_dim
        self.max_length = max_length
        self.text_system_prompt = text_system_prompt
        self.proprioception = proprioception
        if isinstance(prompt_format, dict):
            prompt_format = PromptFormat.from_dict(prompt_format)
        self.prompt_format = WALL_OSS if prompt_format is None else prompt_format
        self._check_options(action_codec)

        self.image_token_id = self._special_token_id(self.prompt_format.image_token)
        self.end_token_id = self._special_token_id(self.prompt_format.end_token)
        if proprioception == "projected":
            self._special_token_id(STATE_TOKEN)
        if tokenizer.pad_token_id is None:
            raise ValueError("Found a tokenizer without a pad token. Batches are padded; set `tokenizer.pad_token`.")
        self._answer_tokens = None  # filled by the first `answer_constraint`
        # The left edges of the bins: a value at or above edge i and below edge i + 1 is in bin i.
        self._bin_edges = np.linspace(-1, 1, state_bins + 1)[:-1]
        # Not `self.action_codec`: the framework would try to write an attribute of that name into the JSON
        self._action_tokens = None if action_codec is None else ActionTokens(action_codec, tokenizer)
        self.embodiments = {}
        for name, embodiment in (embodiments or {}).items():
            self.add_embodiment(name, embodiment)

    def _check_options(self, action_codec: ActionCodec | None) -> None:
        """Raises ValueError for options that contradict each other."""
        kind, prompts = self.proprioception, self.prompt_format
        if kind not in PROPRIOCEPTION:
            raise ValueError(f"Found proprioception {kind!r}. Known: {', '.join(PROPRIOCEPTION)}.")
        if kind in ("projected", "expert") and self.state_dim is None:
            raise ValueError(f"Found {kind} proprioception without state_dim: give its number of channels.")
        if kind in ("text", "projected") and "{state}" not in prompts.action:
            raise ValueError(
                f"Found proprioception {kind!r} and a prompt format without a place for the state. Use 'expert' or "
                f"'none', or a prompt with {{state}}."
            )
        if isinstance(self._images, SquareImages) and self.longest_side is not None:
            raise ValueError(
                f"Found longest_side {self.longest_side} with square images, which are stretched to their side in one "
                f"step. Pass longest_side=None."
            )
        if prompts.num_views and not isinstance(self._images, SquareImages):
            raise ValueError(
                "Found a prompt format with rows of one length and images of any size. Its images need one number of "
                "tokens: use the image processor of a model with square images."
            )
        if prompts.num_views and action_codec is not None:
            raise ValueError("Found an action codec and a prompt format with rows of one length: no token can follow.")

    def _special_token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or self.tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ValueError(f"Found a tokenizer without {token}. The prompt format needs this special token; add it.")
        return token_id

    # ---- discrete action tokens ---------------------------------------------------------------------------------

    @property
    def action_codec(self) -> ActionCodec | None:
        """The codec of the discrete action tokens, if there is one."""
        return None if self._action_tokens is None else self._action_tokens.codec

    @property
    def action_token_start_id(self) -> int | None:
        """Token id of the codec's number 0."""
        return None if self._action_tokens is None else self._action_tokens.start_id

    def action_token_config(self) -> dict:
        """The fields of `WallVLAConfig` that say which discrete action tokens a model has."""
        if self._action_tokens is None:
            raise ValueError("Found no action codec in the processor. Pass `action_codec`.")
        return self._action_tokens.config(self.embodiments.values())

    def check_model(self, config) -> None:
        """Raises ValueError unless the model of `config` has our tokens, states, domains and codec."""
        rows = config.vlm_config.get_text_config().vocab_size
        # The image token is replaced before it is embedded; in Florence-2 it lies behind the table
        last = max(index for index in self.tokenizer.get_vocab().values() if index != self.image_token_id)
        if last >= rows:
            raise ValueError(
                f"Found token id {last} in the tokenizer and {rows} rows in the model's embeddings. Resize them "
                f"(`model.vlm.resize_token_embeddings`), or build the model with this vocab_size."
            )
        to_model = {kind for kind in (config.proprioception, self.proprioception) if kind in ("projected", "expert")}
        if to_model and config.proprioception != self.proprioception:
            raise ValueError(
                f"Found proprioception {self.proprioception!r} in the processor and {config.proprioception!r} in the "
                f"model. Where the model reads the state, both have to say so."
            )
        beyond = {
            name: robot.domain for name, robot in self.embodiments.items() if robot.domain >= len(config.domains)
        }
        if config.domains and beyond:
            raise ValueError(
                f"Found the domains {beyond} in robots, and the model has {len(config.domains)}: "
                f"{', '.join(config.domains)}. Correct `domain`, or give the model one more "
                "(`model.add_domain`, `wallvla train --add-domain`)."
            )
        ours = None if self.action_codec is None else self.action_codec.fingerprint()
        _check_fingerprints(ours, config.action_codec_fingerprint, "processor", "model")

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """As the framework's, and loads the codec that the dictionary names, if it is the model's."""
        stored = processor_dict.pop("action_codec", None)
        names = ("cache_dir", "revision", "token", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        config = cached_file(
            pretrained_model_name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **hub
        )
        if config is not None:
            trained = json.loads(Path(config).read_text()).get("action_codec_fingerprint")
            found = None if stored is None else stored["fingerprint"]
            _check_fingerprints(found, trained, "processor_config.json", "config.json of the model")
        if stored is not None:
            codec = load_action_codec(pretrained_model_name_or_path, CODEC_FOLDER, hub)
            _check_fingerprints(codec.fingerprint(), stored["fingerprint"], CODEC_FOLDER, "processor_config.json")
            processor_dict["action_codec"] = codec
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As `ProcessorMixin.save_pretrained`, with the codec in `action_codec/`."""
        if self.action_codec is not None:
            self.action_codec.save_pretrained(Path(save_directory) / CODEC_FOLDER)
        return super().save_pretrained(save_directory, **kwargs)

    def _action_token_rows(self, samples: list[dict], groups: list, data: dict) -> dict[int, list[int]]:
        """{index of an action sample: token ids of its normalised chunk in `data` and the end of the turn}."""
        rows_of = {}
        for embodiment, rows in groups:
            steps = embodiment.action_horizon
            states = [samples[row].get("state") for row in rows]
            chunks, mask = data["actions"][rows, :steps], data["action_mask"][rows, :steps]
            for row, tokens in zip(rows, self._action_tokens.encode(chunks, mask, states, embodiment), strict=True):
                rows_of[row] = [*tokens, self.end_token_id]
        return rows_of

    def decode_action_tokens(
        self, ids: torch.Tensor, state: ArrayLike | None = None, embodiment: str | None = None
    ) -> np.ndarray:
        """Discrete action tokens in the units of the robot: what `generate_action_tokens` returned, as motion.

        Args:
            ids (`torch.Tensor`): token ids of the vocabulary (n,) or (B, n); of all levels, or of the first ones.
            state, embodiment: as in `decode_actions`.
        Returns:
            `np.ndarray`: float64 (H_emb, D_robot) or (B, H_emb, D_robot).
        Raises:
            ValueError: no codec, or ids that are no action tokens or do not make a chunk.
        """
        if self._action_tokens is None:
            raise ValueError("Found no action codec in the processor; discrete action tokens cannot be decoded.")
        batch = torch.atleast_2d(torch.as_tensor(ids)).cpu()
        states = [None] * len(batch)
        if state is not None:
            states = list(np.broadcast_to(state, (len(batch), np.shape(state)[-1])))
        chunk = self._action_tokens.decode(batch, states, self.get_embodiment(embodiment), self.action_dim)
        chunk = chunk[0] if torch.as_tensor(ids).dim() == 1 else chunk
        return self.decode_actions(chunk, state, embodiment)

    # ---- embodiments --------------------------------------------------------------------------------------------

    def add_embodiment(self, name: str, embodiment: dict | Embodiment) -> None:
        """Add or replace a robot, an `Embodiment` or its dictionary. Raises ValueError if the model cannot hold it."""
        if isinstance(embodiment, dict):
            embodiment = Embodiment.from_dict(embodiment)
        embodiment.channel_mask(self.action_dim)  # raises if the layout reaches beyond the model's channels
        embodiment.padding("action", self.action_dim)
        if self.state_dim is not None:
            embodiment.padding("state", self.state_dim)
        if embodiment.action_horizon > self.action_horizon:
            raise ValueError(
                f"Found action_horizon {embodiment.action_horizon} in embodiment {name!r}, the model predicts "
                f"{self.action_horizon} steps. Lower it, or use a model with a longer horizon."
            )
        channels = embodiment.state_channels
        if self.state_dim is not None and len(channels) and channels[-1] >= self.state_dim:
            raise ValueError(
                f"Found a state that reaches channel {channels[-1]} in embodiment {name!r}, the prompt has state_dim "
                f"{self.state_dim}. Raise state_dim, or use another state_layout."
            )
        if 0 < self.prompt_format.num_views < len(embodiment.cameras):
            raise ValueError(
                f"Found {len(embodiment.cameras)} cameras in embodiment {name!r}, the prompt format has "
                f"{self.prompt_format.num_views} views. Leave some out, or raise num_views."
            )
        self.tokenizer.add_tokens(self.prompt_format.tokens_of_views(embodiment), special_tokens=True)
        self.embodiments[name] = embodiment

    def to_dict(self) -> dict:
        """What `save_pretrained` writes: robots in their JSON form."""
        embodiments = {name: embodiment.to_dict() for name, embodiment in self.embodiments.items()}
        values = {**super().to_dict(), "embodiments": embodiments, "prompt_format": self.prompt_format.to_dict()}
        if self.action_codec is not None:
            values["action_codec"] = {"fingerprint": self.action_codec.fingerprint()}
        return values

    def get_embodiment(self, name: str | None = None) -> Embodiment:
        """The `Embodiment` called `name`; without a name the only one there is."""
        if name is None and len(self.embodiments) == 1:
            return next(iter(self.embodiments.values()))
        if name not in self.embodiments:
            known = ", ".join(self.embodiments) or "none"
            raise ValueError(
                f"Found embodiment {name!r}. Known: {known}. Pass one of these, or call "
                f"`processor.add_embodiment` first."
            )
        return self.embodiments[name]

    # ---- samples to batches -------------------------------------------------------------------------------------

    def __call__(
        self,
        images: dict | list | ImageLike | None = None,
        instruction: str | list[str] | None = None,
        state: ArrayLike | None = None,
        embodiment: str | list[str] | None = None,
        actions: ArrayLike | None = None,
        action_is_pad: ArrayLike | None = None,
        text: str | list[str] | None = None,
        answer: str | list[str] | None = None,
        return_tensors: str = "pt",
        max_length: int | None = None,
    ) -> BatchFeature:
        """Encode one sample, or a batch if `instruction` or `text` is a list (then every argument is one, too).

        Args:
            images: for a robot {camera: image}, for `text` a list of images (or one image). An image is a PIL image or
                a uint8 array (h, w, 3).
            instruction (`str`): the task; makes an action sample.
            state: robot state (S,) in robot units. `None` leaves the proprioception out of the prompt.
            embodiment (`str`): the robot's name; not needed if there is only one. One name may serve a whole batch.
            actions: demonstrated chunk (steps, D_robot) in robot units, for training.
            action_is_pad: bool (steps,), True where the chunk runs past the end of the episode.
            text (`str`): the question; makes a multimodal sample.
            answer (`str`): the answer, for training.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            max_length (`int`, *optional*): as in `encode`.
        Returns:
            `BatchFeature`, see `encode`.
        """
        if (instruction is None) == (text is None):
            found = "neither" if text is None else "both"
            raise ValueError(
                f"Found {found} of `instruction` and `text`. Pass `instruction` for actions, `text` for text."
            )
        action_only = {"state": state, "embodiment": embodiment, "actions": actions, "action_is_pad": action_is_pad}
        if text is None:
            columns, foreign = {"images": images, "instruction": instruction, **action_only}, {"answer": answer}
        else:
            columns, foreign = {"images": images, "text": text, "answer": answer}, action_only
        foreign = [name for name, value in foreign.items() if value is not None]
        if foreign:
            raise ValueError(
                f"Found {', '.join(foreign)} beside `{'instruction' if text is None else 'text'}`, where it has no "
                f"meaning. Leave it out."
            )
        columns = {name: value for name, value in columns.items() if value is not None}
        if isinstance(text if instruction is None else instruction, str):
            if text is not None and isinstance(images, (Image.Image, np.ndarray)):
                columns["images"] = [images]
            return self.encode([columns], return_tensors, max_length)
        size = len(text if instruction is None else instruction)
        if isinstance(embodiment, str):
            columns["embodiment"] = [embodiment] * size
        wrong = [f"{name} {len(column)}" for name, column in columns.items() if len(column) != size]
        if wrong:
            raise ValueError(
                f"Found {', '.join(wrong)} for a batch of {size}. Every argument needs one entry per sample."
            )
        samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return self.encode(samples, return_tensors, max_length)

    def encode(
        self, samples: list[dict], return_tensors: str = "pt", max_length: int | None = None, patches: bool = True
    ) -> BatchFeature:
        """Batch of samples, for training and for inference.

        Args:
            samples (`list[dict]`): action samples (`images`, `instruction`, `state`, `embodiment`, and for training
                `actions`, `action_is_pad`) and multimodal samples (`images`, `text`, and for training `answer`), in
                any mixture. Other keys are ignored, but for those of training's augmentations: `state_is_dropped`
                leaves the state out of the prompt, `state_noise` (K or more numbers) is added to the normalised state
                in the prompt, while relative actions are measured from `state`; `dropped_cameras` are left out.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            max_length (`int`, *optional*): overrides the processor's `max_length`.
            patches (`bool`): False leaves `pixel_values` out, for whoever makes them on a device.
        Returns:
            `BatchFeature` with
            - **input_ids**, **attention_mask**, **mm_token_type_ids** (B, S) int64, padded on the left, or rows of one
              layout (`PromptFormat.num_views`).
            - **pixel_values** (patches, channels * temporal * patch^2) float32 and **image_grid_thw** (images, 3)
              int64, if there are images, sample by sample. Square images: (images, 3, side, side), and no grid.
            - **labels** (B, S) int64, if a sample has an answer: the answer and its end of turn, -100 elsewhere; with
              an action codec also the discrete tokens of the actions.
            - **action_mask** (B, H, D) bool and **domain_ids** (B,) int64, if there is an action sample: the steps and
              channels that mean something. False for multimodal samples.
            - **action_padding** (B, D) float32, beside `action_mask`: the normalised value of channels that the robot
              lacks; the model starts and ends its path there.
            - **states** (B, state_dim) float32 and **state_mask** (B, state_dim) bool, if the state is projected or
              for the expert: 0 and False for samples without one.
            - **actions** (B, H, D) float32, if the samples have actions: normalised, 0 where masked.
        Raises:
            ValueError: what was found, which rule it breaks and what to do, for every input that does not fit.
        """
        if not samples:
            raise ValueError("Found no samples. A batch needs at least one.")
        groups = self._group_by_embodiment(samples)
        images = [self.ordered_images(sample, index) for index, sample in enumerate(samples)]
        frames = [self.as_array(image) for image in chain.from_iterable(images)]
        counts, layout = self._images.layout([self.resized_size(frame.shape[1::-1]) for frame in frames])
        values = {} if self.proprioception == "none" else state_values(samples, groups, self.state_dim)
        prompts = [self._prompt(sample, values.get(index)) for index, sample in enumerate(samples)]
        answers = [sample.get("answer") if "text" in sample else None for sample in samples]
        actions = action_arrays(samples, groups, self.action_horizon, self.action_dim) if groups else {}
        # Only in training, where the chunk is known: inference stops at the assistant's turn
        discrete = (
            self._action_token_rows(samples, groups, actions)
            if self._action_tokens is not None and "actions" in actions
            else {}
        )
        longest = self.max_length if max_length is None else max_length
        rows, learned = self._rows(samples, prompts, answers, discrete)
        data = token_arrays(
            rows,
            learned,
            [len(row) for row in images],
            counts,
            self.tokenizer,
            self.prompt_format.image_token,
            longest,
        )
        if frames:
            data.update(layout)
        if frames and patches:
            data["pixel_values"] = self._images.pixels([self._resized(frame) for frame in frames])
        data.update(actions)
        if groups and self.proprioception in ("projected", "expert"):
            data.update(state_arrays(len(samples), values, groups, self.state_dim))
        return BatchFeature(data, tensor_type=return_tensors)

    def _group_by_embodiment(self, samples: list[dict]) -> list[tuple[Embodiment, list[int]]]:
        """[(embodiment, indices of its samples)]: what is computed per robot is computed for many samples at once."""
        groups = {}
        for index, sample in enumerate(samples):
            if ("text" in sample) == ("instruction" in sample):
                raise ValueError(
                    f"Found keys {', '.join(sample)} in sample {index}. An action sample has `instruction`, a "
                    f"multimodal sample `text`; exactly one of them tells which it is."
                )
            if "instruction" in sample:
                groups.setdefault(sample.get("embodiment"), []).append(index)
        return [(self.get_embodiment(name), indices) for name, indices in groups.items()]

    def ordered_images(self, sample: dict, index: int) -> list[ImageLike]:
        """Images of a sample in the order of its prompt."""
        images = sample.get("images")
        if "text" in sample:
            return list(images) if images is not None else []
        embodiment = self._robot(sample)
        if images is not None and not isinstance(images, dict):
            raise ValueError(
                f"Found images of type {type(images).__name__} in sample {index}. A robot's images are given by "
                f"camera: {{{next(iter(embodiment.cameras), 'camera')!r}: image, ...}}."
            )
        given = {short_camera_key(key): image for key, image in (images or {}).items()}
        cameras = self._cameras(sample)
        missing = [key for key in cameras if short_camera_key(key) not in given]
        if missing:
            raise ValueError(
                f"Found images of {', '.join(images or {}) or 'no camera'} in sample {index}, missing "
                f"{', '.join(missing)}. The embodiment was trained with {', '.join(embodiment.cameras)}; pass all of "
                f"them (the short form, such as {short_camera_key(missing[0])!r}, is enough)."
            )
        return [given[short_camera_key(key)] for key in cameras]

    def _cameras(self, sample: dict) -> dict[str, str]:
        """{dataset key: spoken label} of the cameras in a sample's prompt: its robot's, but for dropped ones."""
        cameras = self._robot(sample).cameras
        dropped = {short_camera_key(key) for key in sample.get("dropped_cameras", ())}
        kept = {key: label for key, label in cameras.items() if short_camera_key(key) not in dropped}
        if cameras and len(kept) < self.prompt_format.fewest_views:
            raise ValueError(
                f"Found dropped_cameras {', '.join(sorted(dropped))}: {len(kept) or 'no'} camera is left. Keep at "
                f"least {self.prompt_format.fewest_views}."
            )
        return kept

    def _robot(self, sample: dict) -> Embodiment:
        return self.get_embodiment(sample.get("embodiment"))

    # ---- images -------------------------------------------------------------------------------------------------

    as_array = staticmethod(as_array)

    @property
    def pixel_table(self) -> np.ndarray:
        """Colour normalisation for every uint8 value: float32 (channels, 256)."""
        return self._images.pixel_table

    def resized_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Size (width, height) at which the model sees an image of `image_size` (width, height), in pixels."""
        return self._images.final_size(self.longest_side_size(image_size))

    def longest_side_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The longer side at `longest_side`, aspect kept: `resized_size` before the sides are whole patches."""
        return longest_side_size(image_size, self.longest_side)

    def _resized(self, frame: np.ndarray) -> np.ndarray:
        """Frame (h, w, 3) uint8 at the size at which the model sees it."""
        # Two steps, as the published checkpoints were trained: first the longer side, then whole patches.
        longer, final = self.longest_side_size(frame.shape[1::-1]), self.resized_size(frame.shape[1::-1])
        return resize(resize(frame, longer, Image.Resampling.BICUBIC), final, self.image_processor.resample)

    # ---- text ---------------------------------------------------------------------------------------------------

    def _prompt(self, sample: dict, state: np.ndarray | None) -> str:
        """Prompt of a sample, with one image token per image that is inside it."""
        if "text" in sample:
            images = sample.get("images")
            return self.prompt_format.write_text(
                self.text_system_prompt, 0 if images is None else len(images), sample["text"]
            )
        numbers = None
        if state is not None and self.proprioception == "text":
            numbers = list(np.digitize(np.clip(state, -1, 1), self._bin_edges) - 1)
        elif state is not None and self.proprioception == "projected":
            numbers = [STATE_TOKEN]
        robot, labels = self._robot(sample), list(self._cameras(sample).values())
        return self.prompt_format.write_action(robot, labels, sample["instruction"], numbers)

    def _rows(
        self, samples: list[dict], prompts: list[str], answers: list, discrete: dict[int, list[int]]
    ) -> tuple[list[list[int]], list[list[bool]] | None]:
        """Tokens of each sample and which of them are learned; an image is one token, a view without one NO_IMAGE.

        After the prompt follow the answer, or the discrete action tokens by sample; without any, nothing is learned.
        """
        # Answers are tokenised on their own, because `generate` continues a prompt that was tokenised without them.
        answered = [index for index, answer in enumerate(answers) if answer is not None]
        texts = [f"{answers[index]}{self.prompt_format.end_token}\n" for index in answered]
        special = self.prompt_format.special_tokens
        rows = self.tokenizer(prompts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        if self.prompt_format.num_views:
            rows = [self._row_of_views(samples[index], row, index) for index, row in enumerate(rows)]
        learned = [[False] * len(row) for row in rows]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for index, answer in zip(answered, ids, strict=True):
            end = len(answer) - answer[::-1].index(self.end_token_id)  # the newline after it belongs to the next turn
            rows[index] = rows[index] + answer
            learned[index] += [True] * end + [False] * (len(answer) - end)
        for index, tokens in discrete.items():
            rows[index] = rows[index] + tokens
            learned[index] += [token != self.end_token_id for token in tokens]
        return rows, learned if answered or discrete else None

    def _row_of_views(self, sample: dict, language: list[int], index: int) -> list[int]:
        """[first view, language at its fixed length, the other views], each view one token; see `PromptFormat`."""
        length = self.prompt_format.language_length
        if len(language) > length:
            raise ValueError(
                f"Found {len(language)} tokens of language in sample {index}, the prompt format has room for "
                f"{length}. Cutting would change the task: shorten the instruction."
            )
        kept = self._cameras(sample)
        views = [self.image_token_id if key in kept else NO_IMAGE for key in self._robot(sample).cameras]
        if views[0] == NO_IMAGE:
            raise ValueError(
                f"Found dropped_cameras in sample {index} with {next(iter(self._robot(sample).cameras))}, the main "
                f"view, which is read together with the language. Keep it (`drop_cameras(always_keep=...)`)."
            )
        views += [NO_IMAGE] * (self.prompt_format.num_views - len(views))
        padding = [self.tokenizer.pad_token_id] * (length - len(language))
        return [views[0], *language, *padding, *views[1:]]

    # ---- actions ------------------------------------------------------------------------------------------------

    def decode_actions(
        self, chunk: torch.Tensor | np.ndarray, state: ArrayLike | None = None, embodiment: str | None = None
    ) -> np.ndarray:
        """Action chunks of the model in the units of the robot: the inverse of what `encode` does to `actions`.

        Args:
            chunk (`torch.Tensor` or `np.ndarray`): normalised actions (H, D) or (B, H, D) of `sample_actions`.
            state: robot state (S,) or (B, S) for which the chunk was predicted; may be `None` if the embodiment's
                reference frame is absolute.
            embodiment (`str`): name of the robot; may be left out if there is only one.
        Returns:
            `np.ndarray`: float64 (H_emb, D_robot) or (B, H_emb, D_robot).
        Raises:
            ValueError: a wrong shape, or a NaN or infinity, which must not reach a robot.
        """
        robot = self.get_embodiment(embodiment)
        if isinstance(chunk, torch.Tensor):
            chunk = chunk.detach().float().cpu().numpy()
        chunk = np.asarray(chunk, dtype=np.float64)
        if chunk.ndim not in (2, 3) or chunk.shape[-1] != self.action_dim or chunk.shape[-2] < robot.action_horizon:
            raise ValueError(
                f"Found an action chunk of shape {chunk.shape}. It is (H, D) or (B, H, D) with D {self.action_dim} "
                f"and at least the embodiment's {robot.action_horizon} steps; pass what `sample_actions` returned."
            )
        values = chunk[..., : robot.action_horizon, :][..., robot.action_channels]
        if not np.isfinite(values).all():
            step, channel = np.argwhere(~np.isfinite(values))[0][-2:]
            raise ValueError(
                f"Found a non-finite number at step {step}, model channel {robot.action_channels[channel]}. It must "
                f"not reach a robot. Check the model's weights and dtype."
            )
        if state is not None:
            state = np.asarray(state, dtype=np.float64)
            if chunk.ndim == 3 and state.ndim == 1:
                state = np.broadcast_to(state, (len(chunk), len(state)))
            if state.shape[:-1] != chunk.shape[:-2]:
                raise ValueError(
                    f"Found a state of shape {state.shape} for an action chunk of shape {chunk.shape}. Pass one "
                    f"state, or one per chunk."
                )
        return robot.decode_actions(values, state)

    # ---- grounding ----------------------------------------------------------------------------------------------

    def parse_grounding(
        self, text: str, image_size: tuple[int, int]
    ) -> tuple[list[tuple[float, float]], list[tuple[float, float, float, float]]]:
        """Points and boxes of a generated text, in pixels of the original image.

        Args:
            text (`str`): with `<point>[x, y]</point>` and `<box>[x1, y1, x2, y2]</box>`, in pixels of the image as
                the model saw it (`resized_size`). Anything else is skipped, and so are boxes with swapped corners.
            image_size: (width, height) of the original image, `image.size` of a PIL image.
        Returns:
            `points` [(x, y)] and `boxes` [(x1, y1, x2, y2)]: lists of tuples of floats, clamped to the image.
        """
        points, boxes = find_elements(text)
        resized = self.resized_size(image_size)
        points = [to_original(point, resized, image_size) for point in points]
        boxes = [to_original(box, resized, image_size) for box in boxes]
        return points, [box for box in boxes if box[0] <= box[2] and box[1] <= box[3]]

    def grounding_prompt(self, kind: str, subject: str) -> str:
        """The question of a kind ("point", "box", ...; see `PROMPTS`) about a subject, as it was asked in training."""
        return grounding_prompt(kind, subject)

    def parse_answer(self, text: str, kind: str, image_size: tuple[int, int]) -> GroundingAnswer:
        """Reads the answer to a question of a kind: coordinates, progress, refusal, and what is wrong with it.

        Args:
            text (`str`): what the model answered; special tokens may still be in it.
            kind (`str`): of the question.
            image_size: (width, height) of the original image.
        """
        text = text.split(self.prompt_format.end_token)[0].strip()
        return read_answer(kind, text, *self.parse_grounding(text, image_size))

    def answer_constraint(self, kind: str, image_sizes: list[tuple[int, int]]) -> CoordinateConstraint:
        """For `generate(logits_processor=[...])`: only well-formed coordinates inside the image can be generated.

        Args:
            kind (`str`): a kind of question whose answer is coordinates.
            image_sizes: (width, height) of the original image of each prompt.
        Raises:
            ValueError: an answer of this kind has no coordinates.
        """
        if kind not in FORMS:
            raise ValueError(f"Found the kind {kind!r}, whose answers are words. Constrain one of {', '.join(FORMS)}.")
        if self._answer_tokens is None:
            self._answer_tokens = answer_tokens(self.tokenizer, self.end_token_id)
        sizes = [self.resized_size(size) for size in image_sizes]
        return CoordinateConstraint(self.tokenizer, FORMS[kind], sizes, self.end_token_id, self._answer_tokens)

    def format_point(self, point: Sequence[float], image_size: tuple[int, int]) -> str:
        """Inverse of `parse_grounding` for a point (x, y) in pixels of the original image; rounds to whole pixels."""
        return f"<point>{to_resized(point, self.resized_size(image_size), image_size)}</point>"

    def format_box(self, box: Sequence[float], image_size: tuple[int, int]) -> str:
        """Inverse of `parse_grounding` for a box (x1, y1, x2, y2) in pixels of the original image."""
        return f"<box>{to_resized(box, self.resized_size(image_size), image_size)}</box>"

    def format_points(self, points: Sequence[Sequence[float]], image_size: tuple[int, int]) -> str:
        """Several points, or a trajectory in the order of time: one `<point>` after the other."""
        return "".join(self.format_point(point, image_size) for point in points)

    def format_boxes(self, boxes: Sequence[Sequence[float]], image_size: tuple[int, int]) -> str:
        """Several boxes, one after the other."""
        return "".join(self.format_box(box, image_size) for box in boxes)


def _check_fingerprints(found: str | None, trained: str | None, ours: str, theirs: str) -> None:
    """Tokens mean what their codec says: another codec's are noise to the model."""
    if found != trained:
        raise ValueError(
            f"Found action codec {found} in the {ours} and {trained} in the {theirs}. A codec and a model that were "
            f"not trained together do not understand each other: use the pair that was saved together."
        )


# Lets `save_pretrained` copy this file and its siblings beside the weights; registers nothing in the process.
WallVLAProcessor.register_for_auto_class("AutoProcessor")
