"""Simulators by name, in this process, in workers and behind a socket: the same episode, action for action."""

import json
import socket
import struct
from pathlib import Path

import numpy as np
import pytest

from wallvla import cli
from wallvla.evaluation.closed_loop import closed_loop_spec, evaluate, replay, run_episode
from wallvla.evaluation.environments import GYM_ADAPTERS, MT10, expand_names, gym_adapter, make_environment
from wallvla.evaluation.gym_env import GymAdapter, GymEnv
from wallvla.evaluation.metaworld import EVALUATION_SEED_START, TASKS
from wallvla.evaluation.policy import PolicyError, RandomPolicy, build_policy
from wallvla.evaluation.remote import RemoteEnv, RemotePolicy, environment_server, policy_server
from wallvla.evaluation.report import load_run, write_comparison, write_report
from wallvla.evaluation.wire import MAGIC, Connection, WireError, connect, pack
from wallvla.evaluation.workers import WorkerError


pytestmark = pytest.mark.filterwarnings("ignore:.*(render fps|observation space).*:UserWarning")
TOY = "gym:toy_gym:Toy-v0?state=agent_pos&instruction=reach+the+dot"
SEED = EVALUATION_SEED_START
RANDOM = {"random": {"kind": "random"}}


@pytest.fixture(autouse=True)
def toy_is_importable(monkeypatch):
    """In the workers too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


class Seeker:
    """Goes to the goal that it sees in the picture (green); state says where it is."""

    cameras = ("front",)

    def reset(self, seed=0):
        pass

    def act(self, observation, instruction):
        rows, columns = np.nonzero(observation["images"]["front"][..., 1] > 100)
        goal = (np.array([columns.mean(), rows.mean()]) / 2 - 15.5) / 15
        return np.clip(goal - observation["state"], -0.1, 0.1)[None].repeat(2, axis=0)


class Faulty(Seeker):
    """Returns whatever it was given instead of actions."""

    def __init__(self, chunk):
        self.chunk = chunk

    def act(self, observation, instruction):
        return self.chunk


# ---- names ----


def test_names():
    assert expand_names(["metaworld/mt10"]) == list(MT10) and set(MT10) <= set(TASKS)
    assert expand_names(["metaworld/all"]) == list(TASKS)
    assert expand_names(["metaworld/reach-v3", "metaworld/mt10"])[0] == "reach-v3"
    assert len(expand_names(["metaworld/reach-v3", "metaworld/mt10"])) == 10, "every task once"
    assert expand_names(["pusht", "remote://h:1/x"]) == ["pusht", "remote://h:1/x"]
    for name, message in [
        ("libero/spatial", "metaworld/TASK, metaworld/mt10.*remote://host:port"),
        ("metaworld/reach", "did you mean reach-v3"),
        ("gym:Toy-v0?succes=x", r"options are success, .* not \['succes'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand_names([name])
    assert gym_adapter("gym:A-v0?success_return=200&state=none").success_return == 200
    with pytest.raises(ValueError, match="where the simulator ends"):
        closed_loop_spec(RANDOM, ["pusht"], 1, max_steps=301)
    with pytest.raises(ValueError, match="Every task once"):
        closed_loop_spec(RANDOM, ["pusht", "pusht"], 1)


# ---- gymnasium ----


def test_an_episode_follows_from_its_seed():
    with GymEnv(gym_adapter(TOY)) as env:
        assert (env.action_dim, env.max_steps, env.cameras, env.instruction) == (2, 40, ("front",), "reach the dot")
        assert [*env.action_low, *env.action_high] == pytest.approx([-0.1, -0.1, 0.1, 0.1])
        outcomes = [run_episode(env, Seeker(), SEED, 2, None) for _ in range(2)]
        other = run_episode(env, Seeker(), SEED + 1, 2, None)
    for outcome in (*outcomes, other):
        outcome.pop("policy_seconds")
    assert outcomes[0] == outcomes[1] and outcomes[0]["success"] and outcomes[0]["progress"] == 1
    assert other["digest"] != outcomes[0]["digest"]


def test_the_episode_ends_where_the_environment_ends_it():
    with GymEnv(gym_adapter(TOY)) as env:
        still = run_episode(env, Faulty(np.zeros((8, 2))), SEED, 8, None)
        assert (still["steps"], still["success"]) == (40, False)
        with pytest.raises(RuntimeError, match="over"):
            env.step(np.zeros(2))


def test_adapters_say_what_does_not_fit(monkeypatch):
    with GymEnv(gym_adapter("gym:toy_gym:Toy-v0?state=joints")) as env:
        env.reset_scene(SEED)
        with pytest.raises(ValueError, match=r"no 'joints': it has \['agent_pos', 'goal'\]"):
            env.observe()
        with pytest.raises(ValueError, match="no camera 'wrist'"):
            env.observe(("wrist",))
        with pytest.raises(ValueError, match="2 finite numbers"):
            env.step(np.array([0, np.nan]))
    with GymEnv(gym_adapter(TOY)) as env:
        env.reset_scene(SEED)
        monkeypatch.setenv("TOY_NAN", "1")
        env.step(np.zeros(2))
        with pytest.raises(ValueError, match="not finite at step 1"):
            env.observe(())
    with pytest.raises(ValueError, match="cannot make"):
        make_environment("gym:NoSuchThing-v0")
    with pytest.raises(ImportError, match="pip install no-such-module"):
        GymEnv(GymAdapter("X-v0", "", 10, imports="no_such_module"))


def test_discrete_actions_and_explicit_success():
    silent = "gym:toy_gym:ToyDiscrete-v0?state=agent_pos"
    with GymEnv(gym_adapter(silent)) as env:
        env.reset_scene(SEED)
        with pytest.raises(ValueError, match=r"does not report 'is_success'; its info has \[\]"):
            env.step(np.array([0.9]))
    with GymEnv(gym_adapter(f"{silent}&success_return=1.5&max_steps=9")) as env:
        assert (env.action_low, env.action_high) == ([0.0], [2.0])
        outcome = run_episode(env, RandomPolicy(env.action_low, env.action_high), SEED, 4, None)
        assert outcome["success"] and outcome["return"] >= 1.5
    with GymEnv(gym_adapter(f"{silent}&success=terminated")) as env:
        env.reset_scene(SEED)
        assert env.step(np.array([1.0])).success is False


def test_experts_are_for_metaworld():
    with GymEnv(gym_adapter(TOY)) as env, pytest.raises(ValueError, match="Only Meta-World"):
        build_policy({"kind": "expert"}, env)


@pytest.mark.parametrize("name", list(GYM_ADAPTERS))
def test_known_gym_environments(name):
    """Where the packages are installed (docs/evaluation.md): reset, step, render."""
    pytest.importorskip(GYM_ADAPTERS[name].imports)
    with make_environment(name, image_size=48) as env:
        outcome = run_episode(env, RandomPolicy(env.action_low, env.action_high), SEED, 4, 8, frames=[])
        assert outcome["steps"] == 8 and env.observe()["images"][env.cameras[0]].shape == (48, 48, 3)


# ---- messages ----


def pair():
    a, b = socket.socketpair()
    a.settimeout(5), b.settimeout(5)
    return Connection(TcpLike(a), "a"), Connection(TcpLike(b), "b"), b


class TcpLike:
    """A socket pair has no TCP options."""

    def __init__(self, stream):
        self._stream = stream
        self.recv, self.sendall, self.close = stream.recv, stream.sendall, stream.close

    def setsockopt(self, *arguments):
        pass


def test_messages_round_trip():
    left, right, _ = pair()
    arrays = {
        "images/front": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1],
        "state": np.array([1.5, -2], ">f4"),
        "empty": np.zeros((0, 3)),
        "flag": np.array(True),
    }
    left.send("observation", {"text": "ünïcode\n"}, arrays)
    header, received = right.receive()
    assert header["type"] == "observation" and header["text"] == "ünïcode\n"
    for name, value in arrays.items():
        np.testing.assert_array_equal(received[name], value)
        assert received[name].dtype == value.dtype.newbyteorder("=") and received[name].flags.writeable
    left.close()
    assert right.receive() is None


def test_broken_messages_are_errors():
    def header(value):
        text = json.dumps(value).encode()
        return MAGIC + struct.pack(">I", len(text)) + text

    broken = {
        b"GET / HTTP/1.1\r\n\r\n": "does not speak this protocol",
        MAGIC + struct.pack(">I", 1 << 31): "header of 2147483648 bytes",
        MAGIC + struct.pack(">I", 3) + b"{a}": "breaks the schema",
        header([1]): "breaks the schema",
        header({"arrays": []}): "breaks the schema",
        header({"type": "x", "arrays": [{"name": "a", "dtype": "object", "shape": [1]}]}): "dtype 'object'",
        header({"type": "x", "arrays": [{"name": "a", "dtype": "uint8", "shape": [-1]}]}): "list of sizes",
        header({"type": "x", "arrays": [{"name": "a", "dtype": "uint8", "shape": [1 << 40]}]}): "more than",
        pack("x", None, {"a": np.zeros(9)})[:-1]: "in the middle of a message",
    }
    for content, message in broken.items():
        left, right, stream = pair()
        left._stream.sendall(content)
        left.close()
        with pytest.raises(WireError, match=message):
            right.receive()
        stream.close()
    with pytest.raises(WireError, match="Array 'a' is object"):
        pack("x", None, {"a": np.array([None])})
    with pytest.raises(WireError, match="write host:port"):
        connect("localhost")
    with pytest.raises(WireError, match="start the server there first"):
        connect("127.0.0.1:1")


# ---- remote ----


def make_toy(task, image_size):
    return make_environment(task or TOY, image_size)


def test_a_remote_environment_is_the_same_as_a_local_one():
    with GymEnv(gym_adapter(TOY)) as local, environment_server(make_toy) as server:
        remote = RemoteEnv(server.address, None, 64)
        assert (remote.action_dim, remote.max_steps, remote.instruction) == (2, 40, "reach the dot")
        for seed in (SEED, SEED + 3):
            frames = [], []
            outcomes = [
                run_episode(env, Seeker(), seed, 2, None, frames=pictures)
                for env, pictures in zip((local, remote), frames, strict=True)
            ]
            for outcome in outcomes:
                outcome.pop("policy_seconds")
            assert outcomes[0] == outcomes[1]
            np.testing.assert_array_equal(frames[0], frames[1])
        remote.close()


def test_a_remote_environment_reports_its_errors(monkeypatch):
    with environment_server(make_toy) as server:
        remote = RemoteEnv(server.address)
        remote.reset_scene(SEED)
        with pytest.raises(WireError, match="could not answer 'step'.*2 finite numbers"):
            remote.step(np.zeros(3))
        remote = RemoteEnv(server.address)
        monkeypatch.setenv("TOY_THROWS_AT", str(SEED))
        remote.reset_scene(SEED)
        with pytest.raises(WireError, match="ZeroDivisionError: the simulation exploded"):
            remote.step(np.zeros(2))
        with pytest.raises(WireError, match="Unknown Meta-World task 'nothing'"):
            RemoteEnv(server.address, "nothing")
        early = connect(server.address)
        with pytest.raises(WireError, match="first message must be hello"):
            early.ask("reset", {"seed": 1})


def test_evaluation_of_a_remote_policy_in_a_remote_environment(tmp_path):
    """Both over sockets, two workers and one: the same episodes."""
    with environment_server(make_toy) as simulator, policy_server(Seeker) as brain:
        policies = {"policy": {"kind": "remote", "address": brain.address}, **RANDOM}
        spec = closed_loop_spec(policies, [f"remote://{simulator.address}"], 4, execute_steps=2, max_steps=None)
        runs = [evaluate(spec, tmp_path / str(workers), workers, progress=False) for workers in (2, 1)]
    for run in runs:
        for episode in run["episodes"]:
            episode.pop("policy_seconds")
    assert runs[0]["episodes"] == runs[1]["episodes"]
    assert runs[0]["summary"]["policy"]["all"]["successes"] == 4
    assert runs[0]["summary"]["random"]["all"]["successes"] < 4


# ---- bad input in workers ----


def test_an_environment_that_throws_keeps_what_is_finished(tmp_path, monkeypatch):
    spec = closed_loop_spec(RANDOM, [TOY], 4, max_steps=None)
    monkeypatch.setenv("TOY_THROWS_AT", str(SEED + 2))
    with pytest.raises(WorkerError, match=f"'seed': {SEED + 2}") as error:
        evaluate(spec, tmp_path, num_workers=1, progress=False)
    assert "ZeroDivisionError: the simulation exploded" in str(error.value)
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 2
    monkeypatch.delenv("TOY_THROWS_AT")
    before = (tmp_path / "episodes.jsonl").read_text()
    assert len(evaluate(spec, tmp_path, num_workers=1, progress=False)["episodes"]) == 4
    assert (tmp_path / "episodes.jsonl").read_text().startswith(before)


def test_a_broken_policy_ends_the_run_by_name(tmp_path):
    with policy_server(lambda: Faulty(np.full((4, 2), np.nan))) as server:
        spec = closed_loop_spec({"bad": {"kind": "remote", "address": server.address}}, [TOY], 1, max_steps=None)
        with pytest.raises(WorkerError, match="nan at step 0, dimension 0") as error:
            evaluate(spec, tmp_path, num_workers=1, progress=False)
    assert "'policy': 'bad'" in str(error.value)
    with GymEnv(gym_adapter(TOY)) as env, pytest.raises(PolicyError, match=r"shape \(4, 3\)"):
        run_episode(env, Faulty(np.zeros((4, 3))), SEED)


def test_a_policy_server_that_answers_something_else():
    with environment_server(make_toy) as server, pytest.raises(WireError, match="answered 'hello' by 'environment'"):
        RemotePolicy(server.address)


def test_a_video_that_cannot_be_written_does_not_cost_the_episode(tmp_path, capsys):
    spec = closed_loop_spec(RANDOM, [TOY], 2, max_steps=12, videos_per_task=2)
    (tmp_path / "videos").write_text("in the way")
    results = evaluate(spec, tmp_path, num_workers=1, progress=False)
    assert len(results["video_errors"]) == 2 and not results["videos"]
    assert "could not be written" in write_report(load_run(tmp_path), tmp_path / "report")["md"].read_text()
    (tmp_path / "videos").unlink()
    again = evaluate(spec, tmp_path, num_workers=1, progress=False)
    assert not again["video_errors"] and len(again["videos"]) == 2
    assert [item["digest"] for item in again["episodes"]] == [item["digest"] for item in results["episodes"]]


# ---- replay and reports ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same random policy twice, and another seed of it: (folder, folder, folder)."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        for name, seed in (("first", 0), ("copy", 0), ("other", 5)):
            policies = {"policy": {"kind": "random", "seed": seed}}
            spec = closed_loop_spec(policies, [TOY], 6, max_steps=None, videos_per_task=1)
            evaluate(spec, folder / name, num_workers=1, progress=False)
    return folder / "first", folder / "copy", folder / "other"


def test_replay_is_exact_and_notices_a_difference(runs, tmp_path, capsys):
    episode = replay(runs[0], TOY, SEED + 4, replay_dir=tmp_path)
    assert episode["digest"] == episode["recorded"]["digest"] and Path(episode["video"]).stat().st_size > 1000
    cli.main(["replay", str(runs[0]), "--task", TOY, "--seed", str(SEED), "--output", str(tmp_path)])
    assert "every action as recorded" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"its seeds {SEED} and the 5 after it"):
        replay(runs[0], TOY, 3)
    results = json.loads((runs[0] / "results.json").read_text())
    results["spec"]["policies"]["policy"]["seed"] = 1
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="the evaluation .*: the checkpoint, the machine or the simulator"):
        replay(tmp_path / "changed", TOY, SEED)


def test_an_episode_with_two_outcomes_is_an_error(runs, tmp_path):
    lines = (runs[0] / "episodes.jsonl").read_text().splitlines()
    changed = json.dumps({**json.loads(lines[0]), "digest": "0" * 16})
    (tmp_path / "episodes.jsonl").write_text("\n".join([*lines, changed]) + "\n")
    spec = json.loads((runs[0] / "results.json").read_text())["spec"]
    with pytest.raises(ValueError, match="Line 7 of .* repeats .* with other actions"):
        evaluate(spec, tmp_path, progress=False)


def test_report_is_one_file_with_everything_in_it(runs, tmp_path):
    paths = write_report(load_run(runs[0]), tmp_path, ["wall-oss-0.5"])
    page = paths["html"].read_text()
    assert page.count("data:video/mp4;base64,") == 1
    assert "http" not in page.split("</style>")[1].replace("base64", "") and "<script" not in page
    assert "different conditions" in page and "Block Sorting" in page
    text = paths["md"].read_text()
    assert "> **Note.** Published figures" in text and "| policy | gym:toy_gym" in text
    figures = json.loads(paths["json"].read_text())
    assert figures["summary"]["policy"]["all"]["episodes"] == 6
    assert [reference["name"] for reference in figures["references"]] == ["wall-oss-0.5"]


def test_comparison_of_runs(runs, tmp_path, capsys):
    copy = json.loads(write_comparison(*map(load_run, runs[:2]), tmp_path)["json"].read_text())
    assert copy["all"]["only_a"] == copy["all"]["only_b"] == 0 and copy["all"]["p"] == 1
    cli.main(["report", str(runs[0]), str(runs[2]), "--output", str(tmp_path), "--reference", "x-vla"])
    printed = capsys.readouterr().out
    assert "McNemar" in printed and "first (policy)" in printed and "different conditions" in printed
    other = load_run(runs[2])
    other["spec"] = {**other["spec"], "execute_steps": 9}
    page = write_comparison(load_run(runs[0]), other, tmp_path)["html"].read_text()
    assert "different rules: execute_steps 4 and 9" in page
    for episode in other["episodes"]:
        episode["seed"] += 100
    apart = json.loads(write_comparison(load_run(runs[0]), other, tmp_path)["json"].read_text())
    assert apart["all"] is None and not apart["tasks"][0]["paired"]
    with pytest.raises(ValueError, match="no policy 'p': it has policy"):
        write_comparison(load_run(runs[0]), other, tmp_path, ("p", None))
    with pytest.raises(ValueError, match="no task in common"):
        write_comparison(load_run(runs[0]), {**other, "spec": {**other["spec"], "tasks": ["pusht"]}}, tmp_path)
    with pytest.raises(ValueError, match="holds no results.json"):
        load_run(tmp_path / "nothing")
