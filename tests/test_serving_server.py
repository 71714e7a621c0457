"""The server over real sockets, with a tiny random model: protocol, batching, limits, drain, recording."""

import asyncio
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from wallvla import quickstart
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.evaluation.policy import HubPolicy
from wallvla.inference import WallVLAEngine
from wallvla.ops_wallvla import TORCH_OPS
from wallvla.serving.chunking import OverlappingScheduler, SynchronousScheduler
from wallvla.serving.client import PolicyClient, RobotLoop, ServerError
from wallvla.serving.observations import RequestError
from wallvla.serving.policy import PolicyRequest, ServedPolicy
from wallvla.serving.recording import EpisodeJournal, Recorder, read_journal
from wallvla.serving.safety import SafetyLimits, SafetyRails, SafetyStop
from wallvla.serving.serve import name_and_path
from wallvla.serving.server import PolicyServer, ServerOptions
from wallvla.serving.wire import pack, unpack


ROOT = Path(quickstart.__file__).parent
TOKEN = "0123456789abcdef-token"
WIDE = {name: [value] * 4 for name, value in [("q01", -1.0), ("q99", 1.0), ("mean", 0.0), ("std", 0.5)]}
WIDE |= {"min": [-2.0] * 4, "max": [2.0] * 4}


@pytest.fixture(scope="module")
def parts():
    """(model, processor): random weights, one camera of 32 pixels, 4 state and 4 action channels."""
    torch.manual_seed(0)
    config = quickstart.QuickstartConfig(image_size=32)
    robot = quickstart.embodiment(config, {"state": WIDE, "action": WIDE})
    processor = quickstart.build_processor(config, robot)
    model = quickstart.build_model(processor)
    with torch.no_grad():  # at initialisation the output hardly depends on the input
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval(), processor


@pytest.fixture(scope="module")
def policy(parts):
    return ServedPolicy(*parts)


def observation(seed=0, instruction="press the button", size=32):
    rng = np.random.default_rng(seed)
    return {
        "observation.images.front": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "observation.state": rng.uniform(-1, 1, 4).astype(np.float32),
        "prompt": instruction,
    }


class Running:
    """A server in a thread of its own, between `with` and its end."""

    def __init__(self, policies, recorders=None, **options):
        options = {"port": 0, "max_batch": 4, "drain_s": 5.0} | options
        self.server = PolicyServer(policies, ServerOptions(**options), recorders)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        async def main():
            self.loop = asyncio.get_running_loop()
            await self.server.run(ready=lambda port: self._ready.set(), handle_signals=False)

        asyncio.run(main())

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(60)
        self.address = f"ws://127.0.0.1:{self.server.port}"
        return self

    def stop(self):
        self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def __exit__(self, *exception):
        if self._thread.is_alive():
            self.stop()

    def connect(self, path="/", **options):
        connection = connect(self.address + path, compression=None, max_size=None, **options)
        self.metadata = unpack(connection.recv(10))
        return connection

    def fetch(self, path, headers=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.server.port}{path}", headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def running(policy):
    with Running({"tiny": policy, "other": policy}, max_requests_per_second=1000.0) as server:
        yield server


def ask(connection, message):
    connection.send(pack(message))
    return connection.recv(20)


# The policy


