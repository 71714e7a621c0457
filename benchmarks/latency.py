"""Latency of one policy call, frames in and actions out: every way to run it, against the floor of the machine.

    python benchmarks/latency.py                                      # counts at full size; a scaled model on the CPU
    python benchmarks/latency.py --device cuda --output runs/latency  # full size, random weights, 3 x 224 and 3 x 448

Arms: `eager` (sample_actions, keys and values of the prefix reused), `recompute` (the prefix again at every step, as
several public implementations do), `compile-...` (eager with the denoising step compiled), `engine` (the same function
as the graph, without one), `graph`, `graph+kernels` (where the Kernel Hub's are at hand), `graph+fp8`. The arms take
turns in every round. Scope S0 is the device alone, inputs in place; S1 is uint8 frames on the host to actions on the
host, tokeniser and image processing included; S2 is the best arm behind a policy server on this machine. Weights are
random, as rates on zeros are not to be trusted.

With the times come the floor (measured rates of the machine, counted operations, bytes of the weights and the cache),
the stages of a call, the error of each arm against float32, and whether a replay equals the eager call to the byte.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import Embodiment
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.flow_matching_wallvla import euler_step, time_grid
from wallvla.inference.engine import Bucket, WallVLAEngine, capture
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.ops_wallvla import TORCH_OPS, Ops, fast_ops
from wallvla.processing_wallvla import WallVLAProcessor


SPECIAL = [f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")]
FILLER = " more"  # one token, to make instructions of any length
PHRASES = ["You are a helpful assistant.", "Observation:", "Instruction:", "Predict the next action in robot action."]
CAMERAS = {"front": "front view", "left_wrist": "left wrist view", "right_wrist": "right wrist view"}
BOUNDS = {"q01": [-1.0] * 26, "q99": [1.0] * 26}
FP8_GATE = 0.05  # relative L2 error against float32


# --- the policy


def scaled_config() -> WallVLAConfig:
    """36 layers like Wall-OSS-0.5, each of them small enough for a CPU."""
    config = WallVLAConfig.tiny(vocab_size=1024, action_dim=26, action_horizon=32, num_inference_steps=10)
    values = config.to_dict()
    values["vlm_config"]["text_config"] |= {"num_hidden_layers": 36, "layer_types": None, "max_window_layers": 36}
    values["vlm_config"]["vision_config"] |= {"patch_size": 14, "window_size": 112, "temporal_patch_size": 2}
    names = ("hidden_size", "intermediate_size")
    values["action_expert"] = {name: values["action_expert"][name] // 2 for name in names}
    return WallVLAConfig(**{name: values[name] for name in WallVLAConfig.__dataclass_fields__ if name in values})


def make_processor(image_size: int) -> WallVLAProcessor:
    """Three cameras, 26 channels, a second of 32 steps, patches of 14 pixels, and a tokenizer of a thousand tokens."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["press the button"], vocab_size=300, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens([FILLER, *PHRASES, *CAMERAS.values(), *(f" {number}" for number in range(256))])
    robot = Embodiment.from_dict(
        {
            "cameras": {f"observation.images.{name}": label for name, label in CAMERAS.items()},
            "control_frequency": 32,
            "action_horizon": 32,
            "state_layout": [["native", 26]],
            "action_layout": [["native", 26]],
            "statistics": {"state": BOUNDS, "action": BOUNDS},
        }
    )
    return WallVLAProcessor(
        Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2),
        tokenizer,
        {"robot": robot},
        longest_side=image_size,
    )


def make_model(config: WallVLAConfig, processor: WallVLAProcessor, device: str) -> WallVLAForConditionalGeneration:
    """A random float32 model whose image token is the processor's."""
    config.vlm_config.image_token_id = processor.image_token_id
    with torch.device(device):
        return WallVLAForConditionalGeneration(config).eval()


def make_observation(processor: WallVLAProcessor, image_size: int, text_tokens: int, seed: int = 0) -> dict:
    """Random square frames and state, and an instruction that makes `text_tokens` tokens of everything but images."""
    rng = np.random.default_rng(seed)
    shape = (image_size, image_size, 3)
    sample = {
        "images": {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in CAMERAS},
        "instruction": "press the button",
        "state": rng.uniform(-1, 1, 26),
    }
    ids = processor.encode([sample], "np", patches=False)["input_ids"]
    missing = text_tokens - int((ids != processor.image_token_id).sum())
    if missing < 0:
        raise ValueError(
            f"Found {text_tokens} text tokens; the prompt alone has {text_tokens - missing}. Ask for more."
        )
    return sample | {"instruction": "press the button" + FILLER * missing}


