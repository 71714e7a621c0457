"""A mixture as a YAML file: which datasets, how much of each, for which robot.

multimodal_fraction: 0.1        # of every batch; the paper's 9:1
power: 0.5                      # shares of the tasks, n ** power
cap: 0.2                        # largest share of one task; optional
budget: 2000                    # trajectories of an epoch; default: all that there are
actions:
  - dataset: data/aloha         # folder (relative to this file) or Hub id
    embodiment: aloha           # a robot of the checkpoint
    frame_step_size: 2
    weight: 0.6                 # fixed share of the source; for all sources, or for none
  - dataset: lerobot/droid_100
    embodiment: franka
    weight: 0.4
    clean: droid.clean.json     # what `wallvla data clean` wrote
    convert: droid.yaml         # forward kinematics, relative commands: unification.py
    resample: true              # steps at the robot's control_frequency; without it the frames must have it
robots: {franka: franka.json}   # robots that the checkpoint does not have
multimodal:
  - path: data/grounding.parquet
  - path: data/pointing.jsonl
    coordinates: thousand       # boxes and points of the answers count 0 to 1000
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import numpy as np
import yaml

from ..action_space_wallvla import Embodiment
from .augmentation import Augmentation
from .cleaning import read_plan
from .conversations import ConversationDataset, JsonLines
from .lerobot import LeRobotDataset
from .mixture import CoTrainingMixture
from .multimodal import MultimodalDataset
from .sampling import BalancedSources, sample_source, trajectory_source
from .statistics import check_fit
from .unification import read_conversion


@dataclass(frozen=True)
class ActionEntry:
    """One LeRobot dataset; options as in `LeRobotDataset` and `Source`, `clean` and `convert` as file names.

    The steps of a chunk are one period of the robot's control frequency apart. Without `resample` they are frames, so
    the dataset must have that frequency. `resample` puts them where they belong, between frames where need be; that
    takes absolute targets. `anchors` does the same, but starts one period after the observation (X-VLA).

    `full_sequence` (Qwen-VLA's text-to-action stage): a trajectory is one sample, its chunk the whole of it in
    action_horizon steps at even distances, whatever its duration; it takes absolute targets too. `one_group`: power
    sampling takes all trajectories for one task, as where hardly two instructions are equal.
    """

    dataset: str
    embodiment: str
    name: str | None = None
    weight: float | None = None
    frame_step_size: int = 1
    revision: str | None = None
    episodes: list[int] | None = None
    clean: str | None = None
    convert: str | None = None
    state_key: str = "observation.state"
    action_key: str | None = "action"
    resample: bool = False
    anchors: bool = False
    full_sequence: bool = False
    one_group: bool = False
    frames_in_memory: bool = False


@dataclass(frozen=True)
class MultimodalEntry:
    """Questions: a parquet file or folder of them (`MultimodalDataset`), or JSON lines (`ConversationDataset`)."""

    path: str
    name: str | None = None
    weight: float | None = None
    coordinates: str = "text"
    in_memory: bool = True


@dataclass(frozen=True)
class Recipe:
    """A mixture, as the YAML file says it. `folder` is where its relative paths start."""

    folder: Path
    actions: tuple[ActionEntry, ...]
    multimodal: tuple[MultimodalEntry, ...] = ()
    multimodal_fraction: float = 0.1
    power: float = 0.5
    cap: float | None = None
    budget: int | None = None
    robots: dict[str, str] = field(default_factory=dict)


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a YAML recipe.

    Raises:
        ValueError: no valid YAML, unknown or missing options, or a wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    if isinstance(values, dict):
        for key, kind in (("actions", ActionEntry), ("multimodal", MultimodalEntry)):
            entries = values.get(key, [])
            if not isinstance(entries, list):
                raise ValueError(f"{path}: {key} is {entries!r}; it is a list of datasets.")
            if key in values:
                checked = [_checked(each, kind, f"{path}: entry {n} of {key}") for n, each in enumerate(entries)]
                values[key] = tuple(kind(**entry) for entry in checked)
    recipe = Recipe(folder=path.parent, **_checked(values, Recipe, f"{path}", given=("folder",)))
    if not recipe.actions:
        raise ValueError(f"{path} names no dataset under actions. A mixture has at least one.")
    return recipe


def _checked(values, kind: type, where: str, given: tuple[str, ...] = ()) -> dict:
    """`values` if they are keyword arguments of the dataclass `kind`, without those that are `given`."""
    known = {field.name: field for field in fields(kind) if field.name not in given}
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it is a mapping of {', '.join(known)}.")
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where} has unknown options {', '.join(map(str, unknown))}; known are {', '.join(known)}.")
    required = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
    absent = [name for name in required if name not in values]
    if absent:
        raise ValueError(f"{where} lacks {', '.join(absent)}.")
    for name, value in values.items():
        if not _fits(value, known[name].type):
            raise ValueError(f"{where}: {name} is {value!r}; it is {_spelled(known[name].type)}.")
    return values


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _fits(value, kind) -> bool:
    """Whether a value of YAML has the type of a field."""
    if isinstance(kind, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(each, get_args(kind)[0]) for each in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            _fits(each, of) for pair in value.items() for each, of in zip(pair, get_args(kind), strict=True)
        )
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _spelled(kind) -> str:
    """A type of a field in words."""
    if isinstance(kind, UnionType):
        return " or ".join(_spelled(option) for option in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_spelled(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return " to ".join(["a mapping of text", _spelled(get_args(kind)[1])])
    return _NAMES.get(kind, "a list")


def build_mixture(
    recipe: Recipe,
    embodiments: Mapping[str, Embodiment],
    *,
    seed: int = 0,
    length: int | None = None,
    augment: Augmentation | None = None,
    skip_errors: bool = False,
    processor=None,
) -> CoTrainingMixture:
    """The mixture of a recipe.

    Args:
        recipe: what `read_recipe` returned.
        embodiments: the robots, `processor.embodiments`; their cameras and horizons decide what is read.
        seed, length, augment, skip_errors: as in `CoTrainingMixture`; `skip_errors` also leaves out whole episodes
            that cannot be read and rows in no known form.
        processor: formats boxes and points of multimodal sources whose `coordinates` are not "text".

    Raises:
        ValueError: a robot that `embodiments` lacks, and all errors of the datasets.
    """
    balance = {"power": recipe.power, "cap": recipe.cap, "seed": seed}
    sources = [_action_source(entry, recipe.folder, embodiments, skip_errors) for entry in recipe.actions]
    actions = BalancedSources(sources, budget=recipe.budget, **balance)
    questions = None
    if recipe.multimodal:
        several = []
        for entry in recipe.multimodal:
            path, options = recipe.folder / entry.path, {"coordinates": entry.coordinates, "processor": processor}
            if path.suffix == ".jsonl":
                dataset = ConversationDataset(JsonLines(path), skip_errors=skip_errors, **options)
            else:
                dataset = MultimodalDataset(path, in_memory=entry.in_memory, **options)
            several.append(sample_source(entry.name or Path(entry.path).stem, dataset, entry.weight))
        questions = BalancedSources(several, power=recipe.power, seed=seed + 1)
    return CoTrainingMixture(
        actions,
        questions,
        multimodal_fraction=recipe.multimodal_fraction if questions is not None else 0.0,
        seed=seed,
        length=length,
        augment=augment,
        skip_errors=skip_errors,
    )


def _action_source(entry: ActionEntry, folder: Path, embodiments: Mapping[str, Embodiment], skip_errors: bool):
    if entry.embodiment not in embodiments:
        raise ValueError(
            f"Dataset {entry.dataset} is of embodiment {entry.embodiment!r}; the checkpoint knows "
            f"{', '.join(embodiments) or 'none'}. Add its JSON under robots."
        )
    dataset = open_entry(entry, embodiments[entry.embodiment], folder, skip_errors)
    name = entry.name or Path(entry.dataset).name
    source = trajectory_source(name, dataset, entry.weight, entry.frame_step_size)
    if entry.full_sequence:
        starts = source.bounds[:, 0]
        source = replace(source, bounds=np.stack([starts, starts + 1], axis=1))
    return replace(source, labels=[name] * len(source.labels)) if entry.one_group else source


def open_entry(
    entry: ActionEntry, robot: Embodiment, folder: str | Path = ".", skip_errors: bool = False
) -> LeRobotDataset:
    """The dataset of an entry, as its robot sees it. `folder` is where relative paths start.

    Raises:
        ValueError: the vectors do not fit the robot's layouts, its steps are not the dataset's frames, or the entry
            spaces them in two ways.
    """
    folder = Path(folder)
    local = folder / entry.dataset
    if entry.full_sequence and (entry.resample or entry.anchors or entry.frame_step_size > 1):
        raise ValueError(
            f"{entry.dataset} has full_sequence and resample, anchors or frame_step_size. A full sequence fills the "
            "horizon whatever its duration; leave the others out."
        )
    times = None
    if entry.resample or entry.anchors:
        times = (np.arange(robot.action_horizon) + entry.anchors) / robot.control_frequency
    dataset = LeRobotDataset(
        local if local.is_dir() else entry.dataset,
        embodiment=entry.embodiment,
        cameras=list(robot.cameras),
        action_horizon=robot.action_horizon,
        episodes=entry.episodes,
        keep=read_plan(folder / entry.clean) if entry.clean else None,
        frames_in_memory=entry.frames_in_memory,
        state_key=entry.state_key,
        action_key=entry.action_key,
        convert=read_conversion(folder / entry.convert) if entry.convert else None,
        action_times_s=times,
        full_sequence=entry.full_sequence,
        interpolate=robot.interpolate_actions,
        skip_errors=skip_errors,
        revision=entry.revision,
    )
    check_fit(dataset, robot)
    if times is None and not entry.full_sequence and abs(dataset.fps / robot.control_frequency - 1) > 0.01:
        raise ValueError(
            f"{entry.dataset} has {dataset.fps:g} frames per second; robot {entry.embodiment} takes "
            f"{robot.control_frequency:g} steps per second (control_frequency). Correct it, or, if the actions are "
            "absolute targets, set resample."
        )
    return dataset
