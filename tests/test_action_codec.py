"""Action codecs: tokens that mean the same tomorrow, alone and in a batch; and the discrete pathway they feed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoProcessor

import wallvla
from wallvla import cli, register_auto_classes
from wallvla.action_codec_wallvla import (
    ResidualQuantizer,
    WallVLAActionCodec,
    WallVLAActionCodecConfig,
    dct_matrix,
    hold_padding,
    resample,
)
from wallvla.action_space_wallvla import Embodiment
from wallvla.baseline_codecs_wallvla import BinningActionCodec, FASTActionCodec, load_action_codec
from wallvla.data.action_chunks import ActionChunks
from wallvla.data.collator import Collator
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.vision_features import cache_vision_features
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, build_model, build_processor, embodiment
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.co_training_trainer import CoTrainingTrainer
from wallvla.trainers.codec_trainer import CodecTrainer, CodecTrainingConfig, VisionEmbedder, codebook_use


NUMBERS = {"q01": [-1.0] * 4, "q99": [1.0] * 4, "mean": [0.0] * 4, "std": [1.0] * 4}
STATISTICS = {"state": NUMBERS, "action": NUMBERS}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_config(**overrides) -> WallVLAActionCodecConfig:
    sizes = {"action_dim": 4, "state_dim": 4, "hidden_size": 32, "num_layers": 1, "code_dim": 16}
    tokens = {"latent_steps": 2, "num_levels": 3, "codebook_size": 16, "feature_dim": 6}
    return WallVLAActionCodecConfig(**sizes | tokens | overrides)


def small_codec(seed: int = 0, corrections: float = 0.1, **overrides) -> WallVLAActionCodec:
    """A random codec; `corrections` is the size of the weights that are 0 in an untrained one."""
    torch.manual_seed(seed)
    codec = WallVLAActionCodec(small_config(**overrides)).eval()
    with torch.no_grad():
        for layer in (codec.code_out, codec.action_out):
            layer.weight.normal_(std=corrections, generator=rng(seed))
    actions = smooth(64, 8, codec.config.action_dim)
    codec.initialise_codebooks(actions, generator=rng(seed))
    return codec


def smooth(size: int, steps: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Chunks that a few sines describe, within [-1, 1]: (size, steps, channels)."""
    amplitude, phase = torch.rand(2, size, 1, channels, generator=rng(seed))
    return amplitude * torch.sin(math.pi * (torch.arange(steps)[:, None] / steps + 2 * phase))


class Motion:
    """What `ActionChunks` reads of a LeRobot dataset, from memory: episodes of 20 frames."""

    def __init__(self, episodes: int = 12, horizon: int = 8, seed: int = 0):
        self.action_horizon, self.root, self.fps = horizon, Path("motion"), 80
        generator = np.random.default_rng(seed)
        self.states = generator.uniform(-1, 1, (episodes * 20, 4)).astype(np.float32)
        self.actions = smooth(episodes, 20, 4, seed).reshape(-1, 4).numpy()
        self.episode_bounds = np.stack([np.arange(episodes) * 20, np.arange(1, episodes + 1) * 20], axis=1)
        self.episode_ids, self.timestamps = np.arange(episodes), np.arange(episodes * 20) / 80
        self.camera_keys = ["front"]
        self.looks = 0

    def __len__(self) -> int:
        return len(self.states)

    def action_chunks(self, indices):
        steps = indices[:, None] + np.arange(self.action_horizon)
        last = indices[:, None] // 20 * 20 + 19
        return self.actions[np.minimum(steps, last)], steps > last

    def image(self, index, camera):
        self.looks += 1
        return np.full((4, 4, 3), index % 256, dtype=np.uint8)


def robot(horizon: int = 8) -> Embodiment:
    values = embodiment(QuickstartConfig(), STATISTICS).to_dict() | {"action_horizon": horizon}
    return Embodiment.from_dict(values)


