"""Adapting a policy of two robots to a third one, in small (X-VLA, sections 4.2.2 and 5; figures 2, 4 and 9).

    python benchmarks/adaptation.py --output runs/adaptation
    python benchmarks/adaptation.py --output runs/adaptation --report benchmarks/results   # tables of what is there

One Meta-World task, three robots (`ROBOTS`): each has its own camera, unit and axes of its commands and state, and
control rate. Where its base stands is drawn for every episode (`place_of_base`) and told to nobody, so the state does
not say where the hand is in the scene, and a policy has to look. A policy is trained on the first two, once for each
way to tell domains apart (`CONDITIONINGS`, figure 2); then the third robot is added to the one with soft prompts, with
few demonstrations, in the ways of `ARMS`. All training is `wallvla train` (`fine_tune`). Every policy meets the same
scenes; success has Wilson's interval, and two arms are compared scene by scene. Everything measured is kept: a call
after ctrl-C goes on from the last checkpoint or arm.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, set_seed

from wallvla import register_auto_classes
from wallvla.action_space_wallvla import Embodiment
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.statistics import compute_statistics
from wallvla.evaluation.closed_loop import run_episode
from wallvla.evaluation.demonstrations import Demonstration, record_demonstrations
from wallvla.evaluation.gym_env import StepResult
from wallvla.evaluation.metaworld import CONTROL_FREQUENCY, EVALUATION_SEED_START, MetaWorldEnv
from wallvla.evaluation.policy import BlankedImages, HubPolicy
from wallvla.evaluation.statistics import compare_paired, holm, wilson_interval
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, build_model, build_processor
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.fine_tuning import FineTuningArguments, add_domain, fine_tune
from wallvla.trainers.parameter_groups import DOMAIN_PARTS, parts_of


HORIZON, IMAGE_SIZE, MAX_STEPS = 8, 64, 150
CAMERA = "observation.images.front"
PLACE_M = 0.3  # how far a base may stand from its usual place, along either horizontal axis
HELD_OUT, HELD_OUT_SEED = 4, 90_000  # demonstrations of each robot that no policy is trained on


@dataclass(frozen=True)
class Robot:
    """What a robot makes of Meta-World's Sawyer.

    camera: of the simulator.
    axes: its x, y and z axes as axes of the simulator, 1 to 3, negative where they point the other way.
    unit: what the simulator calls 1, it calls this.
    hold: simulator steps of one command.
    seed: of its first demonstration.
    words: how a language prompt describes it.
    """

    camera: str
    axes: tuple[int, int, int]
    unit: float
    hold: int
    seed: int
    words: str

    def to_robot(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (..., 4) of the simulator, three axes and the gripper, as the robot has them."""
        order, signs = np.abs(self.axes) - 1, np.sign(self.axes)
        return np.concatenate([vectors[..., order] * signs, vectors[..., 3:]], axis=-1) * self.unit

    def to_simulator(self, vectors: np.ndarray) -> np.ndarray:
        """The inverse of `to_robot`."""
        order, signs = np.abs(self.axes) - 1, np.sign(self.axes)
        values = np.array(vectors, np.float64) / self.unit
        values[..., order] = values[..., :3] * signs
        return values


ROBOTS = {
    "front": Robot("front", (1, 2, 3), 1.0, 1, 0, "Front View"),
    "right": Robot("corner3", (-1, -2, 3), 0.5, 2, 200, "Right View"),
    "left": Robot("corner", (2, -1, 3), 2.0, 2, 400, "Left View"),
}
BASE, NEW = ("front", "right"), "left"
AXES = ("own", "common")
CONDITIONINGS = {"soft_prompt": "soft_prompt", "hpt": "hpt", "projections": "none", "language": "none"}
BACKBONE = ["vision", "vlm", "action_expert", "heads"]
LORA = {"adapter_rank": 1, "adapter_alpha": 2, "adapter_experts": ["vision", "vlm", "action_expert"]}
# Start of the new domain (`None`: an untrained model), and more options of `wallvla train` (`None`: no training)
ARMS = {
    "two steps": ("random", {}, {"two_steps": True}),
    "random": ("random", {}, {}),
    "copied": ("copy:front", {}, {}),
    "mean": ("mean", {}, {}),
    "LoRA": ("mean", LORA, {"learning_rate": 3e-3}),
    "from scratch": (None, {}, {}),
    "not trained": ("copy:front", {}, None),
    "domain alone": ("mean", {}, {"freeze": BACKBONE, "learning_rate": 3e-3}),
}
REFERENCE = "random"


