"""What action codecs keep of motion, on held-out episodes: RVQ with and without each objective, FAST, binning.

    python benchmarks/action_codecs.py --datasets RUN/dataset MORE/dataset --vision RUN/hub --output runs/codecs

Every fifth episode of each dataset is held out: nothing is fitted on it, statistics included. FAST gets the token rate
of RVQ. Position errors are those of the executed displacement per step; a Meta-World robot has no rotation channel.
jerk ratio: RMS of the second difference of the displacements, reconstruction over original; 1 is faithful.
Linear probes: balanced accuracy of logistic regression on token counts, of the third of the episode (chance 33%) and
of whether the gripper command changes within the chunk (chance 50%). Trained codecs are kept in `--output`.
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
from wallvla.trainers.codec_trainer import CodecTrainer, CodecTrainingConfig, VisionEmbedder, codebook_use
from wallvla.trainers.fine_tuning import native_embodiment


MILLIMETRES = 10.0  # of set point per unit of a Meta-World action
VARIANTS = {
    "RVQ full": {},
    "RVQ without alignment": {"alignment_weight": 0.0},
    "RVQ without next-frame": {"next_frame_weight": 0.0},
    "RVQ without DCT": {"dct_weight": 0.0},
}


def read(path: str, horizon: int, held_out: bool) -> LeRobotDataset:
    """Every fifth episode, or the others."""
    count = LeRobotDataset(path, embodiment="robot", cameras=[], action_horizon=horizon).num_episodes
    episodes = [index for index in range(count) if (index % 5 == 4) == held_out]
    return LeRobotDataset(path, embodiment="robot", cameras=["front"], action_horizon=horizon, episodes=episodes)


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
                **overrides,
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


def all_chunks(chunks: ActionChunks) -> dict[str, torch.Tensor]:
    """Every second full chunk, in one batch."""
    batch = chunks.__getitems__(list(range(0, len(chunks), 2)))
    full = batch["action_mask"].all(dim=1).any(dim=1)
    return {name: values[full] for name, values in batch.items()} | {"index": torch.arange(0, len(chunks), 2)[full]}


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
    gripper = batch["actions"][..., -1]
    return torch.from_numpy(third), ((gripper.amax(1) - gripper.amin(1)) > 0.5).long()


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
    decoded = codec.decode(ids, test["state"], test["actions"].shape[1], None, test["domain_ids"])
    ended = time.perf_counter()
    robot_units = [robot.decode_actions(each.numpy().astype(np.float64), None) for each in (decoded, test["actions"])]
    rmse = np.sqrt(np.square(robot_units[0] - robot_units[1]).mean(axis=(0, 1)))
    bends = [np.sqrt(np.square(np.diff(each[..., :3], n=2, axis=1)).mean()) for each in robot_units]
    vocabulary = codec.vocabulary_size
    counts = torch.bincount(ids[ids >= 0], minlength=vocabulary).view(codec.num_levels, -1)
    use = codebook_use(counts)
    train_ids = codec.encode(train["actions"], train["state"], train["action_mask"], train["domain_ids"])
    features = token_counts(train_ids, vocabulary), token_counts(ids, vocabulary)
    accuracy = {
        name: probe(features[0], train[name], features[1], test[name])
        for name in ("third_of_episode", "gripper_event")
    }
    tokens = (ids >= 0).float().sum(dim=1).mean().item()
    return {
        "tokens_per_chunk": tokens,
        "tokens_per_s": tokens * robot.control_frequency / robot.action_horizon,
        "bits_per_s": tokens * robot.control_frequency / robot.action_horizon * np.log2(vocabulary / codec.num_levels),
        "rmse_mm": [float(each) * MILLIMETRES for each in rmse[:3]],
        "rmse_gripper": float(rmse[3]),
        "jerk_ratio": float(bends[0] / bends[1]),
        "usage": [round(share, 3) for share, _ in use],
        "perplexity": [round(perplexity, 1) for _, perplexity in use],
        **accuracy,
        "encode_chunks_per_s": len(ids) / (encoded - begun),
        "decode_chunks_per_s": len(ids) / (ended - encoded),
    }


def level_curve(codec: WallVLAActionCodec, test: dict) -> list[float]:
    """RMS error of normalised actions from 1, 2, ... levels."""
    ids = codec.encode(test["actions"], test["state"], test["action_mask"], test["domain_ids"])
    errors = []
    for level in range(1, codec.num_levels + 1):
        prefix = ids[:, : level * codec.config.latent_steps]
        decoded = codec.decode(prefix, test["state"], test["actions"].shape[1], None, test["domain_ids"])
        errors.append((decoded - test["actions"]).square().mean().sqrt().item())
    return errors


def print_table(results: dict) -> None:
    """The table of docs/action_codec.md."""
    print(
        "| codec | tokens/s | bits/s | x / y / z, mm | gripper | jerk ratio | codes in use | phase | gripper event |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        position = " / ".join(f"{each:.2f}" for each in row["rmse_mm"])
        usage = " / ".join(f"{each:.0%}" for each in row["usage"])
        rates = f"{row['tokens_per_s']:.0f} | {row['bits_per_s']:.0f}"
        errors = f"{position} | {row['rmse_gripper']:.3f} | {row['jerk_ratio']:.2f}"
        probes = f"{row['third_of_episode']:.0%} | {row['gripper_event']:.0%}"
        print(f"| {name} | {rates} | {errors} | {usage} | {probes} |")
    print("\n| codec | perplexity by level | encode, chunks/s | decode, chunks/s |\n|---|---|---|---|")
    for name, row in results.items():
        perplexity = " / ".join(f"{each:.0f}" for each in row["perplexity"])
        print(f"| {name} | {perplexity} | {row['encode_chunks_per_s']:.0f} | {row['decode_chunks_per_s']:.0f} |")


def main() -> None:
    """Prints tables and writes `results.json` in `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", required=True, help="LeRobot folders of Meta-World demonstrations")
    parser.add_argument("--vision", required=True, help="checkpoint whose vision features align the tokens")
    parser.add_argument("--output", default="runs/codecs")
    parser.add_argument("--action-horizon", type=int, default=16)
    parser.add_argument("--latent-steps", type=int, default=4)
    parser.add_argument("--codebook-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_auto_classes()
    sources = {
        part: [read(path, options.action_horizon, part == "test") for path in options.datasets]
        for part in ("train", "test")
    }
    robot = native_embodiment(sources["train"][0], options.action_horizon)
    robot = Embodiment.from_dict(robot.to_dict() | {"statistics": compute_statistics(sources["train"], robot)})
    embedder = VisionEmbedder(options.vision)
    name, folder = embedder.fingerprint(), Path(options.output) / "vision"
    features = [cache_vision_features(dataset, embedder, name, folder) for dataset in sources["train"]]
    sizes = len(robot.action_channels), len(robot.state_channels)
    training = ActionChunks(sources["train"], robot, *sizes, features)
    parts = {}
    for part, datasets in sources.items():
        chunks = ActionChunks(datasets, robot, *sizes)
        parts[part] = all_chunks(chunks)
        parts[part]["third_of_episode"], parts[part]["gripper_event"] = labels(chunks, parts[part])
    counts = {part: (len(parts[part]["index"]), int(parts[part]["gripper_event"].sum())) for part in parts}
    print(f"chunks, with gripper event: {counts}")
    codecs = {
        name: train_variant(name, overrides, training, features[0].shape[1], options)
        for name, overrides in VARIANTS.items()
    }
    full, train = codecs["RVQ full"], parts["train"]
    rate = full.tokens_per_chunk(options.action_horizon, sizes[0])
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
