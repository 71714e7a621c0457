"""Statistics: the sketch keeps its bound, threads change nothing, the cache knows what it depends on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallvla.action_space_wallvla import Embodiment
from wallvla.data import statistics as module
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.statistics import QuantileSketch, compute_statistics


settings.register_profile("wallvla", max_examples=60, deadline=None)
settings.load_profile("wallvla")

LAYOUT = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("stats") / "d"
    rng = np.random.default_rng(0)
    features = {name: {"dtype": "float32", "shape": (7,)} for name in ("observation.state", "action")}
    with LeRobotWriter(root, fps=10, features=features) as writer:
        for length in (40, 7, 90, 1, 25):
            path = np.cumsum(rng.normal(size=(length, 7)) * 0.05, axis=0)
            for step in range(length):
                writer.add_frame({"observation.state": path[step], "action": path[step] + 0.01})
            writer.save_episode("wave")
    return root


def robot(frame="world_relative", **changes) -> Embodiment:
    values = {
        "cameras": [["front", "front"]],
        "control_frequency": 10,
        "action_horizon": 6,
        "state_layout": LAYOUT,
        "action_layout": LAYOUT,
        "reference_frame": frame,
    }
    return Embodiment.from_dict(values | changes)


def read(root, **options) -> LeRobotDataset:
    return LeRobotDataset(root, **({"embodiment": "r", "action_horizon": 6} | options))


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.integers(2, 4000), st.floats(0, 1))
def test_sketch_keeps_its_bound(seed, scale, count, share):
    rng = np.random.default_rng(seed)
    values = (
        np.stack([rng.normal(size=count), rng.lognormal(size=count), -rng.exponential(size=count)], axis=1) * scale
    )
    parts = [QuantileSketch(3), QuantileSketch(3)]
    for number, part in enumerate(np.array_split(values, 5)):
        parts[number % 2].add(part)
    parts[1].merge(parts[0])
    found = parts[1].quantile(share)
    low, high = (np.quantile(values, share, axis=0, method=method) for method in ("lower", "higher"))
    slack = 1.0001e-3
    assert (found >= low - np.abs(low) * slack - 1e-7).all() and (found <= high + np.abs(high) * slack + 1e-7).all()


def test_sketch_of_zeros_and_outliers():
    sketch = QuantileSketch(1)
    sketch.add(np.array([[0.0], [1e-9], [0.0], [1e30]]))
    assert sketch.quantile(0.5)[0] == 0 and sketch.quantile(1.0)[0] > 9e5


@pytest.mark.parametrize("frame", ["absolute", "world_relative", "eef_delta"])
def test_sketched_statistics_are_close_to_exact_ones(root, frame):
    dataset = read(root)
    exact = compute_statistics(dataset, robot(frame), progress=False, exact=True)
    sketched = compute_statistics(dataset, robot(frame), progress=False, exact=False)
    for kind in ("state", "action"):
        spread = np.subtract(exact[kind]["q99"], exact[kind]["q01"])
        for name in ("q01", "q99"):
            error = np.abs(np.subtract(sketched[kind][name], exact[kind][name]))
            assert (error <= 0.05 * spread + 2e-3 * np.abs(exact[kind][name])).all()
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(sketched[kind][name], exact[kind][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_threads_and_order_change_nothing(root, exact):
    dataset, shuffled = read(root), read(root, episodes=[3, 0, 4, 2, 1])
    first = compute_statistics(dataset, robot(), progress=False, exact=exact, num_threads=1)
    assert compute_statistics(dataset, robot(), progress=False, exact=exact, num_threads=3) == first
    other = compute_statistics(shuffled, robot(), progress=False, exact=exact)
    for kind in first:
        for name in first[kind]:
            np.testing.assert_allclose(other[kind][name], first[kind][name], rtol=1e-9, atol=1e-12)


def test_large_data_is_sketched_by_itself(root, monkeypatch):
    dataset = read(root)
    exact = compute_statistics(dataset, robot(), progress=False)
    assert exact == compute_statistics(dataset, robot(), progress=False, exact=True)
    monkeypatch.setattr(module, "EXACT_BYTES", 1000)
    assert compute_statistics(dataset, robot(), progress=False) == compute_statistics(
        dataset, robot(), progress=False, exact=False
    )


def test_cache_is_found_again_and_knows_what_it_depends_on(root, tmp_path):
    cache = tmp_path / "cache"
    first = compute_statistics(read(root), robot(), progress=False, cache=cache)
    (file,) = cache.iterdir()
    file.write_text(json.dumps({"from": "cache"}))
    again = compute_statistics(read(root), robot(prompt="Another one."), progress=False, cache=cache)
    assert again == {"from": "cache"}  # the prompt is not what the numbers depend on
    for dataset, embodiment in (
        (read(root, episodes=[0, 1, 2]), robot()),
        (read(root), robot("absolute")),
        (read(root), robot(state_gripper_range=[0, 2])),
        (read(root, action_times_s=np.arange(6) * 0.2), robot()),
    ):
        assert compute_statistics(dataset, embodiment, progress=False, cache=cache) != {"from": "cache"}
    changed = read(root)
    changed.states[3, 0] += 1e-3
    assert compute_statistics(changed, robot(), progress=False, cache=cache) != {"from": "cache"}
    assert len(list(cache.iterdir())) == 6 and first.keys() == {"state", "action"}
