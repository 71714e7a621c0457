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
multimodal:
  - path: data/grounding.parquet
  - path: data/pointing.jsonl
    coordinates: thousand       # boxes and points of the answers count 0 to 1000
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from ..action_space_wallvla import Embodiment
from .augmentation import Augmentation
from .cleaning import read_plan
from .conversations import ConversationDataset, JsonLines
from .lerobot import LeRobotDataset
from .mixture import CoTrainingMixture
from .multimodal import MultimodalDataset
from .sampling import BalancedSources, sample_source, trajectory_source
from .unification import read_conversion


@dataclass(frozen=True)
class ActionEntry:
    """One LeRobot dataset; options as in `LeRobotDataset` and `Source`, `clean` and `convert` as file names."""

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
    action_times_s: list[float] | None = None
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
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    values = _checked(values, Recipe, f"{path}", hidden=("folder",))
    for key, kind in (("actions", ActionEntry), ("multimodal", MultimodalEntry)):
        entries = values.get(key) or []
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {key} is {entries!r}; it is a list of datasets.")
        values[key] = tuple(
            kind(**_checked(entry, kind, f"{path}: entry {number} of {key}")) for number, entry in enumerate(entries)
        )
    robots = values.get("robots") or {}
    if not isinstance(robots, dict) or not all(isinstance(file, str) for file in robots.values()):
        raise ValueError(f"{path}: robots is {robots!r}; it is a mapping of names to JSON files.")
    values["robots"] = robots
    if not values["actions"]:
        raise ValueError(f"{path} names no dataset under actions. A mixture has at least one.")
    return Recipe(folder=path.parent, **values)


def _checked(values, kind: type, where: str, hidden: tuple[str, ...] = ()) -> dict:
    """`values` as keyword arguments of the dataclass `kind`."""
    known = {field.name: field for field in fields(kind) if field.name not in hidden}
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it is a mapping of {', '.join(known)}.")
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where} has unknown options {', '.join(map(str, unknown))}; known are {', '.join(known)}.")
    required = [name for name in ("dataset", "embodiment", "path", "actions") if name in known and name not in values]
    if required:
        raise ValueError(f"{where} lacks {', '.join(required)}.")
    numbers = {"weight": float, "power": float, "cap": float, "multimodal_fraction": float}
    numbers |= {"budget": int, "frame_step_size": int}
    for name, number in numbers.items():
        value = values.get(name)
        fits = isinstance(value, int | float if number is float else int) and not isinstance(value, bool)
        if value is not None and not fits:
            raise ValueError(f"{where}: {name} is {value!r}; it is a number{' without decimals' * (number is int)}.")
    for name in ("dataset", "embodiment", "path", "name", "clean", "convert", "revision", "coordinates"):
        if values.get(name) is not None and not isinstance(values[name], str):
            raise ValueError(f"{where}: {name} is {values[name]!r}; it is text.")
    return dict(values)


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
            that cannot be read.
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
                dataset = ConversationDataset(JsonLines(path), **options)
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
            f"{', '.join(embodiments) or 'none'}. Add the robot with `wallvla stats` and `processor.add_embodiment`."
        )
    robot = embodiments[entry.embodiment]
    local = folder / entry.dataset
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
        action_times_s=entry.action_times_s,
        interpolate=robot.interpolate_actions,
        skip_errors=skip_errors,
        revision=entry.revision,
    )
    name = entry.name or Path(entry.dataset).name
    return trajectory_source(name, dataset, entry.weight, entry.frame_step_size)
