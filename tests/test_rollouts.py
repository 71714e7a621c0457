"""Simulators in worker processes for a policy that is elsewhere: every episode once, whatever happens to a worker."""

import contextlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from wallvla.evaluation.environments import make_environment
from wallvla.evaluation.remote import environment_server
from wallvla.evaluation.rollouts import RolloutPool, rollout_spec
from wallvla.evaluation.workers import WorkerError


pytestmark = pytest.mark.filterwarnings("ignore:.*(render fps|observation space|precision lowered).*:UserWarning")
LINE = "gym:toy_gym:Line-v0"


@pytest.fixture(autouse=True)
def toy_is_importable(monkeypatch):
    """In the workers too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def plan(count: int, task: str = LINE) -> list[dict]:
    return [{"number": 10 + number, "task": task, "seed": 100 + number} for number in range(count)]


def seek(requests: list[dict]) -> list[np.ndarray]:
    """Goes to the goal, two actions at a time, a little off by what depends on the episode and the chunk alone."""
    actions = []
    for request in requests:
        position, goal = request["observation"]["state"]
        noise = np.random.default_rng([request["number"], request["chunk"]]).normal(0, 1.5)
        actions.append(np.full((2, 1), np.clip((goal - position) / 0.3 + noise, -1, 1)))
    return actions


def play(pool: RolloutPool, episodes: list[dict], act=seek) -> dict[int, dict]:
    played = list(pool.play(episodes, act))
    numbers = [episode["number"] for episode in played]
    assert sorted(numbers) == [episode["number"] for episode in episodes], "every episode once"
    return {episode["number"]: episode for episode in played}


def expected(episodes: list[dict], reward: str, max_steps: int) -> dict[int, dict]:
    """The same episodes one after the other in this process, by the definition."""
    results = {}
    env = make_environment(LINE)
    for episode in episodes:
        env.reset_scene(episode["seed"])
        rewards, executed, over = [], [], False
        while not over:
            request = {"number": episode["number"], "chunk": len(rewards), "observation": env.observe([])}
            total, count = 0.0, 0
            for action in seek([request])[0]:
                step = env.step(action)
                count += 1
                total += step.reward if reward == "environment" else float(step.success)
                over = step.success or step.done or env.steps == max_steps
                if over:
                    break
            rewards.append(total)
            executed.append(count)
        result = {"success": env.success, "steps": env.steps, "rewards": rewards, "executed": executed}
        results[episode["number"]] = episode | result
    env.close()
    return results


@pytest.mark.parametrize("reward", ["success", "environment"])
def test_episodes_are_what_one_process_plays(reward):
    episodes = plan(12)
    for workers, envs, max_steps in ((1, 1, 3), (2, 3, 3), (3, 5, 2)):
        with RolloutPool(rollout_spec([LINE], [], max_steps=max_steps, reward=reward), workers, envs) as pool:
            found = play(pool, episodes)
            assert found == expected(episodes, reward, max_steps)
            assert play(pool, episodes[:5]) == {e["number"]: found[e["number"]] for e in episodes[:5]}, "again"
            assert pool.lost == 0
    assert any(e["success"] for e in found.values()) and not all(e["success"] for e in found.values())


def test_batches_do_not_depend_on_time():
    """With the same number of workers the same episodes come to the policy together."""
    episodes, compositions = plan(10), []
    for _ in range(2):
        seen = set()

        def act(requests, seen=seen):
            seen.add(tuple((request["number"], request["chunk"]) for request in requests))
            return seek(requests)

        with RolloutPool(rollout_spec([LINE], []), 2, 2) as pool:
            play(pool, episodes, act)
        compositions.append(seen)
    assert compositions[0] == compositions[1]


@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_random_change_nothing(seed):
    episodes, chance = plan(16), random.Random(seed)
    begun: dict[int, int] = {}
    with RolloutPool(rollout_spec([LINE], [], max_steps=3), 2, 3) as pool:

        def act(requests):
            for request in requests:
                begun[request["number"]] = begun.get(request["number"], 0) + (request["chunk"] == 0)
            if kills and chance.random() < 0.4:
                with contextlib.suppress(ProcessLookupError):  # the pool knows already that this one is dead
                    os.kill(chance.choice(pool.processes), signal.SIGKILL)
                    kills.pop()
            return seek(requests)

        kills = [None] * 2  # no episode can be lost three times
        assert play(pool, episodes, act) == expected(episodes, "success", 3)
        assert pool.lost > 0
        assert sum(begun.values()) <= len(episodes) + pool.lost
        before = pool.lost
        os.kill(pool.processes[0], signal.SIGKILL)  # while it is idle
        assert play(pool, episodes[:4]) == expected(episodes[:4], "success", 3)
        assert pool.lost > before


def test_an_episode_that_kills_its_worker_is_dropped(monkeypatch):
    monkeypatch.setenv("TOY_DIES_AT", "103")
    with RolloutPool(rollout_spec([LINE], []), 1, 1) as pool:
        found = play(pool, plan(6))
        assert found[13] == {"number": 13, "task": LINE, "seed": 103, "dropped": True}
        assert pool.lost == 3
        assert {n: e for n, e in found.items() if n != 13} == expected(
            [e for e in plan(6) if e["seed"] != 103], "success", 3
        )


def test_a_call_that_was_broken_off_does_not_reach_the_next_one():
    """Its workers owe replies, which would be taken for those of other episodes."""
    with RolloutPool(rollout_spec([LINE], [], max_steps=3), 2, 3) as pool:
        broken_off = pool.play(plan(12), seek)
        next(broken_off)
        assert play(pool, plan(7)) == expected(plan(7), "success", 3)
        broken_off.close()

        def interrupted(requests):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            play(pool, plan(4), interrupted)
        assert play(pool, plan(5)) == expected(plan(5), "success", 3)
        assert pool.lost == 0


def test_a_worker_that_hangs_is_replaced(monkeypatch):
    monkeypatch.setenv("TOY_HANGS_AT", "102")
    with RolloutPool(rollout_spec([LINE], []), 1, 1, reply_seconds=3.0) as pool:
        found = play(pool, plan(5))
        assert "dropped" in found[12] and pool.lost == 3
        assert sum("dropped" in episode for episode in found.values()) == 1


def test_simulators_that_always_die_end_the_run(tmp_path):
    with (
        RolloutPool(rollout_spec(["gym:nowhere:Line-v0"], []), 1, 4, tmp_path) as pool,
        pytest.raises(WorkerError, match="nowhere"),
    ):
        list(pool.play(plan(4, "gym:nowhere:Line-v0"), seek))
    assert "nowhere" in (tmp_path / "worker-0.log").read_text()


def test_simulators_behind_a_socket():
    with environment_server(lambda task, image_size: make_environment(LINE, image_size)) as server:
        task = f"remote://{server.address}"
        with RolloutPool(rollout_spec([task], []), 1, 3) as pool:
            found = play(pool, plan(5, task))
    for number, episode in expected(plan(5), "success", 3).items():
        assert found[number] == episode | {"task": task}


def test_what_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="1 to 500 steps"):
        rollout_spec(["reach-v3"], max_steps=501)
    with pytest.raises(ValueError, match="Unknown reward 'dense'"):
        rollout_spec([LINE], reward="dense")
    with pytest.raises(ValueError, match="did you mean"):
        rollout_spec(["reach"])
    with pytest.raises(ValueError, match="envs_per_worker"):
        RolloutPool(rollout_spec([LINE]), 1, 0)