def test_the_engine_gives_the_same_answers(parts):
    """Also with guidance, for a batch, and for a guidance that the engine does not have."""
    model, processor = parts
    plain = ServedPolicy(model, processor)
    fast = ServedPolicy(model, processor, engine=WallVLAEngine(model, processor, ops=TORCH_OPS))
    read = plain.adapter.read
    requests = [PolicyRequest(read(observation(number)), seed=number) for number in range(3)]
    previous = np.zeros((4, 4), dtype=np.float32)
    batches = [requests[:1], requests]
    for name in ("identity", "prefix", "vjp"):
        batches.append([replace(requests[0], guidance=name, previous=previous, delay=1)])
    for batch in batches:
        for ours, theirs in zip(fast.infer(batch), plain.infer(batch), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert len(fast.engine.buckets) == 4
    broken = replace(requests[0], observation=requests[0].observation | {"images": {}})
    outcomes = fast.infer([requests[0], broken])
    assert isinstance(outcomes[1], RequestError) and "missing" in str(outcomes[1])
    np.testing.assert_allclose(outcomes[0], plain.infer(requests[:1])[0], atol=1e-5)


def test_same_actions_as_in_process(parts, running):
    """A server's answers are those of `HubPolicy` for the same seed and frames."""
    local = HubPolicy(*parts, "metaworld_sawyer")
    local.reset(7)
    with PolicyClient(running.address) as client:
        client.start_episode(seed=7, task="press the button")
        for step in range(3):
            message = observation(step)
            del message["prompt"]
            expected = local.act(
                {"images": {"front": message["observation.images.front"]}, "state": message["observation.state"]},
                "press the button",
            )
            np.testing.assert_allclose(client.infer(message)["actions"], expected, atol=1e-5)


def test_answers_do_not_depend_on_the_batch(policy):
    """Other images, instructions (so other padding) and seeds in the same call."""
    instructions = ["press the button", "open the drawer and then close it again", "x"]
    requests = [
        PolicyRequest(
            policy.adapter.read(observation(seed, instructions[seed % 3], (32, 48)[seed % 2])), seed, seed % 2
        )
        for seed in range(7)
    ]
    alone = [policy.infer([request])[0] for request in requests]
    together = policy.infer(requests)
    for one, all_of_them in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, all_of_them, atol=2e-4)
    assert min(np.abs(alone[0] - other).max() for other in alone[1:]) > 0.01


@pytest.mark.parametrize("guidance", ["identity", "vjp", "prefix"])
def test_guided_requests_continue_the_old_chunk(policy, guidance):
    first = policy.adapter.read(observation(0))
    (old,) = policy.infer([PolicyRequest(first, seed=1)])
    asked = {"guidance": guidance, "previous": np.clip(old[4:], -1, 1), "delay": 2}
    guided = PolicyRequest(policy.adapter.read(observation(1)), seed=2, **asked)
    policy.check(guided, None)
    (free,) = policy.infer([PolicyRequest(guided.observation, seed=2)])
    (bent,) = policy.infer([guided])
    before, after = (np.abs(chunk[:2] - asked["previous"][:2]).max() for chunk in (free, bent))
    assert after < 0.5 * before
    other = PolicyRequest(policy.adapter.read(observation(5)), 3, 0, guidance, np.zeros((2, 4), np.float32), 1)
    np.testing.assert_allclose(policy.infer([other, guided])[1], bent, atol=2e-4)


def test_one_bad_request_does_not_spoil_its_batch(policy):
    good = PolicyRequest(policy.adapter.read(observation(0)))
    bad = PolicyRequest({**good.observation, "instruction": "two <|image_pad|> tokens"})  # past the adapter
    outcomes = policy.infer([good, bad, good])
    assert isinstance(outcomes[1], RequestError) and "image tokens" in str(outcomes[1])
    np.testing.assert_allclose(outcomes[0], policy.infer([good])[0], atol=1e-5)


def test_weights_that_are_not_finite_stop_the_robot(parts):
    model, processor = parts
    policy = ServedPolicy(model, processor)
    policy.model = type(
        "Broken", (), {"device": model.device, "sample_actions": lambda self, **_: torch.full((1, 8, 4), torch.nan)}
    )()
    (outcome,) = policy.infer([PolicyRequest(policy.adapter.read(observation()))])
    assert outcome.kind == "safety_stop" and "non-finite" in str(outcome)


# The protocol


def test_metadata_and_models_by_name(running):
    with running.connect():
        assert running.metadata["model"] == "tiny" and running.metadata["action_horizon"] == 8
        assert ["prompt", "instruction"] in running.metadata["observation_keys"]
    with running.connect("/other"):
        assert running.metadata["model"] == "other"
    with pytest.raises(InvalidStatus, match="404"):
        running.connect("/third")


