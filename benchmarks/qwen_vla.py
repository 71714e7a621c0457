"""The ablations of Qwen-VLA (figure 6, tables 10 and 12) in small: policies trained and measured alike.

    python benchmarks/qwen_vla.py --run RUN --more MORE --output runs/qwen-vla
    python benchmarks/qwen_vla.py --run RUN --more MORE --output runs/qwen-vla --arms scratch t2a --seeds 0 1
    python benchmarks/qwen_vla.py --output runs/qwen-vla --report benchmarks/results/qwen_vla   # .json and .md

RUN is a finished `wallvla quickstart`: its demonstrations are the fine-tuning data, every tenth of them held out. MORE
is another one with other tasks, whose demonstrations are used as text and actions only. A policy is a small Qwen2.5-VL
that has learned to answer the grounding questions of both ("backbone", one for each seed), and a `dit` action expert
from random weights. Text-to-action stages (T2A) train the expert on the frozen backbone without images; fine-tuning
(SFT) trains everything. All arms of a seed share backbone, batches, augmentation, noise and scenes, and first weights
where they have the same parameters; they differ in what `ARMS` says.

Everything measured is kept: a call after ctrl-C goes on from the last checkpoint and the last episode.
"""

import argparse
import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.trainer_utils import get_last_checkpoint

from wallvla import register_auto_classes
from wallvla.action_space_wallvla import Embodiment
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.data.collator import Collator
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.mixture import CoTrainingMixture, random_shift
from wallvla.data.multimodal import MultimodalDataset
from wallvla.data.sampling import BalancedSources, Source, sample_source, trajectory_source
from wallvla.data.statistics import compute_statistics
from wallvla.evaluation.closed_loop import run_episode
from wallvla.evaluation.environments import make_environment
from wallvla.evaluation.metaworld import ACTION_NAMES, CONTROL_FREQUENCY, EVALUATION_SEED_START, STATE_NAMES
from wallvla.evaluation.policy import HubPolicy
from wallvla.evaluation.statistics import compare_paired, holm, wilson_interval
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.prompts_wallvla import QWEN_VLA
from wallvla.quickstart import QuickstartConfig, build_tokenizer, cpu_has_bf16
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.co_training_trainer import CoTrainingTrainer


HORIZON, CHANNELS, BATCH_SIZE, LEARNING_RATE = 16, 8, 24, 1e-3
EXECUTED = 8  # steps of a chunk, the rest is predicted again
TASKS = ("button-press-topdown-v3", "window-close-v3", "drawer-open-v3")
BODY, OTHER, BLIND = "sawyer", "other", "sawyer_blind"
# The other body: the same motions in other channels, some backwards, in other units. Its robot does what
# `commands @ TO_BODY` says to ours.
TO_OTHER = np.array([[0, 0, 2.0, 0], [-0.5, 0, 0, 0], [0, 0, 0, 3.0], [0, -1.0, 0, 0]])
TO_BODY = np.linalg.inv(TO_OTHER)


@dataclass(frozen=True)
class T2A:
    """A text-to-action stage: distribution of times, whole trajectories or chunks, share of generated ones."""

    time_sampler: str = "logit_normal"
    full_sequence: bool = True
    generated: float = 0.0


@dataclass(frozen=True)
class Arm:
    """Fine-tuning: what it starts from, how it differs, and in which table it stands."""

    table: str
    t2a: T2A | None = None
    time_sampler: str = "beta"
    bodies: tuple[str, ...] = (BODY,)
    projection: str = "shared"
    proprioception: str = "none"