# ---- the transform and the quantiser


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 32])
def test_dct_is_the_formula_and_orthonormal(steps):
    signal = torch.randn(steps, generator=rng(0)).tolist()
    expected = []
    for k in range(steps):
        total = sum(signal[n] * math.cos(math.pi * (2 * n + 1) * k / (2 * steps)) for n in range(steps))
        expected.append(total * math.sqrt((1 if k == 0 else 2) / steps))
    matrix = dct_matrix(steps)
    torch.testing.assert_close(matrix @ torch.tensor(signal), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(steps), atol=1e-5, rtol=0)


def test_every_level_takes_the_nearest_code_of_what_is_left():
    quantizer = small_codec().quantizer
    latents = torch.randn(5, 2, 16, generator=rng(1))
    codes = quantizer.encode(latents)
    assert codes.shape == (5, 3, 2)
    for sample in range(5):
        for step in range(2):
            left = latents[sample, step]
            for level in range(3):
                distances = [(left - code).norm().item() for code in quantizer.codebooks[level]]
                assert codes[sample, level, step] == int(np.argmin(distances))
                left = left - quantizer.codebooks[level][codes[sample, level, step]]
    total = sum(quantizer.codebooks[level][codes[:, level]] for level in range(3))
    torch.testing.assert_close(quantizer.decode(codes)[-1], total)


def test_kmeans_finds_clusters_and_refuses_too_few_vectors():
    quantizer = ResidualQuantizer(small_config(codebook_size=4, num_levels=1))
    centres = 10 * torch.eye(4, 16)
    vectors = (centres[:, None] + 0.1 * torch.randn(4, 50, 16, generator=rng(0))).flatten(0, 1)
    errors = []
    for seed in range(5):
        quantizer.initialise(vectors, rng(seed))
        errors.append(torch.cdist(centres, quantizer.codebooks[0]).amin(dim=1).max().item())
    assert min(errors) < 0.2  # k-means depends on its start; of five one finds all
    with pytest.raises(ValueError, match="3 latents to start 4 codes"):
        quantizer.initialise(vectors[:3], rng(0))


def test_codebooks_follow_the_data_and_dead_codes_come_back():
    quantizer = small_codec(codebook_size=4, num_levels=1).quantizer
    centres = 3 * torch.eye(4, 16)
    latents = (centres[:, None] + 0.1 * torch.randn(4, 16, 16, generator=rng(2))).flatten(0, 1)[:, None]  # (64, 1, 16)
    with torch.no_grad():  # three codes near the middle, and one that nothing ever chooses
        quantizer.codebooks[0] = 0.1 * torch.randn(4, 16, generator=rng(3))
        quantizer.codebooks[0, 3] = 1000.0
        quantizer.code_counts[0] = torch.tensor([5.0, 5.0, 5.0, 1.0])
        quantizer.code_sums[0] = quantizer.codebooks[0] * quantizer.code_counts[0][:, None]
    for step in range(200):
        quantizer.update(latents, quantizer.encode(latents), rng(step))
    codes = quantizer.encode(latents)
    assert set(codes.unique().tolist()) == {0, 1, 2, 3}  # one for each cluster
    torch.testing.assert_close(
        quantizer.decode(codes)[-1], centres.repeat_interleave(16, 0)[:, None], atol=0.1, rtol=0
    )


def test_codebook_use_counts_codes():
    (usage, perplexity), (full, even) = codebook_use(torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2]]))
    assert (usage, full) == (0.25, 1.0)
    assert perplexity == pytest.approx(1) and even == pytest.approx(4)


# ---- tokens


@pytest.mark.parametrize("steps", [1, 5, 8, 13])
def test_resampling_keeps_lines_and_undoes_itself(steps):
    slope, start = torch.randn(2, 3, 1, 2, generator=rng(0))

    def line(count: int) -> torch.Tensor:
        return start + slope * torch.linspace(0, 1, count)[:, None] if count > 1 else start

    for more in (steps, steps + 7, 2 * steps):
        torch.testing.assert_close(
            resample(line(steps), more), line(more) if steps > 1 else start.expand(-1, more, -1)
        )
        torch.testing.assert_close(resample(resample(line(steps), more), steps), line(steps))


def test_padded_steps_repeat_the_valid_one_before():
    actions = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[True, True, True, False, False], [True, False, True, True, False]])
    held = hold_padding(actions, mask)
    assert held.flatten(1).tolist() == [[0, 1, 2, 2, 2], [5, 5, 7, 8, 8]]


