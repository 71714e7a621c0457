"""The wire format against openpi's own rules, the client's logic of time, and the safety rails."""

import io
import json
import logging
import math
import struct
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import wallvla
from wallvla.action_space_wallvla import Embodiment
from wallvla.serving import wire
from wallvla.serving.chunking import ActionQueue, DelayEstimator, OverlappingScheduler, SynchronousScheduler
from wallvla.serving.observations import ObservationAdapter, RequestError
from wallvla.serving.safety import SafetyLimits, SafetyRails, SafetyStop


ROOT = Path(wallvla.__file__).parent


# The wire


def openpi_default(value):
    """What openpi's packer makes of arrays and numpy scalars, from its published format."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


arrays = st.sampled_from(["uint8", "int32", "int64", "float32", "float64", "bool"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@settings(max_examples=60, deadline=None)
@given(arrays)
def test_round_trip_and_openpis_bytes(array):
    message = {"a": array, "b": [1, 2.5, None, "text", b"bytes"], "c": {"d": np.float32(1.5)}}
    assert wire.pack(message) == msgpack.packb(message, default=openpi_default)
    loaded = wire.unpack(wire.pack(message))
    np.testing.assert_array_equal(loaded["a"], array)
    assert loaded["a"].dtype == array.dtype and loaded["a"].shape == array.shape
    assert loaded["b"] == message["b"] and loaded["c"]["d"] == np.float32(1.5)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_message_or_a_wire_error(data):
    try:
        wire.unpack(data)
    except wire.WireError as error:
        assert str(error)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_messages_are_a_message_or_a_wire_error(data):
    """Starts from a real observation, so the damage gets past the first byte."""
    observation = {"image": np.zeros((4, 4, 3), np.uint8), "state": np.ones(4, np.float32), "prompt": "press"}
    frame = bytearray(wire.pack(observation))
    for _ in range(data.draw(st.integers(1, 6))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.unpack(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    except wire.WireError as error:
        assert str(error)


def ndarray(data=b"", dtype="<f4", shape=(0,)):
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


def nested(depth):
    return b"\x91" * depth + b"\x90"


BAD_FRAMES = {
    "empty": (b"", "not msgpack"),
    "cut off": (wire.pack({"a": np.zeros(3)})[:-1], "not msgpack"),
    "two messages": (wire.pack(1) + wire.pack(2), "not msgpack"),
    "list of four billion entries": (b"\xdd\xff\xff\xff\xff", "not msgpack"),
    "map of four billion entries": (b"\xdf\xff\xff\xff\xff", "not msgpack"),
    "string of four gigabytes": (b"\xdb\xff\xff\xff\xff", "not msgpack"),
    "nested a million times": (nested(1_000_000), "lists and maps|not msgpack"),
    "a thousand lists": (msgpack.packb([[]] * 1000), "more than 512 lists"),
    "a long list": (msgpack.packb([0] * 2000), "not msgpack"),
    "extension type": (msgpack.packb(msgpack.ExtType(4, b"x")), "extension type"),
    "number as key": (msgpack.packb({1: 2}), "not msgpack"),
    "bytes as key": (msgpack.packb({b"x": 2}), "key of a map"),
    "object array": (ndarray(b"x" * 8, "|O", [1]), "dtype '|O'"),
    "structured array": (ndarray(b"x" * 8, "|V8", [1]), "dtype '|V8'"),
    "complex array": (ndarray(b"x" * 8, "<c8", [1]), "dtype '<c8'"),
    "array of strings": (ndarray(b"x" * 8, "<U2", [1]), "dtype '<U2'"),
    "dtype as a list": (ndarray(b"x" * 8, ["<f4"], [2]), "dtype"),
    "negative shape": (ndarray(b"x" * 8, "<f4", [-1, -2]), "must agree"),
    "shape that overflows": (ndarray(b"", "<f4", [2**32, 2**32]), "must agree"),
    "huge shape with a zero": (ndarray(b"", "<f4", [2**62, 0, 2**62]), "larger than any frame"),
    "shape of floats": (ndarray(b"x" * 8, "<f4", [2.0]), "as the shape"),
    "five dimensions": (ndarray(b"", "<f4", [1, 1, 1, 1, 0]), "at most 4"),
    "too few bytes": (ndarray(b"x" * 7, "<f4", [2]), "must agree"),
    "text as data": (ndarray("x" * 8, "<f4", [2]), "It is its bytes"),
    "scalar of bytes": (msgpack.packb({b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"}), "value of a number"),
    "scalar out of range": (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not fit"),
    "too large": (b"\x00" * (wire.MAX_FRAME + 1), "the limit is"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_are_refused_with_the_reason(name):
    frame, reason = BAD_FRAMES[name]
    with pytest.raises(wire.WireError, match=reason):
        wire.unpack(frame)


@pytest.mark.parametrize("value", [np.array([object()]), np.array([1j]), object(), {1, 2}, np.zeros(2, "V4")])
def test_what_cannot_be_sent_is_an_error(value):
    with pytest.raises(wire.WireError, match="cannot send"):
        wire.pack({"a": value})


def test_client_needs_neither_torch_nor_transformers(tmp_path):
    """In a process in which they, and all else that a robot's environment lacks, cannot be imported."""
    (tmp_path / "wallvla").symlink_to(ROOT, target_is_directory=True)
    blocked = ["torch", "transformers", "PIL", "pandas", "pyarrow", "av", "huggingface_hub", "datasets"]
    code = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