ARMS = {
    "scratch": Arm("t2a"),
    "t2a": Arm("t2a", T2A()),
    "t2a_beta": Arm("t2a", T2A("beta")),
    "t2a_and_sft_logit_normal": Arm("t2a", T2A(), "logit_normal"),
    "scratch_logit_normal": Arm("t2a", None, "logit_normal"),
    "t2a_chunks": Arm("t2a", T2A(full_sequence=False)),
    "t2a_generated": Arm("t2a", T2A(generated=0.2)),
    "shared": Arm("projection", bodies=(BODY, OTHER)),
    "concatenated": Arm("projection", bodies=(BODY, OTHER), projection="concatenated"),
    "per_domain": Arm("projection", bodies=(BODY, OTHER), projection="per_domain"),
    "state_prompt": Arm("state", proprioception="text"),
    "state_expert": Arm("state", proprioception="expert"),
}
# Each table's first arm is the paper's default, or what it is an alternative to
TABLES = {
    "t2a": ("scratch", "Text-to-action and flow times (figure 6)"),
    "projection": ("shared", "Projections of two bodies (table 10)"),
    "state": ("scratch", "Proprioception (table 12)"),
}


@dataclass(frozen=True)
class Options:
    """Folders and sizes of a run: training steps of each stage and closed-loop episodes of each task."""

    run: Path
    more: Path
    generated: Path | None
    output: Path
    steps: int
    t2a_steps: int
    backbone_steps: int
    episodes: int
    tasks: tuple[str, ...]

    def sizes(self) -> dict:
        """What policies that are compared must have in common."""
        return {"steps": self.steps, "t2a_steps": self.t2a_steps, "backbone_steps": self.backbone_steps}


# --- robots, data


def to_other(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An episode as the other body would have recorded it; the state is not used there."""
    return states, actions @ TO_OTHER


def robots() -> dict[str, Embodiment]:
    """Our robot, the other one, and ours without cameras."""
    sawyer = Embodiment(
        cameras={"observation.images.front": "front"},
        control_frequency=CONTROL_FREQUENCY,
        action_horizon=HORIZON,
        state_layout=(("native", len(STATE_NAMES)),),
        action_layout=(("native", len(ACTION_NAMES)),),
        robot_tag="Sawyer",
    )
    return {
        BODY: sawyer,
        OTHER: replace(sawyer, robot_tag="other Sawyer", domain=1),
        BLIND: replace(sawyer, cameras={}),
    }


def split(folder: Path, held_out: bool) -> list[int]:
    """Episodes of a dataset: every tenth, or the others."""
    total = json.loads((folder / "meta" / "info.json").read_text())["total_episodes"]
    return [episode for episode in range(total) if (episode % 10 == 9) == held_out]


def open_dataset(folder: Path, body: str, held_out: bool = False, **options) -> LeRobotDataset:
    """A half of a folder's demonstrations, as a body sees them."""
    return LeRobotDataset(
        folder,
        embodiment=body,
        cameras=[] if body == BLIND else ["front"],
        action_horizon=HORIZON,
        episodes=split(folder, held_out),
        convert=to_other if body == OTHER else None,
        frames_in_memory=body != BLIND,
        **options,
    )


def with_statistics(options: Options) -> dict[str, Embodiment]:
    """The robots with what the demonstrations say of their ranges; kept in a file."""
    file = options.output / "robots.json"
    if not file.exists():
        found = robots()
        for body, robot in found.items():
            found[body] = replace(
                robot, statistics=compute_statistics(open_dataset(options.run / "dataset", body), robot)
            )
        write_json(file, {name: robot.to_dict() for name, robot in found.items()})
    return {name: Embodiment.from_dict(values) for name, values in json.loads(file.read_text()).items()}


def t2a_sources(options: Options, t2a: T2A) -> list[Source]:
    """Demonstrations of both folders without images, and generated trajectories of other arms."""
    datasets = {
        folder.name: open_dataset(folder / "dataset", BLIND, full_sequence=t2a.full_sequence)
        for folder in (options.run, options.more)
    }
    weights = dict.fromkeys(datasets, (1 - t2a.generated) / len(datasets))
    if t2a.generated:
        folders = generated_folders(options)
        datasets |= {folder.name: open_generated(folder, t2a.full_sequence) for folder in folders}
        weights |= {folder.name: t2a.generated / len(folders) for folder in folders}
    sources = []
    for name, dataset in datasets.items():
        source = trajectory_source(name, dataset, weights[name])
        if t2a.full_sequence:  # a trajectory is one sample
            source = replace(source, bounds=np.stack([source.bounds[:, 0], source.bounds[:, 0] + 1], axis=1))
        if dataset.embodiment != BLIND:  # hardly two of its sentences are equal
            source = replace(source, labels=[name] * len(source.labels))
        sources.append(source)
    return sources


def generated_folders(options: Options) -> list[Path]:
    """Datasets that `wallvla data text-actions` wrote.

    Raises:
        ValueError: there is none.
    """
    folders = [] if options.generated is None else sorted(path.parent for path in options.generated.glob("*/meta"))
    if not folders:
        raise ValueError(
            f"Found no datasets in {options.generated}: run `wallvla data text-actions --output FOLDER --arms "
            "franka_panda` and pass --generated FOLDER."
        )
    return folders


def generated_robot(folder: Path) -> Embodiment:
    """An arm of a generated dataset, whose joint positions and gripper are used as they are."""
    dataset = open_generated(folder, full_sequence=False)
    robot = Embodiment(
        cameras={},
        control_frequency=dataset.fps,
        action_horizon=HORIZON,
        state_layout=(("native", dataset.states.shape[1]),),
        action_layout=(("native", dataset.actions.shape[1]),),
        robot_tag=folder.name.replace("_", " "),
    )
    return replace(robot, statistics=compute_statistics(dataset, robot))


def open_generated(folder: Path, full_sequence: bool) -> LeRobotDataset:
    """A generated dataset; its robot has the name of its folder."""
    return LeRobotDataset(
        folder, embodiment=folder.name, cameras=[], action_horizon=HORIZON, full_sequence=full_sequence
    )


# --- model


def make_processor(options: Options, arm: Arm) -> WallVLAProcessor:
    """Qwen-VLA's prompt with a tokenizer in which its fixed phrases are one token each; 256 bins of state."""
    known = with_statistics(options)
    tokenizer = build_tokenizer(QuickstartConfig())
    phrases = [
        "user\nThe robot is",
        " Sawyer",
        " other",
        " with single arm. The control frequency is",
        " Hz. Please predict the next",
        " control actions to execute the following task:",
        " state: [",
    ]
    numbers = [AddedToken(str(number), lstrip=True, normalized=False) for number in range(100, 256)]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases] + numbers)
    images = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=1, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 512 * 512}
    )
    return WallVLAProcessor(
        images,
        tokenizer,
        {name: known[name] for name in (*arm.bodies, BLIND)},
        action_dim=CHANNELS,
        action_horizon=HORIZON,
        longest_side=64,
        state_dim=len(STATE_NAMES) if arm.proprioception == "expert" else None,
        proprioception=arm.proprioception,
        prompt_format=QWEN_VLA,
    )


