"""Rule-based action codecs behind the interface of `WallVLAActionCodec`: FAST (arXiv 2501.09747) and plain binning.

Both are data rather than networks: one JSON file each. They read a chunk's valid channels only, and hold the last
valid step over padded ones. The state and the embodiment, which the learned codec needs, are accepted and not used.

Shapes: B samples, H action steps, D action channels, K channels that the robot has.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, trainers
from torch import Tensor
from transformers.utils import cached_file

from .action_codec_wallvla import WallVLAActionCodec, dct_matrix


FIRST_CHARACTER = 0x4E00  # coefficients become characters of a large block of assigned code points
MOST_CHARACTERS = 20_000


def held_chunks(actions: Tensor, action_mask: Tensor | None) -> list[np.ndarray]:
    """The K valid channels of each chunk, float64 (H, K), with padded steps set to the last valid one.

    Raises:
        ValueError: NaN or infinity among the valid elements, a chunk without one, or a gap among the valid steps.
    """
    if actions.dim() != 3 or 0 in actions.shape:
        raise ValueError(f"Found actions of shape {tuple(actions.shape)}. They are (B, H, D), none of them 0.")
    values = actions.detach().cpu().double().numpy()
    mask = np.ones(values.shape, dtype=bool) if action_mask is None else action_mask.cpu().numpy()
    if mask.shape != values.shape:
        raise ValueError(f"Found action_mask of shape {mask.shape} for actions of shape {values.shape}.")
    chunks = []
    for row, (chunk, valid) in enumerate(zip(values, mask, strict=True)):
        steps = np.flatnonzero(valid.any(axis=1))
        if not len(steps) or steps[-1] != len(steps) - 1:
            raise ValueError(f"Found valid steps {steps.tolist()} in chunk {row}. A chunk starts with at least one.")
        chunk = chunk[:, valid.any(axis=0)]
        if not np.isfinite(chunk[: len(steps)]).all():
            where = np.argwhere(~np.isfinite(chunk[: len(steps)]))[0].tolist()
            raise ValueError(f"Found a non-finite number in actions at {[row, *where]}. It has no token.")
        chunks.append(chunk[np.minimum(np.arange(len(chunk)), len(steps) - 1)])
    return chunks


def spread(chunks: list[np.ndarray], channel_mask: Tensor | None, action_dim: int) -> Tensor:
    """Chunks (H, K) -> (B, H, D) float32, 0 in the channels that the robot lacks; mask (D,) or (B, D) bool."""
    if channel_mask is None:
        channel_mask = torch.ones(action_dim, dtype=torch.bool)
    masks = channel_mask.expand(len(chunks), action_dim).cpu().numpy()
    actions = np.zeros((len(chunks), len(chunks[0]), action_dim), dtype=np.float32)
    for row, chunk in enumerate(chunks):
        actions[row][:, masks[row]] = chunk
    return torch.from_numpy(actions)


class JsonCodec:
    """What both share: a dictionary that is all there is to save, and its fingerprint."""

    values: dict
    num_levels = 1

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the meaning of the tokens."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, which is the whole codec."""
        os.makedirs(folder, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.values, sort_keys=True) + "\n")

    def channels(self, channel_mask: Tensor | None, row: int) -> int:
        """How many channels the robot of a row has."""
        if channel_mask is None:
            return self.values["action_dim"]
        return int(channel_mask.expand(row + 1, self.values["action_dim"])[row].sum())