sys.path.insert(0, {str(tmp_path)!r})
import wallvla.serving.client, wallvla.serving.chunking, wallvla.serving.safety
ours = {{name.split(".")[0] for name, module in sys.modules.items() if module}} - set(sys.stdlib_module_names)
print(*sorted(name for name in ours if not name.startswith("_")))
"""
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"wallvla", "numpy", "msgpack", "websockets", "cython_runtime"}


# Observations


ROBOT = {
    "cameras": [["observation.images.front", "front view"], ["observation.images.wrist", "wrist view"]],
    "control_frequency": 20,
    "action_horizon": 4,
    "state_layout": [["native", 3]],
    "action_layout": [["native", 2]],
}
OPENPI_KEYS = [
    ["observation/image", "observation.images.front"],
    ["images/cam_wrist", "observation.images.wrist"],
    ["observation/joint_position", "state"],
    ["observation/gripper_position", "state"],
    ["prompt", "instruction"],
]


def jpeg(width=20, height=10, quality=95):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def jpeg_that_claims(width, height):
    """A small JPEG whose header says that the picture is large."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def openpi_message(**changes):
    message = {
        "observation/image": np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3),
        "images": {"cam_wrist": jpeg()},
        "observation/joint_position": np.array([0.5, 1.5]),
        "observation/gripper_position": np.float32(0.25),
        "prompt": "fold the towel",
    }
    return message | changes


def test_client_keys_survive_json_and_are_checked():
    robot = Embodiment.from_dict(ROBOT | {"client_keys": OPENPI_KEYS})
    loaded = Embodiment.from_dict(json.loads(json.dumps(robot.to_dict(), sort_keys=True)))
    assert loaded == robot and [list(pair) for pair in loaded.observation_keys] == OPENPI_KEYS
    usual = Embodiment.from_dict(ROBOT).observation_keys
    assert [key for key, _ in usual] == [
        "observation.images.front", "observation.images.wrist", "observation.state", "prompt",
    ]  # fmt: skip
    for keys, reason in [
        (OPENPI_KEYS[1:], "without observation.images.front"),
        (OPENPI_KEYS[:2] + OPENPI_KEYS[4:], "without state"),
        ([*OPENPI_KEYS, ["x", "observation.images.top"]], "Each pairs"),
        ([*OPENPI_KEYS, ["prompt", "state"]], "Each pairs"),
        ([*OPENPI_KEYS, ["task", "instruction"]], "Each pairs"),
        (["prompt"], "key of the client"),
    ]:
        with pytest.raises(ValueError, match=reason):
            Embodiment.from_dict(ROBOT | {"client_keys": keys})