def make_model(processor: WallVLAProcessor, arm: Arm, seed: int) -> WallVLAForConditionalGeneration:
    """A tiny Qwen2.5-VL and a `dit` of three blocks, random by `seed`."""
    tokenizer = processor.tokenizer
    config = WallVLAConfig.tiny(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        action_expert={
            "kind": "dit",
            "action_projection": arm.projection,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mrope_section": [4, 6, 6],
            "time_dim": 128,
        },
        action_dim=CHANNELS,
        action_horizon=HORIZON,
        proprioception=arm.proprioception,
        state_dim=len(STATE_NAMES),
        domains=list(arm.bodies),
        loss_space="velocity",
        loss_reduction="per_channel",
    )
    vlm, text = config.vlm_config, config.vlm_config.text_config
    for name in ("image", "video"):
        setattr(vlm, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    for name in ("start", "end"):
        setattr(vlm, f"vision_{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{name}|>"))
    text.eos_token_id, text.pad_token_id = processor.end_token_id, tokenizer.pad_token_id
    set_seed(seed)
    return WallVLAForConditionalGeneration(config)


# --- training


def train(model, processor, mixture: CoTrainingMixture, folder: Path, **options) -> None:
    """Runs a stage and saves `folder/hub`, which is there when it is complete."""
    arguments = CoTrainingConfig(
        output_dir=str(folder / "training"),
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=50,
        weight_decay=0.01,
        save_steps=100,
        save_total_limit=1,
        use_cpu=True,
        bf16=cpu_has_bf16(),
        dataloader_pin_memory=False,
        disable_tqdm=False,
        report_to="none",
        **options,
    )
    trainer = CoTrainingTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(processor),
        train_dataset=mixture,
        processing_class=processor,
    )
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    write_json(folder / "log.json", trainer.state.log_history)
    write_json(folder / "machine.json", machine())
    partial = folder / ".hub.partial"
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder / "hub")


