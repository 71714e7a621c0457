"""Closed-loop evaluation: policies act in simulators, in worker processes; success rates with intervals.

    spec = closed_loop_spec(
        policies={"trained": {"kind": "hub", "path": "runs/quickstart/hub", "embodiment": "metaworld"},
                  "random": {"kind": "random"}},
        tasks=["button-press-topdown-v3"], episodes_per_task=50)
    results = evaluate(spec, "runs/quickstart/closed_loop")
    print(format_summary(results["summary"]))

Finished episodes are lines of `episodes.jsonl`; a second call with the same output folder runs only what is missing.
The result of an episode depends on its policy, task and seed alone, never on the worker or on the order: `replay` runs
one again and compares every action by its digest.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .environments import Environment, check_name, make_environment, step_limit
from .metaworld import EVALUATION_SEED_START
from .policy import Policy, build_policy, check_chunk
from .statistics import wilson_interval
from .video import write_video
from .workers import WorkerPool


VIDEO_RATE = 20  # frames of a video per second, in real time; fewer where the control rate is lower
VIDEO_SIZE = 256


def closed_loop_spec(
    policies: Mapping[str, Mapping],
    tasks: Sequence[str],
    episodes_per_task: int,
    seed0: int = EVALUATION_SEED_START,
    image_size: int = 64,
    execute_steps: int = 4,
    max_steps: int | None = 300,
    settle_steps: int = 0,
    videos_per_task: int = 0,
    trust_remote_code: bool = False,
) -> dict:
    """The plain description of an evaluation that `evaluate` takes.

    Args:
        policies: name -> spec of `policy.build_policy`.
        tasks: names from `environments.expand_names`; a bare name is a Meta-World task.
        episodes_per_task: every policy meets the seeds `seed0 ... seed0 + episodes_per_task - 1` in every task.
        seed0: at least `EVALUATION_SEED_START`; demonstrations never use those seeds.
        image_size: side of the policy's images in pixels.
        execute_steps: actions of each chunk that are executed before the policy looks again.
        max_steps: an episode without success ends after this many steps (Meta-World: 80 a second). None: when the
            environment says so.
        settle_steps: steps that the policy goes on after its first success.
        videos_per_task: the first so many episodes of every policy and task are written as mp4.
        trust_remote_code: true runs the checkpoint's own code, in workers that cannot import `wallvla`.

    Raises:
        ValueError: the first value that breaks a rule.
    """
    for task in tasks:
        check_name(task)
    limit = min((limit for limit in map(step_limit, tasks) if limit is not None), default=None)
    rules = [
        (len(set(tasks)) == len(tasks), f"Every task once, got {list(tasks)}."),
        (len(policies) > 0, "policies is empty: name at least one."),
        (len(tasks) > 0, "tasks is empty: name at least one."),
        (episodes_per_task > 0, f"episodes_per_task must be positive, got {episodes_per_task}."),
        (
            seed0 >= EVALUATION_SEED_START,
            f"seed0 is {seed0}: seeds below {EVALUATION_SEED_START} belong to demonstrations.",
        ),
        (execute_steps > 0, f"execute_steps must be positive, got {execute_steps}."),
        (settle_steps >= 0, f"settle_steps must not be negative, got {settle_steps}."),
        (
            max_steps is None or 0 < max_steps and (limit is None or max_steps + settle_steps <= limit),
            f"max_steps {max_steps} + settle_steps {settle_steps} must lie in [1, {limit}], where the simulator ends.",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
    return {
        "job": "evaluate",
        "policies": {name: dict(policy) for name, policy in policies.items()},
        "tasks": list(tasks),
        "episodes_per_task": episodes_per_task,
        "seed0": seed0,
        "image_size": image_size,
        "execute_steps": execute_steps,
        "max_steps": max_steps,
        "settle_steps": settle_steps,
        "videos_per_task": videos_per_task,
        "trust_remote_code": trust_remote_code,
    }


def evaluate(spec: dict, output_dir: Path | str, num_workers: int = 2, progress: bool = True) -> dict:
    """Runs the episodes of `spec` that `output_dir` does not hold yet.

    Args:
        spec: from `closed_loop_spec`.
        output_dir: gets `episodes.jsonl`, `results.json`, `logs/` and `videos/`.
        num_workers: worker processes.
        progress: whether to show a progress bar.

    Returns:
        `{"episodes": [...], "summary": {policy: {task or "all": ...}}, "videos": [...], "video_errors": [...]}`, in
        the order of the spec (videos: failures first); see `summarize`. A video that could not be written is an error
        there and is tried again by the next call; its episode counts.

    Raises:
        WorkerError: a worker stopped; finished episodes are kept and the next call goes on.
        ValueError: `episodes.jsonl` is damaged before its last line.
    """
    output_dir = Path(output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    keys = {name: _policy_key(spec, policy) for name, policy in spec["policies"].items()}
    finished = _read_finished(output_dir / "episodes.jsonl", keys)
    wanted = [
        {"policy": name, "task": task, "seed": spec["seed0"] + number, "video": number < spec["videos_per_task"]}
        for name in spec["policies"]
        for task in spec["tasks"]
        for number in range(spec["episodes_per_task"])
    ]
    jobs = [job for job in wanted if _identity(job) not in finished or _video_is_missing(job, finished, output_dir)]
    if jobs:
        _run_jobs({**spec, "output_dir": str(output_dir)}, jobs, finished, keys, len(wanted), num_workers, progress)
    episodes = [finished[_identity(job)] for job in wanted]
    videos = [episode for episode in episodes if episode["video"] is not None]
    results = {
        "episodes": episodes,
        "summary": summarize(episodes),
        "videos": [str(output_dir / episode["video"]) for episode in sorted(videos, key=lambda item: item["success"])],
        "video_errors": [episode["video_error"] for episode in episodes if "video_error" in episode],
    }
    _write_json(output_dir / "results.json", {"spec": spec, **results})
    return results


def _run_jobs(
    spec: dict, jobs: list[dict], finished: dict, keys: dict[str, str], total: int, num_workers: int, progress: bool
) -> None:
    """Runs the jobs and records each episode in the file and in `finished` as it comes in."""
    output_dir = Path(spec["output_dir"])
    tally: dict[str, list[bool]] = {}
    with (
        open(output_dir / "episodes.jsonl", "a", encoding="utf-8") as log,
        WorkerPool(spec, min(num_workers, len(jobs)), output_dir / "logs") as pool,
        tqdm(total=total, initial=total - len(jobs), desc="closed loop", unit="episode", disable=not progress) as bar,
    ):
        for index, episode in pool.map(jobs):
            log.write(json.dumps({**episode, "key": keys[episode["policy"]]}) + "\n")
            log.flush()
            finished[_identity(jobs[index])] = episode
            outcomes = tally.setdefault(episode["policy"], [])
            outcomes.append(episode["success"])
            rate = sum(outcomes) / len(outcomes)
            bar.set_postfix_str(f"{episode['policy']} {sum(outcomes)}/{len(outcomes)} = {rate:.0%}", refresh=False)
            bar.update()


def replay(
    output_dir: Path | str, task: str, seed: int, policy: str | None = None, replay_dir: Path | str | None = None
) -> dict:
    """Runs one episode of a finished evaluation again, with a video, and compares it with the record.

    Args:
        output_dir: of `evaluate`.
        task, seed: of the episode.
        policy: name in the evaluation; None takes the first.
        replay_dir: gets the video; by default `replay` in `output_dir`.

    Returns:
        The episode, with `video` as an absolute path and `recorded`, what the evaluation has. The same actions led to
        the same end if both `digest`s are equal.

    Raises:
        ValueError: the evaluation has no such episode, or it went otherwise this time.
    """
    output_dir = Path(output_dir).resolve()
    results = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    spec = results["spec"]
    policy = next(iter(spec["policies"])) if policy is None else policy
    found = [item for item in results["episodes"] if _identity(item) == (policy, task, seed)]
    if not found:
        raise ValueError(
            f"{output_dir} has no episode of policy {policy!r}, task {task!r}, seed {seed}: its policies are "
            f"{list(spec['policies'])}, its tasks {spec['tasks']}, its seeds {spec['seed0']} and the "
            f"{spec['episodes_per_task'] - 1} after it."
        )
    replay_dir = Path(replay_dir or output_dir / "replay").resolve()
    job = {"policy": policy, "task": task, "seed": seed, "video": True}
    with WorkerPool({**spec, "output_dir": str(replay_dir)}, 1, replay_dir / "logs") as pool:
        [(_, episode)] = pool.map([job])
    for name in ("success", "steps", "digest"):
        if episode[name] != found[0][name]:
            raise ValueError(
                f"The replay of {task}, seed {seed} has {name} {episode[name]}, the evaluation {found[0][name]}: the "
                "checkpoint, the machine or the simulator is another one now, or something does not follow the seed."
            )
    if "video_error" in episode:
        raise OSError(episode["video_error"])
    return {**episode, "video": str(replay_dir / episode["video"]), "recorded": found[0]}


class EpisodeRunner:
    """The worker's side of `evaluate`: one simulator per task, checkpoints loaded once."""

    def __init__(self, spec: dict) -> None:
        self._spec = spec
        self._envs: dict[str, Environment] = {}
        if any(policy["kind"] == "hub" for policy in spec["policies"].values()):
            import torch

            torch.set_num_threads(1)

    def run(self, job: dict) -> dict:
        """Plays the episode of `job`: policy, task, seed, and whether to write a video."""
        spec, task = self._spec, job["task"]
        if task not in self._envs:
            self._envs[task] = make_environment(task, spec["image_size"])
        env = self._envs[task]
        policy = build_policy(spec["policies"][job["policy"]], env, spec["trust_remote_code"])
        frames: list[np.ndarray] | None = [] if job["video"] else None
        outcome = run_episode(
            env, policy, job["seed"], spec["execute_steps"], spec["max_steps"], spec["settle_steps"], frames
        )
        episode = {"policy": job["policy"], "task": task, "seed": job["seed"], **outcome, "video": None}
        if frames is None:
            return episode
        word = "success" if outcome["success"] else "failure"
        video = Path("videos") / _file_name(job["policy"]) / f"{_file_name(task)}_seed{job['seed']}_{word}.mp4"
        rate = env.control_frequency / video_stride(env.control_frequency)
        try:
            write_video(Path(spec["output_dir"]) / video, frames, rate, f"{job['policy']}: {env.instruction} ({word})")
        except OSError as error:  # a full disk must not cost the outcome; the next call tries the video again
            return {**episode, "video_error": f"{video}: {error}"}
        return {**episode, "video": video.as_posix()}

    def close(self) -> None:
        """Closes the simulators."""
        for env in self._envs.values():
            env.close()