@dataclass(frozen=True)
class Sizes:
    """Of a run: task, demonstrations of a base robot and of the new one, steps, samples of a step, scenes, seed.

    axes: each robot has its `"own"`, or all have the simulator's in `"common"`.
    """

    task: str = "button-press-topdown-v3"
    axes: str = "own"
    base_demonstrations: int = 40
    new_demonstrations: tuple[int, ...] = (10, 50)
    base_steps: int = 600
    new_steps: int = 150
    adaptation_steps: int = 50
    adaptation_warmup_steps: int = 25
    batch_size: int = 16
    scenes: int = 30
    seed: int = 0


def robot_of(sizes: Sizes, name: str) -> Robot:
    """A robot of `ROBOTS`, with the axes that it has in this run."""
    return ROBOTS[name] if sizes.axes == "own" else replace(ROBOTS[name], axes=(1, 2, 3))


def write_json(path: Path, value) -> None:
    """Writes a JSON file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


# --- robots


def place_of_base(seed: int) -> np.ndarray:
    """Where a robot's base stands in the scene of `seed`, as a vector (4,) of the simulator's state."""
    return np.append(PLACE_M * np.random.default_rng([seed, 1]).uniform(-1, 1, 2), (0.0, 0.0))


class RobotEnv:
    """Meta-World as one of the robots has it: the `Environment` of a closed loop. Steps are the simulator's."""

    action_dim = 4
    max_steps = MAX_STEPS

    def __init__(self, robot: Robot, env: MetaWorldEnv):
        self.robot, self.env, self.instruction = robot, env, env.instruction
        self.control_frequency = CONTROL_FREQUENCY / robot.hold
        self.action_low, self.action_high = (-robot.unit,) * 4, (robot.unit,) * 4
        self.cameras = ("front",)
        self.place = np.zeros(4)

    success = property(lambda self: self.env.success)
    progress = property(lambda self: self.env.progress)
    steps = property(lambda self: self.env.steps)

    def reset_scene(self, seed: int) -> None:
        """Starts the episode of a seed, with the base at its place."""
        self.place = place_of_base(seed)
        self.env.reset_scene(seed)

    def observe(self, cameras: Sequence[str] | None = None) -> dict:
        """The picture of the robot's camera, and the state from its base on its axes."""
        seen = self.env.observe((self.robot.camera,))
        state = self.robot.to_robot(seen["state"] - self.place)
        return {"images": {"front": seen["images"][self.robot.camera]}, "state": state}

    def step(self, action: np.ndarray) -> StepResult:
        """Executes a command for `hold` steps of the simulator."""
        for _ in range(self.robot.hold):
            result = self.env.step(self.robot.to_simulator(action))
            if result.done or self.env.success or self.env.steps >= MAX_STEPS:
                break
        return result

    def video_frame(self, size: int) -> np.ndarray:
        """A picture for people."""
        return self.env.video_frame(size)

    def close(self) -> None:
        """Closes the simulator."""
        self.env.close()