class BinningActionCodec(JsonCodec):
    """One token per step and channel: which of `num_bins` equal bins of [-1, 1] it lies in (RT-2, OpenVLA)."""

    model_type = "wallvla_binning_codec"

    def __init__(self, action_dim: int = 26, num_bins: int = 256):
        self.values = {"model_type": self.model_type, "action_dim": action_dim, "num_bins": num_bins}

    @property
    def vocabulary_size(self) -> int:
        """The bins."""
        return self.values["num_bins"]

    def tokens_per_chunk(self, horizon: int, num_channels: int) -> int:
        """H * K."""
        return horizon * num_channels

    def encode(
        self,
        actions: Tensor,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
    ) -> Tensor:
        """As `WallVLAActionCodec.encode`: (B, H * K) int64, step by step; -1 behind chunks with fewer channels."""
        bins = self.vocabulary_size
        rows = [
            np.clip(np.floor((chunk + 1) / 2 * bins), 0, bins - 1).astype(np.int64).flatten()
            for chunk in held_chunks(actions, action_mask)
        ]
        return padded_ids(rows).to(actions.device)

    def decode(
        self,
        ids: Tensor,
        state: Tensor | None = None,
        horizon: int = 32,
        channel_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
    ) -> Tensor:
        """The middle of each bin, (B, H, D) float32; see `WallVLAActionCodec.decode`."""
        chunks = []
        for row, line in enumerate(ids.cpu().numpy()):
            line = line[line >= 0]
            channels = self.channels(channel_mask, row)
            if len(line) != horizon * channels or (line >= self.vocabulary_size).any():
                raise ValueError(
                    f"Found {len(line)} ids up to {line.max(initial=-1)} in chunk {row}; {horizon} steps of "
                    f"{channels} channels are {horizon * channels} ids below {self.vocabulary_size}."
                )
            chunks.append(((line + 0.5) / self.vocabulary_size * 2 - 1).reshape(horizon, channels))
        return spread(chunks, channel_mask, self.values["action_dim"]).to(ids.device)


class FASTActionCodec(JsonCodec):
    """FAST: DCT along time, scale and round, low frequencies first, byte-pair encoding of the coefficients.

    Args:
        action_dim: channels D.
        scale: coefficients are multiplied by it and rounded: larger is finer and longer.
        lowest, highest: range of the rounded coefficients; others are clipped to it.
        tokenizer: JSON of the byte-pair encoding, a `tokenizers.Tokenizer`.
    """

    model_type = "wallvla_fast_codec"

    def __init__(self, action_dim: int, scale: float, lowest: int, highest: int, tokenizer: str):
        self.values = {
            "model_type": self.model_type,
            "action_dim": action_dim,
            "scale": scale,
            "lowest": lowest,
            "highest": highest,
            "tokenizer": tokenizer,
        }
        self._tokenizer = Tokenizer.from_str(tokenizer)

    @classmethod
    def fit(
        cls, actions: Tensor, action_mask: Tensor | None = None, *, scale: float = 10.0, vocabulary_size: int = 1024
    ) -> "FASTActionCodec":
        """Learns the byte-pair encoding from chunks (B, H, D).

        Raises:
            ValueError: the vocabulary is smaller than the range of the coefficients.
        """
        rounded = [cls._coefficients(chunk, scale) for chunk in held_chunks(actions, action_mask)]
        lowest, highest = min(row.min() for row in rounded), max(row.max() for row in rounded)
        letters = highest - lowest + 1
        if letters > min(vocabulary_size, MOST_CHARACTERS):
            raise ValueError(
                f"At scale {scale} the coefficients take {letters} values, more than the vocabulary's "
                f"{vocabulary_size} tokens. Lower the scale, or raise vocabulary_size."
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(FIRST_CHARACTER + i) for i in range(letters)],
            max_token_length=10_000,
        )
        tokenizer.train_from_iterator((cls._text(row, lowest) for row in rounded), trainer=trainer)
        return cls(actions.shape[2], scale, int(lowest), int(highest), tokenizer.to_str())

    @classmethod
    def fit_to_rate(
        cls, actions: Tensor, action_mask: Tensor | None, tokens_per_chunk: float, vocabulary_size: int = 1024
    ) -> "FASTActionCodec":
        """As `fit`, at the scale whose chunks have `tokens_per_chunk` tokens on average: to 2%, or nearly."""
        low, high = 0.25, 400.0
        for _ in range(14):
            scale = (low * high) ** 0.5
            try:
                codec = cls.fit(actions, action_mask, scale=scale, vocabulary_size=vocabulary_size)
            except ValueError:  # the coefficients do not fit the vocabulary
                high = scale
                continue
            found = (codec.encode(actions, None, action_mask) >= 0).sum().item() / len(actions)
            if abs(found / tokens_per_chunk - 1) < 0.02:
                break
            low, high = (scale, high) if found < tokens_per_chunk else (low, scale)
        return codec

    @staticmethod
    def _coefficients(chunk: np.ndarray, scale: float) -> np.ndarray:
        """A chunk (H, K) -> rounded coefficients (H * K,) int64, all channels of the lowest frequency first."""
        spectrum = dct_matrix(len(chunk)).double().numpy() @ np.clip(chunk, -1e6, 1e6)
        return np.rint(spectrum * scale).astype(np.int64).flatten()

    @staticmethod
    def _text(coefficients: np.ndarray, lowest: int) -> str:
        return "".join(chr(FIRST_CHARACTER + int(value) - lowest) for value in coefficients)

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the byte-pair encoding."""
        return self._tokenizer.get_vocab_size()

    def tokens_per_chunk(self, horizon: int, num_channels: int) -> None:
        """`None`: the number depends on the motion."""
        return None

    def encode(
        self,
        actions: Tensor,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
    ) -> Tensor:
        """As `WallVLAActionCodec.encode`: (B, longest) int64, -1 behind shorter chunks."""
        values = self.values
        texts = [
            self._text(
                np.clip(self._coefficients(chunk, values["scale"]), values["lowest"], values["highest"]),
                values["lowest"],
            )
            for chunk in held_chunks(actions, action_mask)
        ]
        return padded_ids([np.array(line.ids) for line in self._tokenizer.encode_batch(texts)]).to(actions.device)

    def decode(
        self,
        ids: Tensor,
        state: Tensor | None = None,
        horizon: int = 32,
        channel_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, H, D) float32; see `WallVLAActionCodec.decode`. Raises ValueError unless all coefficients are there."""
        inverse = dct_matrix(horizon).double().numpy().T
        chunks = []
        for row, line in enumerate(ids.cpu().tolist()):
            line = [each for each in line if each != -1]
            channels = self.channels(channel_mask, row)
            wrong = [each for each in line if not 0 <= each < self.vocabulary_size]
            text = "" if wrong else self._tokenizer.decode(line)
            if wrong or len(text) != horizon * channels:
                raise ValueError(
                    f"Found {len(text)} coefficients in chunk {row} and ids {wrong} outside the vocabulary of "
                    f"{self.vocabulary_size}; {horizon} steps of {channels} channels have {horizon * channels}."
                )
            codes = np.array([ord(letter) - FIRST_CHARACTER for letter in text]) + self.values["lowest"]
            chunks.append(inverse @ (codes.reshape(horizon, channels) / self.values["scale"]))
        return spread(chunks, channel_mask, self.values["action_dim"]).to(ids.device)


