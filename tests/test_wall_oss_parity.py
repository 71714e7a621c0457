"""A ladder from one norm to the whole training loss: a converted Wall-OSS computes what the published formulas say.

The reference is written from the formulas alone (docs/checkpoints.md): published weights, one interleaved sequence in
which each token is routed to its expert, masks as loops. It uses none of our modules and no module of transformers.
"""

import math

import published
import pytest
import torch
from published import EXPERT_HIDDEN, HEAD_DIM, HEADS, HIDDEN, HORIZON, KEY_HEADS, VISION
from safetensors.torch import load_file

from wallvla.conversion import convert
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration


TOLERANCE = 1e-5


PAD = 0


class Reference:
    """Wall-OSS in one precision. float64 is the truth; bfloat16 is upstream's: norms and heads float32."""

    def __init__(self, folder, dtype=torch.float64):
        settings = published.config(published.tokenizer())
        self.ids = {name: settings[f"{name}_token_id"] for name in ("image", "vision_start")}
        tokens = published.tokenizer()
        self.first_action = tokens.convert_tokens_to_ids("<|action_token_0|>")
        self.dtype, self.high = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        self.w = {}
        for key, values in load_file(folder / "model.safetensors").items():
            exact = "norm" in key and "visual" not in key or key.startswith("action_preprocessor.")
            self.w[key] = values.to(self.high if exact else dtype)
        self.layers = 1 + max(int(key.split(".")[2]) for key in self.w if key.startswith("model.layers."))

    def linear(self, x, key):
        y = x @ self.w[f"{key}.weight"].T
        return y + self.w[f"{key}.bias"] if f"{key}.bias" in self.w else y

    def norm(self, x, key):
        states = x.to(self.high)
        states = states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return (states * self.w[key]).to(x.dtype)  # the weight before the cast

    # --- positions and rope

    def positions(self, ids, valid, grids):
        """(3, B, S): text counts up on all axes; an image is a block of rows and columns from where text ended."""
        result = torch.ones(3, *ids.shape, dtype=torch.long)
        grids = iter(grids.tolist())
        for b in range(len(ids)):
            row, start, s = [], 0, 0
            tokens = ids[b][valid[b]].tolist()
            while s < len(tokens):
                if tokens[s] != self.ids["image"]:
                    row.append((start, start, start))
                    start, s = start + 1, s + 1
                    continue
                _, height, width = next(grids)
                height, width = height // 2, width // 2
                row += [(start, start + y, start + x) for y in range(height) for x in range(width)]
                start, s = start + max(height, width), s + height * width
            result[:, b, valid[b]] = torch.tensor(row).T
        return result

    def rope(self, positions):
        """cos and sin (B, S, 16): of 8 frequencies the first 2 follow time, 3 the height, 3 the width."""
        frequency = 1e6 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
        axis = [0] * 2 + [1] * 3 + [2] * 3
        angles = torch.stack([positions[a] * f for a, f in zip(axis, frequency, strict=True)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    @staticmethod
    def rotate(x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    # --- vision

    def vision(self, pixels, grids):
        """Patches -> (tokens, HIDDEN). Windows as masks: order inside a set does not matter to attention."""
        heads, size = VISION["num_heads"], VISION["hidden_size"] // VISION["num_heads"]
        x = pixels.to(self.dtype) @ self.w["visual.patch_embed.proj.weight"].flatten(1).T
        place, image, window = [], [], []
        for number, (_, height, width) in enumerate(grids.tolist()):
            for block_y in range(height // 2):
                for block_x in range(width // 2):
                    for y, x_ in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        place.append((2 * block_y + y, 2 * block_x + x_))
                        image.append(number)
                        window.append((number, block_y // 2, block_x // 2))  # 16 pixels are 2 blocks
        frequency = 10_000.0 ** (-torch.arange(0, size // 2, 2, dtype=torch.float64) / (size // 2))
        angles = torch.cat([torch.tensor(place)[:, axis, None] * frequency for axis in (0, 1)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos().to(self.high), angles.sin().to(self.high)
        same_image = torch.tensor([[a == b for b in image] for a in image])
        same_window = torch.tensor([[a == b for b in window] for a in window])

        def norm(x, key):  # the vision tower keeps Qwen's order: cast, then multiply
            states = x.to(self.high)
            states = states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            return states.to(x.dtype) * self.w[key]

        for i in range(VISION["depth"]):
            block = f"visual.blocks.{i}."
            h = self.linear(norm(x, f"{block}norm1.weight"), f"{block}attn.qkv")
            q, k, v = h.view(-1, 3, heads, size).unbind(1)  # (tokens, heads, size)
            q, k = (self.rotate(part.to(self.high), cos, sin).to(self.dtype) for part in (q, k))
            allowed = same_image if i in VISION["fullatt_block_indexes"] else same_window
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
            weights = scores.to(self.high).masked_fill(~allowed, -torch.inf).softmax(-1).to(self.dtype)
            x = x + self.linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), f"{block}attn.proj")
            h = norm(x, f"{block}norm2.weight")
            gate, up = self.linear(h, f"{block}mlp.gate_up_proj").chunk(2, dim=-1)
            x = x + self.linear(gate * gate.sigmoid() * up, f"{block}mlp.down_proj")
        x = norm(x, "visual.merger.ln_q.weight").view(-1, 4 * VISION["hidden_size"])
        x = self.linear(x, "visual.merger.mlp.0")
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return self.linear(x, "visual.merger.mlp.2")

    # --- the sequence

    def action_tokens(self, noisy, time, mask):
        """(B, H, D), (B,), (B, H, D) -> (B, H, HIDDEN), of which the second half is zero."""
        x = self.linear(torch.cat([noisy, mask], dim=-1).to(self.high), "action_preprocessor.w1")
        half = EXPERT_HIDDEN // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=self.high) / (half - 1))
        angles = time.to(self.high)[:, None] * frequency
        embedded = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None].expand(-1, HORIZON, -1)
        x = self.linear(torch.cat([x, embedded], dim=-1), "action_preprocessor.w2")
        x = self.linear(x * x.sigmoid(), "action_preprocessor.w3").to(self.dtype)
        return torch.cat([x, x.new_zeros(*x.shape[:2], HIDDEN - EXPERT_HIDDEN)], dim=-1)

    def routed(self, x, flow, function):
        """Each token through its own expert: `function(tokens, expert)`; results padded to one width."""
        parts = [function(x[:, ~flow], 0), function(x[:, flow, :EXPERT_HIDDEN], 1)]
        wide = max(part.shape[-1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, wide - part.shape[-1])) for part in parts], dim=1)

    def attention(self, x, layer, flow, rope, allowed):
        name = f"model.layers.{layer}.self_attn."
        qkv = self.routed(x, flow, lambda t, e: self.linear(t, f"{name}qkv_proj_experts.{e}"))
        kv = KEY_HEADS * HEAD_DIM
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)) for part in qkv.split([HEADS * HEAD_DIM, kv, kv], dim=-1))
        cos, sin = (part[:, :, None] for part in rope)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, dim=2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.to(self.high).masked_fill(~allowed[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights.to(self.dtype), v).flatten(2)
        # The output of attention is as wide as the VL expert for both
        parts = [self.linear(mixed[:, ~flow], f"{name}o_proj_experts.0")]
        parts.append(self.linear(mixed[:, flow], f"{name}o_proj_experts.1"))
        return torch.cat([parts[0], torch.nn.functional.pad(parts[1], (0, HIDDEN - EXPERT_HIDDEN))], dim=1)

    def mlp(self, x, expert, layer):
        name = f"model.layers.{layer}.moe.experts.{expert}."
        gate, up = self.linear(x, f"{name}gate_up_proj").chunk(2, dim=-1)
        return self.linear(gate * gate.sigmoid() * up, f"{name}down_proj")

    def hidden(self, batch, noisy, time, mask):
        """Final hidden states of the prefix (B, S, HIDDEN) and of the actions (B, H, EXPERT_HIDDEN)."""
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        x = self.w["model.embed_tokens.weight"][ids].clone()
        x[ids == self.ids["image"]] = self.vision(batch["pixel_values"], batch["image_grid_thw"])
        x = torch.cat([x, self.action_tokens(noisy, time, mask)], dim=1)
        size, length = ids.shape
        positions = self.positions(ids, valid, batch["image_grid_thw"])
        flow = torch.arange(length + HORIZON) >= length
        allowed = torch.zeros(size, length + HORIZON, length + HORIZON, dtype=torch.bool)
        starts = []
        for b in range(size):
            discrete = [s for s in range(length) if valid[b, s] and ids[b, s] >= self.first_action]
            first = discrete[0] if discrete else length
            starts.append(positions[0, b, first] if discrete else positions[:, b, valid[b]].max() + 1)
            for i in range(length + HORIZON):
                for j in range(i + 1):
                    real = all(n >= length or valid[b, n] for n in (i, j))
                    hidden = i >= length and first <= j < length  # discrete tokens and all that follows them
                    allowed[b, i, j] = real and not hidden
        own = torch.stack(starts)[:, None] + torch.arange(HORIZON)
        rope = self.rope(torch.cat([positions, own.expand(3, -1, -1)], dim=-1))
        for i in range(self.layers):
            name = f"model.layers.{i}."
            h = self.routed(x, flow, lambda t, e, name=name: self.norm(t, f"{name}input_layernorms.{e}.weight"))
            x = x + self.attention(h, i, flow, rope, allowed)
            h = self.routed(
                x, flow, lambda t, e, name=name: self.norm(t, f"{name}post_attention_layernorms.{e}.weight")
            )
            x = x + self.routed(h, flow, lambda t, e, i=i: self.mlp(t, e, i))
        x = self.routed(x, flow, lambda t, e: self.norm(t, f"model.norms.{e}.weight"))
        return x[:, ~flow], x[:, flow, :EXPERT_HIDDEN]

    def velocity(self, batch, noisy, time, mask):
        actions = self.hidden(batch, noisy, time, mask)[1]
        return self.linear(actions.to(self.high), "action_preprocessor.action_proj_back")

    def sample(self, batch, noise, mask, padding):
        """Euler with 10 steps. Channels with mask 0 go straight from their noise to their normalised zero."""
        times = torch.linspace(0, 1, 11, dtype=self.high) * 0.999
        x, noise, mask = (part.to(self.high) for part in (noise, noise, mask))
        for i in range(10):
            velocity = self.velocity(batch, x, times[i].expand(len(x)), mask)
            velocity = velocity * mask + (padding.to(self.high)[:, None] - noise) * (1 - mask)
            x = x + (times[i + 1] - times[i]) * velocity
        return x

    def losses(self, batch, chunk, valid):
        """(flow loss, cross-entropy of discrete tokens, of text)."""
        actions, noise, time = (chunk[name].to(self.high) for name in ("actions", "noise", "time"))
        mask = chunk["action_mask"].any(1, keepdim=True).expand_as(valid)
        actions = torch.where(mask, actions, chunk["action_padding"].to(self.high)[:, None])
        t = time[:, None, None]
        noisy = (1 - t) * noise + t * actions
        prefix, own = self.hidden(batch, noisy, time, mask.to(self.high))
        velocity = self.linear(own.to(self.high), "action_preprocessor.action_proj_back")
        recovered = (1 - t) * velocity + noisy
        flow = ((recovered - actions) ** 2 * valid).sum() / valid.sum()
        logits = (prefix @ self.w["model.embed_tokens.weight"].T).to(self.high)
        terms = {True: [], False: []}
        for b, s in (batch["labels"] != -100).nonzero().tolist():
            target = batch["labels"][b, s].item()
            terms[target >= self.first_action].append(-logits[b, s - 1].log_softmax(-1)[target])
        return flow, torch.stack(terms[True]).mean(), torch.stack(terms[False]).mean()


# --- one converted checkpoint, two dtypes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.wall_oss_05(tmp_path_factory.mktemp("wall") / "source")


@pytest.fixture(scope="module")
def converted(folder):
    convert(str(folder), folder.parent / "output")
    return folder.parent / "output"


@pytest.fixture(scope="module")
def model(converted):
    return WallVLAForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def half(converted):
    return WallVLAForConditionalGeneration.from_pretrained(converted, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def truth(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def rough(folder):
    return Reference(folder, torch.bfloat16)


def make_batch(discrete: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts of different length, left padded: one image of 8 x 12 patches; two of 4 x 8 and 6 x 4."""
    generator = torch.Generator().manual_seed(seed)
    tokens = published.tokenizer()
    image, start, end, turn = tokens.convert_tokens_to_ids(
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]
    )
    first = tokens.convert_tokens_to_ids("<|action_token_0|>")

    def integers(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    rows, grids, answers = [], [], []
    for images in ([(8, 12)], [(4, 8), (6, 4)]):
        row = integers(1, 200, 4)
        for height, width in images:
            row += [start, *[image] * (height * width // 4), end]
            grids.append([1, height, width])
        row += integers(1, 200, 5 + 3 * len(images))
        # The end of the turn and the line break after the discrete tokens: they have seen them
        answer = [*integers(first, first + published.NUM_ACTION_TOKENS, 4), turn, 10] if discrete else []
        rows.append(row + answer)
        answers.append(len(answer))
    length = max(map(len, rows)) + 2
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "image_grid_thw": torch.tensor(grids),
        "pixel_values": torch.randn(sum(h * w for _, h, w in grids), 3 * 2 * 4 * 4, generator=generator),
    }
    if discrete:
        batch["labels"] = torch.full_like(ids, -100)
        for b, count in enumerate(answers):
            batch["labels"][b, -count:] = ids[b, -count:]
    return batch


def make_chunk(seed: int = 1) -> dict[str, torch.Tensor]:
    """Row 0 lacks 6 channels, row 1 has all; row 1 ends two steps early."""
    generator = torch.Generator().manual_seed(seed)
    actions, noise = torch.randn(2, 2, HORIZON, 26, generator=generator)
    mask = torch.ones(2, HORIZON, 26, dtype=torch.bool)
    mask[0, :, 20:] = False
    mask[1, -2:] = False
    return {
        "actions": actions,
        "noise": noise,
        "action_mask": mask,
        "time": torch.tensor([0.3, 0.85]),
        "action_padding": torch.rand(2, 26, generator=generator) * 2 - 1,
    }


def largest(values: torch.Tensor) -> float:
    return values.double().abs().max().item()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest one, as a share of the largest value that is wanted."""
    return largest(found.double() - wanted.double()) / largest(wanted)


def inputs(batch: dict) -> dict:
    return {name: values for name, values in batch.items() if name != "labels"}


# --- the ladder


@pytest.mark.parametrize("layer", [0, 1])
def test_norm(model, half, truth, rough, layer):
    x = torch.randn(5, EXPERT_HIDDEN, generator=torch.Generator().manual_seed(2)) * 3
    ours = model.action_expert.layers[layer].input_layernorm(x)
    key = f"model.layers.{layer}.input_layernorms.1.weight"
    assert error(ours, truth.norm(x.double(), key)) < TOLERANCE
    exact = half.action_expert.layers[layer].input_layernorm(x.bfloat16())
    assert torch.equal(exact, rough.norm(x.bfloat16(), key)) and exact.dtype == torch.bfloat16
    assert half.action_expert.layers[layer].input_layernorm.weight.dtype == torch.float32
    wrong = (
        half.action_expert.layers[layer].input_layernorm.weight.bfloat16()
        * (x.bfloat16().float() / (x.bfloat16().float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    )
    assert not torch.equal(exact, wrong), "the order of cast and weight shows"


@pytest.mark.parametrize("discrete", [False, True])
def test_positions_and_rope(model, truth, discrete):
    batch = make_batch(discrete)
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    ours, _ = model.vlm.model.get_rope_index(
        ids, (ids == truth.ids["image"]).int(), image_grid_thw=batch["image_grid_thw"], attention_mask=valid
    )
    wanted = truth.positions(ids, valid, batch["image_grid_thw"])
    assert torch.equal(ours[:, valid], wanted[:, valid])
    with torch.no_grad():
        start = model.encode_prefix(**inputs(batch)).next_position
    length = ids.shape[1]
    first = length - 6 if discrete else length
    assert start.tolist() == [wanted[0, b, first - 1].item() + 1 for b in range(2)]
    cos, sin = model.vlm.model.language_model.rotary_emb(torch.zeros(1), ours)
    for found, expected in zip((cos, sin), truth.rope(wanted), strict=True):
        assert error(found[valid], expected[valid]) < TOLERANCE


@pytest.mark.parametrize("expert", [0, 1])
def test_qkv_split(model, truth, expert):
    x = torch.randn(3, (HIDDEN, EXPERT_HIDDEN)[expert], generator=torch.Generator().manual_seed(3))
    decoder = (model.vlm.model.language_model, model.action_expert)[expert]
    fused = truth.linear(x.double(), f"model.layers.1.self_attn.qkv_proj_experts.{expert}")
    kv = KEY_HEADS * HEAD_DIM
    for name, wanted in zip("qkv", fused.split([HEADS * HEAD_DIM, kv, kv], dim=-1), strict=True):
        assert error(vars(decoder.layers[1].self_attn)["_modules"][f"{name}_proj"](x), wanted) < TOLERANCE


def test_vision(model, half, truth, rough):
    batch = make_batch()
    with torch.no_grad():
        ours, low = (
            torch.cat(m.vlm.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output)
            for m in (model, half)
        )
    wanted = truth.vision(batch["pixel_values"].double(), batch["image_grid_thw"])
    assert error(ours, wanted) < TOLERANCE
    assert error(low, wanted) <= 2 * error(rough.vision(batch["pixel_values"], batch["image_grid_thw"]), wanted)


def test_one_layer(tmp_path):
    source = published.wall_oss_05(tmp_path / "source", layers=1)
    convert(str(source), tmp_path / "output")
    one = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "output", dtype=torch.float32).eval()
    ours, wanted = (velocity_of(each, make_batch(), 0.5) for each in (one, Reference(source)))
    assert error(ours, wanted) < TOLERANCE


def test_prefix(model, half, truth, rough):
    batch, chunk = make_batch(), make_chunk()
    valid = batch["attention_mask"].bool()
    mask = torch.ones(2, HORIZON, 26)
    wanted, plain = (r.hidden(batch, chunk["noise"].to(r.high), chunk["time"], mask)[0] for r in (truth, rough))
    with torch.no_grad():
        ours, low = (m.encode_prefix(**batch).last_hidden_state for m in (model, half))
    assert error(ours[valid], wanted[valid]) < TOLERANCE
    assert error(low[valid], wanted[valid]) <= 2 * error(plain[valid], wanted[valid])


def test_action_head(model, truth):
    chunk = make_chunk()
    mask = chunk["action_mask"].any(1, keepdim=True)
    wanted = truth.action_tokens(chunk["noise"].double(), chunk["time"], mask.expand(-1, HORIZON, -1))
    ours = model.action_expert.embed(chunk["noise"], chunk["time"], mask)
    assert error(ours, wanted[..., :EXPERT_HIDDEN]) < TOLERANCE
    assert (wanted[..., EXPERT_HIDDEN:] == 0).all()


def velocity_of(source, batch, tau):
    """Of a model, or of the formulas at their own precision."""
    chunk = make_chunk()
    noisy, time = chunk["noise"] * (1 - tau) + chunk["actions"] * tau, torch.full((2,), tau)
    channels = chunk["action_mask"].any(1, keepdim=True)
    if isinstance(source, Reference):
        mask = channels.expand(-1, HORIZON, -1)
        return source.velocity(batch, *(part.to(source.high) for part in (noisy, time, mask)))
    with torch.no_grad():
        context = source.encode_prefix(**inputs(batch))
        return source.predict_velocity(noisy, time, context, channels, torch.ones(2, HORIZON, dtype=torch.bool))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9])
def test_velocity(model, half, truth, rough, tau, discrete):
    ours, low, plain, wanted = (
        velocity_of(source, make_batch(discrete), tau) for source in (model, half, rough, truth)
    )
    assert error(ours, wanted) < TOLERANCE
    assert error(low, wanted) <= 2 * error(plain, wanted)


def test_sampling_in_ten_steps(model, half, truth, rough):
    batch, chunk = make_batch(), make_chunk()
    channels = chunk["action_mask"].any(1, keepdim=True).expand(-1, HORIZON, -1)
    names = ("noise", "action_padding")
    wanted, plain = (r.sample(batch, chunk["noise"], channels, chunk["action_padding"]) for r in (truth, rough))
    ours, low = (
        m.sample_actions(**batch, action_mask=channels, **{name: chunk[name] for name in names}) for m in (model, half)
    )
    assert error(ours[channels], wanted[channels]) < TOLERANCE
    assert error(low[channels], wanted[channels]) <= 2 * error(plain[channels], wanted[channels])
    assert (ours[~channels] == 0).all()
    zero = model.sample_actions(**batch, action_mask=channels, noise=chunk["noise"])
    assert (zero - ours).abs().max() > 1e-3, "where the missing channels end up shows in the others"


def test_joint_loss(model, half, truth, rough):
    """Flow loss over valid elements only, discrete tokens with the end of their turn, neither seeing the other."""
    batch, chunk = make_batch(discrete=True), make_chunk()
    with torch.no_grad():
        ours, low = (m(**batch, **chunk) for m in (model, half))
    wanted, plain = (r.losses(batch, chunk, chunk["action_mask"]) for r in (truth, rough))
    names = ("flow_loss", "action_token_loss", "text_loss")
    for name, expected, own in zip(names, wanted, plain, strict=True):
        assert error(ours[name], expected) < TOLERANCE
        assert error(low[name], expected) <= 2 * error(own, expected)
    assert error(ours.loss, wanted[0] + 0.01 * (wanted[1] + wanted[2])) < TOLERANCE
