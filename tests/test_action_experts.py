"""Every kind of action expert on every VLM that fits it: one contract, the formulas of each kind, the sizes."""

import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import tiny_actions, tiny_batch, tiny_batch_of, tiny_config_of, tiny_model_of
from transformers import AutoModelForImageTextToText, DynamicCache, Florence2Model

from wallvla.action_experts_wallvla import DomainLinear, fourier_embedding
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.flow_matching_wallvla import action_loss
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.ops_wallvla import multimodal_rope, rope


PAIRS = [
    ("mot", "qwen2_5_vl"),
    ("mot", "qwen3_vl"),
    ("mot", "internvl"),
    ("soft_prompt", "florence2"),
    ("soft_prompt", "qwen2_5_vl"),
    ("soft_prompt", "qwen3_5"),
    ("dit", "qwen3_5"),
    ("dit", "qwen2_5_vl"),
    ("dit", "internvl"),
]
each_pair = pytest.mark.parametrize("kind, vlm", PAIRS, ids=["-".join(pair) for pair in PAIRS])


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def training_batch(vlm: str, **options) -> dict:
    return tiny_batch_of(vlm, **options) | tiny_actions(2)


# --- the VL expert is the stock model


@pytest.mark.parametrize("vlm", ["qwen2_5_vl", "qwen3_vl", "internvl", "qwen3_5"])
def test_the_prefix_is_the_stock_models(vlm):
    model, batch = tiny_model_of("soft_prompt", vlm), tiny_batch_of(vlm, padding=2)
    stock = AutoModelForImageTextToText.from_config(model.config.vlm_config).eval()
    stock.load_state_dict(model.vlm.state_dict())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    inputs = {name: batch[name] for name in names if name in batch}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (batch["input_ids"] == model.vlm.config.image_token_id).int()
    else:  # as `generate` counts them
        inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.vlm_config.text_config)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = stock.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        context = model.encode_prefix(**batch)
        logits = model(**{name: batch[name] for name in batch if name in names}).logits
    assert largest((context.last_hidden_state - expected)[real]) < 1e-5
    assert largest((logits - stock.lm_head(expected))[real]) < 1e-4
    assert context.auxiliary is None
    if vlm == "qwen3_5":
        assert context.keys == ()
        return
    for ours, layer in zip(context.keys, cache.layers, strict=True):
        assert largest((ours - layer.keys).transpose(1, 2)[real]) < 1e-5
    for ours, layer in zip(context.values, cache.layers, strict=True):
        assert largest((ours - layer.values).transpose(1, 2)[real]) < 1e-5


def test_florence_encodes_the_main_view_and_only_looks_at_the_others():
    model, batch = tiny_model_of("soft_prompt", "florence2"), tiny_batch_of("florence2")
    stock = Florence2Model(model.config.vlm_config).eval()
    missing = stock.load_state_dict(model.vlm.state_dict(), strict=False).missing_keys
    assert missing and all(key.startswith("language_model.decoder") for key in missing)
    with torch.no_grad():
        context = model.encode_prefix(**batch)
        features = stock.get_image_features(batch["pixel_values"]).pooler_output  # (3, 5, C): one and two views
        words = stock.get_input_embeddings()(batch["input_ids"][:, 5:11])
        encoder = stock.language_model.encoder
        expected = encoder(inputs_embeds=torch.cat([features[[0, 1]], words], dim=1)).last_hidden_state
    assert largest(context.last_hidden_state - expected) < 1e-5
    assert torch.equal(context.auxiliary[1], features[2])
    assert not context.auxiliary[0].any()  # a missing view
    assert context.visible.all() and context.visible.shape == (2, 11)
    with pytest.raises(ValueError, match="no LM head"):
        model(**batch, labels=batch["input_ids"])
    with pytest.raises(ValueError, match="no LM head"):
        model.generate(**batch)


# --- the contract


@pytest.mark.parametrize(("kind", "vlm"), [("mot", "internvl"), ("soft_prompt", "florence2")])
def test_images_and_their_tokens_are_as_many(kind, vlm):
    """Also where the images are squares: one too many or none is an error, and no other picture in its place."""
    model, batch = tiny_model_of(kind, vlm), tiny_batch_of(vlm, (2, 2))
    more = batch | {"pixel_values": torch.cat([batch["pixel_values"], batch["pixel_values"][:1]])}
    with pytest.raises(ValueError, match="another number of image tokens"):
        model.encode_prefix(**more)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="another number of image tokens|Found no `pixel_values`"):
        model.encode_prefix(**batch)