def video_stride(control_frequency: float) -> int:
    """Control steps between two frames of a video."""
    return max(1, round(control_frequency / VIDEO_RATE))


def run_episode(
    env: Environment,
    policy: Policy,
    seed: int,
    execute_steps: int = 4,
    max_steps: int | None = 300,
    settle_steps: int = 0,
    frames: list[np.ndarray] | None = None,
) -> dict:
    """Plays one episode.

    Args:
        env: the simulator.
        policy: what acts.
        seed: of the scene and of the policy.
        execute_steps, max_steps, settle_steps: see `closed_loop_spec`.
        frames: a list to fill with `env.video_frame` (256 px) every `video_stride` steps.

    Returns:
        `success` (at any step within `max_steps`), `success_at_end`, `progress` (0 to 1, best of the episode),
        `steps`, `return` (sum of the rewards), `policy_calls`, `policy_seconds`, `digest` (of all executed actions).

    Raises:
        PolicyError: the policy returned something else than finite actions (steps, action_dim).
    """
    stride = video_stride(env.control_frequency)
    digest = hashlib.sha256()
    env.reset_scene(seed)
    policy.reset(seed)
    last_step = env.max_steps if max_steps is None else max_steps
    total_reward, calls, seconds, solved, over = 0.0, 0, 0.0, False, False
    while env.steps < last_step and not over:
        observation = env.observe(policy.cameras)
        started = time.perf_counter()
        chunk = check_chunk(policy.act(observation, env.instruction), env.action_dim)
        seconds += time.perf_counter() - started
        calls += 1
        for action in chunk[:execute_steps]:
            if frames is not None and env.steps % stride == 0:
                frames.append(env.video_frame(VIDEO_SIZE))
            digest.update(action.tobytes())
            result = env.step(action)
            total_reward, over = total_reward + result.reward, result.done
            if env.success and not solved:
                solved = True
                last_step = env.steps + settle_steps
            if over or env.steps >= last_step:
                break
    if frames is not None:
        frames.append(env.video_frame(VIDEO_SIZE))
    return {
        "success": solved,
        "success_at_end": env.success,
        "progress": round(1.0 if solved else env.progress, 6),
        "steps": env.steps,
        "return": round(total_reward, 6),
        "policy_calls": calls,
        "policy_seconds": round(seconds, 4),
        "digest": digest.hexdigest()[:16],
    }


