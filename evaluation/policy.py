"""What acts: a checkpoint from the Hub layout, two baselines, and two controls that take information away.

An observation is what `environments.Environment.observe` returns:
`{"images": {camera: uint8 (h, w, 3)}, "state": float32 (S,)}`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from .environments import Environment
from .metaworld import MetaWorldEnv
from .remote import RemotePolicy


class Policy(Protocol):
    """Anything that turns an observation and an instruction into a chunk of actions.

    `cameras` names the cameras that the policy looks at: nothing else is rendered for it.
    """

    cameras: Sequence[str]

    def reset(self, seed: int = 0) -> None:
        """Starts an episode. Everything random in it must follow from `seed`."""

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The next actions, float (H, D) in robot units, in the order of execution."""


class PolicyError(ValueError):
    """A policy returned something that is not a chunk of actions."""


def check_chunk(chunk: np.ndarray, action_dim: int) -> np.ndarray:
    """Returns `chunk` as float64 (H, action_dim).

    Raises:
        PolicyError: wrong shape, no step, or values that are not finite; the message says which.
    """
    chunk = np.asarray(chunk, dtype=np.float64)
    if chunk.ndim != 2 or chunk.shape[0] == 0 or chunk.shape[1] != action_dim:
        raise PolicyError(
            f"The policy returned actions of shape {chunk.shape}; this robot takes (steps, {action_dim}) with at "
            "least one step. Check the embodiment's action layout."
        )
    if not np.isfinite(chunk).all():
        step, dimension = np.argwhere(~np.isfinite(chunk))[0]
        raise PolicyError(
            f"The policy returned {chunk[step, dimension]} at step {step}, dimension {dimension} of its chunk; "
            "actions must be finite. Check the checkpoint and its normalisation statistics."
        )
    return chunk


class HubPolicy:
    """A model and its processor behind the `Policy` protocol.

    Args:
        model: has `sample_actions(**inputs, noise, num_inference_steps) -> (1, H, D)`, normalised.
        processor: a `WallVLAProcessor` or the same calls.
        embodiment: key of `processor.embodiments`.
        num_inference_steps: integration steps; None takes the checkpoint's own.
        seed: with the episode's seed and the number of the call it fixes the noise, so that the same episode gives the
            same actions in any process and any order.
        discrete: act by the discrete action tokens, `model.generate_action_tokens`, instead of the flow.
        temperature: scale of the noise that the flow starts from; 1 is how it was trained, 0 always the same action.

    Raises:
        ValueError: the processor does not know the embodiment.
    """

    def __init__(
        self,
        model,
        processor,
        embodiment: str,
        num_inference_steps: int | None = None,
        seed: int = 0,
        discrete: bool = False,
        temperature: float = 1.0,
    ):
        if embodiment not in processor.embodiments:
            known = ", ".join(sorted(processor.embodiments)) or "none"
            raise ValueError(f"Unknown embodiment {embodiment!r}: the checkpoint was trained with {known}.")
        self.model = model.eval()
        self.processor = processor
        self.embodiment = embodiment
        self.num_inference_steps = num_inference_steps
        self.seed = seed
        self.discrete = discrete
        self.temperature = temperature
        # Dataset keys like "observation.images.front" name the camera in their last part.
        self.cameras = tuple(key.rsplit(".", 1)[-1] for key in processor.embodiments[embodiment].cameras)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        embodiment: str,
        device: str = "cpu",
        num_inference_steps: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        dtype: str = "float32",
        discrete: bool = False,
        temperature: float = 1.0,
    ) -> "HubPolicy":
        """Loads `path` (a folder or a Hub repository) by the Auto classes.

        Without `trust_remote_code` the installed classes must be registered: `wallvla.register_auto_classes()`.
        """
        from transformers import AutoModel, AutoProcessor  # seconds to import, and baselines do not need it

        model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        return cls(model.to(device), processor, embodiment, num_inference_steps, seed, discrete, temperature)

    def reset(self, seed: int = 0) -> None:
        """Starts the episode `seed`."""
        self._episode_seed = seed
        self._calls = 0

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """Samples one chunk: float32 (H, D) in robot units."""
        import torch

        inputs = self.processor(
            images={camera: observation["images"][camera] for camera in self.cameras},
            instruction=instruction,
            state=observation["state"],
            embodiment=self.embodiment,
            return_tensors="pt",
        ).to(self.model.device)
        if self.discrete:
            of_flow = ("action_mask", "action_padding", "domain_ids")
            prompt = {name: values for name, values in inputs.items() if name not in of_flow}
            tokens = self.model.generate_action_tokens(**prompt)
            actions = self.processor.decode_action_tokens(tokens, observation["state"], self.embodiment)
            return np.asarray(actions[0], dtype=np.float32)
        noise = self.temperature * torch.randn(inputs["action_mask"].shape, generator=self._generator())
        self._calls += 1
        with torch.no_grad():
            chunk = self.model.sample_actions(
                **inputs, noise=noise.to(self.model.device), num_inference_steps=self.num_inference_steps
            )
        actions = self.processor.decode_actions(chunk, state=observation["state"], embodiment=self.embodiment)
        actions = np.asarray(actions, dtype=np.float32)
        return actions[0] if actions.ndim == 3 else actions

    def _generator(self):
        import torch

        sequence = np.random.SeedSequence([self.seed, self._episode_seed, self._calls])
        return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