def mixture_of(sources: list[Source], questions, steps: int, seed: int) -> CoTrainingMixture:
    """Balanced sources with an eighth of questions, shifted images."""
    return CoTrainingMixture(
        BalancedSources(sources, power=0.5, seed=seed),
        questions,
        multimodal_fraction=0.0 if questions is None else 0.125,
        seed=seed,
        length=steps * BATCH_SIZE,
        augment=random_shift(2),
    )


def backbone(options: Options, seed: int) -> Path:
    """A VLM that answers grounding questions, in the place of a pretrained one. Its folder."""
    folder = options.output / f"backbone-{seed}"
    if not (folder / "hub").exists():
        processor = make_processor(options, ARMS["scratch"])
        model = make_model(processor, ARMS["scratch"], seed)
        sources = [
            sample_source(path.parent.name, MultimodalDataset(path, in_memory=True))
            for path in (options.run / "grounding.parquet", options.more / "grounding.parquet")
        ]
        mixture = mixture_of(sources, None, options.backbone_steps, seed)
        train(
            model,
            processor,
            mixture,
            folder,
            max_steps=options.backbone_steps,
            text_loss_weight=1.0,
            freeze=["action_expert", "heads"],
            seed=seed,
        )
    return folder / "hub"


def pretrained(options: Options, t2a: T2A, seed: int) -> Path:
    """The folder of a T2A stage on the backbone."""
    kind = "sequences" if t2a.full_sequence else "chunks"
    folder = options.output / f"t2a-{t2a.time_sampler}-{kind}-{round(100 * t2a.generated)}-{seed}"
    if not (folder / "hub").exists():
        processor = make_processor(options, ARMS["scratch"])
        if t2a.generated:
            for path in generated_folders(options):
                processor.add_embodiment(path.name, generated_robot(path))
        model = make_model(processor, ARMS["scratch"], seed)
        load_vlm(model, backbone(options, seed))
        mixture = mixture_of(t2a_sources(options, t2a), None, options.t2a_steps, seed)
        train(
            model,
            processor,
            mixture,
            folder,
            stage="t2a",
            max_steps=options.t2a_steps,
            time_sampler=t2a.time_sampler,
            seed=seed,
        )
    return folder / "hub"


def load_vlm(model: WallVLAForConditionalGeneration, folder: Path) -> None:
    """Puts the VLM of a checkpoint into the model."""
    source = WallVLAForConditionalGeneration.from_pretrained(folder)
    model.vlm.load_state_dict(source.vlm.state_dict())


def fine_tune(options: Options, name: str, seed: int) -> Path:
    """The folder of an arm's policy."""
    arm, folder = ARMS[name], options.output / f"{name}-{seed}"
    if not (folder / "hub").exists():
        processor = make_processor(options, arm)
        model = make_model(processor, arm, seed)
        load_vlm(model, backbone(options, seed))
        if arm.t2a is not None:
            source = WallVLAForConditionalGeneration.from_pretrained(pretrained(options, arm.t2a, seed))
            model.action_expert.load_state_dict(source.action_expert.state_dict())
        sources = [trajectory_source(body, open_dataset(options.run / "dataset", body)) for body in arm.bodies]
        questions = MultimodalDataset(options.run / "grounding.parquet", in_memory=True)
        mixture = mixture_of(sources, questions, options.steps, seed)
        train(
            model,
            processor,
            mixture,
            folder,
            stage="sft",
            max_steps=options.steps,
            time_sampler=arm.time_sampler,
            seed=seed,
        )
    return folder / "hub"


