"""X-VLA by its formulas: a converted checkpoint against a reference that reads the published tensors.

The reference is float64, one sample at a time, in the published names: nothing of it goes through our tables or our
code. Where it could be told wrong, `fault` names what it does wrong; each has to show.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import published_x_vla as published
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from wallvla.action_space_wallvla import rot6d_to_matrix
from wallvla.conversion import convert
from wallvla.conversion.exporter import load_processor
from wallvla.flow_matching_wallvla import sample_time
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration


HORIZON = published.HORIZON
POSITIONS, ROTATIONS, GRIPPERS = [0, 1, 2, 10, 11, 12], [*range(3, 9), *range(13, 19)], [9, 19]


@dataclass
class Reference:
    """The published formulas over the published tensors `p`."""

    p: dict[str, torch.Tensor]
    mode: str = "ee6d"
    fault: str = ""

    def cast(self, dtype: torch.dtype) -> "Reference":
        return replace(self, p={key: values.to(dtype) for key, values in self.p.items()})

    def linear(self, x, name):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    # ---- one view: (3, side, side) -> (tokens, d)

    def depthwise(self, x, name):
        weight, bias = self.p[f"{name}.fn.dw.weight"], self.p[f"{name}.fn.dw.bias"]
        return x + F.conv2d(x.permute(2, 0, 1)[None], weight, bias, padding=1, groups=len(bias))[0].permute(1, 2, 0)

    def feed_forward(self, x, name):
        inner = F.gelu(self.linear(self.norm(x, f"{name}.norm"), f"{name}.fn.net.fc1"))
        return x + self.linear(inner, f"{name}.fn.net.fc2")

    def spatial_block(self, x, name, heads):
        x = self.depthwise(x, f"{name}.conv1")
        height, width, size = x.shape
        w = published.VISION["window_size"]
        y = F.pad(self.norm(x, f"{name}.window_attn.norm"), (0, 0, 0, -width % w, 0, -height % w))
        result = torch.zeros_like(y)
        for top in range(0, y.shape[0], w):
            for left in range(0, y.shape[1], w):
                window = y[top : top + w, left : left + w].reshape(w * w, size)
                q, k, v = self.linear(window, f"{name}.window_attn.fn.qkv").chunk(3, dim=-1)
                outs = []
                for h in range(heads):
                    part = slice(h * size // heads, (h + 1) * size // heads)
                    scores = q[:, part] @ k[:, part].T / math.sqrt(size // heads)
                    outs.append(scores.softmax(-1) @ v[:, part])
                out = self.linear(torch.cat(outs, dim=-1), f"{name}.window_attn.fn.proj")
                result[top : top + w, left : left + w] = out.reshape(w, w, size)
        x = self.depthwise(x + result[:height, :width], f"{name}.conv2")
        return self.feed_forward(x, f"{name}.ffn")

    def channel_block(self, x, name, groups):
        x = self.depthwise(x, f"{name}.conv1")
        height, width, size = x.shape
        y = self.norm(x, f"{name}.channel_attn.norm").reshape(height * width, size)
        q, k, v = self.linear(y, f"{name}.channel_attn.fn.qkv").chunk(3, dim=-1)
        outs = []
        for g in range(groups):
            part = slice(g * size // groups, (g + 1) * size // groups)
            scores = q[:, part].T @ k[:, part] / math.sqrt(height * width)
            outs.append((scores.softmax(-1) @ v[:, part].T).T)
        y = self.linear(torch.cat(outs, dim=-1), f"{name}.channel_attn.fn.proj")
        x = self.depthwise(x + y.reshape(height, width, size), f"{name}.conv2")
        return self.feed_forward(x, f"{name}.ffn")

    def view(self, pixels):
        v, tower = published.VISION, "vlm.vision_tower"
        x = pixels.permute(1, 2, 0)
        for stage, depth in enumerate(v["depths"]):
            name = f"{tower}.convs.{stage}"
            if v["patch_prenorm"][stage]:
                x = self.norm(x, f"{name}.norm")
            weight, bias = self.p[f"{name}.proj.weight"], self.p[f"{name}.proj.bias"]
            stride, padding = v["patch_stride"][stage], v["patch_padding"][stage]
            x = F.conv2d(x.permute(2, 0, 1)[None], weight, bias, stride, padding)[0].permute(1, 2, 0)
            if not v["patch_prenorm"][stage]:
                x = self.norm(x, f"{name}.norm")
            for number in range(depth):
                block = f"{tower}.blocks.{stage}.{number}"
                x = self.spatial_block(x, f"{block}.spatial_block", v["num_heads"][stage])
                x = self.channel_block(x, f"{block}.channel_block", v["num_groups"][stage])
        height, width, size = x.shape
        columns = self.p["vlm.image_pos_embed.column_embeddings.weight"][:width].expand(height, -1, -1)
        rows = self.p["vlm.image_pos_embed.row_embeddings.weight"][:height, None].expand(-1, width, -1)
        x = (x + torch.cat([columns, rows], dim=-1)).reshape(height * width, size)
        x = x + self.p["vlm.visual_temporal_embed.pos_idx_to_embed"][0]
        x = torch.cat([x.mean(dim=0, keepdim=True), x])
        projection = self.p["vlm.image_projection"]
        return self.norm(x @ (projection.T if self.fault == "projection" else projection), "vlm.image_proj_norm")

    # ---- the encoder of BART over [main view ; language]

    def encode(self, views, ids):
        """Views [(3, side, side) or None], ids (50,) -> (tokens, d) of the encoder and of the other views."""
        seen = [None if view is None else self.view(view) for view in views]
        empty = torch.zeros_like(seen[0])
        seen = [empty if view is None else view for view in seen]
        if self.fault == "views":
            seen[1], seen[2] = seen[2], seen[1]
        start = "vlm.language_model.model"
        x = torch.cat([seen[0], self.p[f"{start}.shared.weight"][ids]])
        x = x + self.p[f"{start}.encoder.embed_positions.weight"][torch.arange(len(x)) + 2]
        x = self.norm(x, f"{start}.encoder.layernorm_embedding")
        heads = published.TEXT["encoder_attention_heads"]
        width = x.shape[1] // heads
        hidden = torch.zeros(len(x), dtype=torch.bool)
        if self.fault == "padding":
            hidden[len(seen[0]) :] = ids == 1
        for number in range(published.TEXT["encoder_layers"]):
            layer = f"{start}.encoder.layers.{number}"
            q, k, v = (self.linear(x, f"{layer}.self_attn.{each}_proj") for each in "qkv")
            outs = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                scores = (q[:, part] @ k[:, part].T / math.sqrt(width)).masked_fill(hidden, -torch.inf)
                outs.append(scores.softmax(-1) @ v[:, part])
            y = self.linear(torch.cat(outs, dim=-1), f"{layer}.self_attn.out_proj")
            x = self.norm(x + y, f"{layer}.self_attn_layer_norm")
            y = self.linear(F.gelu(self.linear(x, f"{layer}.fc1")), f"{layer}.fc2")
            x = self.norm(x + y, f"{layer}.final_layer_norm")
        return x, torch.cat(seen[1:])

    # ---- the soft-prompted transformer

    def of_domain(self, x, name, domain, outputs):
        weight, bias = self.p[f"{name}.fc.weight"][domain], self.p[f"{name}.bias.weight"][domain]
        weight = weight.view(outputs, -1).T if self.fault == "fc" else weight.view(-1, outputs)
        return x @ weight + bias

    def predict(self, noisy, proprio, level, domain, encoded):
        """(H, D), (D,), noise level (1 is noise), domain, `encode` -> (H, D); grippers are logits."""
        grippers = [] if self.fault == "grippers" else {"ee6d": GRIPPERS, "joint": [6, 13]}.get(self.mode, [])
        noisy, proprio = noisy.clone(), proprio.clone()
        noisy[:, grippers], proprio[grippers] = 0, 0
        if self.fault == "time":
            level = 1 - level
        half = published.TIME // 2
        angles = level * torch.exp(-math.log(100) * torch.arange(half, dtype=noisy.dtype) / half)
        waves = [angles.sin(), angles.cos()] if self.fault == "waves" else [angles.cos(), angles.sin()]
        tokens = torch.cat([noisy, *(each.expand(HORIZON, -1) for each in (proprio, torch.cat(waves)))], dim=-1)
        x = self.of_domain(tokens, "transformer.action_encoder", domain, published.WIDE)
        x = torch.cat(
            [
                x,
                self.linear(encoded[0], "transformer.vlm_proj"),
                self.linear(encoded[1], "transformer.aux_visual_proj"),
            ]
        )
        prompts = self.p["transformer.soft_prompt_hub.weight"][domain].view(published.PROMPTS, published.WIDE)
        places = self.p["transformer.pos_emb"][0]
        if self.fault == "prompts":  # before, so that all others move
            x = torch.cat([x[:HORIZON], prompts, x[HORIZON:]]) + places[: len(x) + len(prompts)]
        elif self.fault == "prompt positions":
            x = torch.cat([x, prompts]) + places[: len(x) + len(prompts)]
        else:
            x = torch.cat([x + places[: len(x)], prompts])
        width = published.WIDE // published.HEADS
        for number in range(published.DEPTH):
            block = f"transformer.blocks.{number}"
            q, k, v = self.linear(self.norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
            outs = []
            for h in range(published.HEADS):
                part = slice(h * width, (h + 1) * width)
                outs.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(-1) @ v[:, part])
            x = x + self.linear(torch.cat(outs, dim=-1), f"{block}.attn.proj")
            y = self.linear(self.norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + self.linear(y, f"{block}.mlp.fc2")
        channels = published.CHANNELS[self.mode]
        return self.of_domain(
            self.norm(x[:HORIZON], "transformer.norm"), "transformer.action_decoder", domain, channels
        )

    def sample(self, noise, proprio, domain, encoded, steps=10):
        """The published sampler and its last step, the sigmoid of the grippers."""
        action = torch.zeros_like(noise)
        for i in range(steps, 0, -1):
            level = i / steps
            noisy = noise * level + action * (1 - level)
            action = self.predict(noisy, proprio, torch.tensor(level, dtype=noise.dtype), domain, encoded)
        grippers = {"ee6d": GRIPPERS, "joint": [6, 13]}.get(self.mode, [])
        action[:, grippers] = action[:, grippers].sigmoid()
        return action

    def losses(self, prediction, actions):
        """{term: its weighted mean} of (B, H, D)."""

        def square(channels):
            return (prediction[..., channels] - actions[..., channels]).square().mean()

        def decision(channel):
            p, wanted = prediction[..., channel].sigmoid(), actions[..., channel]
            return -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()

        if self.mode == "joint":
            joints = [channel for channel in range(14) if channel not in (6, 13)]
            return {"joints": square(joints), "gripper": 0.1 * (decision(6) + decision(13)) / 2}
        if self.mode == "auto":
            return {"all": 100 * square(list(range(7)))}
        terms = {
            "position": 500 * (square(POSITIONS[:3]) + square(POSITIONS[3:])),
            "rotation": 10 * (square(ROTATIONS[:6]) + square(ROTATIONS[6:])),
        }
        if self.mode == "agibot_ee6d":
            return terms | {"gripper": 10 * square(GRIPPERS)}
        return terms | {"gripper": (decision(9) + decision(19)) / 2}


class Case:
    """A converted checkpoint, its reference, and a batch of three: all views, one missing, all but one missing."""

    def __init__(self, folder, mode="ee6d", **changes):
        self.mode = mode
        source = published.x_vla(folder / "published", mode, **changes)
        convert(str(source), folder / "ours")
        self.folder = folder / "ours"
        self.model = WallVLAForConditionalGeneration.from_pretrained(self.folder).eval()
        weights = {key: values.double() for key, values in load_file(source / "model.safetensors").items()}
        self.reference = Reference(weights, mode)
        self.domains, self.views = torch.tensor([6, 3, 0]), (3, 2, 1)
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.channels = published.CHANNELS[mode]
        self.pixels = [normal(3, published.SIDE, published.SIDE) for _ in range(sum(self.views))]
        self.states, self.noise = normal(3, self.channels), normal(3, HORIZON, self.channels)
        self.actions = normal(3, HORIZON, self.channels)
        if mode == "ee6d":
            self.actions[..., GRIPPERS] = (self.actions[..., GRIPPERS] > 0).float()
        if mode == "joint":
            self.actions[..., [6, 13]] = (self.actions[..., [6, 13]] > 0).float()
        self.time = torch.tensor([0.15, 0.6, 0.95])
        self.language = torch.ones(3, 50, dtype=torch.long)
        for row, length in enumerate((50, 12, 7)):
            self.language[row, :length] = torch.randint(2, 300, (length,), generator=generator)

    def batch(self):
        """As the processor makes it."""
        image = self.model.config.vlm_config.image_token_id
        rows = []
        for language, views in zip(self.language, self.views, strict=True):
            others = [image if number < views else 1 for number in (1, 2) for _ in range(5)]
            rows.append(torch.cat([torch.full((5,), image), language, torch.tensor(others)]))
        ids = torch.stack(rows)
        seen = torch.ones_like(ids)
        seen[:, 55:] = ids[:, 55:] == image
        return {
            "input_ids": ids,
            "attention_mask": seen,
            "mm_token_type_ids": (ids == image).long(),
            "pixel_values": torch.stack(self.pixels),
            "domain_ids": self.domains,
            "states": self.states,
            "state_mask": torch.ones_like(self.states, dtype=torch.bool),
        }

    def encoded(self, reference):
        """The reference's `encode` of each sample."""
        dtype = next(iter(reference.p.values())).dtype
        pixels, result = iter(self.pixels), []
        for language, count in zip(self.language, self.views, strict=True):
            views = [next(pixels).to(dtype) for _ in range(count)] + [None] * (3 - count)
            result.append(reference.encode(views, language))
        return result

    def predicted(self, reference):
        """The reference's prediction of the noisy actions that `ours` sees, (B, H, D)."""
        dtype = next(iter(reference.p.values())).dtype
        results = []
        for row, encoded in enumerate(self.encoded(reference)):
            level = (1 - self.time[row].double()).to(dtype)
            noisy = level * self.noise[row].to(dtype) + (1 - level) * self.actions[row].to(dtype)
            state = self.states[row].to(dtype)
            results.append(reference.predict(noisy, state, level, int(self.domains[row]), encoded))
        return torch.stack(results)

    def ours(self, model=None):
        """Our prediction: logits where the grippers are decisions."""
        model = model or self.model
        with torch.no_grad():
            context = model.encode_prefix(**self.batch())
            time = self.time[:, None, None]
            noisy = time * self.actions + (1 - time) * self.noise
            everything = torch.ones(3, 1, self.channels, dtype=torch.bool), torch.ones(3, HORIZON, dtype=torch.bool)
            return model.action_expert(noisy, self.time, context, *everything)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("ee6d"))