def test_health_and_metrics(running):
    with PolicyClient(running.address) as client:
        client.infer(observation())
        assert running.fetch("/healthz") == (200, "OK\n")
        status, page = running.fetch("/metrics")
    assert status == 200 and 'wallvla_requests_total{model="tiny",outcome="ok"}' in page
    assert "wallvla_connections 1\n" in page and 'wallvla_batch_size_bucket{model="tiny",le="+Inf"}' in page


def test_seeds_calls_and_episodes(running):
    with PolicyClient(running.address) as client, PolicyClient(running.address) as other:
        client.start_episode(seed=3)
        first, second = client.infer(observation())["actions"], client.infer(observation())["actions"]
        assert np.abs(first - second).max() > 1e-3, "each call has noise of its own"
        client.start_episode(seed=3)
        np.testing.assert_allclose(client.infer(observation())["actions"], first, atol=1e-5)
        np.testing.assert_allclose(other.infer(observation(), {"seed": 3, "call": 1})["actions"], second, atol=1e-5)
        unseeded = [
            connection.infer(observation())["actions"] for connection in (PolicyClient(running.address), other)
        ]
        assert np.abs(unseeded[0] - unseeded[1]).max() > 1e-3, "connections without a seed differ"


BAD_MESSAGES = {
    "garbage": (b"\xc1", "bad_request", "not msgpack"),
    "a list": (pack([1, 2]), "bad_request", "A message is a map"),
    "nothing": (pack({}), "bad_request", "Found keys none"),
    "unknown option": (pack(observation() | {"__wallvla__": {"sede": 1}}), "bad_request", "unknown options"),
    "negative seed": (pack(observation() | {"__wallvla__": {"seed": -1}}), "bad_request", "as seed"),
    "boolean seed": (pack(observation() | {"__wallvla__": {"seed": True}}), "bad_request", "as seed"),
    "unknown guidance": (
        pack(observation() | {"__wallvla__": {"guidance": "magic"}}),
        "bad_request",
        "Known: identity",
    ),
    "guidance without chunk": (pack(observation() | {"__wallvla__": {"guidance": "vjp"}}), "bad_request", "previous"),
    "long request id": (pack(observation() | {"__wallvla__": {"request_id": "x" * 65}}), "bad_request", "request_id"),
    "unknown control": (pack({"__ctrl__": "format_disk"}), "bad_request", "unknown __ctrl__"),
    "bad seed of an episode": (pack({"__ctrl__": "episode_start", "__seed__": "x"}), "bad_request", "as __seed__"),
    "text": ("hello", "bad_request", "text message"),
    "NaN": (pack(observation() | {"observation.state": np.full(4, np.nan, np.float32)}), "safety_stop", "finite"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_get_an_answer_and_the_connection_stays(running, name):
    message, kind, reason = BAD_MESSAGES[name]
    with running.connect() as connection:
        connection.send(message)
        error = json.loads(connection.recv(10))
        assert error["error"] == kind and reason in error["message"] and len(error["id"]) == 12
        assert unpack(ask(connection, observation()))["actions"].shape == (8, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=400), min_size=1, max_size=5))
def test_fuzzed_frames_neither_kill_nor_stall(running, frames):
    with running.connect() as connection:
        for frame in frames:
            connection.send(frame)
            assert json.loads(connection.recv(10))["error"] in ("bad_request", "safety_stop")


def test_many_bad_messages_close_the_connection(running):
    with running.connect() as connection:
        with pytest.raises(ConnectionClosed, match="1008.*too many bad messages"):
            for _ in range(40):
                connection.send(b"\xc1")
                connection.recv(10)


def test_large_frames_are_cut_off(policy):
    with Running({"tiny": policy}, max_frame_bytes=100_000) as server, server.connect() as connection:
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.send(b"x" * 200_000)
            connection.recv(10)
        with server.connect() as other:
            assert isinstance(ask(other, observation()), bytes)