# --- measuring


class OtherBody:
    """The policy of the other robot in our simulator."""

    def __init__(self, policy: HubPolicy):
        self._policy, self.cameras = policy, policy.cameras

    def reset(self, seed: int = 0) -> None:
        """Starts the episode of the inner policy."""
        self._policy.reset(seed)

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The inner policy's chunk, as our robot would command the same motion."""
        return self._policy.act(observation, instruction) @ TO_BODY


@torch.no_grad()
def held_out_loss(model, processor, dataset: LeRobotDataset, draws: int = 4) -> float:
    """Flow loss (velocity space, per channel) at uniform times, the same noise and times for all arms."""
    generator = torch.Generator().manual_seed(0)
    total, count = 0.0, 0
    for start in range(0, len(dataset), 8 * BATCH_SIZE):
        samples = [dataset[index] for index in range(start, min(start + 8 * BATCH_SIZE, len(dataset)), 8)]
        batch = processor.encode(samples)
        for _ in range(draws):
            noise = torch.randn(batch["actions"].shape, generator=generator)
            time = torch.rand(len(noise), generator=generator) * model.config.time_scale
            total += model(**batch, noise=noise, time=time).flow_loss.item() * len(samples)
            count += len(samples)
    return total / count


def play(options: Options, policy, file: Path, label: str) -> list[dict]:
    """The episodes of all tasks; those that `file` has are not played again."""
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {(episode["task"], episode["seed"]): episode for episode in done}
    wanted = [(task, EVALUATION_SEED_START + number) for task in options.tasks for number in range(options.episodes)]
    environment, played = None, None
    try:
        with open(file, "a", encoding="utf-8") as log, tqdm(wanted, desc=label, unit="episode") as bar:
            for task, seed in bar:
                if (task, seed) in found:
                    continue
                if played != task:
                    if environment is not None:
                        environment.close()
                    environment, played = make_environment(task), task
                outcome = run_episode(environment, policy, seed, execute_steps=EXECUTED, max_steps=200)
                episode = {"task": task, "seed": seed, "success": outcome["success"], "steps": outcome["steps"]}
                log.write(json.dumps(episode) + "\n")
                log.flush()
                found[task, seed] = episode
    finally:
        if environment is not None:
            environment.close()
    return [found[each] for each in wanted]


def run_arm(options: Options, name: str, seed: int) -> dict:
    """Trains and measures one policy; the result is kept in its folder."""
    arm, folder = ARMS[name], options.output / f"{name}-{seed}"
    wanted = {"episodes": options.episodes, "tasks": list(options.tasks)}
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        if {key: result[key] for key in wanted} == wanted:
            return result
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    hub = fine_tune(options, name, seed)
    model = WallVLAForConditionalGeneration.from_pretrained(hub).eval()
    processor = WallVLAProcessor.from_pretrained(hub)
    closed_loop, losses = {}, {}
    for body in arm.bodies:
        dataset = open_dataset(options.run / "dataset", body, held_out=True)
        losses[body] = held_out_loss(model, processor, dataset)
        policy = HubPolicy(model, processor, body)
        if body == OTHER:
            policy = OtherBody(policy)
        closed_loop[body] = play(options, policy, folder / f"episodes-{body}.jsonl", f"{name} {seed} {body}")
    projections = sum(
        parameter.numel()
        for module in (model.action_expert.action_in, model.action_expert.action_out)
        for parameter in module.parameters()
    )
    result = {
        "arm": name,
        "seed": seed,
        **asdict(arm),
        **options.sizes(),
        **wanted,
        "held_out_loss": losses,
        "closed_loop": closed_loop,
        "parameters": model.num_parameters(),
        "projection_parameters": projections,
        "log": json.loads((folder / "log.json").read_text()),
        "seconds": round(time.perf_counter() - started),
        **json.loads((folder / "machine.json").read_text()),
    }
    write_json(folder / "result.json", result)
    return result