def summarize(episodes: Sequence[Mapping]) -> dict[str, dict[str, dict]]:
    """Success rates by policy and task, and over all tasks of a policy under `"all"`.

    Each entry: `episodes`, `successes`, `rate`, `low`, `high` (95% Wilson), `progress` (mean, 0 to 100), `mean_steps`
    (of the successes, None without one), `policy_ms` (mean time of one call).
    """
    groups: dict[str, dict[str, list[Mapping]]] = {}
    for episode in episodes:
        tasks = groups.setdefault(episode["policy"], {})
        tasks.setdefault(episode["task"], []).append(episode)
    summary = {}
    for policy, tasks in groups.items():
        everything = [episode for group in tasks.values() for episode in group]
        summary[policy] = {task: _summarize_group(group) for task, group in tasks.items()}
        summary[policy]["all"] = _summarize_group(everything)
    return summary


def _summarize_group(group: Sequence[Mapping]) -> dict:
    successes = [episode for episode in group if episode["success"]]
    low, high = wilson_interval(len(successes), len(group))
    calls = sum(episode["policy_calls"] for episode in group)
    return {
        "episodes": len(group),
        "successes": len(successes),
        "rate": len(successes) / len(group),
        "low": low,
        "high": high,
        "progress": 100 * sum(episode["progress"] for episode in group) / len(group),
        "mean_steps": sum(episode["steps"] for episode in successes) / len(successes) if successes else None,
        "policy_ms": 1000 * sum(episode["policy_seconds"] for episode in group) / calls,
    }