# --- counts


def closed_form(config: WallVLAConfig, image_size: int, text_tokens: int, cameras: int = 3) -> dict[str, float]:
    """Operations of each stage by hand, causal attention at half: `vision`, `prefill`, and one denoising `step`."""
    vision, text = config.vlm_config.vision_config, config.vlm_config.text_config
    expert, horizon = config.action_expert, config.action_horizon
    per_image = (image_size // vision.patch_size) ** 2
    patches, unit, width = cameras * per_image, vision.spatial_merge_size**2, vision.hidden_size
    window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.fullatt_block_indexes)
    block = 2 * patches * (4 * width**2 + 3 * width * vision.intermediate_size)
    attention = 4 * width * patches * (full * per_image + (vision.depth - full) * window)
    merged = 2 * patches // unit * (unit * width) * (unit * width + vision.out_hidden_size)
    embedded = 2 * patches * 3 * vision.patch_size**2 * width
    prefix, key_width = patches // unit + text_tokens, expert.num_key_value_heads * expert.head_dim

    def layer(hidden: int, inner: int) -> int:
        queries = expert.num_attention_heads * expert.head_dim
        return 2 * hidden * queries + 2 * hidden * key_width + 3 * hidden * inner

    text_layer = 2 * prefix * layer(text.hidden_size, text.intermediate_size) + 2 * text.hidden_size * prefix**2
    heads = (config.action_dim + expert.hidden_size + config.action_dim) * expert.hidden_size
    scores = 4 * expert.num_attention_heads * expert.head_dim * horizon * (prefix + horizon / 2)
    expert_layer = 2 * horizon * layer(expert.hidden_size, expert.intermediate_size) + scores
    return {
        "vision": vision.depth * block + attention + merged + embedded,
        "prefill": (text.num_hidden_layers - 1) * text_layer + 4 * prefix * text.hidden_size * key_width,
        "step": expert.num_hidden_layers * expert_layer + 2 * horizon * heads,
    }


def count_flops(function) -> int:
    """Operations of the matrix products and attentions of a call; attention masks do not lower them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


class OperationCounter(TorchDispatchMode):
    """Counts dispatched operations that do something: views, which only describe memory, are left out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not view and function is not torch.ops.aten._unsafe_view.default:
            self.counts[function.name().removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def as_one(function):
    """The function, counted as a single operation by the `OperationCounter` around it."""

    def run(*args):
        counter = _get_current_dispatch_mode()
        with _disable_current_modes():
            result = function(*args)
        if counter is not None:
            counter.counts[function.__name__] += 1
        return result

    return run


def count_operations(function) -> Counter:
    """Dispatched operations of a call by name."""
    function()
    with OperationCounter() as counter, torch.no_grad():
        function()
    return counter.counts


def stages(bucket: Bucket) -> dict:
    """The three passes of a call, as functions without arguments."""
    forward, key = bucket.forward, bucket.key
    images = forward.encode_images(bucket.inputs, bucket.resizers, bucket.plan)
    return {
        "vision": partial(forward.encode_images, bucket.inputs, bucket.resizers, bucket.plan),
        "prefill": partial(forward.prefill, bucket.inputs, bucket.caches, key.text, key.length, images),
        "denoise": partial(forward.denoise, bucket.inputs, bucket.caches),
    }


@torch.no_grad()
def full_size_counts(image_size: int, text_tokens: int) -> dict:
    """Counted on the meta device at the real sizes: the engine's passes, and a call that recomputes its prefix."""
    processor = make_processor(image_size)
    model = make_model(WallVLAConfig.wall_oss_05(), processor, "meta")
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS, length_step=8)
    bucket = engine.bucket(*engine.inputs([make_observation(processor, image_size, text_tokens)]))
    bucket.run()  # makes what cannot be made while counting
    flops = {name: count_flops(run) for name, run in stages(bucket).items()}
    whole_prefix = partial(engine.forward.prefill, bucket.inputs, bucket.caches, 0, bucket.key.length)
    whole_prefix()
    reused = partial(engine.forward.prefill, bucket.inputs, bucket.caches, 0, bucket.key.text)
    last = model.vlm.model.language_model.layers[-1]
    skipped = sum(
        p.numel() for p in (*last.mlp.parameters(), last.self_attn.o_proj.weight, last.self_attn.q_proj.weight)
    )
    prefix = count_flops(whole_prefix) + 2 * bucket.key.length * skipped  # what other implementations run again
    steps = len(engine.forward.time_rows)
    return {
        "prefix_tokens": int(bucket.key.length),
        "reused_text_tokens": bucket.key.text,
        "reused_text_flops": count_flops(reused),
        "counted": flops,
        "closed_form": closed_form(model.config, image_size, text_tokens),
        "engine_total": sum(flops.values()),
        "recompute_language_total": flops["vision"] + flops["denoise"] + steps * prefix,
        "recompute_all_total": flops["denoise"] + steps * (flops["vision"] + prefix),
    }