def padded_ids(rows: list[np.ndarray]) -> Tensor:
    """Rows of ids (n,) -> (B, longest) int64, -1 behind the shorter ones."""
    ids = torch.full((len(rows), max(map(len, rows))), -1)
    for row, line in enumerate(rows):
        ids[row, : len(line)] = torch.from_numpy(line)
    return ids


ActionCodec = WallVLAActionCodec | FASTActionCodec | BinningActionCodec


def load_action_codec(path: str | Path, subfolder: str = "", hub: dict | None = None) -> ActionCodec:
    """The codec of a folder or Hub repository, whichever of the three it is.

    Args:
        path: folder, or id on the Hub.
        subfolder: where in it.
        hub: where and how the Hub is asked: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        OSError: there is no codec.
        ValueError: one of an unknown kind.
    """
    values = json.loads(Path(cached_file(path, "config.json", subfolder=subfolder, **(hub or {}))).read_text())
    kind = values.pop("model_type", None)
    if kind == "wallvla_action_codec":
        return WallVLAActionCodec.from_pretrained(path, subfolder=subfolder, **(hub or {})).eval()
    for codec in (FASTActionCodec, BinningActionCodec):
        if kind == codec.model_type:
            return codec(**values)
    raise ValueError(
        f"{path} holds a codec of kind {kind!r}. Known: wallvla_action_codec, {FASTActionCodec.model_type}, "
        f"{BinningActionCodec.model_type}."
    )


__all__ = ["ActionCodec", "BinningActionCodec", "FASTActionCodec", "load_action_codec"]