def test_internal_errors_have_a_number_and_no_stack(parts, caplog):
    policy = ServedPolicy(*parts)
    with Running({"tiny": policy}) as server, server.connect() as connection:

        def explode(requests):
            raise RuntimeError("the secret path of the model")

        server.server._batchers["tiny"]._infer = explode
        error = json.loads(ask(connection, observation()))
        assert error["error"] == "internal" and "secret" not in json.dumps(error)
        assert error["id"] in caplog.text and "the secret path of the model" in caplog.text
        server.server._batchers["tiny"]._infer = policy.infer
        assert isinstance(ask(connection, observation()), bytes), "the next request is served"


# Many clients


def test_no_crossed_replies(policy, running):
    """Eight threads, 160 requests; each reply must be the one of its own question."""
    expected = {
        seed: policy.infer([PolicyRequest(policy.adapter.read(observation(seed)), seed)])[0] for seed in range(6)
    }

    def robot(name):
        choice, sizes = random.Random(name), []
        with PolicyClient(running.address) as client:
            for number in range(20):
                seed = choice.randrange(6)
                reply = client.infer(observation(seed), {"seed": seed, "call": 0, "request_id": f"{name}-{number}"})
                assert reply["request_id"] == f"{name}-{number}"
                np.testing.assert_allclose(reply["actions"], expected[seed], atol=2e-4)
                sizes.append(reply["server_timing"]["batch_size"])
        return sizes

    with ThreadPoolExecutor(8) as pool:
        sizes = [size for result in pool.map(robot, range(8)) for size in result]
    assert max(sizes) > 1 and max(sizes) <= 4


def test_clients_that_misbehave_hold_nobody_up(policy):
    with Running({"tiny": policy}, send_timeout_s=1.0, ping_s=2.0) as server:
        silent = [socket.create_connection(("127.0.0.1", server.server.port)) for _ in range(3)]
        half = socket.create_connection(("127.0.0.1", server.server.port))
        half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgr")
        idle = server.connect()
        dead = server.connect()
        dead.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        dead.recv_messages.close()  # from now on nobody reads what the server sends
        with server.connect() as client:
            ask(client, observation())
            started = time.monotonic()
            for seed in range(10):
                assert isinstance(ask(client, observation(seed)), bytes)
            assert time.monotonic() - started < 10
        for connection in (*silent, half):
            connection.close()
        idle.close()
        dead.socket.close()


def test_busy_when_the_queue_is_full_and_when_a_request_waited_too_long(parts):
    policy, gate = ServedPolicy(*parts), threading.Event()

    with Running({"tiny": policy}, max_batch=1, max_queue=2, max_wait_s=0.5) as server:
        infer = policy.infer
        server.server._batchers["tiny"]._infer = lambda requests: gate.wait(20) and infer(requests)
        connections = [server.connect() for _ in range(5)]
        for connection in connections:
            connection.send(pack(observation()))
            time.sleep(0.2)
        refused = [json.loads(connection.recv(10)) for connection in connections[3:]]
        assert {error["error"] for error in refused} == {"busy"} and "2 requests wait" in refused[0]["message"]
        time.sleep(0.5)
        gate.set()
        assert isinstance(connections[0].recv(20), bytes)
        late = [json.loads(connection.recv(20)) for connection in connections[1:3]]
        assert {error["error"] for error in late} == {"busy"} and "waited" in late[0]["message"]


def test_too_many_connections_and_too_many_requests(policy):
    with Running({"tiny": policy}, max_connections=2, max_requests_per_second=5.0) as server:
        first, second = server.connect(), server.connect()
        with pytest.raises(InvalidStatus, match="503"):
            server.connect()
        for _ in range(12):
            first.send(b"\xc1")
        kinds = [json.loads(first.recv(10))["error"] for _ in range(12)]
        assert kinds.count("rate_limited") >= 4 and kinds[0] == "bad_request"
        second.close()


def test_drain_answers_what_was_asked(parts):
    policy, gate = ServedPolicy(*parts), threading.Event()
    with Running({"tiny": policy}) as server:
        infer = policy.infer
        server.server._batchers["tiny"]._infer = lambda requests: gate.wait(20) and infer(requests)
        asking, idle = server.connect(), server.connect()
        asking.send(pack(observation()))
        time.sleep(0.3)
        server.loop.call_soon_threadsafe(server.server.stop)
        time.sleep(0.2)
        assert server.fetch("/healthz") == (503, "draining\n")
        with pytest.raises(InvalidStatus, match="503"):
            server.connect()
        assert json.loads(ask(idle, observation()))["error"] == "draining"
        gate.set()
        assert unpack(asking.recv(20))["actions"].shape == (8, 4)
        with pytest.raises(ConnectionClosed, match="1001"):
            asking.recv(10)


