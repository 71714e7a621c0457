"""Open loop: predicted against demonstrated chunks on episodes that were not trained on, in physical units.

    report = open_loop_report(policy, demonstrations, ACTION_NAMES)
    print(format_open_loop(report["metrics"], ACTION_UNITS))
    print(format_probes(report["probes"]))

`open_loop_report` asks for errors by dimension, horizon step, phase and noise seed, and probes what the policy looks
at: the same observations with one thing taken away or exchanged, the same noise, how much do the actions change?
A low error says little by itself (demonstrations are smooth, so copying the last action is accurate); the closed loop
decides.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .demonstrations import Demonstration
from .policy import Policy


def open_loop_metrics(
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    is_pad: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> dict:
    """Errors of N chunks of H steps and D dimensions.

    Args:
        predicted, demonstrated: (N, H, D) in robot units.
        is_pad: bool (N, H), True where the demonstration had already ended; those steps count nowhere.
        names: of the D dimensions, by default their numbers.

    Returns:
        `mae`, `rmse`: {name: error in the unit of that dimension};
        `mae_by_step`: {name: list of H errors}, None at steps that no chunk has;
        `chunks`, `steps`: how many were compared.

    Raises:
        ValueError: shapes that do not agree, nothing to compare, or predictions that are not finite.
    """
    predicted, demonstrated = np.asarray(predicted, np.float64), np.asarray(demonstrated, np.float64)
    if predicted.ndim != 3 or predicted.shape != demonstrated.shape:
        raise ValueError(f"Expected two arrays (N, H, D), got {predicted.shape} and {demonstrated.shape}.")
    valid = np.ones(predicted.shape[:2], bool) if is_pad is None else ~np.asarray(is_pad, bool)
    if valid.shape != predicted.shape[:2]:
        raise ValueError(f"is_pad has shape {valid.shape}, but the chunks have {predicted.shape[:2]} (chunks, steps).")
    if not valid.any():
        raise ValueError("There is no step to compare: all are padding.")
    if not np.isfinite(predicted[valid]).all():
        raise ValueError("The predicted actions hold values that are not finite.")
    names = [str(index) for index in range(predicted.shape[2])] if names is None else list(names)
    error = np.where(valid[..., None], predicted - demonstrated, 0.0)
    count, count_by_step = valid.sum(), valid.sum(axis=0)
    absolute_by_step = np.abs(error).sum(axis=0)  # (H, D)
    mae = absolute_by_step.sum(axis=0) / count
    rmse = np.sqrt((error**2).sum(axis=(0, 1)) / count)
    return {
        "chunks": len(predicted),
        "steps": int(count),
        "mae": dict(zip(names, mae.tolist(), strict=True)),
        "rmse": dict(zip(names, rmse.tolist(), strict=True)),
        "mae_by_step": {
            name: [float(total / n) if n else None for total, n in zip(column, count_by_step, strict=True)]
            for name, column in zip(names, absolute_by_step.T, strict=True)
        },
    }


def predict_demonstration(
    policy: Policy, demonstration: Demonstration, every: int = 8, seed: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lets a policy predict along a demonstration without ever acting.

    Args:
        policy: what predicts.
        demonstration: a recorded episode of T steps.
        every: steps between two predictions.
        seed: of the policy's noise; None takes the demonstration's.

    Returns:
        `starts` (N,), `predicted` (N, H, D), `demonstrated` (N, H, D), `is_pad` (N, H). Steps after the end of the
        demonstration repeat its last action and are padding.
    """
    policy.reset(demonstration.seed if seed is None else seed)
    length = len(demonstration.actions)
    starts = np.arange(0, length, every)
    predicted = []
    for start in starts:
        images = {camera: demonstration.frames[camera][start] for camera in policy.cameras}
        observation = {"images": images, "state": demonstration.states[start]}
        predicted.append(policy.act(observation, demonstration.instruction))
    predicted = np.stack(predicted)
    steps = starts[:, None] + np.arange(predicted.shape[1])
    return starts, predicted, demonstration.actions[np.minimum(steps, length - 1)], steps >= length


