"""The inference engine is the model, faster: equal numbers, no stale result, bounded memory. Tiny random weights."""

import gc
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_action_experts import each_pair
from tiny import TINY_ROBOT, tiny_parts_of
from torch.utils._python_dispatch import TorchDispatchMode

from wallvla import quickstart
from wallvla.action_space_wallvla import Embodiment
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.flow_matching_wallvla import identity_guidance, prefix_guidance, vjp_guidance
from wallvla.inference import WallVLAEngine
from wallvla.inference.engine import Bucket
from wallvla.inference.forward import obstacles
from wallvla.inference.plans import plan_vision, rope_positions, window_order
from wallvla.inference.preprocessing import FrameResizer, cut_patches
from wallvla.inference.weights import Fp8Linear, Linear, quantize_rows
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.ops_wallvla import TORCH_OPS
from wallvla.processing_wallvla import WallVLAProcessor


STATISTICS = {"q01": [-1.0] * 4, "q99": [1.0] * 4}
ARM = {
    "prompt": "You are a helpful assistant.",
    "cameras": {"observation.images.front": "front view", "observation.images.wrist": "wrist view"},
    "control_frequency": 10,
    "action_horizon": 6,
    "state_layout": [["native", 4]],
    "action_layout": [["native", 3]],
    "statistics": {"state": STATISTICS, "action": {name: values[:3] for name, values in STATISTICS.items()}},
}
BASE = ARM | {"prompt": "You drive a drawer.", "cameras": {"observation.images.front": "front view"}}


def make_parts(dtype=torch.float32, **overrides):
    """(model, processor) with two robots; weights larger than at initialisation, so that differences show."""
    torch.manual_seed(0)
    tokenizer = quickstart.build_tokenizer(quickstart.QuickstartConfig())
    tokenizer.add_tokens(["<|propri|>"], special_tokens=True)
    small = quickstart.build_processor(
        quickstart.QuickstartConfig(image_size=96), Embodiment.from_dict(BASE)
    ).image_processor
    projected = overrides.get("proprioception") == "projected"
    processor = WallVLAProcessor(
        small,
        tokenizer,
        {"arm": ARM, "base": BASE},
        action_dim=4,
        action_horizon=8,
        longest_side=96,
        proprioception=overrides.get("proprioception", "text"),
        state_dim=4 if projected else None,
    )
    if projected:
        overrides |= {"state_dim": 4, "state_token_id": tokenizer.convert_tokens_to_ids("<|propri|>")}
    config = WallVLAConfig.tiny(vocab_size=len(tokenizer), **overrides)
    config.vlm_config.image_token_id = processor.image_token_id
    model = WallVLAForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(dtype), processor


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def engine(parts):
    return WallVLAEngine(*parts, ops=TORCH_OPS)


def observation(seed=0, robot="arm", size=(96, 72), instruction="press the button"):
    """`size` is (width, height) of the frames."""
    rng = np.random.default_rng(seed)
    cameras = ["front", "wrist"] if robot == "arm" else ["front"]
    frames = {camera: rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for camera in cameras}
    return {"images": frames, "instruction": instruction, "state": rng.uniform(-1, 1, 4), "embodiment": robot}


def noise(batch=1, seed=0):
    return torch.randn(batch, 8, 4, generator=torch.Generator().manual_seed(seed))


# 1e-6 of the largest number on the way from noise to actions, where float32 rounds
TOLERANCE = 1e-6 * noise().abs().max().item()


def expected(model, processor, samples, start, guidance=None):
    return model.sample_actions(**processor.encode(samples), noise=start, guidance=guidance)


def largest(difference):
    return difference.abs().max().item()


# --- the engine is the model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"norm_in_float32": True},
        {"prediction": "action"},
        {"proprioception": "projected"},
        {"action_expert": {"hidden_size": 64, "intermediate_size": 96, "action_attention": "bidirectional"}},
        {"num_inference_steps": 1, "time_scale": 1.0},
    ],
    ids=["plain", "norm_in_float32", "action", "projected", "bidirectional", "one step"],
)
def test_engine_equals_the_model(overrides):
    model, processor = make_parts(**overrides)
    samples = [observation(), observation(1, "base", (200, 130), "open the drawer and close the box")]
    before = [expected(model, processor, [sample], noise()) for sample in samples]
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS)
    for sample, value in zip(samples, before, strict=True):
        assert largest(engine.sample_actions([sample], noise()) - value) < TOLERANCE
        assert torch.equal(expected(model, processor, [sample], noise()), value), "stacking changed the model"
    assert largest(before[0] - before[1]) > 0.01
    together = engine.sample_actions(samples, noise().repeat(2, 1, 1))
    assert largest(together - torch.cat(before)) < TOLERANCE