def test_an_untrained_codec_is_a_product_quantiser():
    """On the grid, encoder and decoder start as one isometry and its transpose: only the codes round."""
    codec = small_codec(corrections=0.0)
    actions = smooth(20, 8, 4, seed=3)
    latents = codec._latents(*codec._checked(actions, None, None, None))
    torch.testing.assert_close(latents, codec.segment_in(actions.view(20, 2, 16)))
    decoded = codec.decode(codec.encode(actions), None, 8)
    rounding = codec.quantizer.decode(codec.quantizer.encode(latents))[-1] - latents
    torch.testing.assert_close((decoded - actions).square().sum(), rounding.square().sum())


@pytest.mark.parametrize("horizon", [8, 13, 32, 64])
@pytest.mark.parametrize("channels", [4, 7, 14, 26])
def test_any_horizon_and_channels(horizon, channels):
    codec = small_codec(action_dim=26, state_dim=26)
    mask = torch.zeros(3, horizon, 26, dtype=torch.bool)
    mask[..., :channels] = True
    mask[2, horizon // 2 :] = False
    actions = smooth(3, horizon, 26)
    ids = codec.encode(actions, torch.zeros(3, 26), mask)
    assert ids.shape == (3, 6) and ids.dtype == torch.int64
    decoded = codec.decode(ids, torch.zeros(3, 26), horizon, mask.any(dim=1))
    assert decoded.shape == (3, horizon, 26) and torch.isfinite(decoded).all()
    assert (decoded[..., channels:] == 0).all() and (decoded[..., :channels] != 0).any()
    # what is masked does not matter, whatever it holds
    actions[~mask] = math.nan
    assert torch.equal(codec.encode(actions, torch.zeros(3, 26), mask), ids)


def test_a_batch_gives_the_ids_of_its_samples():
    codec, actions, state = small_codec(), smooth(40, 8, 4, seed=3), torch.rand(40, 4, generator=rng(4))
    domains = torch.arange(40) % 5
    ids = codec.encode(actions, state, domain_ids=domains)
    assert torch.equal(codec.encode(actions, state, domain_ids=domains), ids)
    single = [codec.encode(actions[i : i + 1], state[i : i + 1], None, domains[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(single), ids)
    codec.train()
    assert torch.equal(codec.encode(actions, state, domain_ids=domains), ids)
    # the state and the embodiment are part of what a token means
    assert not torch.equal(codec.encode(actions, -state, domain_ids=domains), ids)
    assert not torch.equal(codec.encode(actions, state, domain_ids=domains + 1), ids)


VALUES = st.one_of(st.just(0.0), st.floats(-1, 1), st.floats(-1e-30, 1e-30), st.floats(-1e38, 1e38), st.just(1e30))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(VALUES, min_size=32, max_size=32), constant=st.booleans())
def test_ids_stay_in_range(values, constant):
    actions = torch.tensor([values[:1] * 32 if constant else values]).view(1, 8, 4)
    ids = FUZZED.encode(actions, actions[:, 0])
    level = torch.arange(3).repeat_interleave(2)
    assert ((ids >= level * 16) & (ids < (level + 1) * 16)).all()
    assert torch.isfinite(FUZZED.decode(ids, actions[:, 0], 8)).all()
    binned = BinningActionCodec(4, 32).encode(actions)
    assert ((binned >= 0) & (binned < 32)).all()
    fast = FUZZED_FAST.encode(actions)
    assert ((fast >= 0) & (fast < FUZZED_FAST.vocabulary_size)).all()


FUZZED = small_codec()
FUZZED_FAST = FASTActionCodec.fit(smooth(50, 8, 4), scale=5, vocabulary_size=128)


@pytest.mark.parametrize("codec", [FUZZED, FUZZED_FAST, BinningActionCodec(4)], ids=["rvq", "fast", "binning"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_token_for_what_is_not_finite(codec, value):
    actions = smooth(2, 8, 4)
    actions[1, 3, 2] = value
    with pytest.raises(ValueError, match=r"non-finite number in actions at \[1, 3, 2\]"):
        codec.encode(actions)
    with pytest.raises(ValueError, match=r"chunk 1|in chunk 1"):
        mask = torch.ones(2, 8, 4, dtype=torch.bool)
        mask[1] = False
        codec.encode(smooth(2, 8, 4), None, mask)


def test_wrong_inputs_say_what_was_found():
    codec, actions = small_codec(), smooth(2, 8, 4)
    ids = codec.encode(actions)
    for arguments, message in (
        ((actions[..., :3],), r"actions of shape \(2, 8, 3\)"),
        ((actions, torch.zeros(2, 5)), r"state of shape \(2, 5\).*\(2, 4\)"),
        ((actions, None, None, torch.tensor([0, 99])), r"domain_ids \[0, 99\].*32 embodiments"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.encode(*arguments)
    with pytest.raises(ValueError, match="5 ids per chunk.*2 ids for each"):
        codec.decode(ids[:, :5], horizon=8)
    with pytest.raises(ValueError, match=r"at level 1, whose ids lie in \[16, 32\)"):
        codec.decode(ids[:, [0, 1, 0, 1]], horizon=8)
    with pytest.raises(ValueError, match="never initialised"):
        WallVLAActionCodec(small_config()).encode(actions)
    with pytest.raises(StrictDataclassClassValidationError, match="feature_dim is 0"):
        small_config(feature_dim=0)


def test_a_fresh_process_gives_the_same_ids(tmp_path):
    """Through `save_pretrained` and remote code, where wallvla cannot be imported."""
    codec, actions = small_codec(), smooth(20, 8, 4, seed=5)
    codec.save_pretrained(tmp_path / "codec")
    np.save(tmp_path / "actions.npy", actions.numpy())
    code = """
import json, sys
sys.modules.pop("wallvla", None)
sys.modules["wallvla"] = None
import numpy, torch
from transformers import AutoModel
codec = AutoModel.from_pretrained("codec", trust_remote_code=True)
actions = torch.from_numpy(numpy.load("actions.npy"))
print(json.dumps([codec.fingerprint(), codec.encode(actions).tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fingerprint, ids = json.loads(done.stdout.splitlines()[-1])
    assert fingerprint == codec.fingerprint()
    assert ids == codec.encode(actions).tolist()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    codec = small_codec()
    state = codec.state_dict()
    state.pop("quantizer.codebooks")
    codec.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="quantizer.codebooks"):
        WallVLAActionCodec.from_pretrained(tmp_path)


def test_a_codec_loaded_in_half_precision_is_the_same(tmp_path):
    codec, actions = small_codec(), smooth(20, 8, 4)
    codec.set_feature_statistics(torch.rand(6, generator=rng(0)), torch.rand(6, generator=rng(1)))
    codec.save_pretrained(tmp_path)
    loaded = WallVLAActionCodec.from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.fingerprint() == codec.fingerprint()
    assert torch.equal(loaded.encode(actions), codec.encode(actions))


def test_the_fingerprint_sees_every_tensor():
    codec = small_codec()
    before = codec.fingerprint()
    assert small_codec().fingerprint() == before
    with torch.no_grad():
        codec.quantizer.codebooks[2, 5, 7] += 1e-4
    assert codec.fingerprint() != before


# ---- the baselines


def test_binning_is_exact_to_half_a_bin():
    codec, actions = BinningActionCodec(4, 64), smooth(5, 8, 4)
    ids = codec.encode(actions)
    assert ids.shape == (5, codec.tokens_per_chunk(8, 4))
    assert (codec.decode(ids, horizon=8) - actions).abs().max() <= 1 / 64 + 1e-6


def test_fast_is_exact_to_its_rounding_and_shorter_than_binning():
    actions = smooth(200, 8, 4)
    codec = FASTActionCodec.fit(actions, scale=10, vocabulary_size=512)
    ids = codec.encode(actions)
    # a coefficient is off by at most 0.05, and an orthonormal transform keeps the length of the error
    error = codec.decode(ids, horizon=8) - actions
    assert error.norm(dim=1).max() <= 0.05 * math.sqrt(8) + 1e-5
    assert (ids >= 0).sum() < 0.6 * actions.numel()
    with pytest.raises(ValueError, match="more than the vocabulary's 8"):
        FASTActionCodec.fit(actions, scale=100, vocabulary_size=8)
    with pytest.raises(ValueError, match="coefficients in chunk 0"):
        codec.decode(ids[:, :1], horizon=8)


def test_fast_reaches_a_token_rate():
    actions = smooth(300, 8, 4)
    codec = FASTActionCodec.fit_to_rate(actions, None, 12, 256)
    assert (codec.encode(actions) >= 0).sum().item() / 300 == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize("codec", [FUZZED_FAST, BinningActionCodec(4)], ids=["fast", "binning"])
def test_baselines_hold_padded_steps_and_skip_absent_channels(codec, tmp_path):
    mask = torch.ones(2, 8, 4, dtype=torch.bool)
    mask[1, 5:] = False
    actions = smooth(2, 8, 4)
    held = actions.clone()
    held[1, 5:] = held[1, 4]
    assert torch.equal(codec.encode(actions, None, mask), codec.encode(held))
    three = torch.tensor([True, True, False, True])
    ids = codec.encode(actions, None, three.expand(2, 8, 4))
    decoded = codec.decode(ids, None, 8, three)
    assert (decoded[..., 2] == 0).all() and (decoded - actions)[..., three].abs().max() < 0.4
    codec.save_pretrained(tmp_path)
    loaded = load_action_codec(tmp_path)
    assert loaded.fingerprint() == codec.fingerprint()
    assert torch.equal(loaded.encode(actions), codec.encode(actions))


def test_an_unknown_codec_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match="kind 'other'"):
        load_action_codec(tmp_path)


# ---- losses and training


def test_losses_are_what_they_say():
    codec, actions = small_codec(), smooth(6, 8, 4)
    mask = torch.ones(6, 8, 4, dtype=torch.bool)
    mask[0, 6:], mask[:, :, 3] = False, False
    features, after = torch.randn(2, 6, 6, generator=rng(1))
    output = codec(actions, None, mask, None, features, after)
    error = (output.reconstruction - actions) * mask
    assert output.reconstruction_loss.item() == pytest.approx((error.square().sum() / mask.sum()).item(), rel=1e-5)
    spectrum = torch.einsum("kn,bnd->bkd", dct_matrix(8), error)
    weights = torch.tensor([1 + 4.0 * k / 7 for k in range(8)])
    expected = (weights[:, None] * spectrum.square()).sum() / mask.sum()
    assert output.dct_loss.item() == pytest.approx(expected.item(), rel=1e-4)
    config = codec.config
    total = (
        config.reconstruction_weight * output.reconstruction_loss
        + config.alignment_weight * output.alignment_loss
        + config.next_frame_weight * output.next_frame_loss
        + config.dct_weight * output.dct_loss
        + config.commitment_weight * output.commitment_loss
    )
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.equal(output.ids, codec.encode(actions, None, mask))
    padded = actions.clone()
    padded[~mask] = 7.0
    assert codec(padded, None, mask, None, features, after).loss.item() == pytest.approx(output.loss.item(), rel=1e-6)
    without = codec(actions, None, mask)
    assert without.alignment_loss is None and without.next_frame_loss is None


@pytest.mark.parametrize("alignment", ["contrastive", "regression"])
def test_every_objective_reaches_the_encoder(alignment):
    codec, actions = small_codec(alignment=alignment).train(), smooth(16, 8, 4)
    features, after = torch.randn(2, 16, 6, generator=rng(1))
    for name in ("reconstruction", "alignment", "next_frame", "dct", "commitment"):
        output = codec(actions, None, None, None, features, after, generator=rng(0))
        (gradient,) = torch.autograd.grad(output[f"{name}_loss"], codec.step_in.weight)
        assert gradient.abs().sum() > 0, name


def train(folder, features: bool = True, codec: WallVLAActionCodecConfig | None = None, **options) -> CodecTrainer:
    datasets = [Motion(), Motion(seed=1)]
    chunks = ActionChunks(datasets, robot(), 4, 4, [np.hstack([d.states, d.states[:, :2]]) for d in datasets])
    if not features:
        chunks = ActionChunks(datasets, robot(), 4, 4)
    torch.manual_seed(0)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 120,
        "per_device_train_batch_size": 64,
        "logging_steps": 10,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 3e-3,
    }
    codec = WallVLAActionCodec(small_config() if codec is None else codec)
    trainer = CodecTrainer(codec, CodecTrainingConfig(**defaults | options), chunks)
    trainer.train()
    return trainer


def test_training_learns_and_logs_every_loss(tmp_path):
    trainer = train(tmp_path)
    log = [entry for entry in trainer.state.log_history if "reconstruction_loss" in entry]
    for name in ("loss", "alignment_loss", "next_frame_loss"):
        assert log[-1][name] < 0.9 * log[0][name], name
    for name in ("reconstruction_loss", "dct_loss"):  # at the start all codes serve them, then they share
        assert log[-1][name] < 1.3 * log[0][name], name
    assert log[-1]["usage_0"] > 0.5 and 1 < log[-1]["perplexity_2"] <= 16
    codec = trainer.model.eval()
    chunks = trainer.train_dataset.__getitems__(list(range(0, 200)))
    inputs = (chunks["actions"], chunks["state"], chunks["action_mask"])
    ids, errors = codec.encode(*inputs), []
    for count in (2, 4, 6):  # coarse to fine
        error = (codec.decode(ids[:, :count], chunks["state"], 8) - chunks["actions"]) * chunks["action_mask"]
        errors.append(error.square().mean().item())
    assert errors[2] < errors[0] and errors[1] < errors[0]
    assert errors[2] < 0.6 * (chunks["actions"] * chunks["action_mask"]).square().mean()
    again = train(tmp_path)
    assert again.model.fingerprint() == codec.fingerprint()


def test_training_improves_on_the_product_quantiser(tmp_path):
    config = small_config(feature_dim=0, alignment_weight=0.0, next_frame_weight=0.0, level_dropout=0.0)
    log = train(tmp_path, features=False, codec=config, max_steps=400).state.log_history
    losses = [entry["reconstruction_loss"] for entry in log if "reconstruction_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_a_codec_of_many_lengths(tmp_path):
    """With `min_horizon` short chunks decode; the codec that only saw whole ones does worse."""
    errors = []
    for name, options in (("whole", {}), ("many", {"min_horizon": 2})):
        trainer = train(tmp_path / name, **options)
        batch = trainer.train_dataset.__getitems__(list(range(0, 480, 3)))
        short = batch["actions"][:, :3], batch["state"], batch["action_mask"][:, :3]
        decoded = trainer.model.eval().decode(trainer.model.encode(*short), batch["state"], 3)
        errors.append(((decoded - short[0]) * short[2]).square().mean().item())
    assert errors[1] < errors[0] < 0.1 * (short[0] * short[2]).square().mean()


def test_one_command_trains_on_a_dataset(tmp_path):
    register_auto_classes()
    model, processor = build(None)
    model.save_pretrained(tmp_path / "hub")
    processor.save_pretrained(tmp_path / "hub")
    camera = {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "channel"]}
    vector = {"dtype": "float32", "shape": [4], "names": list("xyzg")}
    features = {"observation.state": vector, "action": vector, "observation.images.front": camera}
    generator = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "data", fps=80, features=features, robot_type="sawyer") as writer:
        for _ in range(2):
            for _ in range(20):
                numbers = {name: generator.uniform(-1, 1, 4).astype(np.float32) for name in list(features)[:2]}
                image = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                writer.add_frame(numbers | {"observation.images.front": image})
            writer.save_episode("move")
    hub, data, output = (str(tmp_path / name) for name in ("hub", "data", "codec"))
    sizes = "--latent_steps 2 --codebook_size 16 --hidden_size 32 --max_steps 4"
    quiet = "--use_cpu --report_to none --save_strategy no --disable_tqdm true"
    command = f"train-codec --dataset {data} --vision {hub} --model {hub} --output_dir {output} {sizes} {quiet}"
    cli.main(command.split())
    codec = load_action_codec(output)
    assert codec.config.feature_dim == 128 and codec.config.action_dim == 4 and codec.quantizer.initialised
    assert len(list((tmp_path / "codec" / "vision").glob("*.npy"))) == 1
    embedder = VisionEmbedder(hub)
    image = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    batch = processor(text="?", images=[image])
    tokens = model.vlm.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output[0]
    np.testing.assert_allclose(embedder([image])[0], tokens.mean(dim=0).detach(), rtol=1e-4, atol=1e-5)
    assert embedder.fingerprint() == VisionEmbedder(hub).fingerprint()


def test_training_without_the_features_it_needs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="feature_dim 6, the chunks have vision features of width 0"):
        train(tmp_path, features=False)


def test_chunks_of_several_datasets(tmp_path):
    datasets = [Motion(episodes=2), Motion(episodes=3, seed=1)]
    chunks = ActionChunks(datasets, robot(), 4, 5, [d.states for d in datasets])
    batch = chunks.__getitems__([45, 3, 39])
    assert len(chunks) == 100
    np.testing.assert_allclose(batch["state"][0, :4], datasets[1].states[5], rtol=1e-6)
    assert (batch["state"][:, 4] == 0).all()
    np.testing.assert_allclose(batch["actions"][1], datasets[0].actions[3:11], atol=1e-6)
    np.testing.assert_allclose(batch["features"][0], datasets[1].states[5])
    np.testing.assert_allclose(batch["next_features"][0], datasets[1].states[13])
    assert batch["action_mask"][2].sum() == 4  # one step is left of the episode
    np.testing.assert_allclose(batch["next_features"][2], datasets[0].states[39])
    with pytest.raises(ValueError, match="action_horizon 8, the embodiment has 16"):
        ActionChunks(datasets, robot(16), 4, 4)


def test_vision_features_are_computed_once_and_go_on(tmp_path):
    data, calls = Motion(episodes=2), []

    def embed(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.stack([image.mean(axis=(0, 1)) for image in images])

    with pytest.raises(KeyboardInterrupt):
        cache_vision_features(data, embed, "model", tmp_path, batch_size=8)
    features = cache_vision_features(data, embed, "model", tmp_path, batch_size=8)
    np.testing.assert_array_equal(features, np.repeat(np.arange(40.0)[:, None], 3, axis=1))
    assert calls == [8] * 6  # two batches were kept, the third was asked again
    cache_vision_features(data, embed, "model", tmp_path, batch_size=8)
    assert len(calls) == 6
    cache_vision_features(data, embed, "another model", tmp_path, batch_size=8)
    assert len(calls) == 11
    cache_vision_features(Motion(episodes=2, seed=1), embed, "model", tmp_path, batch_size=8)
    assert len(calls) == 16


# ---- the discrete pathway


def build(codec=FUZZED):
    config = QuickstartConfig(image_size=32)
    processor = build_processor(config, embodiment(config, STATISTICS), codec)
    torch.manual_seed(0)
    return build_model(processor).eval(), processor


def sample(index: int, training: bool = True) -> dict:
    generator = np.random.default_rng(index)
    values = {
        "images": {"front": generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)},
        "instruction": "press the button",
        "state": generator.uniform(-1, 1, 4),
        "embodiment": EMBODIMENT,
    }
    if training:
        values |= {"actions": smooth(1, 8, 4, index)[0].numpy(), "action_is_pad": np.arange(8) >= 8 - index}
    return values


@pytest.mark.parametrize("codec", [FUZZED, FUZZED_FAST], ids=["rvq", "fast"])
def test_tokens_follow_the_turn_in_training_only(codec):
    model, processor = build(codec)
    batch = processor.encode([sample(i) for i in range(3)])
    prompt = processor.encode([sample(i, training=False) for i in range(3)])
    assert "labels" not in prompt
    mask = batch["action_mask"]
    state = torch.stack([torch.from_numpy(sample(i)["state"]) for i in range(3)]).float()
    expected = codec.encode(batch["actions"], state, mask)
    for row in range(3):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        before = prompt["input_ids"][row][prompt["attention_mask"][row] == 1]
        own = expected[row][expected[row] >= 0] + processor.action_token_start_id
        assert ids.tolist() == [*before.tolist(), *own.tolist(), processor.end_token_id]
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == own.tolist()
        decoded = codec.decode(expected[row : row + 1], state[row : row + 1], 8)
        robot_actions = processor.decode_action_tokens(own, state=state[row].numpy())
        np.testing.assert_allclose(robot_actions, decoded[0], atol=1e-6)
    # the flow neither sees the tokens nor moves: same context position and same prediction as at inference
    flow = {"noise": torch.zeros(3, 8, 4), "time": torch.full((3,), 0.5)}
    with_tokens = model(**batch, **flow)
    without = model(**prompt | {"actions": batch["actions"], "action_mask": mask}, **flow)
    torch.testing.assert_close(with_tokens.action_prediction, without.action_prediction, atol=1e-5, rtol=1e-5)
    assert with_tokens.action_token_loss > 0 and with_tokens.loss_counts[1] == (expected >= 0).sum()


def test_generated_tokens_are_legal_and_decode():
    model, processor = build()
    inputs = processor.encode([sample(i, training=False) for i in range(3)])
    inputs = {name: inputs[name] for name in inputs if name not in ("action_mask", "action_padding", "domain_ids")}
    for do_sample in (False, True):
        torch.manual_seed(0)
        tokens = model.generate_action_tokens(**inputs, do_sample=do_sample)
        assert tokens.shape == (3, 6)
        level = (tokens - processor.action_token_start_id) // 16
        assert level.tolist() == [[0, 0, 1, 1, 2, 2]] * 3
    actions = processor.decode_action_tokens(tokens, state=np.zeros(4))
    assert actions.shape == (3, 8, 4)
    # greedy: the likeliest legal id, each time
    tokens = model.generate_action_tokens(**inputs)
    logits = model(**inputs).logits[:, -1]
    start = processor.action_token_start_id
    assert torch.equal(tokens[:, 0] - start, logits[:, start : start + 16].argmax(dim=-1))
    with pytest.raises(ValueError, match="no action token"):
        processor.decode_action_tokens(torch.tensor([[1, 2]]), state=np.zeros(4))
    with pytest.raises(ValueError, match="fixed number"):
        build(FUZZED_FAST)[0].generate_action_tokens(**inputs)


@pytest.mark.parametrize("codec", [FUZZED, FUZZED_FAST], ids=["rvq", "fast"])
def test_a_repository_carries_its_codec(codec, tmp_path):
    register_auto_classes()
    model, processor = build(codec)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.action_codec_fingerprint == codec.fingerprint()
    assert loaded.action_codec.fingerprint() == codec.fingerprint()
    batches = [each.encode([sample(1), sample(2)]) for each in (processor, loaded)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_a_codec_of_another_model_is_refused(tmp_path):
    register_auto_classes()
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other = small_codec(seed=1)
    both = f"(?s){other.fingerprint()}.*{FUZZED.fingerprint()}.*not trained together"
    # another codec in the folder
    other.save_pretrained(tmp_path / "action_codec")
    with pytest.raises(ValueError, match=both):
        AutoProcessor.from_pretrained(tmp_path)
    # another processor beside the model
    build(other)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=both):
        AutoProcessor.from_pretrained(tmp_path)
    # none at all
    build(None)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"codec None .* and {FUZZED.fingerprint()}"):
        AutoProcessor.from_pretrained(tmp_path)
    # and in training
    with pytest.raises(ValueError, match=both):
        CoTrainingTrainer(model, CoTrainingConfig(str(tmp_path), use_cpu=True), None, None, None, build(other)[1])


def test_co_training_learns_the_tokens(tmp_path):
    model, processor = build()
    arguments = CoTrainingConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=25, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    samples = [sample(index % 4) for index in range(100)]
    CoTrainingTrainer(model.train(), arguments, Collator(processor), samples, None, processor).train()
    losses = model.eval()(**processor.encode(samples[:4])).action_token_loss
    assert losses < 0.7 * math.log(model.config.vlm_config.text_config.vocab_size)


def test_a_tokenizer_with_other_action_tokens_is_refused():
    _, processor = build()
    with pytest.raises(ValueError, match="48 action tokens.* needs 32"):
        wallvla.WallVLAProcessor(
            processor.image_processor, processor.tokenizer, action_codec=small_codec(num_levels=2)
        )