def largest(difference):
    return difference.abs().max().item()


def test_encoder(case):
    """Main view and language through the encoder, padding attended to; other views through the tower, or zero."""
    with torch.no_grad():
        context = case.model.encode_prefix(**case.batch())
    for row, (language, others) in enumerate(case.encoded(case.reference)):
        assert largest(context.last_hidden_state[row] - language) < 1e-5
        assert largest(context.auxiliary[row] - others) < 1e-5
    assert not context.auxiliary[2].any() and context.auxiliary[1, :5].any() and not context.auxiliary[1, 5:].any()


def test_prediction(case):
    assert largest(case.ours() - case.predicted(case.reference)) < 1e-5


FAULTS = ["projection", "views", "padding", "fc", "grippers", "time", "waves", "prompts", "prompt positions"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(case, fault):
    """What a conversion or a port gets wrong without an error."""
    assert largest(case.ours() - case.predicted(replace(case.reference, fault=fault))) > 1e-3


def test_ten_steps(case):
    sampled = case.model.sample_actions(**case.batch(), noise=case.noise, num_inference_steps=10)
    for row, encoded in enumerate(case.encoded(case.reference)):
        noise, state = case.noise[row].double(), case.states[row].double()
        expected = case.reference.sample(noise, state, int(case.domains[row]), encoded)
        assert largest(sampled[row] - expected) < 1e-5
    assert case.model.config.num_inference_steps == 10


@pytest.mark.parametrize("mode", ["agibot_ee6d", "joint", "auto"])
def test_other_action_spaces(tmp_path, mode):
    """Prediction, sample and each loss of the other three."""
    case = Case(tmp_path, mode, **({"real_action_dim": 7, "max_action_dim": 20} if mode == "auto" else {}))
    assert largest(case.ours() - case.predicted(case.reference)) < 1e-5
    sampled = case.model.sample_actions(**case.batch(), noise=case.noise, num_inference_steps=10)
    encoded = case.encoded(case.reference)[0]
    noise, state = case.noise[0].double(), case.states[0].double()
    assert largest(sampled[0] - case.reference.sample(noise, state, 6, encoded)) < 1e-5
    ours, expected = losses(case)
    assert ours == pytest.approx(expected, rel=1e-5)


def losses(case) -> tuple[dict, dict]:
    """Ours and the published code's: the sum, and each term alone, with the weights of the other channels at zero."""
    terms = case.reference.losses(case.predicted(case.reference), case.actions.double())
    config, weights = case.model.config, list(case.model.config.loss_channel_weights)
    channels = {
        "position": POSITIONS,
        "rotation": ROTATIONS,
        "gripper": GRIPPERS if case.mode.endswith("ee6d") else [6, 13],
        "joints": [channel for channel in range(14) if channel not in (6, 13)],
        "all": list(range(20)),
    }
    expected = {"sum": sum(terms.values()).item()} | {name: value.item() for name, value in terms.items()}
    ours = {}
    try:
        for name in expected:
            chosen = range(len(weights)) if name == "sum" else channels[name]
            config.loss_channel_weights = [w * (i in chosen) for i, w in enumerate(weights)]
            with torch.no_grad():
                output = case.model(**case.batch(), actions=case.actions, noise=case.noise, time=case.time)
            ours[name] = output.flow_loss.item()
    finally:
        config.loss_channel_weights = weights
    return ours, expected


def test_losses(case):
    ours, expected = losses(case)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_bfloat16(case):
    """At most twice as far from float64 as the published code is, which computes all of it in bfloat16."""
    model = WallVLAForConditionalGeneration.from_pretrained(case.folder, dtype=torch.bfloat16).eval()
    assert model.action_expert.action_encoder.weight.dtype == torch.float32
    expected = case.predicted(case.reference)
    plain = case.predicted(case.reference.cast(torch.bfloat16)).double()
    assert largest(plain - expected) > 1e-3
    assert (case.ours(model) - expected).square().mean() < 4 * (plain - expected).square().mean()


def test_times_are_those_of_the_published_code():
    """`(u + arange(B) / B) % (1 - 1e-5)` with t = 1 - tau, but for their order, which is random here."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 32):
        levels = 1 - sample_time(size, "stratified", scale=1.0, generator=generator).double()
        u = levels.min()
        assert 0 <= u <= 1 / size + 1e-6
        published_levels = ((u + torch.arange(size) / size) % (1 - 1e-5)).sort().values
        assert largest(levels.sort().values - published_levels) < 2e-5
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample_time(4, "stratified", scale=1.0, generator=generator) for _ in range(400)])
    assert all(draws[:, place].min() < 0.05 and draws[:, place].max() > 0.95 for place in range(4))


def test_processor_and_model_together(case):
    """From pictures, words and the robot's own numbers to the reference and back."""
    processor, rng = load_processor(case.folder), np.random.default_rng(0)
    cameras = list(processor.embodiments["libero"].cameras)
    images = {key: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for key in cameras}
    state = np.array([0.1, -0.2, 0.3, 1, 0, 0, 0, 1, 0, 1.0])  # the first two columns of the identity, one by one
    words = "pick up the red cube"
    batch = processor(images=images, instruction=words, state=state, embodiment="libero")
    noise = torch.randn(1, HORIZON, 20, generator=torch.Generator().manual_seed(3))
    everything = torch.ones(1, HORIZON, 20, dtype=torch.bool)
    sampled = case.model.sample_actions(**{**batch, "action_mask": everything}, noise=noise)
    mean, std = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    views = [((torch.tensor(images[key]).permute(2, 0, 1).double() / 255 - mean) / std) for key in cameras]
    ids = published.tokenizer()(words, padding="max_length", max_length=50)["input_ids"]
    encoded = case.reference.encode([*views, None], torch.tensor(ids))
    proprio = torch.cat([torch.tensor(state), torch.zeros(10)]).double()
    expected = case.reference.sample(noise[0].double(), proprio, 3, encoded)
    assert largest(sampled[0] - expected) < 1e-5
    actions = processor.decode_actions(sampled, state, embodiment="libero")[0]
    np.testing.assert_allclose(actions[:, :3], expected[:, :3], atol=1e-5)
    np.testing.assert_allclose(actions[:, 9], expected[:, 9], atol=1e-5)
    found = rot6d_to_matrix(actions[:, 3:9], layout="columns")
    first = expected[:, 3:6] / expected[:, 3:6].norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(found[..., 0], first, atol=1e-5)