@pytest.mark.parametrize("size", [(96, 96), (72, 96), (64, 48), (301, 97), (16, 200)])
def test_every_frame_size(parts, engine, size):
    samples = [observation(3, size=size)]
    assert largest(engine.sample_actions(samples, noise()) - expected(*parts, samples, noise())) < TOLERANCE


def test_the_vision_width_that_needs_padding():
    vlm = WallVLAConfig.tiny(vocab_size=1024).vlm_config.to_dict()
    vlm["vision_config"]["intermediate_size"] = 100
    model, processor = make_parts(vlm_config=vlm)
    value = expected(model, processor, [observation()], noise())
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS)
    assert engine.forward.vision_blocks[0].gate_up.weight.shape[0] == 2 * 112
    assert largest(engine.sample_actions([observation()], noise()) - value) < TOLERANCE


def test_actions_in_robot_units(parts, engine):
    model, processor = parts
    sample = observation(5)
    chunk = expected(model, processor, [sample], noise())[0]
    actions = engine.act(**sample, noise=noise())
    assert actions.shape == (6, 3)
    np.testing.assert_allclose(actions, processor.decode_actions(chunk, sample["state"], "arm"), atol=1e-5)


def test_noise_from_a_generator_is_the_model_s(parts, engine):
    model, processor = parts
    drawn = model.sample_actions(**processor.encode([observation()]), generator=torch.Generator().manual_seed(3))
    ours = engine.sample_actions([observation()], generator=torch.Generator().manual_seed(3))
    assert largest(ours - drawn) < TOLERANCE


@pytest.mark.parametrize("function", [identity_guidance, prefix_guidance])
def test_guidance(parts, engine, function):
    bound = {"target": noise(seed=1), "weights": (torch.arange(8) < 3).float()[None]}
    if function is identity_guidance:
        bound["limit"] = 5.0
    guided = engine.sample_actions([observation()], noise(), guidance=partial(function, **bound))
    reference = expected(*parts, [observation()], noise(), partial(function, **bound))
    assert largest(guided - reference) < TOLERANCE
    assert largest(guided - engine.sample_actions([observation()], noise())) > 0.01


def test_bfloat16_is_as_close_to_float32_as_the_model():
    model, processor = make_parts(num_inference_steps=3)
    samples = [observation()]
    exact = expected(model, processor, samples, noise())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.bfloat16()
    theirs = (expected(model, processor, samples, noise()) - exact).norm()
    ours = (WallVLAEngine(model, processor, ops=TORCH_OPS).sample_actions(samples, noise()) - exact).norm()
    assert 0 < ours < 2 * theirs


# --- models that the fused passes were not written for


@each_pair
def test_every_kind_on_every_vlm(kind, vlm, caplog):
    """The same interface, the same numbers; and what is lost, said once."""
    robots = {"robot": TINY_ROBOT, "second": TINY_ROBOT | {"domain": 1, "action_horizon": 5}}
    model, processor = tiny_parts_of(kind, vlm, robots)
    engine = WallVLAEngine(model, processor, num_inference_steps=3, ops=TORCH_OPS)
    (record,) = [each for each in caplog.records if each.name.endswith("inference.engine")]
    assert record.levelname == "WARNING" and "without CUDA graphs" in record.message
    assert engine.forward is None and not engine.use_graphs
    samples = [
        {**observation(number, size=(40, 32)), "embodiment": name} for number, name in enumerate(["robot", "second"])
    ]
    guidance = partial(prefix_guidance, target=noise(2, 1), weights=(torch.arange(8) < 3).float().expand(2, 8))
    for guide in (None, guidance):
        found = engine.sample_actions(samples, noise(2), guidance=guide)
        batch = processor.encode(samples)
        wanted = model.sample_actions(**batch, noise=noise(2), guidance=guide, num_inference_steps=3)
        assert torch.equal(found, wanted) and found.abs().max() > 0.01
    drawn = model.sample_actions(**batch, generator=torch.Generator().manual_seed(3), num_inference_steps=3)
    assert torch.equal(engine.sample_actions(samples, generator=torch.Generator().manual_seed(3)), drawn)
    actions = engine.act(**samples[1], noise=noise(2)[1:])
    alone = model.sample_actions(**processor.encode(samples[1:]), noise=noise(2)[1:], num_inference_steps=3)
    np.testing.assert_array_equal(actions, processor.decode_actions(alone[0], samples[1]["state"], "second"))
    assert actions.shape == (5, 4) and engine.nbytes == 0 and not engine.buckets
    with pytest.raises(ValueError, match="without `actions`"):
        engine.sample_actions([samples[0] | {"actions": np.zeros((8, 4))}])
    with pytest.raises(ValueError, match="CUDA graphs need, do not compute"):
        WallVLAEngine(model, processor, use_graphs=True)
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"num_inference_steps {steps}.*at least 1"):
            WallVLAEngine(model, processor, steps, ops=TORCH_OPS)