def format_summary(summary: Mapping[str, Mapping[str, Mapping]]) -> str:
    """The summary as an aligned table."""
    rows = [("policy", "task", "success", "rate", "95% interval", "progress", "steps", "ms/call")]
    for policy, tasks in summary.items():
        for task, entry in tasks.items():
            rows.append(
                (
                    policy,
                    task,
                    f"{entry['successes']}/{entry['episodes']}",
                    f"{entry['rate']:.0%}",
                    f"{entry['low']:.0%} - {entry['high']:.0%}",
                    f"{entry['progress']:.0f}",
                    "-" if entry["mean_steps"] is None else f"{entry['mean_steps']:.0f}",
                    f"{entry['policy_ms']:.1f}",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _file_name(name: str) -> str:
    """A name that is one plain part of a path; names that had to be changed stay apart by a digest."""
    plain = "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in name)[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _identity(job: Mapping) -> tuple[str, str, int]:
    return job["policy"], job["task"], job["seed"]


def _video_is_missing(job: Mapping, finished: Mapping, output_dir: Path) -> bool:
    video = finished[_identity(job)]["video"]
    return job["video"] and (video is None or not (output_dir / video).exists())


def _policy_key(spec: Mapping, policy: Mapping) -> str:
    """Fingerprint of all that decides an episode's outcome: an episode of other weights or rules is not finished."""
    rules = {name: spec[name] for name in ("image_size", "execute_steps", "max_steps", "settle_steps")}
    files = []
    if policy["kind"] == "hub":
        rules["trust_remote_code"] = spec["trust_remote_code"]
        for path in sorted(Path(policy["path"]).glob("*")):  # nothing for the name of a Hub repository
            if path.suffix in (".safetensors", ".json", ".jinja", ".py"):
                files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    text = json.dumps([rules, policy, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_finished(path: Path, keys: Mapping[str, str]) -> dict[tuple, dict]:
    """Finished episodes by identity. A last line that a crash cut short is removed from the file."""
    finished: dict[tuple, dict] = {}
    if not path.exists():
        return finished
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with open(path, "rb+") as log:
            log.truncate(len(complete))
    for number, line in enumerate(complete.decode("utf-8").splitlines(), start=1):
        try:
            episode = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON ({error}): remove the line or the file.") from error
        if episode.pop("key") != keys.get(episode["policy"]):
            continue
        # An episode may be there twice, when its video was missing. Then it has to be the same episode
        known = finished.get(_identity(episode))
        if known is not None and known["digest"] != episode["digest"]:
            raise ValueError(
                f"Line {number} of {path} repeats {_identity(episode)} with other actions than before: something in "
                "this policy or simulator does not follow from the seed. Remove the file and find out what."
            )
        finished[_identity(episode)] = episode
    return finished


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