def test_adapter_reads_flat_nested_joined_and_jpeg():
    adapter = ObservationAdapter(Embodiment.from_dict(ROBOT | {"client_keys": OPENPI_KEYS}))
    observation = adapter.read(openpi_message())
    assert list(observation["images"]) == ["observation.images.front", "observation.images.wrist"]
    np.testing.assert_array_equal(
        observation["images"]["observation.images.front"], openpi_message()["observation/image"]
    )
    wrist = observation["images"]["observation.images.wrist"]
    assert wrist.shape == (10, 20, 3) and np.abs(wrist.astype(int) - [200, 30, 40]).max() <= 3
    np.testing.assert_array_equal(observation["state"], np.float32([0.5, 1.5, 0.25]))
    assert observation["instruction"] == "fold the towel"
    channels_first = openpi_message()["observation/image"].transpose(2, 0, 1)
    again = adapter.read(openpi_message(**{"observation/image": channels_first}))
    np.testing.assert_array_equal(*(item["images"]["observation.images.front"] for item in (observation, again)))
    assert adapter.read({**openpi_message(), "prompt": None}, "wave")["instruction"] == "wave"


BAD_OBSERVATIONS = {
    "missing camera": ({"observation/image": None}, "but not|Found keys"),
    "float image": ({"observation/image": np.zeros((8, 8, 3), np.float32)}, "float32 array"),
    "gray image": ({"observation/image": np.zeros((8, 8), np.uint8)}, "uint8 array"),
    "four channels": ({"observation/image": np.zeros((8, 8, 4), np.uint8)}, "uint8 array"),
    "empty image": ({"observation/image": np.zeros((0, 8, 3), np.uint8)}, "8 x 0 pixels"),
    "too wide image": ({"observation/image": np.zeros((1, 5000, 3), np.uint8)}, "5000 x 1 pixels"),
    "image as text": ({"observation/image": "x"}, "str 'x'"),
    "truncated JPEG": ({"images": {"cam_wrist": jpeg()[:-40]}}, "no intact JPEG"),
    "PNG": ({"images": {"cam_wrist": png()}}, "no intact JPEG"),
    "random bytes": ({"images": {"cam_wrist": b"\xff\xd8\xff" + b"x" * 50}}, "no intact JPEG"),
    "large JPEG": ({"images": {"cam_wrist": jpeg_that_claims(9000, 8000)}}, "9000 x 8000 pixels"),
    "JPEG bomb": ({"images": {"cam_wrist": jpeg_that_claims(65000, 65000)}}, "DecompressionBomb"),
    "images as a list": ({"images": [1]}, "but not 'images/cam_wrist'"),
    "short state": ({"observation/joint_position": np.zeros(1)}, "2 numbers; this robot has 3"),
    "state of text": ({"observation/joint_position": "abc"}, "vector of numbers"),
    "ragged state": ({"observation/joint_position": [[1], [1, 2]]}, "vector of numbers"),
    "state with NaN": ({"observation/joint_position": np.array([0.0, np.nan])}, "must be finite"),
    "state beyond float32": ({"observation/joint_position": np.array([0.0, 1e300])}, "must be finite"),
    "no instruction": ({"prompt": None}, "given in words"),
    "empty instruction": ({"prompt": " "}, "given in words"),
    "long instruction": ({"prompt": "x" * 3000}, "given in words"),
    "image token": ({"prompt": "press <|image_pad|>"}, "special tokens"),
}


@pytest.mark.parametrize("name", BAD_OBSERVATIONS)
def test_bad_observations_are_refused_with_the_reason(name):
    changes, reason = BAD_OBSERVATIONS[name]
    adapter = ObservationAdapter(Embodiment.from_dict(ROBOT | {"client_keys": OPENPI_KEYS}))
    with pytest.raises(RequestError, match=reason):
        adapter.read(openpi_message(**changes))


# The queue and the schedulers


chunks = hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 3)), elements=st.floats(-5, 5))


