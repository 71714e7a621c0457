"""A codec's discrete action tokens inside the vocabulary of a tokenizer.

Shapes: B samples, H action steps and D action channels of the model, S state channels of the codec.
"""

from collections.abc import Iterable

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .action_space_wallvla import Embodiment, stack_vectors
from .baseline_codecs_wallvla import ActionCodec


ACTION_TOKEN = "<|action_token_{}|>"


class ActionTokens:
    """Chunks of normalised actions to token ids and back.

    Args:
        codec: chunks to numbers from 0 and back.
        tokenizer: the codec's tokens are added to it where they are missing.
    Raises:
        ValueError: the tokenizer has the action tokens of another codec.
    """

    def __init__(self, codec: ActionCodec, tokenizer: PreTrainedTokenizerBase):
        names = [ACTION_TOKEN.format(index) for index in range(codec.vocabulary_size)]
        vocabulary = tokenizer.get_vocab()
        if names[0] not in vocabulary:
            tokenizer.add_tokens(names, special_tokens=True)
            vocabulary = tokenizer.get_vocab()
        start = vocabulary[names[0]]
        found = [vocabulary.get(name) for name in names]
        beyond = ACTION_TOKEN.format(len(names))
        if found != list(range(start, start + len(names))) or beyond in vocabulary:
            count = sum(name.startswith("<|action_token_") for name in vocabulary)
            raise ValueError(
                f"Found {count} action tokens in the tokenizer; the codec needs {len(names)} with consecutive ids. "
                f"Use the tokenizer that was saved with this codec, or one without action tokens."
            )
        self.codec, self.start_id = codec, start

    def config(self, robots: Iterable[Embodiment]) -> dict:
        """The fields of `WallVLAConfig` that say which discrete action tokens a model of these robots has."""
        codec = self.codec
        lengths = {codec.tokens_per_chunk(robot.action_horizon, robot.action_channels.size) for robot in robots}
        return {
            "action_token_start_id": self.start_id,
            "num_action_tokens": codec.vocabulary_size,
            "action_token_levels": codec.num_levels,
            "action_tokens_per_chunk": lengths.pop() if len(lengths) == 1 else None,
            "action_codec_fingerprint": codec.fingerprint(),
        }

    def encode(self, actions: np.ndarray, mask: np.ndarray, states: list, robot: Embodiment) -> list[list[int]]:
        """Token ids of normalised chunks (B, H, D) of one robot; `mask` (B, H, D) bool, `states` in its own units."""
        ids = self.codec.encode(
            torch.from_numpy(actions),
            self._states(states, robot),
            torch.from_numpy(mask),
            torch.full((len(actions),), robot.domain),
        )
        return [[self.start_id + each for each in line if each >= 0] for line in ids.tolist()]

    def decode(self, ids: torch.Tensor, states: list, robot: Embodiment, action_dim: int) -> torch.Tensor:
        """Inverse of `encode`: ids (B, n), of all levels or of the first ones, to normalised chunks (B, H, D)."""
        batch = ids - self.start_id
        wrong = batch[(batch < 0) | (batch >= self.codec.vocabulary_size)]
        if len(wrong):
            raise ValueError(
                f"Found token id {int(wrong[0]) + self.start_id}, which is no action token: those are "
                f"[{self.start_id}, {self.start_id + self.codec.vocabulary_size}). Pass what "
                f"`generate_action_tokens` returned."
            )
        return self.codec.decode(
            batch,
            self._states(states, robot),
            robot.action_horizon,
            torch.from_numpy(robot.channel_mask(action_dim)),
            torch.full((len(batch),), robot.domain),
        )

    def _states(self, states: list, robot: Embodiment) -> torch.Tensor | None:
        """Normalised states at their channels, (B, S) float32, 0 without one; `None` for codecs that need none."""
        if not isinstance(self.codec, torch.nn.Module):
            return None
        padded = np.zeros((len(states), self.codec.config.state_dim), dtype=np.float32)
        given = [row for row, state in enumerate(states) if state is not None]
        if given and robot.state_channels.size:
            values = robot.encode_state(stack_vectors([states[row] for row in given], given, "state", 1))
            padded[np.ix_(given, robot.state_channels)] = values
        return torch.from_numpy(padded)