def machine() -> dict:
    """Where and when, and of which commit a policy was trained."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": f"{names[0]}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
    }


def check_sizes(options: Options) -> None:
    """Policies of different length are not compared: a folder holds those of one.

    Raises:
        ValueError: the folder was begun with other numbers of steps.
    """
    file = options.output / "sizes.json"
    options.output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json(file, options.sizes())
    found = json.loads(file.read_text())
    if found != options.sizes():
        raise ValueError(f"{options.output} holds policies of {found}, now {options.sizes()}: take another --output.")


def write_json(path: Path, value) -> None:
    """Writes a JSON file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


# --- report


def outcomes(rows: list[dict], body: str) -> dict[tuple, bool]:
    """{(seed, task, scene): success} of the episodes of an arm."""
    return {
        (row["seed"], episode["task"], episode["seed"]): episode["success"]
        for row in rows
        for episode in row["closed_loop"][body]
    }


def by_task(solved: dict[tuple, bool]) -> dict[str, list[int]]:
    """{task: [successes, episodes]} of `outcomes`."""
    counts: dict[str, list[int]] = {}
    for (_, task, _), success in solved.items():
        count = counts.setdefault(task, [0, 0])
        count[0] += success
        count[1] += 1
    return counts


def verdict(test: dict, p: float) -> str:
    """What a paired test says, with the p value that is corrected for the number of arms."""
    if p >= 0.05:
        return "undecided"
    return "better" if test["difference"] > 0 else "worse"


def table(rows: list[dict], name: str) -> tuple[str, list[dict]]:
    """Markdown and plain data of a table: arms against its reference, on the seeds that both have."""
    reference, title = TABLES[name]
    arms = [arm for arm in ARMS if ARMS[arm].table == name or arm == reference]
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    entries = []
    for body in (BODY, OTHER):
        tests, of_body = {}, []
        base = outcomes(by_arm.get(reference, []), body) if body in ARMS[reference].bodies else {}
        for arm, found in by_arm.items():
            if body not in ARMS[arm].bodies:
                continue
            solved = outcomes(found, body)
            entry = {
                "arm": arm,
                "body": body,
                "seeds": sorted(row["seed"] for row in found),
                "successes": sum(solved.values()),
                "episodes": len(solved),
                "interval": wilson_interval(sum(solved.values()), len(solved)),
                "by_task": {
                    task: [
                        sum(v for (_, t, _), v in solved.items() if t == task),
                        sum(t == task for _, t, _ in solved),
                    ]
                    for task in dict.fromkeys(t for _, t, _ in solved)
                },
                "held_out_loss": float(np.mean([row["held_out_loss"][body] for row in found])),
                "projection_parameters": found[0]["projection_parameters"],
            }
            pairs = [key for key in solved if key in base]
            if arm != reference and pairs:
                groups = [f"{seed} {task}" for seed, task, _ in pairs]
                tests[arm] = compare_paired([solved[key] for key in pairs], [base[key] for key in pairs], groups)
                entry["against"] = {"reference": reference, **tests[arm]}
            of_body.append(entry)
        corrected = holm({arm: test["p"] for arm, test in tests.items()})
        for entry in of_body:
            if entry["arm"] in corrected:
                entry["against"]["holm_p"] = corrected[entry["arm"]]
                entry["verdict"] = verdict(tests[entry["arm"]], corrected[entry["arm"]])
        entries += of_body
    return f"### {title}\n\n{markdown(entries, reference)}", entries