class ScriptedExpert:
    """The simulator's own expert, which sees the true object poses: an upper bound."""

    cameras = ()

    def __init__(self, env: MetaWorldEnv) -> None:
        self._env = env

    def reset(self, seed: int = 0) -> None:
        """Nothing to start: the simulator makes a new expert at each reset."""

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The expert's next action, float32 (1, 4)."""
        return self._env.expert_action()[None]


class RandomPolicy:
    """Uniform actions, each held for a while so that the hand does get somewhere: a lower bound."""

    cameras = ()

    def __init__(
        self,
        low: Sequence[float] = (-1.0,) * 4,
        high: Sequence[float] = (1.0,) * 4,
        hold_steps: int = 8,
        seed: int = 0,
    ) -> None:
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.hold_steps = hold_steps
        self.seed = seed
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Starts the episode `seed`."""
        self._rng = np.random.default_rng([self.seed, seed])

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """One random action between the bounds, repeated: float64 (hold_steps, action_dim)."""
        return np.repeat(self._rng.uniform(self.low, self.high)[None], self.hold_steps, axis=0)


class BlankedImages:
    """A policy that is shown each image as its own mean gray: what it still solves, it solves blind."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.cameras = policy.cameras

    def reset(self, seed: int = 0) -> None:
        """Starts the episode of the inner policy."""
        self._policy.reset(seed)

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The inner policy's chunk for the blank images."""
        blank = {
            camera: np.full_like(image, round(float(image.mean()))) for camera, image in observation["images"].items()
        }
        return self._policy.act({**observation, "images": blank}, instruction)


class SwappedInstruction:
    """A policy that is told something else: one instruction for all, or a table from the true one to the told one.

    Raises:
        ValueError: at `act`, when the table does not have the instruction.
    """

    def __init__(self, policy: Policy, instruction: str | Mapping[str, str]) -> None:
        self._policy = policy
        self._instruction = instruction
        self.cameras = policy.cameras

    def reset(self, seed: int = 0) -> None:
        """Starts the episode of the inner policy."""
        self._policy.reset(seed)

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The inner policy's chunk for the other instruction."""
        told = self._instruction
        if not isinstance(told, str):
            if instruction not in told:
                raise ValueError(f"No other instruction is given for {instruction!r}; the table has {sorted(told)}.")
            told = told[instruction]
        return self._policy.act(observation, told)


@functools.lru_cache(maxsize=4)
def _load_hub_policy(arguments: str) -> HubPolicy:
    return HubPolicy.from_pretrained(**json.loads(arguments))


@functools.lru_cache(maxsize=4)
def _connect_policy(address: str) -> RemotePolicy:
    return RemotePolicy(address)


def build_policy(spec: Mapping, env: Environment, trust_remote_code: bool = False) -> Policy:
    """Makes a policy from plain data. A checkpoint is loaded once per process.

    Args:
        spec: one of
            `{"kind": "expert"}` (Meta-World only),
            `{"kind": "random", "seed"?}`,
            `{"kind": "hub", "path", "embodiment", "device"?, "num_inference_steps"?, "seed"?, "dtype"?, "discrete"?,
                "temperature"?}`,
            `{"kind": "remote", "address": "host:port"}` (a policy server of `remote.py`), and optional
            controls in any of them: `"blank_images": true`, `"instruction": str or {true: told}`.
        env: the simulator of the episode (the expert looks into it).
        trust_remote_code: whether a checkpoint's own Python files may run.

    Raises:
        ValueError: unknown kind, or an expert where there is none.
        TypeError: an option that the kind does not have.
        WireError: no policy server answers.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    blank_images = options.pop("blank_images", False)
    instruction = options.pop("instruction", None)
    if kind == "expert":
        if not isinstance(env, MetaWorldEnv):
            raise ValueError("Only Meta-World has scripted experts: leave the policy of kind 'expert' out.")
        policy = ScriptedExpert(env, **options)
    elif kind == "random":
        policy = RandomPolicy(env.action_low, env.action_high, **options)
    elif kind == "remote":
        policy = _connect_policy(**options)
    elif kind == "hub":
        policy = _load_hub_policy(json.dumps({**options, "trust_remote_code": trust_remote_code}, sort_keys=True))
    else:
        raise ValueError(f"Unknown policy kind {kind!r}: use 'hub', 'remote', 'expert' or 'random'.")
    if blank_images:
        policy = BlankedImages(policy)
    if instruction is not None:
        policy = SwappedInstruction(policy, instruction)
    return policy