def test_plain_calls_of_threads_are_those_of_one():
    model, processor = tiny_parts_of("dit", "qwen2_5_vl")
    engine = WallVLAEngine(model, processor)
    samples = [observation(number, size=(32, 32)) | {"embodiment": "robot"} for number in range(4)]
    wanted = [engine.sample_actions([sample], noise()) for sample in samples]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: engine.sample_actions([samples[i]], noise())}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(4))


def test_a_call_without_images():
    model, processor = tiny_parts_of("mot", "qwen2_5_vl", proprioception="none")
    processor.prompt_format = replace(processor.prompt_format, fewest_views=0)
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS)
    blind = {"images": None, "dropped_cameras": list(TINY_ROBOT["cameras"]), "instruction": "press the button"}
    found = engine.sample_actions([blind], noise())
    assert torch.equal(found, expected(model, processor, [blind], noise())) and not engine.buckets
    seeing = observation(size=(32, 32)) | {"embodiment": "robot"}
    found = engine.sample_actions([seeing], noise())
    assert largest(found - expected(model, processor, [seeing], noise())) < TOLERANCE and len(engine.buckets) == 1


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"sampler": "renoise"}, "sampler renoise (not euler)"),
        ({"prediction": "action", "binary_channels": [2]}, "channels that hold a decision"),
        ({"proprioception": "expert"}, "a token of the state in the action expert"),
        ({"action_expert": {"hidden_size": 32, "intermediate_size": 64, "hidden_act": "gelu"}}, "activation gelu"),
    ],
    ids=["sampler", "decision", "state", "activation"],
)
def test_what_the_fused_passes_do_not_compute(change, reason):
    """Each is seen, and the answer is the model's."""
    assert obstacles(tiny_parts_of("mot", "qwen2_5_vl", proprioception="none")[0]) == []
    model, processor = tiny_parts_of("mot", "qwen2_5_vl", **{"proprioception": "none"} | change)
    assert len(obstacles(model)) == 1 and reason in obstacles(model)[0]
    engine, sample = WallVLAEngine(model, processor), observation(size=(32, 32)) | {"embodiment": "robot"}
    assert torch.equal(engine.sample_actions([sample], noise()), expected(model, processor, [sample], noise()))


# --- buckets


def test_no_stale_result_while_everything_changes(parts):
    """Prompt lengths, text before the images, cameras, sizes and robots change from call to call."""
    engine = WallVLAEngine(*parts, ops=TORCH_OPS, max_buckets=3)
    rng = np.random.default_rng(0)
    words = ["press the button", "open the drawer", "close it", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"]
    seen = set()
    for number in range(12):
        sample = observation(
            number, rng.choice(["arm", "base"]), [(96, 72), (96, 96)][rng.integers(2)], str(rng.choice(words))
        )
        start = noise(seed=number)
        assert largest(engine.sample_actions([sample], start) - expected(*parts, [sample], start)) < TOLERANCE
        seen |= set(engine.buckets)
        assert len(engine.buckets) <= 3
    assert len(seen) > 4


def test_same_bucket_with_another_text_before_the_images(parts):
    """Two prompts of one length: the keys and values of the first text must not stay."""
    model, processor = parts
    tokens = [" drawer", " cabinet"]
    for name, word in zip(("one", "two"), tokens, strict=True):
        processor.add_embodiment(name, BASE | {"prompt": "You are a helpful assistant." + word})
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS)
    results = []
    for name in ("one", "two", "one"):
        sample = observation(1, "base") | {"embodiment": name}
        results.append(engine.sample_actions([sample], noise()))
        assert largest(results[-1] - expected(model, processor, [sample], noise())) < TOLERANCE
    assert largest(results[0] - results[1]) > 1e-4
    assert torch.equal(results[0], results[2])
    assert len(engine.buckets) <= 2