@settings(max_examples=150, deadline=None)
@given(chunks, st.floats(1, 100), st.floats(0, 1e5), st.integers(-3, 12))
def test_queue_at_the_steps_is_the_chunk(chunk, frequency, start, step):
    for interpolate in (False, True):
        queue = ActionQueue(frequency, interpolate)
        queue.put(chunk, start)
        action = queue.at(start + step / frequency)
        if 0 <= step < len(chunk):
            np.testing.assert_allclose(action, chunk[step], atol=1e-6)
        else:
            assert action is None
        left = queue.remaining(start + step / frequency)
        assert left.shape[1] == chunk.shape[1] and len(left) <= len(chunk)
        if 0 <= step:
            np.testing.assert_allclose(left, chunk[step:], atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(chunks, st.floats(1, 100), st.floats(0, 0.999))
def test_queue_between_the_steps(chunk, frequency, share):
    held, linear = ActionQueue(frequency), ActionQueue(frequency, interpolate=True)
    for queue in (held, linear):
        queue.put(chunk, 10.0)
    for step in range(len(chunk)):
        now = 10 + (step + share) / frequency
        following = chunk[min(step + 1, len(chunk) - 1)]
        between = chunk[step] + share * (following - chunk[step])
        np.testing.assert_allclose(linear.at(now), between, atol=1e-3)
        assert min(np.abs(held.at(now) - chunk[step]).max(), np.abs(held.at(now) - following).max()) == 0
        if 1e-3 < share < 0.99:
            np.testing.assert_array_equal(held.at(now), chunk[step])


def test_queue_refuses_what_a_robot_must_not_get():
    queue = ActionQueue(10)
    for chunk in (np.zeros(3), np.zeros((0, 3)), [[math.nan]], [[math.inf]]):
        with pytest.raises(ValueError, match="not empty and finite"):
            queue.put(chunk, 0)
    assert queue.at(0) is None and queue.end == -math.inf and len(queue.remaining(0)) == 0


def test_delay_is_the_longest_of_the_window():
    delay = DelayEstimator(window=3, initial_s=0.5)
    assert delay.steps(10) == 5
    for seconds in (0.31, 0.1, 0.2):
        delay.add(seconds)
    assert delay.seconds == 0.31 and delay.steps(10) == 4
    delay.add(0.2)
    assert delay.steps(10) == 2, "a whole number of steps is not rounded up"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(1, 8), st.sampled_from([None, "identity"]), st.integers(1, 8))
def test_overlapping_scheduler_executes_what_the_newest_chunk_says_for_now(delay, execute, guidance, horizon):
    """The chunk asked for at step s holds s, s + 1, ...: whatever is executed must be the number of its own step."""
    scheduler = OverlappingScheduler(20.0, execute, guidance)
    arrival, asked, executed, idle = None, None, 0, 0
    for step in range(80):
        now = 1000 + step / 20
        if arrival == step:
            scheduler.receive(asked + np.arange(horizon)[:, None], now)
            arrival, late = None, step - asked >= horizon
        if scheduler.wants_chunk(now):
            assert arrival is None, "one question at a time"
            options = scheduler.ask(now)
            if options:
                left = options["previous"]
                assert options["guidance"] == "identity" and 0 <= options["delay"] <= len(left)
                if delay < horizon:
                    np.testing.assert_array_equal(left[:, 0], step + np.arange(len(left)))
            asked, arrival = step, step + delay
            if delay == 0:
                scheduler.receive(asked + np.arange(horizon)[:, None], now)
                arrival, late = None, False
        action = scheduler.action(now)
        if action is None:
            idle += 1
        else:
            executed += 1
            assert late or action[0] == step
    if delay + execute <= horizon and execute >= delay:
        assert idle <= delay, "after the first answer the robot never waits"
    assert executed > 0


