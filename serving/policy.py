"""A checkpoint as a server runs it: many requests in one call, each with its own noise, guidance and outcome.

Shapes: H action steps and D channels of the model, H_emb steps and D_robot channels of the robot.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..flow_matching_wallvla import identity_guidance, number_of_steps, prefix_guidance, prefix_weights, vjp_guidance
from ..inference import WallVLAEngine
from .observations import ObservationAdapter, RequestError
from .safety import SafetyLimits, SafetyRails, SafetyStop


GUIDANCES = {"identity": identity_guidance, "vjp": vjp_guidance, "prefix": prefix_guidance}


@dataclass(frozen=True)
class PolicyRequest:
    """One question to a policy.

    observation: of `ObservationAdapter.read`.
    seed, call: with the policy's own seed they fix the noise.
    guidance: one of GUIDANCES or None; `previous` (n, D_robot) are the actions that the robot still has for now and
        the steps after, of which it will have executed `delay` when the answer comes.
    """

    observation: dict
    seed: int = 0
    call: int = 0
    guidance: str | None = None
    previous: np.ndarray | None = None
    delay: int = 0


class ServedPolicy:
    """A model and its processor, for one robot.

    Args:
        model: a `WallVLAForConditionalGeneration`, or the same `sample_actions`.
        processor: its `WallVLAProcessor`.
        embodiment: key of `processor.embodiments`; None if there is only one.
        num_inference_steps: integration steps; None takes the checkpoint's own.
        seed: with a request's `seed` and `call` it fixes the noise, as in `evaluation.policy.HubPolicy`.
        client_keys: replaces the embodiment's own.
        default_instruction: the task of clients that send none.
        limits: safety rails; None for none.
        engine: an `inference.WallVLAEngine` of this model, processor and number of steps, which then answers every
            request but those with guidance "vjp".

    Raises:
        ValueError: unknown embodiment, limits of another width, or fewer than one step.
    """

    def __init__(
        self,
        model,
        processor,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        client_keys: list | None = None,
        default_instruction: str | None = None,
        limits: SafetyLimits | None = None,
        engine: WallVLAEngine | None = None,
    ) -> None:
        robot = processor.get_embodiment(embodiment)
        if client_keys is not None:
            robot = replace(robot, client_keys=client_keys)
        self.model, self.processor, self.robot = model.eval(), processor, robot
        self.embodiment = embodiment or next(iter(processor.embodiments))
        self.num_inference_steps = number_of_steps(num_inference_steps, model.config.num_inference_steps)
        self.seed = seed
        self.engine = engine
        self.limits = limits
        self.action_dim = robot.action_width
        self._state_statistics = None if robot.statistics is None else robot.statistics.get("state")
        if limits is not None:
            limits.check_width(self.action_dim)
        self.adapter = ObservationAdapter(robot, default_instruction)

    @property
    def metadata(self) -> dict:
        """What a client is told when it connects: plain numbers, strings and lists."""
        return {
            "embodiment": self.embodiment,
            "action_horizon": self.robot.action_horizon,
            "action_dim": self.action_dim,
            "control_frequency": self.robot.control_frequency,
            "observation_keys": [list(pair) for pair in self.robot.observation_keys],
            "state_layout": [list(part) for part in self.robot.state_layout],
            "action_layout": [list(part) for part in self.robot.action_layout],
            "guidances": list(GUIDANCES),
            "num_inference_steps": self.num_inference_steps,
        }

    def make_rails(self) -> SafetyRails | None:
        """The rails of one session, None without limits."""
        if self.limits is None:
            return None
        return SafetyRails(self.limits, self.robot.control_frequency, self._state_statistics)

    def check(self, request: PolicyRequest, rails: SafetyRails | None) -> None:
        """Everything about a request that can be wrong before the model runs.

        Raises:
            RequestError: what was found and which rule it breaks; "safety_stop" if the rails refuse the state.
        """
        for name in ("seed", "call", "delay"):
            value = vars(request)[name]
            if type(value) is not int or not 0 <= value < 2**63:
                raise RequestError(f"Found {str(value)[:60]} as {name}. It is an integer from 0.")
        if request.guidance is not None:
            self._check_guidance(request)
        if rails is not None:
            state = request.observation["state"]
            seen = None
            if self._state_statistics is not None and len(state):
                seen = self.robot.transform_state(state)
            try:
                rails.check_state(state, seen)
            except SafetyStop as stop:
                raise RequestError(str(stop), "safety_stop") from stop

    def _check_guidance(self, request: PolicyRequest) -> None:
        if request.guidance not in GUIDANCES:
            raise RequestError(f"Found guidance {str(request.guidance)[:60]!r}. Known: {', '.join(GUIDANCES)}.")
        previous, horizon = request.previous, self.robot.action_horizon
        if (
            not isinstance(previous, np.ndarray)
            or previous.dtype.kind != "f"
            or previous.ndim != 2
            or previous.shape[1] != self.action_dim
            or not 1 <= len(previous) <= horizon
            or not np.isfinite(previous).all()
        ):
            raise RequestError(
                f"Guidance {request.guidance!r} needs `previous`: finite floats (n, {self.action_dim}), the actions "
                f"that the robot still has, n from 1 to {horizon}."
            )
        if request.delay > len(previous):
            raise RequestError(
                f"Found delay {request.delay} with {len(previous)} previous actions; it is at most that."
            )

    def infer(self, requests: list[PolicyRequest]) -> list[np.ndarray | RequestError]:
        """One answer for each request: float32 (H_emb, D_robot) in robot units, or the reason why there is none.

        All requests of a call must have the same `guidance`. An answer does not depend on the others in the call
        beyond the rounding of float32.
        """
        samples = [{**request.observation, "embodiment": self.embodiment} for request in requests]
        shape = torch.Size((self.processor.action_horizon, self.processor.action_dim))
        noise = torch.stack([self._noise(request, shape) for request in requests]).to(self.model.device)
        try:
            guidance = self._guidance(requests, shape) if requests[0].guidance is not None else None
            if self.engine is not None and requests[0].guidance != "vjp":  # which needs a backward pass
                chunks = self.engine.sample_actions(samples, noise, guidance=guidance)
            else:
                inputs = self.processor.encode(samples).to(self.model.device)
                chunks = self.model.sample_actions(
                    **inputs, noise=noise, num_inference_steps=self.num_inference_steps, guidance=guidance
                )
        except ValueError as error:
            if len(requests) == 1:
                return [RequestError(str(error))]
            return [self.infer([request])[0] for request in requests]  # so that one cannot spoil the others
        return [self._decode(chunk, request) for chunk, request in zip(chunks, requests, strict=True)]

    def _noise(self, request: PolicyRequest, shape: torch.Size) -> torch.Tensor:
        """(H, D) of the request alone: whoever else is in the batch, the numbers are the same."""
        sequence = np.random.SeedSequence([self.seed, request.seed, request.call])
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return torch.randn((1, *shape), generator=generator)[0]

    def _guidance(self, requests: list[PolicyRequest], shape: torch.Size) -> partial:
        target = np.zeros((len(requests), *shape), dtype=np.float32)
        if self.robot.action_padding:  # where the flow of channels that the robot lacks ends anyway
            target[:] = self.robot.action_padding
        for row, request in zip(target, requests, strict=True):
            values = self.robot.encode_actions(request.previous, request.observation["state"])
            row[: len(values), self.robot.action_channels] = values
        delays = torch.tensor([request.delay for request in requests])
        ends = torch.tensor([len(request.previous) for request in requests])
        device = self.model.device
        bound = {
            "target": torch.from_numpy(target).to(device),
            "weights": prefix_weights(delays, ends, shape[0]).to(device),
        }
        name = requests[0].guidance
        if name != "prefix":
            bound["limit"] = float(self.num_inference_steps)  # what one Euler step can correct at most
        return partial(GUIDANCES[name], **bound)

    def _decode(self, chunk: torch.Tensor, request: PolicyRequest) -> np.ndarray | RequestError:
        state = request.observation["state"] if self.robot.state_layout else None
        try:
            actions = self.processor.decode_actions(chunk, state=state, embodiment=self.embodiment)
        except ValueError as error:  # a number that is not finite
            return RequestError(str(error), "safety_stop")
        return np.asarray(actions, dtype=np.float32)

    def warm_up(self, batch_sizes: tuple[int, ...] = (1,), image_size: tuple[int, int] = (224, 224)) -> None:
        """Runs the model once for each batch size, on gray images (width, height), so that the first robot need not
        wait for it."""
        state = np.ones(self.robot.state_width, dtype=np.float32)  # a valid rotation in every format, unlike zeros
        image = np.full((*reversed(image_size), 3), 127, dtype=np.uint8)
        observation = {
            "images": dict.fromkeys(self.robot.cameras, image),
            "state": state,
            "instruction": "warm up",
        }
        for size in batch_sizes:
            for outcome in self.infer([PolicyRequest(observation)] * size):
                if isinstance(outcome, RequestError):
                    raise outcome


def load_policy(
    path: str,
    embodiment: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    num_inference_steps: int | None = None,
    seed: int = 0,
    client_keys: list | None = None,
    default_instruction: str | None = None,
    limits: SafetyLimits | None = None,
    use_engine: bool = False,
    fp8: bool = False,
) -> ServedPolicy:
    """A `ServedPolicy` of a folder or a Hub repository, loaded by the Auto classes.

    `use_engine` answers by the inference engine, `fp8` with its products in e4m3.
    Without `trust_remote_code` the installed classes must be registered: `wallvla.register_auto_classes()`.
    """
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    if fp8 and not use_engine:
        raise ValueError("Found fp8 without the engine, which has those products. Add --engine.")
    engine = WallVLAEngine(model, processor, num_inference_steps, fp8=fp8) if use_engine else None
    return ServedPolicy(
        model, processor, embodiment, num_inference_steps, seed, client_keys, default_instruction, limits, engine
    )