def test_the_text_before_the_images_is_computed_once(parts, engine, monkeypatch):
    calls = []
    prefill = engine.forward.prefill
    monkeypatch.setattr(
        engine.forward, "prefill", lambda *args, **kwargs: (calls.append(args[2:4]), prefill(*args, **kwargs))[1]
    )
    sample = observation(0, "base", (40, 40))
    for seed in range(3):
        engine.sample_actions([sample], noise(seed=seed))
    (key,) = [key for key in engine.buckets if key.frames == ((40, 40),)]
    assert key.text > 0
    assert calls == [(0, key.text), *[(key.text, key.length)] * 3]


def test_memory_is_bounded_by_bytes(parts):
    engine = WallVLAEngine(*parts, ops=TORCH_OPS)
    engine.sample_actions([observation()], noise())
    one = engine.nbytes
    engine.max_bytes = 2 * one
    for number in range(6):
        engine.sample_actions([observation(size=(40 + 8 * number, 40))], noise())
        assert len(engine.buckets) == 1 or engine.nbytes <= 2 * one
    engine.max_bytes = 1
    engine.sample_actions([observation()], noise())
    assert len(engine.buckets) == 1, "the bucket in use stays"


def live_tensors():
    gc.collect()
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


def call_often(calls):
    """Live tensors in call 60 and in the last one, when the same buckets are kept; others come and go in between."""
    vlm = WallVLAConfig.tiny(vocab_size=1024).vlm_config.to_dict()
    vlm["text_config"] |= {"num_hidden_layers": 1, "layer_types": None}
    vlm["vision_config"] |= {"depth": 1}
    model, processor = make_parts(num_inference_steps=1, vlm_config=vlm)
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS, max_buckets=2)
    samples = [observation(n, robot, (32, 32)) for n, robot in enumerate(["arm", "base", "base"])]
    samples[2]["instruction"] += " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"
    counts = []
    for number in range(calls):
        engine.sample_actions([samples[number // 10 % 3]], noise())
        if number in (59, calls - 1):
            counts.append(live_tensors())
    return counts


def test_no_leak_over_1_020_calls():
    first, last = call_often(1_020)
    assert last <= first


@pytest.mark.slow
def test_no_leak_over_10_000_calls():
    first, last = call_often(10_020)
    assert last <= first


def test_threads_and_two_engines(parts):
    model, processor = parts
    engines = [WallVLAEngine(model, processor, ops=TORCH_OPS) for _ in range(2)]
    assert (
        engines[0].forward.text_blocks[0].qkv.weight.data_ptr()
        == engines[1].forward.text_blocks[0].qkv.weight.data_ptr()
    ), "the second engine shares the stacked weights of the first"
    samples = [observation(number, ["arm", "base"][number % 2]) for number in range(8)]
    wanted = [expected(model, processor, [sample], noise()) for sample in samples]
    errors = []

    def work(number):
        for turn in range(4):
            index = (number + turn) % 8
            found = engines[number % 2].sample_actions([samples[index]], noise())
            errors.append(largest(found - wanted[index]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 16 and max(errors) < TOLERANCE


def test_saving_after_the_engine_took_the_weights(parts, engine, tmp_path):
    model, _ = parts
    model.save_pretrained(tmp_path)
    again = WallVLAForConditionalGeneration.from_pretrained(tmp_path)
    for (name, saved), (_, ours) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(saved, ours), name


class HostReads(TorchDispatchMode):
    """What makes the host wait for the device: reading a number out of a tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal"}:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_host_sync_in_the_captured_call(parts, engine):
    guidance = partial(prefix_guidance, target=noise(seed=1), weights=torch.ones(1, 8))
    for options in ({}, {"guidance": guidance}):
        bucket = engine.bucket(*engine.inputs([observation()], noise(), **options))
        bucket.run()
        with HostReads() as reads, torch.no_grad():
            bucket.run()
        assert reads.found == []
    with HostReads() as reads:
        parts[0].sample_actions(**parts[1].encode([observation()]))
    assert reads.found, "the plain model reads from the device, so the check can fail"


# --- errors


def test_errors(parts, engine):
    model, processor = parts
    with pytest.raises(ValueError, match="without `actions`"):
        engine.sample_actions([observation() | {"actions": np.zeros((6, 3))}])
    with pytest.raises(ValueError, match="Found images, text in sample 0"):
        engine.sample_actions([{"images": [], "text": "where"}])
    with pytest.raises(ValueError, match="noise of shape \\(2, 8, 4\\)"):
        engine.sample_actions([observation()], noise(2))
    with pytest.raises(ValueError, match="vjp_guidance.*identity_guidance, prefix_guidance; `model.sample_actions`"):
        engine.sample_actions([observation()], guidance=partial(vjp_guidance, target=noise(), weights=None, limit=1.0))
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        WallVLAEngine(model, processor, use_graphs=True)
    with pytest.raises(ValueError, match="FP8 products give bfloat16"):
        WallVLAEngine(model, processor, fp8=True)
    with pytest.raises(ValueError, match="multiple of 8"):
        WallVLAEngine(model, processor, length_step=12)
    assert (
        largest(engine.sample_actions([observation()], noise()) - expected(*parts, [observation()], noise()))
        < TOLERANCE
    )


def test_adapters_are_refused():
    from peft import LoraConfig, inject_adapter_in_model

    model, processor = make_parts()
    inject_adapter_in_model(LoraConfig(target_modules=["k_proj"]), model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        WallVLAEngine(model, processor, ops=TORCH_OPS)


# --- images


@pytest.mark.parametrize("source", [(64, 64), (640, 480), (97, 301), (31, 20), (448, 252)])
def test_resizing_equals_pillow_to_the_byte(source):
    frame = np.random.default_rng(0).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    for steps in ([(448, 336), (448, 336)], [(200, 150), (196, 140)], [source, (28, 56)]):
        image = Image.fromarray(frame)
        for step in steps:
            image = image.resize(step, Image.Resampling.BICUBIC)
        ours = FrameResizer([source, *steps], torch.device("cpu"))(torch.from_numpy(frame)[None])
        assert np.array_equal(ours[0].numpy(), np.asarray(image))


@torch.no_grad()
def test_patches_equal_the_processor_s_to_the_bit(parts, engine):
    _, processor = parts
    sample = observation(0, "base", (150, 110))
    bucket = engine.bucket(*engine.inputs([sample], noise()))
    frame = bucket.inputs["frame_0"][None]
    patches = cut_patches(bucket.resizers[0](frame), 8, 2)
    pixels = engine.forward.pixel_table[patches + engine.forward.table_rows]
    assert torch.equal(pixels, processor.encode([sample])["pixel_values"])


# --- plans


@pytest.mark.parametrize("rows, columns", [(8, 8), (6, 9), (3, 2), (16, 5)])
def test_window_order(rows, columns):
    order, groups = window_order(rows, columns, 4)
    assert sorted(order.tolist()) == list(range(rows * columns))
    start = 0
    for count, size in groups:
        for window in order[start : start + count * size].reshape(count, size):
            corners = {(token // columns // 4, token % columns // 4) for token in window.tolist()}
            assert len(corners) == 1, "tokens of one window"
        start += count * size
    windows = -(-rows // 4) * -(-columns // 4)
    assert sum(count for count, _ in groups) == windows and start == rows * columns


def test_positions_equal_the_stock_model_s(parts):
    model, processor = parts
    for sample in (observation(size=(96, 40)), observation(robot="base", size=(50, 90))):
        batch = processor.encode([sample])
        wanted, _ = model.vlm.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
        )
        found, following = rope_positions(
            batch["mm_token_type_ids"][0].bool().numpy(), batch["image_grid_thw"].numpy()[:, 1:] // 2
        )
        assert np.array_equal(found, wanted[:, 0].numpy())
        assert following == int(wanted.max()) + 1


def test_equal_neighbours_are_one_run():
    plan = plan_vision(np.array([[8, 8], [8, 8], [8, 12]]), 2, 4, torch.ones(4))
    assert [(run.images, run.patches, run.windows) for run in plan.runs] == [
        (2, 64, [(1, 64)]),
        (1, 96, [(1, 64), (1, 32)]),
    ]
    assert sorted(plan.order.tolist()) == list(range(16 + 16 + 24))


# --- FP8


def test_fp8_product_against_its_formula():
    torch.manual_seed(0)
    states, weight, bias = torch.randn(3, 5, 64), torch.randn(48, 64), torch.randn(48)
    states[1, 2] *= 1000  # a row of another magnitude costs the others nothing
    layer = Fp8Linear.of(Linear(weight.bfloat16(), bias.bfloat16()), quantize_rows)
    found = layer(states.bfloat16())
    values, scale = quantize_rows(states.bfloat16().flatten(0, 1))
    table = layer.weight.double() * layer.scale.T.double()
    emulated = (values.double() * scale.double()) @ table.T + bias.bfloat16().double()
    assert found.shape == (3, 5, 48)
    error = (found.flatten(0, 1).double() - emulated).abs()
    assert (error <= 2**-8 * emulated.abs() + 2**-8 * emulated.abs().amax(-1, keepdim=True)).all()
    exact = states.flatten(0, 1).double() @ weight.double().T + bias.double()
    per_row = (emulated - exact).norm(dim=1) / exact.norm(dim=1)
    assert per_row.max() < 0.05
    tail = layer.last_rows(16)(states.bfloat16())
    assert torch.equal(tail, found[..., -16:])


def test_quantising_keeps_to_the_range():
    values = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3.0, -3.0], [1e30, 1.0]], dtype=torch.bfloat16)
    quantised, scale = quantize_rows(values)
    assert quantised.float().isfinite().all() and quantised.float().abs().max() <= 448
    torch.testing.assert_close((quantised.float() * scale)[2:, 0], values[2:, 0].float())


def test_fp8_engine_passes_its_gate():
    model, processor = make_parts(num_inference_steps=3)
    samples = [observation()]
    exact = expected(model, processor, samples, noise())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.bfloat16()
    errors = [
        (
            (WallVLAEngine(model, processor, ops=TORCH_OPS, fp8=fp8).sample_actions(samples, noise()) - exact).norm()
            / exact.norm()
        ).item()
        for fp8 in (False, True)
    ]
    assert errors[0] < errors[1] < 0.05


# --- on a GPU


def cuda_parts(**overrides):
    model, processor = make_parts(**overrides)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.bfloat16()
    return model.cuda(), processor


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_replay_equals_eager_to_the_byte(fp8):
    model, processor = cuda_parts()
    graph = WallVLAEngine(model, processor, ops=TORCH_OPS, fp8=fp8)
    eager = WallVLAEngine(model, processor, ops=TORCH_OPS, fp8=fp8, use_graphs=False)
    for number in range(6):
        samples = [observation(number, ["arm", "base"][number % 2])]
        start = noise(seed=number).cuda()
        found = graph.sample_actions(samples, start)
        assert torch.equal(found, eager.sample_actions(samples, start))
        assert torch.equal(found, graph.sample_actions(samples, start))


@pytest.mark.gpu
def test_graphs_of_threads_and_engines_on_a_gpu():
    model, processor = cuda_parts()
    engines = [WallVLAEngine(model, processor, ops=TORCH_OPS) for _ in range(2)]
    samples = [observation(number, ["arm", "base"][number % 2]) for number in range(6)]
    reference = WallVLAEngine(model, processor, ops=TORCH_OPS, use_graphs=False)
    wanted = [reference.sample_actions([sample], noise().cuda()) for sample in samples]
    equal = []

    def work(number):
        for turn in range(6):
            index = (number + turn) % 6
            equal.append(
                torch.equal(engines[number % 2].sample_actions([samples[index]], noise().cuda()), wanted[index])
            )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 24


@pytest.mark.gpu
def test_evicted_graphs_give_their_memory_back():
    model, processor = cuda_parts(num_inference_steps=2)
    engine = WallVLAEngine(model, processor, ops=TORCH_OPS, max_buckets=2)
    reserved = []
    for number in range(24):
        engine.sample_actions([observation(size=(40 + 8 * (number % 6), 40))], noise().cuda())
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[12:]) <= 1.1 * max(reserved[:12])


@torch.no_grad()
def test_a_bucket_knows_what_it_holds(engine):
    bucket = engine.bucket(*engine.inputs([observation()], noise()))
    assert isinstance(bucket, Bucket)
    assert bucket.nbytes > bucket.caches.nbytes == 4 * 2 * 2 * (bucket.key.length + 8) * 32 * 4
    assert engine.nbytes == sum(each.nbytes for each in engine.buckets.values())