@torch.no_grad()
def step_operations() -> dict[str, Counter]:
    """Dispatched operations of one denoising step with 36 layers: the model's, the engine's, and the engine's with
    each of `Ops` as the one operation that a kernel makes of it."""
    processor = make_processor(224)
    model = make_model(scaled_config(), processor, "cpu")
    sample = make_observation(processor, 56, 150)
    context = model.encode_prefix(**prefix_inputs(processor.encode([sample]))).with_room(32)
    channels, steps = torch.ones(1, 1, 26, dtype=torch.bool), torch.ones(1, 32, dtype=torch.bool)
    step = partial(model.predict_velocity, torch.randn(1, 32, 26), torch.zeros(1), context, channels, steps)
    engine = {}
    for name, ops in (("engine", TORCH_OPS), ("engine with kernels", Ops(*map(as_one, TORCH_OPS)))):
        counts = []
        for number in (1, 2):
            bucket = WallVLAEngine(model, processor, number, ops=ops)
            bucket = bucket.bucket(*bucket.inputs([sample]))
            counts.append(count_operations(stages(bucket)["denoise"]))
        engine[name] = counts[1] - counts[0]
    return {"model": count_operations(step), **engine}


# --- arms


def prefix_inputs(batch) -> dict:
    """The arguments of `encode_prefix` in a batch of the processor."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    return {name: batch[name] for name in names}


def sample_recomputing(model, batch: dict, noise: torch.Tensor) -> torch.Tensor:
    """`sample_actions` that encodes the prefix at every step."""
    mask = batch["action_mask"]
    channels, steps = mask.any(1, keepdim=True), mask.any(2)
    times, actions = time_grid(model.config.num_inference_steps, model.config.time_scale, noise.device), noise
    for now, then in zip(times[:-1], times[1:], strict=True):
        context = model.encode_prefix(**prefix_inputs(batch))
        velocity = model.predict_velocity(actions, now.expand(1), context, channels, steps)
        actions = euler_step(actions, velocity, now, then)
    return actions


class CompiledSampler:
    """`sample_actions` whose step is compiled; its keys and values have static addresses."""

    def __init__(self, model, mode: str):
        self.model, self.context = model, None
        self.step = torch.compile(model.predict_velocity, mode=mode, fullgraph=True)

    def __call__(self, batch: dict, noise: torch.Tensor) -> torch.Tensor:
        config, mask = self.model.config, batch["action_mask"]
        fresh = self.model.encode_prefix(**prefix_inputs(batch))
        if self.context is None:
            self.context = fresh.with_room(config.action_horizon)
            for tensor in (*self.context.keys, *self.context.values):
                torch._dynamo.mark_static_address(tensor)
        length = fresh.visible.shape[1]
        places = [tensor[:, :, :length] for tensor in (*self.context.keys, *self.context.values)]
        torch._foreach_copy_(places, [*fresh.keys, *fresh.values])
        context = replace(self.context, visible=fresh.visible, next_position=fresh.next_position)
        channels, steps = mask.any(1, keepdim=True), mask.any(2)
        times, actions = time_grid(config.num_inference_steps, config.time_scale, noise.device), noise
        for now, then in zip(times[:-1], times[1:], strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            actions = euler_step(actions, self.step(actions, now.expand(1), context, channels, steps), now, then)
        return actions


def make_arms(model, processor, sample: dict, noise: torch.Tensor, options) -> tuple[dict, dict]:
    """(S0, S1): functions without arguments that return the chunk, by arm; and the engines' buckets by arm."""
    batch = processor.encode([sample]).to(model.device)
    samplers = {
        "eager": lambda inputs: model.sample_actions(**inputs, noise=noise),
        "recompute": partial(sample_recomputing, model, noise=noise),
    }
    for mode in options.compile:
        samplers[f"compile-{mode}"] = partial(CompiledSampler(model, mode), noise=noise)
    device_only = {name: partial(sampler, batch) for name, sampler in samplers.items()}

    def from_host(sampler) -> torch.Tensor:
        return sampler(processor.encode([sample]).to(model.device)).cpu()

    whole = {name: partial(from_host, sampler) for name, sampler in samplers.items()}
    settings = {"engine": {"ops": TORCH_OPS, "use_graphs": False}}
    if model.device.type == "cuda":
        kernels = fast_ops(model.device, trust_remote_code=options.trust_kernels)
        settings["graph"] = {"ops": TORCH_OPS}
        if kernels is not TORCH_OPS:
            settings["graph+kernels"] = {"ops": kernels}
        settings["graph+fp8"] = {"ops": kernels, "fp8": True}
    engines = {name: WallVLAEngine(model, processor, **arguments) for name, arguments in settings.items()}
    for name, engine in engines.items():
        whole[name] = lambda engine=engine: engine.sample_actions([sample], noise).cpu()
        device_only[name] = partial(replayed, engine.bucket(*engine.inputs([sample], noise)))
    return device_only, whole, engines


