"""Training samples per second, and milliseconds of `sample_actions` with and without reuse of the prefix.

    python benchmarks/model_speed.py                                       # the quickstart's model on this CPU
    python benchmarks/model_speed.py --size wall_oss_05 --device cuda --image-size 448 --cameras 3

Random weights and inputs. "recompute" runs the whole prefix again at every Euler step, as several public
implementations do; it gives the same actions, which is checked. Medians over interleaved repetitions.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.flow_matching_wallvla import euler_step, time_grid
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration


def make_batch(model, batch_size: int, cameras: int, image_size: int, text_tokens: int, device: str) -> dict:
    """Random prefix of `cameras` square images and `text_tokens` tokens, the same length in every row."""
    vision, vlm = model.config.vlm_config.vision_config, model.config.vlm_config
    side = image_size // vision.patch_size
    image = [vlm.vision_start_token_id, *[vlm.image_token_id] * (side // 2) ** 2, vlm.vision_end_token_id]
    row = image * cameras + [1] * text_tokens
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": torch.tensor([row] * batch_size, device=device),
        "pixel_values": torch.randn(batch_size * cameras * side * side, patch, device=device),
        "image_grid_thw": torch.tensor([[1, side, side]] * (batch_size * cameras), device=device),
    }


def sample_with_recomputed_prefix(model, batch: dict, noise: torch.Tensor) -> torch.Tensor:
    """`sample_actions` that encodes the prefix at every step."""
    mask = torch.ones_like(noise, dtype=torch.bool)
    channels, steps = mask.any(1, keepdim=True), mask.any(2)
    times, actions = time_grid(model.config.num_inference_steps, model.config.time_scale, noise.device), noise
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:], strict=True):
            context = model.encode_prefix(**batch)
            velocity = model.predict_velocity(actions, now.expand(len(noise)), context, channels, steps)
            actions = euler_step(actions, velocity, now, then)
    return actions


def timed(run, device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_sampling(model, options) -> dict:
    """Median milliseconds of one call at batch 1."""
    batch = make_batch(model, 1, options.cameras, options.image_size, options.text_tokens, options.device)
    noise = torch.randn(1, model.config.action_horizon, model.config.action_dim, device=options.device)
    arms = {
        "prefix_reused_ms": lambda: model.sample_actions(**batch, noise=noise),
        "prefix_recomputed_ms": lambda: sample_with_recomputed_prefix(model, batch, noise),
    }
    difference = (arms["prefix_reused_ms"]() - arms["prefix_recomputed_ms"]()).abs().max().item()
    times = {name: [] for name in arms}
    for repetition in range(options.repetitions + 3):
        for name, run in arms.items():
            seconds = timed(run, options.device)
            if repetition >= 3:
                times[name].append(1000 * seconds)
    result = {name: round(statistics.median(values), 2) for name, values in times.items()}
    ratio = result["prefix_recomputed_ms"] / result["prefix_reused_ms"]
    return result | {"ratio": round(ratio, 2), "largest_difference": difference}


def measure_training(model, options) -> dict:
    """Samples per second of forward, backward, clipping and AdamW."""
    batch = make_batch(
        model, options.batch_size, options.cameras, options.image_size, options.text_tokens, options.device
    )
    shape = (options.batch_size, model.config.action_horizon, model.config.action_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kind = torch.device(options.device).type

    def step() -> None:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=options.bf16):
            loss = model(**batch, actions=torch.randn(shape, device=options.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    seconds = [timed(step, options.device) for _ in range(options.repetitions + 3)][3:]
    model.eval()
    return {"training_samples_per_s": round(options.batch_size / statistics.median(seconds), 1)}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "wall_oss_05"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast in training")
    parser.add_argument("--skip-training", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = WallVLAConfig.wall_oss_05()
    if options.size == "tiny":
        config = WallVLAConfig.tiny(vocab_size=640)
        config.vlm_config.image_token_id, config.vlm_config.vision_start_token_id = 600, 601
        config.vlm_config.vision_end_token_id = 602
    model = WallVLAForConditionalGeneration(config).to(options.device).eval()
    result = {
        "options": vars(options),
        "parameters": model.num_parameters(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "sampling": measure_sampling(model, options),
    }
    if not options.skip_training:
        result["training"] = measure_training(model, options)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