def test_synchronous_scheduler_waits_then_executes_from_the_beginning():
    scheduler, log = SynchronousScheduler(10.0, 3), []
    arrival = asked = None
    for step in range(12):
        now = step / 10
        if arrival == step:
            scheduler.receive(100 * asked + np.arange(8)[:, None], now)
            arrival = None
        if scheduler.wants_chunk(now):
            assert scheduler.ask(now) == {}
            asked, arrival = step, step + 2
        action = scheduler.action(now)
        log.append(None if action is None else int(action[0]))
    assert log == [None, None, 0, 1, 2, None, None, 500, 501, 502, None, None]


# Safety rails


LIMITS = SafetyLimits(low=[-1, -2], high=[1, 2], max_velocity=[4, 8], max_jerk=[500, 1000])


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, (25, 2), elements=st.floats(-1e6, 1e6)))
def test_limits_hold_for_any_stream_of_actions(actions):
    rails = SafetyRails(LIMITS, frequency=20)
    limited = np.stack([rails.limit(action) for action in actions])
    assert (np.abs(limited) <= [1, 2]).all()
    assert (np.abs(np.diff(limited, axis=0)) * 20 <= np.array([4, 8]) * (1 + 1e-9)).all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, (25, 2), elements=st.floats(-10, 10)))
def test_jerk_limit_holds_alone(actions):
    rails = SafetyRails(SafetyLimits(max_jerk=[500, 1000]), frequency=20)
    limited = np.stack([rails.limit(action) for action in actions])
    jerk = np.diff(limited, n=3, axis=0) * 20**3
    assert (np.abs(jerk) <= np.array([500, 1000]) * (1 + 1e-6) + 1e-6 * np.abs(limited).max() * 20**3).all()


def test_gentle_actions_pass_unchanged_and_interventions_are_logged(caplog):
    rails = SafetyRails(LIMITS, frequency=20)
    gentle = np.stack([0.5 * np.sin(np.arange(40) / 20), np.zeros(40)], axis=1)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal([rails.limit(action) for action in gentle], gentle)
        assert not caplog.records and not rails.interventions
        rails.limit([5.0, 0])
    assert rails.interventions == {"jerk": 1} and "jerk limit: channel 0 from 5 to" in caplog.text


def test_stops():
    rails = SafetyRails(
        SafetyLimits(state_low=[0, 0], state_margin=0.5, max_observation_age_s=0.2), 20, {"q01": [0, 0], "q99": [1, 2]}
    )
    rails.check_state([1.5, 3.0])
    rails.check_age(0.2)
    with pytest.raises(SafetyStop, match=r"channel 1 is -0.1, outside of \[0"):
        rails.check_state([0, -0.1])
    with pytest.raises(SafetyStop, match=r"channel 0 is 1.6, outside of \[-0.5, 1.5\]"):
        rails.check_state([1.6, 0])
    with pytest.raises(SafetyStop, match="channel 0 is nan"):
        rails.check_state([math.nan, 0])
    with pytest.raises(SafetyStop, match="0.300 s old"):
        rails.check_age(0.3)
    with pytest.raises(SafetyStop, match="must be finite"):
        rails.limit([math.inf])
    assert rails.interventions == {"state_limit": 2, "out_of_distribution": 1, "stale": 1, "not_finite": 1}


def test_limits_are_checked(tmp_path):
    for values, reason in [
        ({"low": [1], "high": [0]}, "must not exceed"),
        ({"max_velocity": [0]}, "above 0"),
        ({"max_jerk": [math.nan]}, "finite"),
        ({"state_margin": -1}, "0 or more"),
    ]:
        with pytest.raises(ValueError, match=reason):
            SafetyLimits(**values)
    with pytest.raises(ValueError, match="3 numbers in low; the robot's action has 2"):
        SafetyLimits(low=[0, 0, 0]).check_width(2)
    path = tmp_path / "limits.json"
    path.write_text('{"low": [0], "hgih": [1]}')
    with pytest.raises(ValueError, match=r"must hold an object with some of low, high.*; found \['hgih'\]"):
        SafetyLimits.from_file(path)
    path.write_text('{"low": [0], "high": [1]}')
    assert SafetyLimits.from_file(path) == SafetyLimits(low=(0.0,), high=(1.0,))