@pytest.mark.parametrize("side", [32, 40, 56, 64])
def test_tokens_of_a_picture_are_those_that_the_tower_makes(side):
    model = tiny_model_of("soft_prompt", "florence2")
    image, tokens = model.vl_expert.blank_image(torch.device("cpu"), side)
    assert model.vlm.get_image_features(image["pixel_values"]).pooler_output.shape == (1, tokens, 64)


def test_a_row_longer_than_the_positions_is_refused():
    """Padding on the left has no position, so it does not count."""
    model = tiny_model_of("soft_prompt")  # 96 positions
    assert model.sample_actions(**tiny_batch_of("qwen2_5_vl", padding=90)).isfinite().all()
    batch = tiny_batch(images=(1,), text=90) | {"domain_ids": torch.zeros(1, dtype=torch.long)}
    with pytest.raises(ValueError, match="8 steps and what the model sees are 107 tokens, .* positions for 96"):
        model.sample_actions(**batch)


@each_pair
def test_every_parameter_learns(kind, vlm):
    model, batch = tiny_model_of(kind, vlm).train(), training_batch(vlm)
    if vlm != "florence2":
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.vlm.config.image_token_id, -100)
    model(**batch).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Rows of a position table that no sequence reaches are zero, but the table is not
    assert still == []


@each_pair
def test_layers_that_shard_are_layers_of_the_model(kind, vlm):
    """FSDP wraps by these names, and refuses one that it does not find."""
    model = tiny_model_of(kind, vlm)
    decoder = model.vlm.get_encoder() if vlm == "florence2" else model.vlm.model.language_model
    names = {type(layer).__name__ for layer in (*decoder.layers, *model.action_expert.layers)}
    assert names <= set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