def test_not_ready_before_the_warm_up(parts):
    policy, gate = ServedPolicy(*parts), threading.Event()
    warm_up = policy.warm_up
    policy.warm_up = lambda *options: gate.wait(20) and warm_up(*options)
    server = Running({"tiny": policy})
    server._thread.start()
    while server.server.port is None:
        time.sleep(0.02)
    server.address = f"ws://127.0.0.1:{server.server.port}"
    assert server.fetch("/healthz") == (503, "warming up\n")
    with pytest.raises(InvalidStatus, match="503"):
        server.connect()
    threading.Timer(0.5, gate.set).start()
    with PolicyClient(server.address) as client:  # waits until the server is ready
        assert client.metadata["model"] == "tiny"
    assert server.fetch("/healthz") == (200, "OK\n")
    server.stop()


def test_a_policy_takes_at_least_one_step(parts):
    with pytest.raises(ValueError, match="num_inference_steps 0.*at least 1"):
        ServedPolicy(*parts, num_inference_steps=0)


@pytest.mark.parametrize(
    "options, keys",
    [
        ({}, {(1, (224, 224)), (4, (224, 224))}),
        ({"warm_up_batches": (1, 2), "warm_up_image": (64, 48)}, {(1, (48, 64)), (2, (48, 64))}),
    ],
)
def test_the_warm_up_makes_the_buckets_that_are_asked_for(parts, options, keys):
    policy = ServedPolicy(*parts, engine=WallVLAEngine(*parts, num_inference_steps=1, ops=TORCH_OPS))
    with Running({"tiny": policy}, **options):
        assert {(key.batch, key.frames[0]) for key in policy.engine.buckets} == keys


# Security


def test_token(policy):
    with Running({"tiny": policy}, token=TOKEN) as server:
        for headers in (
            {},
            {"Authorization": f"Api-Key {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Api-Key é"},
        ):
            with pytest.raises(InvalidStatus, match="401"):
                server.connect(additional_headers=headers)
        for scheme in ("Api-Key", "Bearer"):
            server.connect(additional_headers={"Authorization": f"{scheme} {TOKEN}"}).close()
        with PolicyClient(server.address, token=TOKEN) as client:
            assert client.metadata["model"] == "tiny"
        assert server.fetch("/metrics")[0] == 401
        assert server.fetch("/metrics", {"Authorization": f"Bearer {TOKEN}"})[0] == 200
        assert server.fetch("/healthz")[0] == 200
        with pytest.raises(ConnectionError, match="401"):
            PolicyClient(server.address, token="wrong")


def test_web_pages_are_refused(running):
    with pytest.raises(InvalidStatus, match="403"):
        running.connect(origin="https://example.org")