def markdown(entries: list[dict], reference: str) -> str:
    """Lines of a table."""
    several = len({entry["body"] for entry in entries}) > 1
    head = ["arm", *(["body"] if several else []), "seeds", "success (95% Wilson)", "by task", "held-out flow loss"]
    head += ["parameters of projections"] if several else []
    head += [f"minus {reference} (95% bootstrap)", "only arm / only reference", "McNemar p, Holm p", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for entry in entries:
        low, high = entry["interval"]
        rate = entry["successes"] / entry["episodes"]
        cells = [f"`{entry['arm']}`", *([entry["body"]] if several else []), ", ".join(map(str, entry["seeds"]))]
        cells.append(f"{entry['successes']}/{entry['episodes']} = {rate:.0%} [{low:.0%}, {high:.0%}]")
        cells.append(", ".join(f"{solved}/{count}" for solved, count in entry["by_task"].values()))
        cells.append(f"{entry['held_out_loss']:.4f}")
        cells += [f"{entry['projection_parameters']:,}"] if several else []
        test = entry.get("against")
        if test is None:
            cells += ["reference", "", "", ""]
        else:
            cells.append(f"{test['difference']:+.0%} [{test['low']:+.0%}, {test['high']:+.0%}]")
            cells.append(f"{test['only_a']} / {test['only_b']}")
            cells += [f"{test['p']:.3f}, {test['holm_p']:.3f}", entry["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(output: Path, target: Path) -> str:
    """Writes `target.json` and `target.md` of all finished policies in `output`; returns the Markdown.

    Raises:
        ValueError: no policy is finished.
    """
    rows = [json.loads(path.read_text()) for path in sorted(output.glob("*/result.json"))]
    if not rows:
        raise ValueError(f"{output} holds no finished policy: run the arms first (--run, --more).")
    sizes = {key: sorted({json.dumps(row[key]) for row in rows}) for key in ("steps", "t2a_steps", "backbone_steps")}
    places = sorted({f"{row['machine']}, torch {row['torch']}, {row['date']}, {row['commit']}" for row in rows})
    texts, tables = [], {}
    for name in TABLES:
        text, tables[name] = table(rows, name)
        if len(tables[name]) > 1:
            texts.append(text)
    lines = ", ".join(f"{key} {'/'.join(values)}" for key, values in sizes.items())
    text = "\n\n".join([f"{lines}; {len(rows)} policies.\n\nRun on: {'; '.join(places)}.", *texts])
    write_json(target.with_suffix(".json"), {"tables": tables, "policies": [without_log(row) for row in rows]})
    partial = target.with_name(f".{target.name}.md.partial")
    partial.write_text(text + "\n")
    os.replace(partial, target.with_suffix(".md"))
    return text


def without_log(row: dict) -> dict:
    """A result for the repository: the last entries of the training log in the place of all."""
    last = {key: value for entry in row["log"] for key, value in entry.items() if key.endswith("loss")}
    return {key: value for key, value in row.items() if key != "log"} | {"last_losses": last}


def main() -> None:
    """Trains what is not there yet, seed by seed, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--more", type=Path, help="folder of another one, with other tasks")
    parser.add_argument("--generated", type=Path, help="folder of `wallvla data text-actions`")
    parser.add_argument("--output", type=Path, default=Path("runs/qwen-vla"))
    parser.add_argument("--steps", type=int, default=250, help="of fine-tuning")
    parser.add_argument("--t2a-steps", type=int, default=200, help="of text-to-action")
    parser.add_argument("--backbone-steps", type=int, default=300, help="of grounding questions")
    parser.add_argument("--episodes", type=int, default=15, help="closed-loop episodes of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", type=Path, metavar="FILE", help="only write FILE.json and FILE.md")
    given = parser.parse_args()
    if given.report is not None:
        print(report(given.output, given.report))
        return
    if given.run is None or given.more is None:
        parser.error("--run and --more are needed, unless only --report is asked for")
    sizes = {name: vars(given)[name] for name in ("steps", "t2a_steps", "backbone_steps", "episodes")}
    options = Options(given.run, given.more, given.generated, given.output, tasks=tuple(given.tasks), **sizes)
    check_sizes(options)
    torch.set_num_threads(1)
    register_auto_classes()
    for seed in given.seeds:
        for name in given.arms:
            result = run_arm(options, name, seed)
            solved = {body: sum(e["success"] for e in found) for body, found in result["closed_loop"].items()}
            print(f"{name}, seed {seed}: {solved} solved, losses {result['held_out_loss']}, {result['seconds']} s")


if __name__ == "__main__":
    main()