def commands_of(robot: Robot, demonstration: Demonstration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames (T, h, w, 3), states (T, 4) and commands (T, 4) of a demonstration at the robot's rate.

    A command is held, so it is the mean of the expert's actions meanwhile.
    """
    usable = len(demonstration.actions) // robot.hold * robot.hold
    actions = demonstration.actions[:usable].reshape(-1, robot.hold, 4).mean(axis=1)
    frames = demonstration.frames[robot.camera][: usable : robot.hold]
    states = demonstration.states[: usable : robot.hold] - place_of_base(demonstration.seed)
    return frames, robot.to_robot(states), robot.to_robot(actions)


def record(sizes: Sizes, name: str, count: int, seed: int, root: Path) -> None:
    """A LeRobot dataset of `count` demonstrations of a robot, from `seed` on."""
    robot = robot_of(sizes, name)
    image = {"dtype": "video", "shape": [IMAGE_SIZE, IMAGE_SIZE, 3], "names": ["height", "width", "channel"]}
    features = {key: {"dtype": "float32", "shape": [4]} for key in ("observation.state", "action")} | {CAMERA: image}
    demonstrations = record_demonstrations(
        [sizes.task], count, seed, IMAGE_SIZE, [robot.camera], grounding_every=0, num_processes=1
    )
    with LeRobotWriter(root, fps=CONTROL_FREQUENCY // robot.hold, features=features, robot_type=name) as writer:
        for demonstration in demonstrations:
            for frame, state, action in zip(*commands_of(robot, demonstration), strict=True):
                writer.add_frame({CAMERA: frame, "observation.state": state, "action": action})
            writer.save_episode(demonstration.instruction)


def embodiment_of(name: str, domain: int, described: bool = False) -> Embodiment:
    """The robot without statistics; `described`: its prompt says what it is (X-VLA, table 10)."""
    robot = ROBOTS[name]
    frequency = CONTROL_FREQUENCY / robot.hold
    found = Embodiment(
        cameras={CAMERA: "front view"},
        control_frequency=frequency,
        action_horizon=HORIZON,
        state_layout=(("native", 4),),
        action_layout=(("native", 4),),
        domain=domain,
    )
    words = f"Embodiment: Single Sawyer, Camera Setup: {robot.words}, Freq: {frequency:g}Hz"
    return replace(found, prompt=words) if described else found


# --- policies


def untrained(sizes: Sizes, folder: Path, conditioning: str, robots: Sequence[str]) -> Path:
    """Writes a model with random weights whose domains are `robots`, and its processor."""
    if (folder / "processor_config.json").exists():
        return folder
    set_seed(sizes.seed)
    found = {name: embodiment_of(name, i, conditioning == "language") for i, name in enumerate(robots)}
    options = {"proprioception": "expert", "state_dim": 4}
    processor = build_processor(QuickstartConfig(image_size=IMAGE_SIZE), found[robots[0]], **options)
    del processor.embodiments[EMBODIMENT]
    for name, robot in found.items():
        processor.add_embodiment(name, robot)
    expert = {"kind": "soft_prompt", "conditioning": CONDITIONINGS[conditioning], "hidden_size": 128}
    expert |= {"intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_soft_prompts": 8}
    expert |= {"time_dim": 32, "max_position_embeddings": 256, "dropout": 0.0}
    flow = {"prediction": "action", "sampler": "renoise", "time_sampler": "stratified", "time_scale": 1.0}
    model = build_model(processor, action_expert=expert, domains=list(robots), **flow, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(sizes: Sizes, output: Path, steps: int, **options) -> CoTrainingConfig:
    """What all runs have in common."""
    usual = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": sizes.batch_size,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "save_steps": 200,
        "save_total_limit": 1,
        "use_cpu": True,
        "bf16": False,
        "seed": sizes.seed,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_steps": 25,
        "disable_tqdm": False,
    }
    return CoTrainingConfig(**usual | options)


def train(
    sizes: Sizes,
    output: Path,
    folder: Path,
    start: Path,
    demonstrations: dict[str, int],
    steps: int,
    adapting=(),
    **how,
) -> Path:
    """`wallvla train` from `start` on the first demonstrations of some robots, unless `folder` is finished.

    adapting: fields of `FineTuningArguments` for the new robot. how: other fields of `CoTrainingConfig`.
    """
    if (folder / "processor_config.json").exists():  # written last
        return folder
    actions = [
        {
            "dataset": str((output / "data" / name).resolve()),
            "embodiment": name,
            "episodes": list(range(count)),
            "frames_in_memory": True,
            "weight": 1 / len(demonstrations),
        }
        for name, count in demonstrations.items()
    ]
    recipe = {"actions": actions}
    adapting = dict(adapting)
    if "add_domain" in adapting:
        write_json(output / "new.json", embodiment_of(NEW, 0).to_dict())
        recipe["robots"] = {NEW: "new.json"}
    file = output / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    options = FineTuningArguments(model=str(start), mixture=str(file), random_shift=2, drop_state=0.1, **adapting)
    return fine_tune(options, arguments(sizes, folder, steps, **how))


def pretrain(sizes: Sizes, output: Path, conditioning: str) -> Path:
    """A policy of the two base robots."""
    start = untrained(sizes, output / f"start-{conditioning}", conditioning, BASE)
    demonstrations = dict.fromkeys(BASE, sizes.base_demonstrations)
    return train(sizes, output, output / f"base-{conditioning}", start, demonstrations, sizes.base_steps)


def unadapted(output: Path, folder: Path, start: str, demonstrations: int) -> Path:
    """The policy with the new domain and the statistics of its demonstrations, and without a step of training."""
    if (folder / "processor_config.json").exists():
        return folder
    base = output / "base-soft_prompt"
    model, processor = AutoModel.from_pretrained(base), AutoProcessor.from_pretrained(base)
    robot, episodes = embodiment_of(NEW, 0), list(range(demonstrations))
    data = LeRobotDataset(output / "data" / NEW, embodiment=NEW, cameras=[], action_horizon=HORIZON, episodes=episodes)
    statistics = compute_statistics(data, robot, progress=False)
    processor.add_embodiment(NEW, replace(robot, statistics=statistics))
    add_domain(model, processor, NEW, f"{NEW}:{start}", seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def adapt(sizes: Sizes, output: Path, arm: str, demonstrations: int) -> Path:
    """The policy of an arm, for the new robot."""
    folder = output / f"{arm.replace(' ', '-')}-{demonstrations}"
    start, adapters, how = ARMS[arm]
    if how is None:
        return unadapted(output, folder, start, demonstrations)
    how = dict(how)
    if how.pop("two_steps", False):
        how |= {"adaptation_steps": sizes.adaptation_steps}
        how |= {"adaptation_warmup_steps": sizes.adaptation_warmup_steps}
    model, adapting = output / "base-soft_prompt", {"add_domain": f"{NEW}:{start}"} | adapters
    if start is None:
        model, adapting = untrained(sizes, output / "start-new", "soft_prompt", [NEW]), {}
    return train(sizes, output, folder, model, {NEW: demonstrations}, sizes.new_steps, adapting, **how)


# --- measurement


@torch.no_grad()
def open_loop_error(policy: HubPolicy, held_out: LeRobotDataset, blind: bool) -> float:
    """Mean absolute error of sampled chunks on unseen demonstrations, in units of the normalised action."""
    samples = [held_out[index] for index in range(0, len(held_out), 4)]
    for sample in samples if blind else ():
        pixels = sample["images"][CAMERA]
        sample["images"] = {CAMERA: np.full_like(pixels, round(float(pixels.mean())))}
    batch = policy.processor.encode(samples)
    actions, padding = batch.pop("actions"), batch["action_mask"]
    batch["action_mask"] = torch.ones_like(padding)
    noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0))
    predicted = policy.model.sample_actions(**batch, noise=noise)
    return (predicted - actions).abs()[padding].mean().item()


def measure(sizes: Sizes, output: Path, folder: Path, name: str, blind: bool = False) -> dict:
    """Success on unseen scenes and the open-loop error of a policy on a robot; kept in its folder.

    blind: it sees each image as its own mean grey.
    """
    file = folder / f"{'blind' if blind else 'result'}-{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    started, robot = time.perf_counter(), robot_of(sizes, name)
    policy = HubPolicy.from_pretrained(str(folder), name)
    held_out = LeRobotDataset(
        output / "data" / f"{name}-held-out",
        embodiment=name,
        cameras=[CAMERA],
        action_horizon=HORIZON,
        frames_in_memory=True,
    )
    outcomes = []
    with MetaWorldEnv(sizes.task, cameras=(robot.camera,), image_size=IMAGE_SIZE) as simulator:
        env = RobotEnv(robot, simulator)
        for seed in range(EVALUATION_SEED_START, EVALUATION_SEED_START + sizes.scenes):
            acting = BlankedImages(policy) if blind else policy
            outcomes.append(run_episode(env, acting, seed, execute_steps=4, max_steps=MAX_STEPS)["success"])
            print(f"{folder.name} on {name}: {sum(outcomes)} of {len(outcomes)}", end="\r", flush=True)
    print(f"{folder.name} on {name}: {sum(outcomes)} of {len(outcomes)}", flush=True)
    result = {"successes": outcomes, "error": open_loop_error(policy, held_out, blind)}
    write_json(file, result | {"seconds": round(time.perf_counter() - started)})
    return json.loads(file.read_text())


def trained_share(folder: Path, arm: str) -> float:
    """The share of its parameters that an arm trains; of the tables only the row of the new robot counts."""
    model = AutoModel.from_pretrained(folder)
    part_of, domains = parts_of(model), len(model.config.domains)
    own, common = 0, 0
    for name, parameter in model.named_parameters():
        if part_of[name] in DOMAIN_PARTS:
            own += parameter.numel() // domains
        else:
            common += parameter.numel()
    trained = {"domain alone": own, "not trained": 0}.get(arm, own + common)
    if arm == "LoRA":
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        trained = own + sum(value.numel() for name, value in saved.items() if "lora_" in name)
    return trained / (own + common)


def run(sizes: Sizes, output: Path, conditionings: Sequence[str], arms: Sequence[str]) -> None:
    """Records, trains and measures what is not there yet, most telling first."""
    for name, robot in ROBOTS.items():
        count = max(sizes.new_demonstrations) if name == NEW else sizes.base_demonstrations
        for folder, demonstrations, seed in ((name, count, robot.seed), (f"{name}-held-out", HELD_OUT, HELD_OUT_SEED)):
            if not (output / "data" / folder).exists():
                record(sizes, name, demonstrations, seed, output / "data" / folder)
    for conditioning in [name for name in conditionings if name == "soft_prompt"]:
        folder = pretrain(sizes, output, conditioning)
        for name in BASE:
            measure(sizes, output, folder, name)
            measure(sizes, output, folder, name, blind=True)
    for demonstrations in sizes.new_demonstrations:
        for arm in arms:
            folder = adapt(sizes, output, arm, demonstrations)
            result = measure(sizes, output, folder, NEW)
            write_json(folder / "arm.json", {"arm": arm, "demonstrations": demonstrations, **result})
    for conditioning in conditionings:
        folder = pretrain(sizes, output, conditioning)
        for name in BASE:
            measure(sizes, output, folder, name)


# --- report


def rate(successes: Sequence[bool]) -> str:
    """A success rate with its 95% interval."""
    total, count = sum(successes), len(successes)
    low, high = wilson_interval(total, count)
    return f"{total} of {count} = {total / count:.0%} [{low:.0%}, {high:.0%}]"


def read_results(output: Path) -> dict:
    """What is there: `base` {conditioning: {robot: result}}, `arms` [{arm, demonstrations, trained share, ...}]."""
    base = {}
    for name in CONDITIONINGS:
        found = {robot: output / f"base-{name}" / f"result-{robot}.json" for robot in BASE}
        found = {robot: json.loads(file.read_text()) for robot, file in found.items() if file.exists()}
        if found:
            base[name] = found
        blind = {robot: output / f"base-{name}" / f"blind-{robot}.json" for robot in BASE}
        blind = {robot: json.loads(file.read_text()) for robot, file in blind.items() if file.exists()}
        if blind:
            base[f"{name}, images blanked"] = blind
    arms = []
    for demonstrations in sorted({int(file.parent.name.split("-")[-1]) for file in output.glob("*/arm.json")}):
        for arm in ARMS:
            folder = output / f"{arm.replace(' ', '-')}-{demonstrations}"
            if (folder / "arm.json").exists():
                trained = {"trained": trained_share(folder, arm)}
                arms.append(json.loads((folder / "arm.json").read_text()) | trained)
    if not base and not arms:
        raise ValueError(f"{output} holds no finished policy: run the benchmark first, without --report.")
    return {"sizes": json.loads((output / "sizes.json").read_text()), "base": base, "arms": arms}


def base_table(base: dict) -> list[str]:
    """Figure 2: ways to tell two robots apart."""
    lines = ["| domains differ by | robot | success (95% Wilson) | open-loop error |", "|---|---|---|---|"]
    for name, results in base.items():
        for robot, result in results.items():
            lines.append(f"| {name} | {robot} | {rate(result['successes'])} | {result['error']:.4f} |")
    return lines


def arms_table(arms: list[dict]) -> list[str]:
    """Figure 9: ways to add a third robot."""
    lines = [
        "| demonstrations | arm | trained | success (95% Wilson) | open-loop error |",
        "|---|---|---|---|---|",
    ]
    for each in arms:
        cells = [each["demonstrations"], each["arm"], f"{each['trained']:.1%}", rate(each["successes"])]
        lines.append(f"| {' | '.join(map(str, cells))} | {each['error']:.4f} |")
    return lines


def pairs_table(arms: list[dict]) -> list[str]:
    """Every arm against `REFERENCE` with as many demonstrations, on the same scenes."""
    found = {(each["demonstrations"], each["arm"]): each["successes"] for each in arms}
    tests = {
        key: compare_paired(successes, found[key[0], REFERENCE])
        for key, successes in found.items()
        if key[1] != REFERENCE and (key[0], REFERENCE) in found
    }
    corrected = holm({key: test["p"] for key, test in tests.items()})
    lines = [
        f"| demonstrations | arm minus {REFERENCE} | difference (95% bootstrap) | only the arm / only {REFERENCE} | p "
        "(McNemar) | p (Holm) |",
        "|---|---|---|---|---|---|",
    ]
    for (demonstrations, arm), test in tests.items():
        difference = f"{test['difference']:+.0%} [{test['low']:+.0%}, {test['high']:+.0%}]"
        cells = [demonstrations, arm, difference, f"{test['only_a']} / {test['only_b']}"]
        cells += [f"{test['p']:.3f}", f"{corrected[demonstrations, arm]:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def command_of(sizes: dict) -> str:
    """The call that makes a run of these sizes."""
    words = ["python benchmarks/adaptation.py --output RUNS"]
    for name, usual in json.loads(json.dumps(asdict(Sizes()))).items():
        if sizes[name] != usual:
            values = sizes[name] if isinstance(sizes[name], list) else [sizes[name]]
            words.append(f"--{name.replace('_', '-')} {' '.join(map(str, values))}")
    return " ".join(words)


def report(output: Path, folder: Path) -> str:
    """Writes `adaptation_<axes>_axes.json` and `.md` of what is there into `folder`; returns the tables."""
    results = read_results(output)
    tables = [base_table(results["base"]), arms_table(results["arms"]), pairs_table(results["arms"])]
    text = "\n\n".join("\n".join(table) for table in tables)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"adaptation_{results['sizes']['axes']}_axes"
    write_json(folder / f"{name}.json", results)
    partial = folder / f".{name}.md.partial"
    partial.write_text(f"# Adaptation to a third robot\n\n```\n{command_of(results['sizes'])}\n```\n\n{text}\n")
    os.replace(partial, folder / f"{name}.md")
    return text


def check_sizes(output: Path, sizes: Sizes) -> None:
    """Policies of different sizes are not compared.

    Raises:
        ValueError: the folder was begun with other sizes.
    """
    file = output / "sizes.json"
    output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json(file, asdict(sizes))
    found, wanted = json.loads(file.read_text()), json.loads(json.dumps(asdict(sizes)))
    if found != wanted:
        raise ValueError(f"{output} was begun with {found}, now {wanted}: give the same sizes, or another --output.")


def main() -> None:
    """Does what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/adaptation"))
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write the tables of what is there")
    parser.add_argument("--conditionings", nargs="*", choices=CONDITIONINGS, default=list(CONDITIONINGS))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    for size in fields(Sizes):
        many = isinstance(size.default, tuple)
        kind = type(size.default[0] if many else size.default)
        flag = f"--{size.name.replace('_', '-')}"
        choices = AXES if size.name == "axes" else None
        parser.add_argument(flag, type=kind, choices=choices, default=size.default, nargs="+" if many else None)
    options = vars(parser.parse_args())
    sizes = {size.name: options[size.name] for size in fields(Sizes)}
    sizes = Sizes(**sizes | {"new_demonstrations": tuple(sizes["new_demonstrations"])})
    output = options["output"]
    register_auto_classes()
    if options["report"] is None:
        check_sizes(output, sizes)
        run(sizes, output, options["conditionings"], options["arms"])
    print(report(output, options["report"] or output))


if __name__ == "__main__":
    main()