def format_open_loop(metrics: dict, units: Sequence[str]) -> str:
    """The errors as an aligned table; `units` in the order of the dimensions."""
    lines = [f"{'dimension':<12}{'MAE':>10}{'RMSE':>10}  unit"]
    for (name, mae), unit in zip(metrics["mae"].items(), units, strict=True):
        lines.append(f"{name:<12}{mae:>10.4f}{metrics['rmse'][name]:>10.4f}  {unit}")
    return "\n".join(lines)


# --- what it depends on


PHASES = ("first third", "second third", "last third")


def open_loop_report(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    names: Sequence[str] | None = None,
    every: int = 8,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict:
    """Errors along demonstrations, and how they depend on horizon, phase, noise and inputs.

    Args:
        policy: what predicts; its noise has to follow from `reset(seed)`.
        demonstrations: recorded episodes that were not trained on; at least two, so that something can be exchanged.
        names: of the action dimensions.
        every: steps between two predictions.
        seeds: of the noise; at least two.

    Returns:
        `metrics`: of the first seed, see `open_loop_metrics`;
        `by_phase`: {phase: metrics} over thirds of the demonstrations;
        `by_seed`: {seed: {name: MAE}};
        `noise_spread`: {name: mean standard deviation between seeds}, in the dimension's unit;
        `noise_spread_by_step`: {name: list of H};
        `probes`: see `probe_inputs`.

    Raises:
        ValueError: too few demonstrations or seeds.
    """
    if len(demonstrations) < 2 or len(seeds) < 2:
        raise ValueError(
            f"The probes exchange things between demonstrations and compare seeds: at least two of each are needed, "
            f"got {len(demonstrations)} demonstrations and {len(seeds)} seeds."
        )
    by_seed = [_predict_all(policy, demonstrations, every, seed) for seed in seeds]
    predicted, demonstrated, is_pad, phases = by_seed[0]
    names = [str(index) for index in range(predicted.shape[2])] if names is None else list(names)
    chunks = np.stack([prediction for prediction, *_ in by_seed])  # (seeds, N, H, D)
    deviation = np.where(is_pad[..., None], np.nan, chunks.std(axis=0, ddof=1))
    return {
        "metrics": open_loop_metrics(predicted, demonstrated, is_pad, names),
        "by_phase": {
            name: open_loop_metrics(
                predicted[phases == number], demonstrated[phases == number], is_pad[phases == number], names
            )
            for number, name in enumerate(PHASES)
            if (phases == number).any()
        },
        "by_seed": {
            str(seed): open_loop_metrics(prediction, demonstrated, is_pad, names)["mae"]
            for seed, (prediction, *_) in zip(seeds, by_seed, strict=True)
        },
        "noise_spread": dict(zip(names, np.nanmean(deviation, axis=(0, 1)).tolist(), strict=True)),
        "noise_spread_by_step": dict(zip(names, np.nanmean(deviation, axis=0).T.tolist(), strict=True)),
        "probes": probe_inputs(policy, demonstrations, names, every, seeds[0], np.nanmean(deviation, axis=(0, 1))),
    }


def probe_inputs(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    names: Sequence[str],
    every: int,
    seed: int,
    noise_spread: np.ndarray,
) -> dict[str, dict]:
    """How the predictions change when one input is taken away or exchanged, at the same noise.

    Probes: `blank images` (each its own mean gray), `shuffled images` (frames of other moments of the demonstrations),
    `swapped cameras` (each shows the next one's picture; with at least two of one size), `swapped instruction` (of
    another demonstration; when there are two), `zero state`, `shuffled state`.

    Args:
        policy, demonstrations, names, every, seed: as of `open_loop_report`.
        noise_spread: (D,) what other noise changes: the measure for "nothing".

    Returns:
        {probe: `change` {name: mean absolute change}, `mae` {name: error}, `ratio` (largest change in units of the
        noise spread), `used` (ratio above 1)}. A probe that is not `used` changed less than other noise does: the
        policy all but ignores that input here.
    """
    clean, demonstrated, is_pad, _ = _predict_all(policy, demonstrations, every, seed)
    results = {}
    for probe, change in _probes(policy, demonstrations).items():
        altered, *_ = _predict_all(policy, [change(item) for item in demonstrations], every, seed)
        difference = np.abs(altered - clean)[~is_pad].mean(axis=0)
        # Where noise changes nothing at all, any change counts; a millionth keeps the ratio finite
        ratio = float((difference / np.maximum(noise_spread, 1e-6)).max())
        results[probe] = {
            "change": dict(zip(names, difference.tolist(), strict=True)),
            "mae": open_loop_metrics(altered, demonstrated, is_pad, names)["mae"],
            "ratio": ratio,
            "used": ratio > 1,
        }
    return results


def _probes(
    policy: Policy, demonstrations: Sequence[Demonstration]
) -> dict[str, Callable[[Demonstration], Demonstration]]:
    """Name -> a function that alters a demonstration."""
    rng = np.random.default_rng(0)
    instructions = list(dict.fromkeys(item.instruction for item in demonstrations))
    pool = {camera: np.concatenate([item.frames[camera] for item in demonstrations]) for camera in policy.cameras}
    states = np.concatenate([item.states for item in demonstrations])

    def blank(item: Demonstration) -> Demonstration:
        frames = {}
        for camera, images in item.frames.items():
            gray = images.mean(axis=(1, 2, 3), keepdims=True).round().astype(np.uint8)
            frames[camera] = np.broadcast_to(gray, images.shape)
        return dataclasses.replace(item, frames=frames)

    def shuffled_images(item: Demonstration) -> Demonstration:
        picks = rng.integers(len(states), size=len(item.states))  # one moment for all cameras
        return dataclasses.replace(item, frames={camera: images[picks] for camera, images in pool.items()})

    def swapped_cameras(item: Demonstration) -> Demonstration:
        order = list(policy.cameras)
        turned = dict(zip(order, order[1:] + order[:1], strict=True))
        return dataclasses.replace(item, frames={camera: item.frames[other] for camera, other in turned.items()})

    def swapped_instruction(item: Demonstration) -> Demonstration:
        place = instructions.index(item.instruction)
        return dataclasses.replace(item, instruction=instructions[(place + 1) % len(instructions)])

    def shuffled_state(item: Demonstration) -> Demonstration:
        return dataclasses.replace(item, states=states[rng.integers(len(states), size=len(item.states))])

    probes: dict[str, Callable[[Demonstration], Demonstration]] = {}
    if policy.cameras:
        probes |= {"blank images": blank, "shuffled images": shuffled_images}
    if len({images.shape[1:] for images in pool.values()}) == 1 and len(pool) > 1:
        probes["swapped cameras"] = swapped_cameras
    if len(instructions) > 1:
        probes["swapped instruction"] = swapped_instruction
    probes["zero state"] = lambda item: dataclasses.replace(item, states=np.zeros_like(item.states))
    probes["shuffled state"] = shuffled_state
    return probes


def _predict_all(
    policy: Policy, demonstrations: Sequence[Demonstration], every: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, targets, padding and phase (0, 1, 2) of all chunks of all demonstrations."""
    parts = []
    for number, item in enumerate(demonstrations):
        starts, predicted, demonstrated, is_pad = predict_demonstration(policy, item, every, seed * 1000 + number)
        parts.append((predicted, demonstrated, is_pad, 3 * starts // len(item.actions)))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def format_probes(probes: dict[str, dict]) -> str:
    """The probes as an aligned table: change of the actions against that by other noise."""
    lines = [f"{'probe':<22}{'change / noise':>15}  used"]
    for name, entry in probes.items():
        lines.append(f"{name:<22}{entry['ratio']:>15.2f}  {'yes' if entry['used'] else 'no'}")
    return "\n".join(lines)