def replayed(bucket: Bucket) -> torch.Tensor:
    """The chunk of the inputs that are in the bucket."""
    if bucket.graph is None:
        return bucket.run()
    bucket.graph.replay()
    return bucket.output


def timed(run, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def measure(arms: dict, device: torch.device, warm_up: int, calls: int, seconds: float) -> dict:
    """Percentiles of every arm in milliseconds. The arms take turns; one whose time is up sits out the rest."""
    times = {name: [] for name in arms}
    for run in arms.values():
        started = time.perf_counter()
        for _ in range(warm_up):
            run()
            if time.perf_counter() - started > seconds:  # the first calls, which compile, may take minutes
                break
    for _ in range(calls):
        for name, run in arms.items():
            if sum(times[name]) < 1000 * seconds:
                times[name].append(timed(run, device))
    return {
        name: {"calls": len(values), **{f"p{p}": round(float(np.percentile(values, p)), 3) for p in (50, 95, 99)}}
        for name, values in times.items()
    }


@contextlib.contextmanager
def served(model, processor, engine: WallVLAEngine, sample: dict):
    """A function that asks a policy server on this machine through its socket for `sample` (scope S2)."""
    from wallvla.serving.client import PolicyClient
    from wallvla.serving.policy import ServedPolicy
    from wallvla.serving.server import PolicyServer, ServerOptions

    options = ServerOptions(port=0, max_batch=1, batch_window_s=0.0, max_requests_per_second=10_000.0)
    server, ready = PolicyServer({"policy": ServedPolicy(model, processor, engine=engine)}, options), threading.Event()
    loop = asyncio.new_event_loop()
    run = server.run(ready=lambda port: ready.set(), handle_signals=False)
    thread = threading.Thread(target=loop.run_until_complete, args=(run,), daemon=True)
    thread.start()
    ready.wait(120)
    message = {f"observation.images.{name}": frame for name, frame in sample["images"].items()}
    message |= {"observation.state": sample["state"].astype(np.float32), "prompt": sample["instruction"]}
    with PolicyClient(f"ws://127.0.0.1:{server.port}") as client:
        yield lambda: client.infer(message)
    loop.call_soon_threadsafe(server.stop)
    thread.join(30)


def machine_rates(device: torch.device) -> dict[str, float]:
    """Measured bf16 (CPU: float32) operations per second of a large product, and bytes per second of a large copy."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.empty((1 << 30) if on_gpu else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: left @ right, device) for _ in range(12))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(12))
    return {"flops_per_s": 2 * size**3 / product * 1000, "bytes_per_s": 2 * source.nbytes / copy * 1000}


def floor_ms(model, bucket: Bucket, counts: dict[str, float], rates: dict[str, float], steps: int) -> float:
    """Sum over the stages of the longer of computing and reading weights and cache once (once a step), in ms."""

    def nbytes(*modules) -> int:
        return sum(parameter.nbytes for module in modules for parameter in module.parameters())

    read = {
        "vision": nbytes(model.vlm.model.visual),
        "prefill": nbytes(model.vlm.model.language_model.layers),
        "step": nbytes(model.action_expert) + bucket.caches.nbytes,
    }
    stage = {name: max(counts[name] / rates["flops_per_s"], read[name] / rates["bytes_per_s"]) for name in read}
    return 1000 * (stage["vision"] + stage["prefill"] + steps * stage["step"])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error."""
    return ((found.float() - expected).norm() / expected.norm()).item()


def stage_times(bucket: Bucket, calls: int) -> dict[str, float]:
    """Median milliseconds of each pass of an engine, each as a graph of its own where there are graphs."""
    result = {}
    for name, run in stages(bucket).items():
        if bucket.graph is not None:
            graph, _ = capture(run, bucket.caches.device)
            run = graph.replay
        result[name] = round(float(np.median([timed(run, bucket.caches.device) for _ in range(calls)])), 3)
    return result


def half_precision(model) -> None:
    """Casts in place to bfloat16 what a checkpoint would load in it: not the action heads, nor buffers of rope."""
    kept = model._keep_in_fp32_modules_strict
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.bfloat16()


@torch.no_grad()
def benchmark(config: WallVLAConfig, options) -> list[dict]:
    """One result for each image size."""
    device = torch.device(options.device)
    processors = {size: make_processor(size) for size in options.image_sizes}
    model = make_model(config, processors[options.image_sizes[0]], options.device)
    noise = torch.randn(1, config.action_horizon, config.action_dim, device=device)
    samples = {size: make_observation(each, size, options.text_tokens) for size, each in processors.items()}
    exact = {
        size: model.sample_actions(**processor.encode([samples[size]]).to(device), noise=noise)
        for size, processor in processors.items()
    }
    if device.type == "cuda":
        half_precision(model)
    rates, results = machine_rates(device), []
    for size, processor in processors.items():
        if device.type == "cuda":
            torch._dynamo.reset()
            torch.cuda.reset_peak_memory_stats()
        device_only, whole, engines = make_arms(model, processor, samples[size], noise, options)
        errors = {name: relative_error(run(), exact[size]) for name, run in device_only.items()}
        best = [name for name in ("graph+kernels", "graph", "engine") if name in engines][0]
        bucket = next(iter(engines[best].buckets.values()))
        counts = closed_form(config, size, options.text_tokens)
        times = {
            "S0": measure(device_only, device, options.warm_up, options.calls, options.seconds),
            "S1": measure(whole, device, options.warm_up // 4, options.calls, options.seconds),
        }
        holds = gates(errors, engines)
        if importlib.util.find_spec("websockets") and importlib.util.find_spec("msgpack"):
            with served(model, processor, engines[best], samples[size]) as ask:
                times["S2"] = measure({best: ask}, device, options.warm_up // 4, options.calls, options.seconds)
        floor = floor_ms(model, bucket, counts, rates, config.num_inference_steps)
        results.append(
            {
                "image_size": size,
                "times_ms": times,
                "floor_ms": round(floor, 3),
                "fraction_of_floor": {name: round(floor / each["p50"], 3) for name, each in times["S0"].items()},
                "stages_ms": {best: stage_times(bucket, 20)},
                "error_against_float32": errors,
                "gates": holds,
                "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
                "bucket_mb": round(bucket.nbytes / 1e6, 1),
                "machine_rates": rates,
            }
        )
    return results


def gates(errors: dict[str, float], engines: dict[str, WallVLAEngine]) -> dict[str, bool]:
    """What has to hold before a time counts."""
    result = {}
    for name, engine in engines.items():
        limit = FP8_GATE if name == "graph+fp8" else max(2 * errors["eager"], 1e-6)
        result[f"{name}: error at most {limit:.2g}"] = errors[name] <= limit
        bucket = next(iter(engine.buckets.values()))
        if bucket.graph is not None:
            result[f"{name}: replay equals eager to the byte"] = torch.equal(replayed(bucket).clone(), bucket.run())
    return result


# --- output


def markdown(report: dict) -> str:
    """The report as tables."""
    lines = ["# Latency of one policy call", "", *(f"- {name}: {value}" for name, value in report["run"].items()), ""]
    for count in report["full_size_counts"]:
        lines += [f"## Operations at 3 x {count['image_size']}, full size", "", "| stage | counted | by hand |"]
        lines += ["|---|---|---|"]
        hand, counted = count["closed_form"], count["counted"]
        lines += [
            f"| {stage} | {counted[stage] / 1e12:.3f} T | {hand[stage] / 1e12:.3f} T |"
            for stage in ("vision", "prefill")
        ]
        lines += [f"| one step | {counted['denoise'] / 1e10:.1f} G | {hand['step'] / 1e9:.1f} G |", ""]
        for name in ("recompute_language_total", "recompute_all_total"):
            lines += [f"{name}: {count[name] / count['engine_total']:.1f} times the engine's", ""]
    arms = report["step_operations"]
    lines += ["## Dispatched operations of one denoising step", "", f"| | {' | '.join(arms)} |", "|---|---|---|---|"]
    lines += [f"| all | {' | '.join(str(sum(each.values())) for each in arms.values())} |"]
    for name in sorted(set().union(*arms.values())):
        lines += [f"| {name} | {' | '.join(str(each.get(name, 0)) for each in arms.values())} |"]
    for result in report["results"]:
        lines += ["", f"## {result['image_size']} px: floor {result['floor_ms']} ms", ""]
        lines += ["| arm | S0 p50 | p95 | p99 | S1 p50 | of the floor | error |", "|---|---|---|---|---|---|---|"]
        for name, each in result["times_ms"]["S0"].items():
            whole, share = result["times_ms"]["S1"][name]["p50"], result["fraction_of_floor"][name]
            error = result["error_against_float32"][name]
            lines += [f"| {name} | {each['p50']} | {each['p95']} | {each['p99']} | {whole} | {share} | {error:.2g} |"]
        lines += ["", f"S2, ms: {result['times_ms'].get('S2', 'not run, websockets and msgpack are not installed')}"]
        lines += ["", f"Stages, ms: {result['stages_ms']}. Peak memory: {result['peak_memory_gb']} GB.", ""]
        lines += [f"- {'holds' if holds else 'BROKEN'}: {gate}" for gate, holds in result["gates"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes report.json and report.md and prints the latter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scaled", action="store_true", help="the scaled model also on a GPU; on a CPU it always is")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--text-tokens", type=int, default=150)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=15.0, help="what one arm may take in one scope")
    parser.add_argument("--compile", nargs="*", default=None, help="modes of torch.compile; on a CPU none by default")
    parser.add_argument("--trust-kernels", action="store_true", help="load the Hub kernels of an unlisted publisher")
    parser.add_argument("--commit", default="", help="for the record")
    parser.add_argument("--output", type=Path, default=Path("runs/latency"))
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    if options.compile is None:
        options.compile = ["reduce-overhead", "max-autotune"] if on_gpu else []
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    scaled = options.scaled or not on_gpu
    report = {
        "run": {
            "command": shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
            "machine": machine,
            "load": f"{os.getloadavg()[0]:.1f} processes on {os.cpu_count()} cores",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "commit": options.commit,
            "model": "scaled, float32" if scaled else "Wall-OSS-0.5 at full size, bfloat16, random weights",
        },
        "full_size_counts": [
            {"image_size": size, **full_size_counts(size, options.text_tokens)} for size in options.image_sizes
        ],
        "step_operations": step_operations(),
        "results": benchmark(scaled_config() if scaled else WallVLAConfig.wall_oss_05(), options),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(report, indent=2)), ("report.md", markdown(report))):
        temporary = options.output / f"{name}.tmp"
        temporary.write_text(text)
        temporary.replace(options.output / name)
    print(markdown(report))


if __name__ == "__main__":
    main()
