"""What action codecs keep of motion, on held-out episodes: RVQ with and without each objective, FAST, binning.

    python benchmarks/action_codecs.py --datasets RUN/dataset MORE/dataset --vision RUN/hub --output runs/codecs
    python benchmarks/action_codecs.py --datasets runs/se3/dataset --robot runs/se3/robot.json --output runs/codecs-se3

Every fifth episode of each dataset is held out: nothing is fitted on it, statistics included. FAST gets the token
rate of RVQ. Errors are in the robot's own units: of the commanded displacement per step in Meta-World (which has no
rotation), of the commanded pose with `--robot`. jerk ratio: RMS of the second difference of displacements or the third
of positions, reconstruction over original; 1 is faithful.
Linear probes: balanced accuracy of logistic regression on token counts, of the third of the episode (chance 33%) and
of whether the gripper command changes within the chunk (chance 50%). Trained codecs are kept in `--output`. Without
`--vision` the two visual objectives, and the variants without one of them, are left out.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from wallvla import register_auto_classes
from wallvla.action_codec_wallvla import WallVLAActionCodec, WallVLAActionCodecConfig
from wallvla.action_space_wallvla import Embodiment
from wallvla.baseline_codecs_wallvla import BinningActionCodec, FASTActionCodec
from wallvla.data.action_chunks import ActionChunks
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.statistics import compute_statistics
from wallvla.data.vision_features import cache_vision_features
from wallvla.rotations_wallvla import matrix_to_axis_angle, rotation_to_matrix
from wallvla.trainers.codec_trainer import CodecTrainer, CodecTrainingConfig, VisionEmbedder, codebook_use
from wallvla.trainers.fine_tuning import native_embodiment


MILLIMETRES = 10.0  # of set point per unit of a Meta-World action
VISUAL = {"alignment_weight": 0.0, "next_frame_weight": 0.0}
VARIANTS = {
    "RVQ full": {},
    "RVQ without alignment": {"alignment_weight": 0.0},
    "RVQ without next-frame": {"next_frame_weight": 0.0},
    "RVQ without DCT": {"dct_weight": 0.0},
}


def read(path: str, horizon: int, held_out: bool, cameras: list[str]) -> LeRobotDataset:
    """Every fifth episode, or the others."""
    count = LeRobotDataset(path, embodiment="robot", cameras=[], action_horizon=horizon).num_episodes
    episodes = [index for index in range(count) if (index % 5 == 4) == held_out]
    return LeRobotDataset(path, embodiment="robot", cameras=cameras, action_horizon=horizon, episodes=episodes)


def train_variant(name: str, overrides: dict, chunks: ActionChunks, width: int, options) -> WallVLAActionCodec:
    """A trained codec, from `--output` if it is there."""
    folder = Path(options.output) / name.replace(" ", "-")
    if not (folder / "config.json").exists():
        torch.manual_seed(options.seed)
        codec = WallVLAActionCodec(
            WallVLAActionCodecConfig(
                action_dim=chunks.action_dim,
                state_dim=chunks.state_dim,
                hidden_size=128,
                latent_steps=options.latent_steps,
                codebook_size=options.codebook_size,
                feature_dim=width,
                **(overrides if width else overrides | VISUAL),
            )
        )
        arguments = CodecTrainingConfig(
            output_dir=str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            seed=options.seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        CodecTrainer(codec, arguments, chunks).train()
        codec.save_pretrained(folder)
    return WallVLAActionCodec.from_pretrained(folder).eval()


def all_chunks(chunks: ActionChunks, stride: int) -> dict[str, torch.Tensor]:
    """Every `stride`-th full chunk, in one batch, with the robot's states (n, S) and the labels of the probes."""
    index = torch.arange(0, len(chunks), stride)
    batch = chunks.__getitems__(index.tolist()) | {"index": index}
    full = batch["action_mask"].any(dim=2).all(dim=1)
    batch = {name: values[full] for name, values in batch.items()}
    states = np.concatenate([dataset.states[:] for dataset in chunks.datasets])
    batch["robot_state"] = torch.from_numpy(states)[batch["index"]]
    batch["third_of_episode"], batch["gripper_event"] = labels(chunks, batch)
    return batch