@each_pair
def test_padding_and_masked_elements_change_nothing(kind, vlm):
    model, batch = tiny_model_of(kind, vlm), training_batch(vlm)
    with torch.no_grad():
        expected = model(**batch)
        changed = {**batch, "actions": torch.where(batch["action_mask"], batch["actions"], 1e3)}
        assert largest(model(**changed).flow_loss - expected.flow_loss) < 1e-6
        if vlm != "florence2":  # whose rows have one length
            padded = model(**training_batch(vlm, padding=3))
            mask = batch["action_mask"]
            assert largest((padded.action_prediction - expected.action_prediction)[mask]) < 2e-5
        # In a batch as alone
        first = {name: value[:1] for name, value in batch.items() if name not in ("pixel_values", "image_grid_thw")}
        for name in ("pixel_values", "image_grid_thw"):
            if name in batch:
                first[name] = batch[name][: len(batch[name]) // 3]
        alone = model(**first).action_prediction
    assert largest(alone - expected.action_prediction[:1]) < 2e-5


@each_pair
def test_sampling_steps_by_the_formula(kind, vlm):
    model, batch = tiny_model_of(kind, vlm), tiny_batch_of(vlm)
    noise = torch.randn(2, 8, 4)
    context = model.encode_prefix(**batch)
    channels, steps = torch.ones(2, 1, 4, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    state = noise
    scale = model.config.time_scale
    for i in range(5):
        now, then = scale * i / 5, scale * (i + 1) / 5
        clean = model.predict_action(state, torch.full((2,), now), context, channels, steps)
        if model.config.sampler == "renoise":
            state = then * clean + (1 - then) * noise
        else:
            state = state + (then - now) * (clean - state) / (1 - now)
    sampled = model.sample_actions(**batch, noise=noise)
    assert largest(sampled - state) < 1e-5
    assert torch.equal(sampled, model.sample_actions(**batch, noise=noise))


@each_pair
def test_a_round_trip_through_a_folder_is_exact(kind, vlm, tmp_path):
    model, batch = tiny_model_of(kind, vlm), tiny_batch_of(vlm)
    noise = torch.randn(2, 8, 4)
    model.save_pretrained(tmp_path)
    loaded = WallVLAForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.action_expert.to_dict()["kind"] == kind
    assert torch.equal(loaded.sample_actions(**batch, noise=noise), model.sample_actions(**batch, noise=noise))
    half = WallVLAForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {
        p.dtype for name, p in half.named_parameters() if any(f"{m}." in name for m in half.action_expert.fp32_modules)
    }
    assert kept == {torch.float32}
    assert (
        half.sample_actions(**{k: v.bfloat16() if k == "pixel_values" else v for k, v in batch.items()})
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("kind, vlm", [("mot", "qwen3_vl"), ("soft_prompt", "florence2"), ("dit", "qwen3_5")])
def test_checkpointing_gives_the_same_gradients(kind, vlm):
    expert = {"dropout": 0.0} if kind == "soft_prompt" else {}
    model, batch = tiny_model_of(kind, vlm, action_expert=expert), training_batch(vlm)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():  # dropout stays off
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                for name in ("dropout", "activation_dropout", "drop_path_rate", "drop_prob"):
                    if name in vars(module) and isinstance(vars(module)[name], float):
                        setattr(module, name, 0.0)
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_nothing_outside_asks_for_the_kind():
    """The kind is read where the expert is chosen, in the configuration and in the model, and nowhere else."""
    root = Path(__file__).parents[1]
    folders = ("trainers", "serving", "inference", "evaluation", "data")
    files = [file for folder in folders for file in (root / folder).glob("*.py")]
    files += [root / f"{name}_wallvla.py" for name in ("processing", "modeling", "prompts", "images", "vl_experts")]
    files += [root / "cli.py", root / "quickstart.py"]
    pattern = re.compile(r"expert\.kind\b|[\"'](?:mot|soft_prompt|dit)[\"']|isinstance\([^)]*ActionExpert")
    found = [
        f"{file.name}: {line.strip()}"
        for file in files
        if file.exists()
        for line in file.read_text().splitlines()
        if pattern.search(line)
    ]
    assert found == ["modeling_wallvla.py: self.action_expert = ACTION_EXPERTS[config.action_expert.kind](config)"]


# --- soft prompts


def test_soft_prompt_expert_by_the_formula():
    """In float64, one sample at a time, with the projections of its domain written out."""
    model, batch = tiny_model_of("soft_prompt", "florence2"), tiny_batch_of("florence2")
    expert, (noisy, time) = model.action_expert, (torch.randn(2, 8, 4), torch.tensor([0.3, 0.8]))
    context = model.encode_prefix(**batch)
    steps = torch.ones(2, 8, dtype=torch.bool)
    with torch.no_grad():
        found = expert(noisy, time, context, torch.ones(2, 1, 4, dtype=torch.bool), steps)
    p = {name: value.double() for name, value in expert.state_dict().items()}

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    for row in range(2):
        d = batch["domain_ids"][row]
        action, state = noisy[row].double().clone(), batch["states"][row].double().clone()
        action[:, 2], state[2] = 0, 0  # the channel that holds a decision
        level = 1 - time[row].double()
        angles = [level * 100 ** (-i / 4) for i in range(4)]
        embedding = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles])
        tokens = torch.cat([action, state.expand(8, -1), embedding.expand(8, -1)], dim=-1)
        tokens = tokens @ p["action_encoder.weight"][d] + p["action_encoder.bias"][d]
        seen = [linear(context.last_hidden_state[row].double(), "vlm_proj")]
        seen += [linear(context.auxiliary[row].double(), "auxiliary_proj")]
        x = torch.cat([tokens, *seen])
        x = torch.cat([x + p["position_embedding.weight"][: len(x)], p["soft_prompts.tokens"][d]])
        for i in range(2):
            q, k, v = linear(norm(x, f"layers.{i}.norm1"), f"layers.{i}.qkv").chunk(3, dim=-1)
            heads = []
            for h in range(4):
                part = slice(8 * h, 8 * h + 8)
                scores = q[:, part] @ k[:, part].T / math.sqrt(8)
                heads.append(scores.softmax(dim=-1) @ v[:, part])
            x = x + linear(torch.cat(heads, dim=-1), f"layers.{i}.proj")
            y = linear(norm(x, f"layers.{i}.norm2"), f"layers.{i}.fc1")
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + linear(y, f"layers.{i}.fc2")
        expected = norm(x[:8], "norm") @ p["action_decoder.weight"][d] + p["action_decoder.bias"][d]
        assert largest(found[row].double() - expected) < 1e-5


def test_action_loss_by_the_formula():
    """X-VLA's three terms: squared errors of two parts, the cross-entropy of a decision, each a mean."""
    torch.manual_seed(0)
    prediction, actions = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    actions[..., 2] = torch.tensor([[1.0] * 8, [0.0] * 8])
    mask = torch.ones(2, 8, 4, dtype=torch.bool)
    position = (prediction[..., :2] - actions[..., :2]).square().mean()
    rotation = (prediction[..., 3:] - actions[..., 3:]).square().mean()
    p = prediction[..., 2].sigmoid()
    grip = -(actions[..., 2] * p.log() + (1 - actions[..., 2]) * (1 - p).log()).mean()
    expected = 500 * position + 10 * rotation + grip
    loss = action_loss(prediction, actions, mask, "per_channel", [250.0, 250.0, 1.0, 10.0], [2])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_decisions_are_hidden_from_the_network_and_come_out_as_probabilities():
    model, batch = tiny_model_of("soft_prompt", "florence2"), tiny_batch_of("florence2")
    noise = torch.randn(2, 8, 4)
    other = noise.clone()
    other[..., 2] += 5
    states = batch["states"].clone()
    states[:, 2] += 5
    sampled = model.sample_actions(**batch, noise=noise)
    assert ((sampled[..., 2] > 0) & (sampled[..., 2] < 1)).all()
    again = model.sample_actions(**{**batch, "states": states}, noise=other)
    assert largest(sampled - again) < 1e-5


@pytest.mark.parametrize("conditioning", ["soft_prompt", "hpt", "none"])
def test_domains_differ_and_can_be_added(conditioning, tmp_path):
    expert = {"conditioning": conditioning}
    model = tiny_model_of("soft_prompt", "florence2", action_expert=expert)
    batch, noise = tiny_batch_of("florence2"), torch.randn(2, 8, 4)

    def sample(ids):
        return model.sample_actions(**{**batch, "domain_ids": torch.tensor(ids)}, noise=noise)

    before = [sample([i, i]) for i in range(3)]
    assert largest(before[0] - before[1]) > 1e-3
    assert model.add_domain("copied", "copy:second") == 3
    assert model.add_domain("mean") == 4
    assert model.add_domain("fresh", "random", torch.Generator().manual_seed(0)) == 5
    assert [*model.config.domains] == ["first", "second", "third", "copied", "mean", "fresh"]
    for i in range(3):
        assert torch.equal(sample([i, i]), before[i])  # the others have not changed
    assert torch.equal(sample([3, 3]), before[1])
    weight = model.action_expert.action_encoder.weight
    torch.testing.assert_close(weight[4], weight[:4].mean(dim=0))
    assert largest(sample([5, 5]) - sample([4, 4])) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = WallVLAForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample_actions(**batch, noise=noise), model.sample_actions(**batch, noise=noise))
    for name, init, message in (
        ("first", "mean", "already"),
        ("new", "copy:nobody", "copy:nobody"),
        ("new", "median", "random"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_domain(name, init)
    with pytest.raises(ValueError, match="no parameters of domains"):
        tiny_model_of("mot").add_domain("new")
    with pytest.raises(ValueError, match="domain_ids"):
        model.sample_actions(**{**batch, "domain_ids": None}, noise=noise)


def test_domain_linear_against_a_loop():
    layer = DomainLinear(3, 5, 2)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    states, ids = torch.randn(4, 6, 5), torch.tensor([2, 0, 1, 2])
    expected = torch.stack([x @ layer.weight[i] + layer.bias[i] for x, i in zip(states, ids, strict=True)])
    torch.testing.assert_close(layer(states, ids), expected)


def test_fourier_embedding_against_the_formula():
    expected = [f(0.3 * 100 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)]
    torch.testing.assert_close(fourier_embedding(torch.tensor([0.3]), 8, 100.0)[0], torch.tensor(expected))


# --- DiT


def test_dit_by_the_formula():
    """In float64, one sample at a time, without padding, rope by complex numbers."""
    model, batch = (
        tiny_model_of("dit", "qwen2_5_vl", proprioception="expert", state_dim=4),
        tiny_batch_of("qwen2_5_vl"),
    )
    expert, (noisy, time) = model.action_expert, (torch.randn(2, 8, 4), torch.tensor([0.3, 0.8]))
    context = model.encode_prefix(**batch)
    with torch.no_grad():
        found = expert(noisy, time, context, torch.ones(2, 1, 4, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool))
    p = {name: value.double() for name, value in expert.state_dict().items()}

    def silu(x):
        return x / (1 + (-x).exp())

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def shared(x, name):
        return x @ p[f"{name}.weight"][0] + p[f"{name}.bias"][0]

    def plain_norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def turn(x, positions):  # (T, 16), (3, T)
        axis = [0] * 4 + [1] * 2 + [2] * 2
        angles = torch.stack([positions[a].double() * 1e4 ** (-i / 8) for i, a in enumerate(axis)], dim=-1)
        turned = torch.complex(x[:, :8], x[:, 8:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    for row in range(2):
        real = context.visible[row]
        start = int(context.next_position[row])
        positions = torch.cat([context.positions[:, row, real], torch.arange(start, start + 9).expand(3, -1)], dim=-1)
        state = torch.cat([batch["states"][row].double(), torch.ones(4).double()])
        chunk = shared(silu(shared(noisy[row].double(), "action_in.0")), "action_in.1")
        x = torch.cat(
            [
                linear(context.last_hidden_state[row, real].double(), "vlm_proj"),
                linear(state, "state_in_proj")[None],
                chunk,
            ]
        )
        angles = [1000 * time[row].double() * 1e4 ** (-i / 7) for i in range(8)]
        embedding = torch.stack([a.sin() for a in angles] + [a.cos() for a in angles])
        condition = silu(linear(silu(linear(embedding, "time_mlp.0")), "time_mlp.2"))
        for i in range(2):
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(condition, f"layers.{i}.modulation").chunk(6)
            q, k, v = linear(plain_norm(x) * (1 + scale1) + shift1, f"layers.{i}.qkv").chunk(3, dim=-1)
            heads = []
            for h in range(2):
                part = slice(16 * h, 16 * h + 16)
                scores = turn(q[:, part], positions) @ turn(k[:, part], positions).T / 4
                heads.append(scores.softmax(dim=-1) @ v[:, part])
            x = x + gate1 * linear(torch.cat(heads, dim=-1), f"layers.{i}.proj")
            y = plain_norm(x) * (1 + scale2) + shift2
            y = silu(linear(y, f"layers.{i}.gate_proj")) * linear(y, f"layers.{i}.up_proj")
            x = x + gate2 * linear(y, f"layers.{i}.down_proj")
        shift, scale = linear(condition, "out_modulation").chunk(2)
        y = plain_norm(x[-8:]) * (1 + scale) + shift
        expected = shared(silu(shared(y, "action_out.0")), "action_out.1")
        assert largest(found[row].double() - expected) < 2e-5


@pytest.mark.parametrize("projection", ["shared", "concatenated", "per_domain"])
def test_dit_projections(projection):
    """Table 10: what of the projections a domain has for itself."""
    model, batch = tiny_model_of("dit", action_expert={"action_projection": projection}), tiny_batch_of("qwen2_5_vl")
    noise = torch.randn(2, 8, 4)
    samples = [model.sample_actions(**{**batch, "domain_ids": torch.tensor([i, i])}, noise=noise) for i in range(2)]
    assert torch.equal(*samples) == (projection == "shared")
    outer, inner = 4 * 32 + 32 + 32 * 4 + 4, 2 * (32 * 32 + 32)
    rows = {"shared": (1, 1), "concatenated": (3, 1), "per_domain": (3, 3)}[projection]
    expert = model.action_expert
    count = sum(p.numel() for each in (expert.action_in, expert.action_out) for p in each.parameters())
    assert count == rows[0] * outer + rows[1] * inner


def test_dit_starts_as_the_identity():
    torch.manual_seed(0)
    model = WallVLAForConditionalGeneration(tiny_config_of("dit"))
    assert all(not layer.modulation.weight.any() for layer in model.action_expert.layers)
    assert not model.action_expert.out_modulation.weight.any()
    assert model.action_expert.action_out[1].weight.any()


def test_multimodal_rope_is_rope_where_the_axes_agree():
    places = torch.arange(7)
    cos, sin = multimodal_rope(places.expand(3, 1, 7), (4, 2, 2), 100.0)
    angles = torch.outer(places.float(), 100.0 ** (-torch.arange(8) / 8))
    torch.testing.assert_close(cos[0], torch.cat([angles, angles], -1).cos())
    states = torch.randn(1, 2, 7, 16)
    turned = rope(states, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))


# --- the state in the expert


@pytest.mark.parametrize("kind, vlm", [("mot", "internvl"), ("dit", "qwen3_5")])
def test_state_goes_through_the_expert(kind, vlm):
    model = tiny_model_of(kind, vlm, proprioception="expert", state_dim=4)
    batch, noise = tiny_batch_of(vlm), torch.randn(2, 8, 4)
    sampled = model.sample_actions(**batch, noise=noise)
    moved = model.sample_actions(**{**batch, "states": batch["states"] + 0.5}, noise=noise)
    masked = model.sample_actions(**{**batch, "state_mask": ~batch["state_mask"]}, noise=noise)
    assert largest(sampled - moved) > 1e-4 and largest(sampled - masked) > 1e-4
    with pytest.raises(ValueError, match="states"):
        model.sample_actions(**{**batch, "states": None}, noise=noise)


def test_config_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="qwen3_5_text does not offer"):
        tiny_config_of("mot", "qwen3_5")
    with pytest.raises(ValueError, match="kind is 'vae'"):
        WallVLAConfig.tiny(action_expert={"kind": "vae"})
    with pytest.raises(ValueError, match="sum 8"):
        tiny_config_of("dit", action_expert={"mrope_section": [4, 4, 4]})
    with pytest.raises(ValueError, match="clean action"):
        tiny_config_of("soft_prompt", prediction="velocity", binary_channels=[])
    with pytest.raises(StrictDataclassClassValidationError, match="one for each of 4"):
        tiny_config_of("soft_prompt", loss_channel_weights=[1.0])
    with pytest.raises(StrictDataclassClassValidationError, match="twice"):
        tiny_config_of("dit", domains=["a", "a"])
    with pytest.raises(ValueError, match="same channels"):
        tiny_config_of("soft_prompt", state_dim=5)


# --- sizes


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_x_vla_at_full_size():
    """879.48M parameters, part by part (reference: published checkpoint, 603 + 300 tensors)."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(WallVLAConfig.x_vla())
    expert = model.action_expert
    layer = 12 * 1024**2 + 13 * 1024
    assert {count(each) for each in expert.layers} == {layer} and len(expert.layers) == 24
    assert count(expert.action_encoder) == 30 * (72 * 1024 + 1024)
    assert count(expert.action_decoder) == 30 * (1024 * 20 + 20)
    assert count(expert.soft_prompts) == 30 * 32 * 1024
    assert count(expert) == 24 * layer + 6_466_136 == 308_775_512
    assert round(count(model.vlm) / 1e6, 2) == 570.71
    assert round(count(model) / 1e6, 2) == 879.48
    assert len(list(expert.parameters())) == 300


def test_qwen_vla_at_full_size():
    """The paper: 16 blocks of 70.8M, projections 4.9M, VLM to DiT 3.9M, time 2.8M, output AdaLN 4.7M; 1.15B in all."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(WallVLAConfig.qwen_vla())
    expert = model.action_expert
    parts = [
        count(expert.layers[0]),
        count(expert.action_in) + count(expert.action_out),
        count(expert.vlm_proj),
        count(expert.time_mlp),
        count(expert.out_modulation),
    ]
    assert [round(part / 1e6, 1) for part in parts] == [70.8, 4.9, 3.9, 2.8, 4.7]
    assert round(count(expert.layers) / 1e9, 2) == 1.13 and round(count(expert) / 1e9, 2) == 1.15
    assert 4.0e9 < count(model.vlm) < 4.8e9


def test_mot_testbed_at_full_size():
    """A 2B VLM and a 0.7B expert of the same depth and heads."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(WallVLAConfig.mot_testbed())
    assert round(count(model.action_expert) / 1e9, 1) == 0.7
    assert 1.9e9 < count(model.vlm) < 2.4e9
    assert model.action_expert.config.head_dim == 128