def test_options_that_open_a_robot_to_everybody_are_refused():
    for options, reason in [
        ({"host": "0.0.0.0"}, "without a token"),
        ({"host": "::"}, "without a token"),
        ({"host": "robot.local"}, "without a token"),
        ({"token": "short"}, "at least 16"),
        ({"certificate": "a.pem"}, "needs both files"),
        ({"max_batch": 0}, "at least 1"),
        ({"warm_up_batches": (1, 0)}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            ServerOptions(**options)
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.53"):
        ServerOptions(host=host)
    ServerOptions(host="0.0.0.0", token=TOKEN)


def test_tls(policy, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    with Running({"tiny": policy}, certificate=str(certificate), private_key=str(key)) as server:
        address = f"wss://localhost:{server.server.port}"
        with PolicyClient(address, authority=str(certificate)) as client:
            assert client.infer(observation())["actions"].shape == (8, 4)
        with pytest.raises(ConnectionError, match="certificate"):
            PolicyClient(address, reconnect_s=0)
        assert ssl.OPENSSL_VERSION


# Rails, loops, recording


def test_rails_of_a_served_policy(parts):
    limits = SafetyLimits(low=[-0.1] * 4, high=[0.1] * 4, state_margin=0.25)
    policy = ServedPolicy(*parts, limits=limits)
    with Running({"tiny": policy}) as server, PolicyClient(server.address) as client:
        assert np.abs(client.infer(observation())["actions"]).max() <= np.float32(0.1)
        with pytest.raises(ServerError, match=r"safety_stop: State channel 2 is 1.9, outside of \[-1.5, 1.5\]"):
            client.infer(observation() | {"observation.state": np.float32([0, 0, 1.9, 0])})
        page = server.fetch("/metrics")[1]
    assert 'reason="position"' in page and 'reason="out_of_distribution"} 1' in page
    with pytest.raises(ValueError, match="2 numbers in low"):
        ServedPolicy(*parts, limits=SafetyLimits(low=[0, 0]))


@pytest.mark.parametrize("guidance", [None, "identity"])
def test_robot_loop_hides_the_latency(running, guidance):
    """At 40 Hz with chunks of 8 steps, a model call takes several periods; the loop itself must not wait for it."""
    with PolicyClient(running.address) as client:
        client.infer(observation())
        scheduler = OverlappingScheduler(40.0, 3, guidance)
        longest, idle = 0.0, 0
        with RobotLoop(client, scheduler, SafetyRails(SafetyLimits(low=[-1] * 4, high=[1] * 4), 40)) as loop:
            for step in range(60):
                started = time.monotonic()
                action = loop.step(lambda step=step: observation(step))
                longest = max(longest, time.monotonic() - started)
                assert action is None or (action.shape == (4,) and np.abs(action).max() <= 1)
                idle += action is None
                time.sleep(max(0.0, 0.025 - (time.monotonic() - started)))
    assert 0 < scheduler.delay.seconds < 5 and idle < 50
    assert scheduler.observed_at > 0


def test_robot_loop_waits_when_synchronous_and_stops_when_stale(running):
    with PolicyClient(running.address) as client:
        rails = SafetyRails(SafetyLimits(max_observation_age_s=0.0), 80)
        with RobotLoop(client, SynchronousScheduler(80.0, 4), rails) as loop, pytest.raises(SafetyStop, match="old"):
            loop.step(observation)
        with RobotLoop(client, SynchronousScheduler(80.0, 4)) as loop:
            assert loop.step(observation).shape == (4,)
            with pytest.raises(ServerError, match="bad_request"):
                time.sleep(0.06)
                loop.step(lambda: {"prompt": "x"})


def test_recorded_episodes_become_a_lerobot_dataset(parts, tmp_path):
    policy = ServedPolicy(*parts)
    recorder = Recorder(tmp_path / "rec", 80, "sawyer", LeRobotWriter)
    with pytest.raises(ValueError, match="Another server records"):
        Recorder(tmp_path / "rec", 80, "sawyer", LeRobotWriter)
    sent = []
    with Running({"tiny": policy}, {"tiny": recorder}) as server, PolicyClient(server.address) as client:
        for seed, task in enumerate(["press the button", "open the drawer"]):
            client.start_episode(seed=seed, task=task)
            for step in range(3 + seed):
                message = observation(10 * seed + step, task)
                sent.append((message, client.infer(message)["actions"]))
    (root,) = recorder.finish()
    assert recorder.finish() == [] and not list((tmp_path / "rec" / "journal").iterdir())
    dataset = LeRobotDataset(root, embodiment="sawyer", action_horizon=1)
    assert dataset.num_episodes == 2 and sorted(dataset.tasks.values()) == ["open the drawer", "press the button"]
    assert len(dataset) == 7
    for index, (message, actions) in enumerate(sent):
        sample = dataset[index]
        np.testing.assert_allclose(sample["state"], message["observation.state"], atol=1e-6)
        np.testing.assert_allclose(sample["actions"][0], actions[0], atol=1e-6)
        assert sample["instruction"] == message["prompt"]


def test_kill_9_leaves_every_answered_frame(parts, tmp_path):
    """`wallvla serve` itself, in a process of its own, with a token file and client keys."""
    for part in parts:
        part.save_pretrained(tmp_path / "hub")
    (tmp_path / "token").write_text(TOKEN + "\n")
    keys = [["cam", "observation.images.front"], ["q", "state"], ["task", "instruction"]]
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "wallvla").symlink_to(ROOT, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "wallvla.cli", "serve", "arm=hub", "--port", str(port), "--record", "served"]
    command += ["--token-file", "token", "--client-keys", "keys.json", "--max-batch", "2"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        with PolicyClient(f"ws://127.0.0.1:{port}/arm", token=TOKEN, reconnect_s=200) as client:
            assert client.metadata["observation_keys"] == keys
            for step in range(3):
                seen = observation(step)
                client.infer(
                    {"cam": seen["observation.images.front"], "q": seen["observation.state"], "task": "press"}
                )
            server.kill()
            server.wait()
    finally:
        server.kill()
    (root,) = Recorder(tmp_path / "served" / "arm", 80, "metaworld_sawyer", LeRobotWriter).finish()
    dataset = LeRobotDataset(root, embodiment="arm", action_horizon=1)
    assert len(dataset) == 3 and dataset[2]["instruction"] == "press"
    np.testing.assert_allclose(dataset[2]["state"], observation(2)["observation.state"], atol=1e-6)


def write_journal(path, frames):
    journal = EpisodeJournal(path, {"fps": 20, "robot_type": "arm", "instruction": "press", "seed": 0})
    rng = np.random.default_rng(0)
    for number in range(frames):
        image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        seen = {"images": {"front": image}, "state": np.float32([number, 0.5])}
        journal.add(seen, np.full((2, 3), number, np.float32))
    return journal


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_journal_cut_anywhere_loses_only_what_was_being_written(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "a.journal"
    journal = write_journal(path, 4)
    whole = path.read_bytes()
    ends = [0]
    while ends[-1] < len(whole):
        ends.append(ends[-1] + 8 + int.from_bytes(whole[ends[-1] : ends[-1] + 4], "little"))
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut] + data.draw(st.binary(max_size=3)) * (cut < len(whole)))
    records = list(read_journal(path))
    assert len(records) >= sum(end <= cut for end in ends[1:]) and len(records) <= 5
    assert [record["state"][0] for record in records[1:]] == list(range(len(records) - 1))
    journal.close()


def test_finish_may_be_stopped_anywhere_and_called_again(tmp_path):
    """Whatever a killed server left, the next one makes the same dataset of it, once."""

    class Killed(Exception):
        pass

    def killed_writer(when):
        class Writer(LeRobotWriter):
            def save_episode(self, task):
                if when == "save":
                    raise Killed
                super().save_episode(task)

            def finalize(self):
                if when == "before":
                    raise Killed
                super().finalize()
                if when == "after":
                    raise Killed

        return Writer

    for when in ("save", "before", "after"):
        folder = tmp_path / when
        recorder = Recorder(folder, 20, "arm", killed_writer(when))
        for name in ("a", "b"):
            write_journal(folder / "journal" / f"{name}.journal", 3)
        (folder / "journal" / "empty.journal").write_bytes(b"")
        with pytest.raises(Killed):
            recorder.finish()
        recorder.close()
        second = Recorder(folder, 20, "arm", LeRobotWriter)
        second.finish()
        roots = sorted(path.name for path in folder.iterdir() if path.name.startswith((".round", "round")))
        assert roots == ["round-000"]
        dataset = LeRobotDataset(folder / "round-000", embodiment="arm", action_horizon=1)
        assert dataset.num_episodes == 2 and len(dataset) == 6
        second.close()


def test_names_of_models(tmp_path):
    assert name_and_path("wall=runs/a") == ("wall", "runs/a")
    assert name_and_path("x-square/wall-oss") == ("wall-oss", "x-square/wall-oss")
    assert name_and_path(str(tmp_path)) == (tmp_path.name, str(tmp_path))