def labels(chunks: ActionChunks, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Third of the episode (n,) and whether the gripper command changes within the chunk (n,), int64."""
    starts, lengths, offset = [], [], 0
    for dataset in chunks.datasets:
        for first, stop in dataset.episode_bounds:
            starts += [offset + first] * (stop - first)
            lengths += [stop - first] * (stop - first)
        offset += len(dataset)
    index = batch["index"].numpy()
    third = 3 * (index - np.array(starts)[index]) // np.array(lengths)[index]
    gripper = batch["actions"][..., [9, 19] if chunks.action_dim == 26 else [-1]]
    return torch.from_numpy(third), ((gripper.amax(1) - gripper.amin(1)) > 0.5).any(dim=1).long()


def robot_parts(robot: Embodiment, values: np.ndarray) -> dict[str, np.ndarray]:
    """Robot actions (n, H, D) by kind: positions in millimetres, rotations as matrices, grippers; all arms."""
    if robot.action_layout[0][0] == "native":
        return {"position": values[..., :3] * MILLIMETRES, "gripper": values[..., 3:]}
    parts, at = {"position": [], "rotation": [], "gripper": []}, 0
    for name, width in robot.action_layout:
        piece, at = values[..., at : at + width], at + width
        kind = name.rsplit("_", 1)[1]
        if kind == "rotation":
            piece = rotation_to_matrix(piece, robot.rotation_format)[..., None, :, :]
        parts[kind].append(1000 * piece if kind == "position" else piece)
    return {kind: np.concatenate(pieces, -3 if kind == "rotation" else -1) for kind, pieces in parts.items()}


def motion_errors(robot: Embodiment, decoded: np.ndarray, original: np.ndarray) -> dict:
    """RMS errors of robot actions (n, H, D) in millimetres and degrees, and the jerk ratio."""
    ours, theirs = robot_parts(robot, decoded), robot_parts(robot, original)

    def rms(values: np.ndarray, axis=None) -> np.ndarray:
        return np.sqrt(np.square(values).mean(axis=axis))

    order = 2 if robot.action_layout[0][0] == "native" else 3  # of displacements, of positions
    bends = [rms(np.diff(each["position"], n=order, axis=1)) for each in (ours, theirs)]
    errors = {
        "rmse_mm": rms(ours["position"] - theirs["position"], (0, 1)).round(4).tolist(),
        "rmse_gripper": float(rms(ours["gripper"] - theirs["gripper"])),
        "jerk_ratio": float(bends[0] / bends[1]),
    }
    if "rotation" in ours:
        between = np.swapaxes(theirs["rotation"], -1, -2) @ ours["rotation"]
        angles = np.linalg.norm(matrix_to_axis_angle(between), axis=-1)
        errors["rmse_degrees"] = np.rad2deg(rms(angles, (0, 1))).round(4).tolist()
    return errors


def token_counts(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """How often each id occurs in each chunk, (n, vocabulary) float32; -1 is no id."""
    counts = torch.zeros(len(ids), vocabulary + 1)
    counts.scatter_add_(1, torch.where(ids < 0, vocabulary, ids), torch.ones_like(ids, dtype=torch.float32))
    return counts[:, :vocabulary]


def probe(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor) -> float:
    """Balanced accuracy of a logistic regression with balanced classes."""
    classes = int(train_labels.max()) + 1
    share = torch.bincount(train_labels, minlength=classes).float() / len(train_labels)
    weight = torch.zeros(train.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels, weight=1 / share.clamp(min=1e-6) / classes)
        loss = loss + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (test @ weight + bias).argmax(dim=1)
    right = [(predicted == test_labels)[test_labels == each].float().mean() for each in test_labels.unique()]
    return torch.stack(right).mean().item()


def measure(codec, parts: dict, robot: Embodiment, options) -> dict:
    """All figures of one codec."""
    train, test = parts["train"], parts["test"]
    inputs = (test["actions"], test["state"], test["action_mask"], test["domain_ids"])
    begun = time.perf_counter()
    ids = codec.encode(*inputs)
    encoded = time.perf_counter()
    used = test["action_mask"][0, 0]
    decoded = codec.decode(ids, test["state"], test["actions"].shape[1], used, test["domain_ids"])
    ended = time.perf_counter()
    channels, state = torch.from_numpy(robot.action_channels), test["robot_state"].numpy()
    chunks = [each[..., channels].numpy().astype(np.float64) for each in (decoded, test["actions"])]
    robot_units = [
        np.stack([robot.decode_actions(*pair) for pair in zip(each, state, strict=True)]) for each in chunks
    ]
    vocabulary = codec.vocabulary_size
    counts = torch.bincount(ids[ids >= 0], minlength=vocabulary).view(codec.num_levels, -1)
    use = codebook_use(counts)
    train_ids = codec.encode(train["actions"], train["state"], train["action_mask"], train["domain_ids"])
    features = token_counts(train_ids, vocabulary), token_counts(ids, vocabulary)
    accuracy = {
        name: probe(features[0], train[name], features[1], test[name])
        for name in ("third_of_episode", "gripper_event")
        if len(train[name].unique()) > 1  # many tasks keep the gripper as it is
    }
    tokens = (ids >= 0).float().sum(dim=1).mean().item()
    return {
        "tokens_per_chunk": tokens,
        "tokens_per_s": tokens * robot.control_frequency / robot.action_horizon,
        "bits_per_s": tokens * robot.control_frequency / robot.action_horizon * np.log2(vocabulary / codec.num_levels),
        **motion_errors(robot, *robot_units),
        "usage": [round(share, 3) for share, _ in use],
        "perplexity": [round(perplexity, 1) for _, perplexity in use],
        **accuracy,
        "encode_chunks_per_s": len(ids) / (encoded - begun),
        "decode_chunks_per_s": len(ids) / (ended - encoded),
    }


def level_curve(codec: WallVLAActionCodec, test: dict) -> list[float]:
    """RMS error of normalised actions from 1, 2, ... levels."""
    ids = codec.encode(test["actions"], test["state"], test["action_mask"], test["domain_ids"])
    errors, mask = [], test["action_mask"]
    for level in range(1, codec.num_levels + 1):
        prefix = ids[:, : level * codec.config.latent_steps]
        decoded = codec.decode(prefix, test["state"], test["actions"].shape[1], mask[0, 0], test["domain_ids"])
        errors.append((decoded - test["actions"])[mask].square().mean().sqrt().item())
    return errors


def print_table(results: dict) -> None:
    """The table of docs/action_codec.md."""
    print(
        "| codec | tokens/s | bits/s | position, mm | rotation, degrees | gripper | jerk ratio | codes in use ", end=""
    )
    print("| phase | gripper event |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        position = " / ".join(f"{each:.2f}" for each in row["rmse_mm"])
        rotation = " / ".join(f"{each:.2f}" for each in row.get("rmse_degrees", [])) or "-"
        usage = " / ".join(f"{each:.0%}" for each in row["usage"])
        rates = f"{row['tokens_per_s']:.0f} | {row['bits_per_s']:.0f}"
        errors = f"{position} | {rotation} | {row['rmse_gripper']:.3f} | {row['jerk_ratio']:.2f}"
        accuracy = [f"{row[name]:.0%}" if name in row else "-" for name in ("third_of_episode", "gripper_event")]
        probes = " | ".join(accuracy)
        print(f"| {name} | {rates} | {errors} | {usage} | {probes} |")
    print("\n| codec | perplexity by level | encode, chunks/s | decode, chunks/s |\n|---|---|---|---|")
    for name, row in results.items():
        perplexity = " / ".join(f"{each:.0f}" for each in row["perplexity"])
        print(f"| {name} | {perplexity} | {row['encode_chunks_per_s']:.0f} | {row['decode_chunks_per_s']:.0f} |")


def main() -> None:
    """Prints tables and writes `results.json` in `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", required=True, help="LeRobot folders of one robot's demonstrations")
    parser.add_argument("--robot", help="JSON of the robot; without it its vectors are used as they are (Meta-World)")
    parser.add_argument("--vision", help="checkpoint whose vision features align the tokens")
    parser.add_argument("--output", default="runs/codecs")
    parser.add_argument("--action-horizon", type=int, default=16, help="without --robot")
    parser.add_argument("--latent-steps", type=int, default=4)
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stride", type=int, default=2, help="only every n-th chunk is measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_auto_classes()
    robot = None if options.robot is None else Embodiment.from_dict(json.loads(Path(options.robot).read_text()))
    horizon = options.action_horizon if robot is None else robot.action_horizon
    cameras = ["front"] if options.vision else []
    sources = {
        part: [read(path, horizon, part == "test", cameras) for path in options.datasets] for part in ("train", "test")
    }
    if robot is None:
        robot = native_embodiment(read(options.datasets[0], horizon, False, ["front"]), horizon)
        sizes = len(robot.action_channels), len(robot.state_channels)
    else:
        sizes = 26, 26
    robot = Embodiment.from_dict(robot.to_dict() | {"statistics": compute_statistics(sources["train"], robot)})
    features = None
    if options.vision:
        embedder = VisionEmbedder(options.vision)
        name, folder = embedder.fingerprint(), Path(options.output) / "vision"
        features = [cache_vision_features(dataset, embedder, name, folder) for dataset in sources["train"]]
    training = ActionChunks(sources["train"], robot, *sizes, features)
    parts = {
        part: all_chunks(ActionChunks(datasets, robot, *sizes), options.stride) for part, datasets in sources.items()
    }
    counts = {part: (len(parts[part]["index"]), int(parts[part]["gripper_event"].sum())) for part in parts}
    print(f"chunks, with gripper event: {counts}")
    width = 0 if features is None else features[0].shape[1]
    codecs = {
        name: train_variant(name, overrides, training, width, options)
        for name, overrides in VARIANTS.items()
        if width or not set(overrides) & set(VISUAL)
    }
    full, train = codecs["RVQ full"], parts["train"]
    rate = full.tokens_per_chunk(horizon, sizes[0])
    codecs["FAST, same token rate"] = FASTActionCodec.fit_to_rate(train["actions"], train["action_mask"], rate)
    codecs["binning, 256 bins"] = BinningActionCodec(sizes[0])
    results = {name: measure(codec, parts, robot, options) for name, codec in codecs.items()}
    print_table(results)
    curve = level_curve(full, parts["test"])
    print("\nRMS error of normalised actions from 1, 2, ... levels:", ", ".join(f"{each:.3f}" for each in curve))
    values = {"options": vars(options), "chunks": counts, "codecs": results, "level_curve": curve}
    (Path(options.output) / "results.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
