"""Grouped Blind Ensemble: compare models on a robot while nobody who could favour one knows which is running.

After algorithm 1 and section III-B of "Rethinking VLA scaling": models are drawn into groups of at most K; for each
task and group they get aliases, and a shuffled queue holds every alias N times. The system dispatches the next alias,
an operator only executes, someone else judges, and there is a break after each group. Names come back at the end.

    create_study("study", models=[...], tasks=["stack_bowls"], group_size=4, trials=10)
    with BlindStudy("study") as study:
        trial = study.start_next()                 # {"trial": "T0001", "task": "stack_bowls", "alias": "KQ7F"}
        study.finish(trial["trial"], operator="ada")
        study.judge("T0001", judge="bob", counts=[1, 1, 0])
    results = reveal("study")                      # only when every trial is executed and judged

Two files lie in the folder. `journal.jsonl` is public: a hash chain of what happened, without any name of a model.
`sealed.json` (mode 600) has the aliases' models; the journal's first record holds its hash, so it cannot be
exchanged later, and a random salt in it keeps the hash from being guessed. Whoever operates or judges must not open
it: run the dispatcher under another account, or on another machine, if that needs to be enforced.

Every method that changes something appends one record, on the disk when the method returns. So a crash at any point
loses nothing that was reported as done; a trial that had started but not finished is dispatched again.
"""

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .journal import Journal, JournalError, read_journal
from .policy import Policy
from .rubric import Rubric, find_rubric, load_rubrics, read_rubrics
from .statistics import compare_unpaired, holm
from .trials import summarize_group


ALIAS_LETTERS = "BCDFGHJKLMNPQRSTVWXZ23456789"  # no vowels: aliases shall not look like words
JOURNAL_FILE = "journal.jsonl"
SEALED_FILE = "sealed.json"


class BlindError(ValueError):
    """A step that the protocol does not allow now; the message says which one is next."""


# --- planning


def plan_study(
    models: Sequence[str], tasks: Sequence[str], group_size: int, trials: int, rng: np.random.Generator
) -> tuple[list[dict], dict[str, str]]:
    """Draws groups, aliases and queues.

    Args:
        models: their names.
        tasks: in the order in which they are set up.
        group_size: at most so many models in a group (the paper: 4 to 8); groups are as even as possible.
        trials: of every model at every task.
        rng: the only source of chance; positions in `models` enter, names do not.

    Returns:
        Blocks `{"task", "group", "queue": [alias, ...]}` in the order of execution, and alias -> model.
    """
    order = rng.permutation(len(models))
    groups = np.array_split(order, math.ceil(len(models) / group_size))
    blocks, sealed = [], {}
    for task in tasks:
        for group, members in enumerate(groups):
            names = {}
            for member in members:
                alias = _draw_alias(rng, sealed)
                sealed[alias] = models[member]
                names[alias] = None
            queue = np.repeat(np.array(sorted(names)), trials)
            blocks.append({"task": task, "group": group, "queue": rng.permutation(queue).tolist()})
    return blocks, sealed


def _draw_alias(rng: np.random.Generator, taken: Mapping[str, str]) -> str:
    while True:
        alias = "".join(ALIAS_LETTERS[index] for index in rng.integers(len(ALIAS_LETTERS), size=4))
        if alias not in taken:
            return alias


