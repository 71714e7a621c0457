"""Two small policies, co-trained on the tokens of two action codecs: same data, same steps, several seeds.

    wallvla train-codec --dataset RUN/dataset --vision RUN/hub --model RUN/hub --cameras front \
        --latent_steps 2 --codebook_size 256 --hidden_size 128 --max_steps 600 --output_dir runs/rvq
    python benchmarks/codec_downstream.py --run RUN --rvq runs/rvq --output runs/downstream

RUN is a finished `wallvla quickstart`. FAST is fitted on the same chunks, with as many ids and as many tokens per
chunk as the RVQ codec. Only the tokens differ: the policies act by their flow; data, order and steps are the same.
Validation: flow loss on demonstrations of unseen seeds, the same noise for all; success in closed loop on unseen
seeds, by the flow, and for RVQ also by its discrete tokens. Finished arms are kept; a second call goes on from there.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from wallvla import register_auto_classes
from wallvla.baseline_codecs_wallvla import FASTActionCodec, load_action_codec
from wallvla.data.action_chunks import ActionChunks
from wallvla.data.lerobot import LeRobotDataset
from wallvla.evaluation.closed_loop import closed_loop_spec, evaluate
from wallvla.evaluation.demonstrations import record_demonstrations
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.quickstart import EMBODIMENT, OPEN_LOOP_SEED, QuickstartConfig, train


def fit_fast(options, rvq, folder: Path) -> None:
    """FAST with the token rate and the number of ids of `rvq`, from the chunks of the run."""
    processor = WallVLAProcessor.from_pretrained(Path(options.run) / "hub")
    robot = processor.embodiments[EMBODIMENT]
    dataset = LeRobotDataset(
        Path(options.run) / "dataset", embodiment=EMBODIMENT, cameras=[], action_horizon=robot.action_horizon
    )
    batch = ActionChunks([dataset], robot, processor.action_dim, len(robot.state_channels)).__getitems__(
        list(range(0, len(dataset), 2))
    )
    rate = rvq.tokens_per_chunk(robot.action_horizon, len(robot.action_channels))
    FASTActionCodec.fit_to_rate(batch["actions"], batch["action_mask"], rate, rvq.vocabulary_size).save_pretrained(
        folder
    )


def validation_samples(config: QuickstartConfig, episodes: int) -> list[dict]:
    """Every fourth frame of unseen demonstrations, as action samples."""
    samples = []
    for demonstration in record_demonstrations(
        config.task, episodes, seed0=OPEN_LOOP_SEED, cameras=config.cameras, grounding_every=0, progress=False
    ):
        length = len(demonstration.actions)
        for start in range(0, length, 4):
            steps = start + np.arange(8)
            samples.append(
                {
                    "images": {name: images[start] for name, images in demonstration.frames.items()},
                    "instruction": demonstration.instruction,
                    "state": demonstration.states[start],
                    "embodiment": EMBODIMENT,
                    "actions": demonstration.actions[np.minimum(steps, length - 1)],
                    "action_is_pad": steps >= length,
                }
            )
    return samples


@torch.no_grad()
def validation_losses(folder: Path, samples: list[dict]) -> dict:
    """Mean flow loss and cross-entropy of the action tokens, with the same noise and times for every model."""
    model = WallVLAForConditionalGeneration.from_pretrained(folder).eval()
    processor = WallVLAProcessor.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    sums, counts = torch.zeros(2), torch.zeros(2)
    for start in range(0, len(samples), 32):
        batch = processor.encode(samples[start : start + 32])
        noise = torch.randn(batch["actions"].shape, generator=generator)
        time = torch.rand(len(noise), generator=generator) * model.config.time_scale
        output = model(**batch, noise=noise, time=time)
        values = torch.stack([output.flow_loss, output.action_token_loss])
        sums += values * output.loss_counts[:2]
        counts += output.loss_counts[:2]
    flow, token = (sums / counts).tolist()
    return {"flow_loss": flow, "action_token_loss": token}


def run_arm(options, name: str, codec: str, seed: int, samples: list[dict]) -> dict:
    """Trains and measures one policy; the result is kept in its folder."""
    folder = Path(options.output) / f"{name}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    config = QuickstartConfig(steps=options.steps, seed=seed, codec=codec, num_processes=1)
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("dataset", "grounding.parquet"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to((Path(options.run) / shared).resolve())
    if not (folder / "hub").exists():
        train(config, folder, folder / "hub")
    policy = {"kind": "hub", "path": str((folder / "hub").resolve()), "embodiment": EMBODIMENT}
    acting = {"flow": (policy, options.episodes)}
    if name == "rvq" and options.token_episodes:
        acting["tokens"] = ({**policy, "discrete": True}, options.token_episodes)
    summary = {}
    for way, (policy, episodes) in acting.items():
        spec = closed_loop_spec({way: policy}, config.task, episodes, max_steps=200, trust_remote_code=True)
        summary |= evaluate(spec, folder / "closed_loop" / way, 1, progress=False)["summary"]
    values = {
        "arm": name,
        "seed": seed,
        **validation_losses(folder / "hub", samples),
        "closed_loop": {policy: tasks["all"] for policy, tasks in summary.items()},
    }
    result.write_text(json.dumps(values, indent=2) + "\n")
    return values


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """95% interval of a rate."""
    z, rate = 1.96, successes / episodes
    middle = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * (rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) ** 0.5
    return middle - half, middle + half


def print_table(results: list[dict]) -> None:
    """One row per arm and way of acting: losses over seeds, success over all episodes."""
    print("| arm | seeds | flow loss (unseen) | action-token CE (unseen) | success | 95% interval | per seed |")
    print("|---|---|---|---|---|---|---|")
    for arm, acting in (("rvq", "flow"), ("fast", "flow"), ("rvq", "tokens")):
        rows = [row for row in results if row["arm"] == arm and acting in row["closed_loop"]]
        if not rows:
            continue
        losses = []
        for name in ("flow_loss", "action_token_loss"):
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            losses.append(f"{statistics.mean(values):.4f}{spread}")
        closed = [row["closed_loop"][acting] for row in rows]
        successes, episodes = sum(each["successes"] for each in closed), sum(each["episodes"] for each in closed)
        low, high = wilson(successes, episodes)
        rates = ", ".join(f"{each['rate']:.0%}" for each in closed)
        print(
            f"| {arm}, acting by {acting} | {len(rows)} | {losses[0]} | {losses[1]} | {successes}/{episodes} = "
            f"{successes / episodes:.0%} | [{low:.0%}, {high:.0%}] | {rates} |"
        )


def main() -> None:
    """Prints a table; the results are in `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a finished quickstart")
    parser.add_argument("--rvq", required=True, help="folder of an RVQ codec trained on its dataset")
    parser.add_argument("--output", default="runs/downstream")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=["rvq", "fast"], default=["rvq", "fast"])
    parser.add_argument("--episodes", type=int, default=20, help="evaluation seeds of each task")
    parser.add_argument("--token-episodes", type=int, default=5, help="the same for RVQ acting by its tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_auto_classes()
    fast = Path(options.output) / "fast"
    if not fast.exists():
        fit_fast(options, load_action_codec(options.rvq), fast)
    codecs = {"rvq": options.rvq, "fast": str(fast)}
    samples = validation_samples(QuickstartConfig(), 4)
    results = []
    for seed in options.seeds:
        for name in options.arms:
            results.append(run_arm(options, name, codecs[name], seed, samples))
            print(json.dumps(results[-1]), flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