def create_study(
    folder: Path | str,
    models: Sequence[str],
    tasks: Sequence[str],
    group_size: int = 4,
    trials: int = 10,
    rubric_file: Path | str | None = None,
    separate_judge: bool = True,
    entropy: int | None = None,
) -> None:
    """Draws a study and writes its two files.

    Args:
        folder: new or empty.
        models: what is compared: names that `load_policy` of the dispatcher understands, all different.
        tasks: ids of rubrics.
        group_size: models in a group, at most.
        trials: of every model at every task.
        rubric_file: JSON with rubrics of your own, beside the published ones.
        separate_judge: whether a trial's judge must be another person than its operator.
        entropy: of the draw; by default fresh from the operating system. Whoever knows it can undo the blinding.

    Raises:
        ValueError: an argument breaks a rule, or the folder holds a study.
    """
    rules = [
        (len(models) >= 2, f"A comparison needs at least two models, got {list(models)}."),
        (len(set(models)) == len(models), f"Every model once, got {list(models)}."),
        (
            len(tasks) > 0 and len(set(tasks)) == len(tasks),
            f"At least one task and every task once, got {list(tasks)}.",
        ),
        (
            len(models) // math.ceil(len(models) / max(1, group_size)) >= 2,
            f"{len(models)} models in groups of at most {group_size} leave one alone, which is not blind: change it.",
        ),
        (trials >= 1, f"trials must be positive, got {trials}."),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
    rubrics = load_rubrics() | ({} if rubric_file is None else read_rubrics(rubric_file))
    for task in tasks:
        find_rubric(task, rubrics)
    folder = Path(folder)
    if (folder / JOURNAL_FILE).exists():
        raise ValueError(f"{folder} holds a study already: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    entropy = secrets.randbits(128) if entropy is None else entropy
    blocks, aliases = plan_study(models, tasks, group_size, trials, np.random.default_rng(entropy))
    # The commitment hides the aliases only if nobody can try all of them: hence the salt
    sealed = json.dumps({"salt": secrets.token_hex(32), "aliases": aliases}, indent=1) + "\n"
    _write_sealed(folder / SEALED_FILE, sealed)
    number = 0
    for block in blocks:
        block["trials"] = []
        for alias in block.pop("queue"):
            number += 1
            block["trials"].append({"trial": f"T{number:04d}", "alias": alias})
    with Journal(folder / JOURNAL_FILE) as journal:
        journal.append(
            {
                "event": "created",
                "models": len(models),
                "trials_per_model": trials,
                "separate_judge": separate_judge,
                "rubric_file": None if rubric_file is None else str(Path(rubric_file).resolve()),
                "blocks": blocks,
                # Judges go through the recordings of a block in an order of its own
                "judging_seed": int(np.random.default_rng([entropy, 1]).integers(2**32)),
                "sealed": hashlib.sha256(sealed.encode()).hexdigest(),
            }
        )


def _write_sealed(path: Path, text: str) -> None:
    """Writes the key; a folder in which only the key got written is no study yet and may be drawn again."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# --- running


class BlindStudy:
    """The state of a study, as its journal tells it; see the module for the order of the steps."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / JOURNAL_FILE).exists():
            raise BlindError(f"{folder} holds no study: create one first.")
        self._journal = Journal(self.folder / JOURNAL_FILE)
        try:
            self._replay()
        except ValueError:
            self._journal.close()
            raise

    def _replay(self) -> None:
        records = self._journal.records
        if not records:
            raise BlindError(
                f"{self.folder}: the study was not written completely; delete the folder and create it anew."
            )
        plan = records[0]
        self.separate_judge = plan["separate_judge"]
        extra = {} if plan["rubric_file"] is None else read_rubrics(plan["rubric_file"])
        self._rubrics = load_rubrics() | extra
        self._blocks = plan["blocks"]
        self._judging_seed = plan["judging_seed"]
        self._trials = {
            entry["trial"]: {**entry, "task": block["task"], "block": number}
            for number, block in enumerate(self._blocks)
            for entry in block["trials"]
        }
        self._started: dict[str, int] = {}  # trial -> attempts
        self._executed: dict[str, dict] = {}
        self._judged: dict[str, dict] = {}
        self._breaks: set[int] = set()
        self.running: str | None = None
        self.revealed = False
        for record in records[1:]:
            self._apply(record)

    def _apply(self, record: Mapping) -> None:
        """The effect of one record; a record that cannot follow the ones before it is a damaged study."""
        event, trial = record["event"], record.get("trial")
        if trial in {"executed": self._executed, "judged": self._judged}.get(event, {}):
            raise JournalError(f"{self._journal.path} has trial {trial} {event} twice: the study is damaged.")
        if event == "started":
            self._started[trial] = self._started.get(trial, 0) + 1
            self.running = trial
        elif event == "executed":
            self._executed[trial] = dict(record)
            self.running = None
        elif event == "repeat":
            self.running = None
        elif event == "judged":
            self._judged[trial] = dict(record)
        elif event == "break":
            self._breaks.add(record["block"])
        elif event == "revealed":
            self.revealed = True

    def _add(self, record: dict) -> None:
        if self.revealed:
            raise BlindError("The study is revealed: nothing can be added any more.")
        self._journal.append(record)
        self._apply(record)

    def __enter__(self) -> "BlindStudy":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Gives the journal free for another process."""
        self._journal.close()

    @property
    def head(self) -> str:
        """The last hash of the chain: write it down after each session."""
        return self._journal.head

    def rubric(self, trial: str) -> Rubric:
        """How a trial is judged."""
        return find_rubric(self._trial(trial)["task"], self._rubrics)

    def progress(self) -> dict:
        """`trials`, `executed`, `judged`, `break_due`, `running`: what anyone may know."""
        return {
            "trials": len(self._trials),
            "executed": len(self._executed),
            "judged": len(self._judged),
            "break_due": self.break_due,
            "running": self.running,
        }

    @property
    def break_due(self) -> bool:
        """Whether a block is over and its break was not taken; the last block needs none."""
        done = self._finished_block()
        return done is not None and done not in self._breaks and len(self._executed) < len(self._trials)

    def _finished_block(self) -> int | None:
        """The last block of which every trial is executed, when nothing of the next one is."""
        counts = [sum(entry["trial"] in self._executed for entry in block["trials"]) for block in self._blocks]
        complete = [count == len(block["trials"]) for count, block in zip(counts, self._blocks, strict=True)]
        number = sum(complete) - 1
        return number if number >= 0 and sum(counts) == sum(counts[: number + 1]) else None

    def start_next(self) -> dict:
        """Dispatches the next trial: `{"trial", "task", "alias"}`. One that was interrupted comes again.

        Raises:
            BlindError: a break is due, or all trials are executed.
        """
        if self.running is not None:
            trial = self.running
        else:
            if self.break_due:
                raise BlindError("The group is through: take a break, then confirm it with take_break().")
            waiting = [trial for trial in self._trials if trial not in self._executed]
            if not waiting:
                raise BlindError("All trials are executed: what is left is judging and revealing.")
            trial = waiting[0]
        self._add({"event": "started", "trial": trial})
        return self._public(trial)

    def finish(self, trial: str, operator: str, recording: str = "") -> None:
        """Records that the running trial was executed; says nothing about its outcome.

        Args:
            trial: the one that `start_next` gave.
            operator: who executed it.
            recording: where the judge finds it, for instance the name of a video.
        """
        self._check_running(trial)
        if not operator.strip():
            raise BlindError("operator is empty: say who executed the trial.")
        self._add({"event": "executed", "trial": trial, "operator": operator, "recording": recording})

    def repeat(self, trial: str, reason: str) -> None:
        """Discards the running trial for a technical reason, which stays in the journal; it is dispatched again."""
        self._check_running(trial)
        if not reason.strip():
            raise BlindError("reason is empty: a repeated trial needs one, which has nothing to do with its outcome.")
        self._add({"event": "repeat", "trial": trial, "reason": reason})

    def take_break(self) -> None:
        """Records the break after a group."""
        if not self.break_due:
            raise BlindError("No break is due: it comes when every trial of a group is executed.")
        self._add({"event": "break", "block": self._finished_block()})

    def next_to_judge(self) -> dict | None:
        """An executed trial without a judgement, `{"trial", "task", "recording"}`, in an order unlike the execution's.

        None if there is none now. The alias is left out: judging needs no link between trials.
        """
        waiting = sorted(trial for trial in self._executed if trial not in self._judged)
        if not waiting:
            return None
        block = min(self._trial(trial)["block"] for trial in waiting)
        members = [entry["trial"] for entry in self._blocks[block]["trials"]]
        order = np.random.default_rng([self._judging_seed, block]).permutation(len(members))
        trial = next(members[index] for index in order if members[index] in waiting)
        return {"trial": trial, "task": self._trial(trial)["task"], "recording": self._executed[trial]["recording"]}

    def judge(self, trial: str, judge: str, counts: Sequence[int], comment: str = "") -> dict:
        """Records the outcome of an executed trial.

        Args:
            trial: any executed one that was not judged.
            judge: who judges; not its operator, if the study asks for that.
            counts: completed stages of its rubric.
            comment: anything worth knowing.

        Raises:
            BlindError: not executed, judged already, or judged by its operator.
            ValueError: counts that the rubric does not allow.
        """
        self._trial(trial)
        if trial not in self._executed:
            raise BlindError(f"Trial {trial} was not executed yet.")
        if trial in self._judged:
            raise BlindError(f"Trial {trial} is judged already: an outcome is recorded once.")
        if not judge.strip():
            raise BlindError("judge is empty: say who judges.")
        if self.separate_judge and judge.strip() == self._executed[trial]["operator"].strip():
            raise BlindError(f"{judge} executed trial {trial}: someone else has to judge it.")
        rubric = self.rubric(trial)
        record = {
            "event": "judged",
            "trial": trial,
            "judge": judge,
            "counts": list(counts),
            "progress": rubric.progress(counts),
            "success": rubric.success(counts),
            "comment": comment,
        }
        self._add(record)
        return record

    def _reveal(self, aliases: Mapping[str, str]) -> list[dict]:
        left = len(self._trials) - len(self._judged)
        if left:
            raise BlindError(
                f"{left} of {len(self._trials)} trials are not judged yet: names come back only at the end, so that "
                "no interim result can stop or steer the study."
            )
        if not self.revealed:
            self._add({"event": "revealed"})
        return [
            {**self._public(trial), **self._judged[trial], "model": aliases[self._trials[trial]["alias"]]}
            for trial in self._trials
        ]

    def _trial(self, trial: str) -> dict:
        if trial not in self._trials:
            raise BlindError(f"The study has no trial {trial!r}: it has T0001 to {list(self._trials)[-1]}.")
        return self._trials[trial]

    def _public(self, trial: str) -> dict:
        return {name: self._trials[trial][name] for name in ("trial", "task", "alias")}

    def _check_running(self, trial: str) -> None:
        self._trial(trial)
        if trial != self.running:
            now = "no trial is" if self.running is None else f"trial {self.running} is"
            raise BlindError(f"Trial {trial} is not running, {now}: start_next() dispatches one.")


# --- dispatch


class BlindDispatcher:
    """The only one who reads the key: runs the policy of the current trial behind its alias.

    Args:
        folder: of the study.
        load_policy: from a model's name to its policy. Anything with the `Policy` protocol will do: a checkpoint, a
            `remote.RemotePolicy`, a client of any policy server.
        cameras: what every policy is shown, so that the cameras of a request say nothing about the model.
        action_dim: length of an action; every policy must have the same.
        chunk_steps: actions of each chunk that are handed out; longer chunks are cut, because their length would tell.
        seconds_per_call: every answer takes at least so long, because speed would tell; give more than the slowest
            model needs. 0 in simulation.

    Raises:
        BlindError: the key is not the one that the journal was begun with.
    """

    def __init__(
        self,
        folder: Path | str,
        load_policy: Callable[[str], Policy],
        cameras: Sequence[str],
        action_dim: int,
        chunk_steps: int,
        seconds_per_call: float = 0.0,
    ) -> None:
        self._aliases = _read_sealed(Path(folder))
        self._load_policy = load_policy
        self._loaded: dict[str, Policy] = {}
        self._cameras = tuple(cameras)
        self._action_dim, self._chunk_steps, self._seconds = action_dim, chunk_steps, seconds_per_call

    def policy(self, alias: str) -> "BlindPolicy":
        """The policy behind an alias; loading it again for another alias of the same model costs nothing.

        Raises:
            BlindError: no such alias, or the model could not be loaded (without saying which).
        """
        if alias not in self._aliases:
            raise BlindError(f"The study has no alias {alias!r}.")
        model = self._aliases[alias]
        if model not in self._loaded:
            try:
                self._loaded[model] = self._load_policy(model)
            except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError) as error:
                # The cause names the model, so it must not reach the operator's screen or log
                raise BlindError(
                    f"The policy of {alias} could not be loaded ({type(error).__name__}). The operator repeats the "
                    "trial; whoever keeps the key tries the models by name."
                ) from None
        return BlindPolicy(
            alias, self._loaded[model], self._cameras, self._action_dim, self._chunk_steps, self._seconds
        )


class BlindPolicy:
    """A policy that gives away nothing but its actions."""

    def __init__(
        self, alias: str, policy: Policy, cameras: Sequence[str], action_dim: int, chunk_steps: int, seconds: float
    ) -> None:
        self.alias = alias
        self.cameras = cameras
        self._policy, self._action_dim, self._chunk_steps, self._seconds = policy, action_dim, chunk_steps, seconds

    def __repr__(self) -> str:
        return f"BlindPolicy({self.alias})"

    def reset(self, seed: int = 0) -> None:
        """Starts an episode of the hidden policy."""
        self._policy.reset(seed)

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The hidden policy's next actions, float64 (chunk_steps, action_dim), not before `seconds_per_call`.

        Raises:
            BlindError: the policy failed; the message does not say how, because that would say which.
        """
        started = time.monotonic()
        shown = {name: observation["images"][name] for name in self._policy.cameras}
        try:
            chunk = np.asarray(self._policy.act({**observation, "images": shown}, instruction), np.float64)
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise BlindError(f"The policy of {self.alias} failed ({type(error).__name__}).") from None
        rest = self._seconds - (time.monotonic() - started)
        if rest > 0:
            time.sleep(rest)
        if chunk.ndim != 2 or chunk.shape[1] != self._action_dim or len(chunk) < self._chunk_steps:
            raise BlindError(
                f"The policy of {self.alias} returned no {self._chunk_steps} actions of {self._action_dim}."
            )
        if not np.isfinite(chunk[: self._chunk_steps]).all():
            raise BlindError(f"The policy of {self.alias} returned actions that are not finite.")
        return chunk[: self._chunk_steps]


def trial_seed(trial: str) -> int:
    """The policy's seed of a trial: it follows from the number of the trial alone."""
    return 2_000_000 + int(trial.removeprefix("T"))


# --- the end


def reveal(folder: Path | str) -> dict:
    """Opens the seal of a completed study.

    Returns:
        `{"trials": [...], "summary": {model: {task or "all": ...}}, "comparisons": [...], "repeats": [...], "head"}`;
        comparisons are between all pairs of models over all tasks, with Holm's correction for their number.

    Raises:
        BlindError: trials are left, or the key was exchanged.
        JournalError: the journal was tampered with.
    """
    folder = Path(folder)
    aliases = _read_sealed(folder)
    with BlindStudy(folder) as study:
        trials = study._reveal(aliases)
        head = study.head
        repeats = [record for record in study._journal if record["event"] == "repeat"]
    summary = {}
    for model in sorted(set(aliases.values())):
        own = [trial for trial in trials if trial["model"] == model]
        tasks = list(dict.fromkeys(trial["task"] for trial in own))
        summary[model] = {task: summarize_group([trial for trial in own if trial["task"] == task]) for task in tasks}
        summary[model]["all"] = summarize_group(own)
    return {
        "trials": trials,
        "summary": summary,
        "comparisons": _compare_all(summary),
        "repeats": repeats,
        "head": head,
    }


def _read_sealed(folder: Path) -> dict[str, str]:
    text = (folder / SEALED_FILE).read_bytes()
    [created, *_], _ = read_journal(folder / JOURNAL_FILE)
    if hashlib.sha256(text).hexdigest() != created["sealed"]:
        raise BlindError(
            f"{folder / SEALED_FILE} is not the key that this study was begun with: restore it, or the study is void."
        )
    return json.loads(text)["aliases"]


def _compare_all(summary: Mapping[str, Mapping]) -> list[dict]:
    names = list(summary)
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    results = {}
    for a, b in pairs:
        first, second = summary[a]["all"], summary[b]["all"]
        counts = (first["successes"], first["trials"], second["successes"], second["trials"])
        results[f"{a}\0{b}"] = {"a": a, "b": b, **compare_unpaired(*counts)}
    corrected = holm({name: result["p"] for name, result in results.items()})
    return [
        {**result, "p_holm": corrected[name], "different": corrected[name] < 0.05} for name, result in results.items()
    ]


class BlindGate:
    """The running trial's policy as one policy, for a policy server that the robot stays connected to.

        with policy_server(lambda: gate, port=8900): ...

    Args:
        study: the open study; `start_next` decides what runs.
        dispatcher: of the same study.
        cameras: as of the dispatcher.
    """

    def __init__(self, study: BlindStudy, dispatcher: BlindDispatcher, cameras: Sequence[str]) -> None:
        self.cameras = tuple(cameras)
        self._study, self._dispatcher = study, dispatcher
        self._policy: BlindPolicy | None = None

    def reset(self, seed: int = 0) -> None:
        """Takes the policy of the running trial. The trial's own seed is used: the robot's could tell trials apart.

        Raises:
            BlindError: no trial is running.
        """
        trial = self._study.running
        if trial is None:
            raise BlindError("No trial is running: the operator starts one first.")
        self._policy = self._dispatcher.policy(self._study._public(trial)["alias"])
        self._policy.reset(trial_seed(trial))

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The next actions; see `BlindPolicy.act`."""
        if self._policy is None or self._study.running is None:
            raise BlindError("No trial is running, or it was not reset: the robot sends reset first.")
        return self._policy.act(observation, instruction)
