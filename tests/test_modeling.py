"""The model on tiny random weights: what DESIGN section 3 promises, one test a promise."""

import json
import math
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ACTION_START, tiny_actions, tiny_batch, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.flow_matching_wallvla import (
    action_from_velocity,
    euler_step,
    identity_guidance,
    interpolate,
    prefix_guidance,
    prefix_weights,
    time_grid,
    vjp_guidance,
)
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.ops_wallvla import action_attention_mask, sinusoidal_embedding


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- sizes


def test_wall_oss_05_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(WallVLAConfig.wall_oss_05())

    def count(*modules) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    expert = model.action_expert
    heads = (expert.action_in_proj, expert.action_time_mlp_in, expert.action_time_mlp_out, expert.action_out_proj)
    attention = 1024 * 2048 + 2048 + 2 * (1024 * 256 + 256) + 2048 * 1024
    layer = attention + 3 * 1024 * 2048 + 2 * 1024
    assert count(*heads) == 52 * 1024 + 2048 * 1024 + 1024 * 1024 + 1024 * 26
    assert [count(x) for x in expert.layers] == [layer] * 36 == [11_014_656] * 36
    block = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * 2048 + 2048
    assert count(model.vlm.model.visual) == 3 * 2 * 14 * 14 * 1280 + 32 * block + merger
    vl_layer = 2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008 + 2 * 2048
    assert count(model.vlm.model.language_model) == 151_936 * 2048 + 36 * vl_layer + 2048
    assert count(model.vlm) + count(expert) == count(model) == 4_154_377_216
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="no field \\['action_dims'\\]"):
        WallVLAConfig.tiny(action_dims=7)
    with pytest.raises(ValueError, match="head_dim is 64 but the VL expert has 32"):
        WallVLAConfig.tiny(action_expert={"hidden_size": 128, "head_dim": 64})
    with pytest.raises(Exception, match="even width"):
        WallVLAConfig.tiny(action_expert={"hidden_size": 127})
    with pytest.raises(Exception, match="action_token_start_id is None"):
        WallVLAConfig.tiny(num_action_tokens=4)


# --- ops


def test_sinusoidal_embedding_against_the_formula():
    times, dim = [0.0, 0.25, 0.999], 10
    expected = []
    for t in times:
        angles = [t * 10_000 ** (-i / (dim / 2 - 1)) for i in range(dim // 2)]
        expected.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    torch.testing.assert_close(sinusoidal_embedding(torch.tensor(times), dim), torch.tensor(expected))


@pytest.mark.parametrize("causal", [True, False])
def test_action_attention_mask_against_loops(causal):
    visible = torch.tensor([[False, True, True], [True, True, False]])
    steps = torch.tensor([[True, True, True, True], [True, True, False, False]])
    mask = action_attention_mask(visible, steps, causal)
    assert mask.shape == (2, 1, 4, 7)
    for b in range(2):
        for q in range(4):
            for k in range(7):
                if k < 3:
                    allowed = visible[b, k]
                else:
                    step = k - 3
                    allowed = step == q or (steps[b, step] and (step <= q or not causal))
                assert mask[b, 0, q, k] == allowed


# --- the VL expert is the stock model


def test_logits_equal_stock_qwen():
    model, batch = tiny_model(), tiny_batch(padding=2)
    stock = Qwen2_5_VLForConditionalGeneration(model.config.vlm_config).eval()
    stock.load_state_dict(model.vlm.state_dict())
    token_types = (batch["input_ids"] == model.vlm.config.image_token_id).int()
    with torch.no_grad():
        expected = stock(**batch, mm_token_type_ids=token_types).logits
        for types in (None, token_types):  # found by the model, or given
            logits = model(**batch, mm_token_type_ids=types).logits
            assert largest((logits - expected)[batch["attention_mask"].bool()]) < 1e-5


def test_text_without_images_equals_stock_qwen():
    model = tiny_model()
    ids = tiny_batch(images=(1,))["input_ids"][:, -6:]
    with torch.no_grad():
        assert largest(model(ids).logits - model.vlm(ids).logits) < 1e-5


def test_generate_is_the_stock_generate():
    model, batch = tiny_model(), tiny_batch(images=(1, 1))
    batch["mm_token_type_ids"] = (batch["input_ids"] == model.vlm.config.image_token_id).int()
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, batch["input_ids"].shape[1] + 4)
    with torch.no_grad():  # greedy by hand, without a cache
        logits = model(**{**batch, "mm_token_type_ids": batch["mm_token_type_ids"]}).logits[:, -1]
    assert torch.equal(tokens[:, -4], logits.argmax(-1))


# --- the action expert against the formulas


def reference_velocity(model, batch, noisy, time, channel_mask, visible_counts):
    """One sample, no batch, no mask tensor: attention over explicit lists of keys, float64."""
    m = {name: p.double() for name, p in model.action_expert.named_parameters()}
    captured = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: captured.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.vlm.model.language_model.layers
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    text = model.vlm.model.language_model
    positions, _ = model.vlm.model.get_rope_index(
        batch["input_ids"],
        (batch["input_ids"] == model.vlm.config.image_token_id).int(),
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    start = int(positions[:, 0, :visible_counts].max()) + 1
    cos, sin = (x[0].double() for x in text.rotary_emb(captured[0], positions))

    def rms(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotate(x, cos, sin):  # x: tokens, heads, 32
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    frequencies = 1e4 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    angles = torch.arange(start, start + 8)[:, None] * frequencies
    own_cos, own_sin = (torch.cat([f, f], dim=-1) for f in (angles.cos(), angles.sin()))
    i = torch.arange(64, dtype=torch.float64) / 63
    angles = time.double() * 10_000.0**-i
    time_embedding = torch.cat([angles.sin(), angles.cos()])

    x = torch.cat([noisy.double(), channel_mask.double().expand(8, 4)], dim=-1) @ m["action_in_proj.weight"].T
    x = torch.cat([x, time_embedding.expand(8, -1)], dim=-1) @ m["action_time_mlp_in.weight"].T
    x = (x * x.sigmoid()) @ m["action_time_mlp_out.weight"].T
    for n, layer in enumerate(text.layers):
        h = captured[n][0].double()
        k, v = (
            (h @ p.weight.double().T + p.bias.double()).unflatten(-1, (2, 32))
            for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        k = rotate(k, cos, sin)
        name = f"layers.{n}."
        h = rms(x, m[name + "input_layernorm.weight"])
        q, own_k, own_v = (
            (h @ m[f"{name}self_attn.{c}_proj.weight"].T + m[f"{name}self_attn.{c}_proj.bias"]).unflatten(-1, (-1, 32))
            for c in "qkv"
        )
        q, own_k = rotate(q, own_cos, own_sin), rotate(own_k, own_cos, own_sin)
        rows = []
        for step in range(8):
            keys = torch.cat([k[:visible_counts], own_k[: step + 1]])
            values = torch.cat([v[:visible_counts], own_v[: step + 1]])
            heads = []
            for head in range(4):
                scores = keys[:, head // 2] @ q[step, head] / math.sqrt(32)
                heads.append(scores.softmax(0) @ values[:, head // 2])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ m[name + "self_attn.o_proj.weight"].T
        h = rms(x, m[name + "post_attention_layernorm.weight"])
        gate, up = (h @ m[f"{name}mlp.{c}_proj.weight"].T for c in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ m[name + "mlp.down_proj.weight"].T
    return rms(x, m["norm.weight"]) @ m["action_out_proj.weight"].T


@pytest.mark.parametrize("action_tokens", [0, 5])
def test_velocity_equals_the_formulas(action_tokens):
    model = tiny_model()
    batch = tiny_batch(images=(2,), action_tokens=action_tokens)
    batch.pop("labels", None)
    visible = batch["input_ids"].shape[1] - (action_tokens + 1 if action_tokens else 0)
    a = tiny_actions(1)
    a["action_mask"][:] = True
    a["action_mask"][..., 3] = False
    channel_mask = a["action_mask"].any(1)
    noisy = interpolate(torch.where(channel_mask[:, None], a["actions"], 0.0), a["noise"], a["time"])
    expected = reference_velocity(model, batch, noisy[0], a["time"][0], channel_mask, visible)
    with torch.no_grad():
        prediction = model(**batch, **a).action_prediction[0]
    assert largest(prediction - action_from_velocity(noisy, expected[None].float(), a["time"])[0]) < 1e-4


# --- two experts, one context


def test_joint_training_pass_equals_prefix_cache_inference():
    """Training with discrete tokens behind the prompt = inference without them, also under left padding."""
    model, a = tiny_model(), tiny_actions(2)
    training = tiny_batch(action_tokens=5, padding=3)
    prompt = training["input_ids"].shape[1] - 6
    inference = {k: v for k, v in training.items() if k != "labels"}
    inference |= {k: inference[k][:, :prompt] for k in ("input_ids", "attention_mask")}
    channels, steps = a["action_mask"].any(1, keepdim=True), a["action_mask"].any(2)
    noisy = interpolate(torch.where(channels, a["actions"], 0.0), a["noise"], a["time"])
    with torch.no_grad():
        joint = model(**training, **a).action_prediction
        context = model.encode_prefix(**inference).with_room(8)
        cached = model.predict_velocity(noisy, a["time"], context, channels, steps)
        again = model.predict_velocity(noisy, a["time"], context, channels, steps)  # the buffer holds no history
    assert largest(joint - action_from_velocity(noisy, cached, a["time"])) < 1e-5
    assert torch.equal(cached, again)


def test_discrete_and_continuous_actions_are_mutually_invisible():
    model, a = tiny_model(), tiny_actions(2)
    batch = tiny_batch(action_tokens=5)
    with torch.no_grad():
        before = model(**batch, **a)
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        discrete = (batch["input_ids"] >= ACTION_START) & (batch["input_ids"] < ACTION_START + 64)
        changed["input_ids"][discrete] = ACTION_START + (changed["input_ids"][discrete] - ACTION_START + 7) % 64
        changed["input_ids"][:, -1] = 8  # the end-of-turn token behind them has seen them
        after = model(**changed, **a)
        assert torch.equal(before.action_prediction, after.action_prediction)
        assert largest(before.action_token_loss - after.action_token_loss) > 0
        noisier = model(**batch, **{**a, "actions": a["actions"] + 3})
        assert largest(noisier.action_prediction - before.action_prediction) > 0.1
        assert torch.equal(noisier.action_token_loss, before.action_token_loss)
        assert torch.equal(noisier.text_loss, before.text_loss)


def test_discrete_tokens_in_the_prompt_do_change_what_comes_before_nothing():
    """The prompt itself is visible: changing it must change the velocity, else the test above proves nothing."""
    model, a, batch = tiny_model(), tiny_actions(2), tiny_batch(action_tokens=5)
    with torch.no_grad():
        before = model(**batch, **a).action_prediction
        batch["input_ids"][:, -8] += 1
        assert largest(model(**batch, **a).action_prediction - before) > 1e-3


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_attention_inside_the_chunk(attention):
    expert = {"hidden_size": 128, "intermediate_size": 384, "action_attention": attention}
    model, batch, a = tiny_model(action_expert=expert), tiny_batch(), tiny_actions(2)
    a["action_mask"][:] = True
    with torch.no_grad():
        before = model(**batch, **a).action_prediction
        a["noise"][:, 4] += 1
        moved = (model(**batch, **a).action_prediction - before).abs().amax(dim=(0, 2)) > 1e-6
    assert moved[4:].all()
    assert moved[:4].all() == (attention == "bidirectional") and moved[:4].any() == (attention == "bidirectional")


# --- masks and losses


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padded_steps_and_channels_reach_nothing(attention):
    expert = {"hidden_size": 128, "intermediate_size": 384, "action_attention": attention}
    model, batch, a = tiny_model(action_expert=expert), tiny_batch(), tiny_actions(2)
    a["actions"].requires_grad_(True)
    velocities = []
    model.action_expert.register_forward_hook(lambda module, args, velocity: velocities.append(velocity))
    output = model(**batch, **a)
    of_prediction, of_actions = torch.autograd.grad(output.flow_loss, [velocities[0], a["actions"]])
    hidden = ~a["action_mask"]
    assert (of_prediction[hidden] == 0).all() and (of_prediction[~hidden] != 0).all()
    assert (of_actions[hidden] == 0).all()
    garbage = torch.where(hidden, torch.full_like(a["actions"], 1e3), a["actions"])
    changed = model(**batch, **{**a, "actions": garbage})
    assert torch.equal(changed.flow_loss, output.flow_loss)


def test_losses_against_loops():
    model, batch, a = tiny_model(), tiny_batch(action_tokens=5), tiny_actions(2)
    batch["labels"][1, :] = -100  # one sample without labels
    batch["labels"][0, 12] = batch["input_ids"][0, 12]
    with torch.no_grad():
        output = model(**batch, **a)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = {True: [], False: []}
    for b in range(2):
        for s in range(1, logits.shape[1]):
            target = batch["labels"][b, s].item()
            if target != -100:
                loss = F.cross_entropy(logits[b, s - 1], batch["labels"][b, s])
                losses[ACTION_START <= target < ACTION_START + 64].append(loss)
    assert output.loss_counts.tolist() == [a["action_mask"].sum(), len(losses[True]), len(losses[False])] == [39, 5, 2]
    torch.testing.assert_close(output.action_token_loss, torch.stack(losses[True]).mean())
    torch.testing.assert_close(output.text_loss, torch.stack(losses[False]).mean())
    squared = (output.action_prediction - a["actions"])[a["action_mask"]] ** 2
    torch.testing.assert_close(output.flow_loss, squared.mean())
    expected = output.flow_loss + 0.01 * output.action_token_loss + 0.01 * output.text_loss
    torch.testing.assert_close(output.loss, expected)


def test_a_multimodal_row_adds_nothing_to_the_flow_loss():
    model, batch, a = tiny_model(), tiny_batch(images=(1, 1)), tiny_actions(2)
    a["action_mask"][1] = False
    both = model(**batch, **a)
    first = {k: v[:1] for k, v in batch.items()} | {"pixel_values": batch["pixel_values"][:16]}
    alone = model(**first, **{k: v[:1] for k, v in a.items()})
    torch.testing.assert_close(both.flow_loss, alone.flow_loss)
    a["action_mask"][:] = False
    nothing = model(**batch, **a)
    assert nothing.flow_loss == 0
    nothing.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradient_bridge(stop_gradient):
    model, batch, a = tiny_model(), tiny_batch(), tiny_actions(2)
    grads = gradients(model, model(**batch, **a, stop_gradient=stop_gradient).loss)
    reached = {name for name, g in grads.items() if g.abs().max() > 0}
    vl = {name for name in reached if name.startswith("vlm.")}
    experts = {name for name, _ in model.action_expert.named_parameters(prefix="action_expert")}
    assert experts <= reached
    assert bool(vl) != stop_gradient
    if not stop_gradient:  # the vision tower and every layer's keys and values
        assert any("visual.patch_embed" in name for name in vl)
        assert all(f"vlm.model.language_model.layers.{i}.self_attn.v_proj.weight" in vl for i in range(4))


def test_the_bridge_does_not_change_the_numbers():
    model, batch, a = tiny_model(), tiny_batch(), tiny_actions(2)
    losses = [model(**batch, **a, stop_gradient=stop_gradient).loss for stop_gradient in (False, True)]
    assert losses[0] == losses[1]


def test_predicting_the_action_is_the_same_model_read_otherwise():
    batch, a = tiny_batch(), tiny_actions(2)
    velocity, action = tiny_model(), tiny_model(prediction="action")
    with torch.no_grad():
        raw = action.action_expert(
            interpolate(torch.where(a["action_mask"].any(1, keepdim=True), a["actions"], 0.0), a["noise"], a["time"]),
            a["time"],
            action.encode_prefix(**batch),
            a["action_mask"].any(1, keepdim=True),
            a["action_mask"].any(2),
        )
        torch.testing.assert_close(action(**batch, **a).action_prediction, raw, atol=1e-4, rtol=1e-4)
        assert largest(velocity(**batch, **a).action_prediction - raw) > 0.1


# --- batches, backends, checkpointing


def test_a_padded_batch_equals_its_samples():
    model, batch, a = tiny_model(), tiny_batch(images=(1, 3), padding=2), tiny_actions(2)
    with torch.no_grad():
        both = model(**batch, **a).action_prediction
        sampled = model.sample_actions(**batch, noise=a["noise"], action_mask=a["action_mask"])
        starts = [0, 16]
        for i, images in enumerate((1, 3)):
            keep = batch["attention_mask"][i].bool()
            single = {
                "input_ids": batch["input_ids"][i : i + 1, keep],
                "attention_mask": batch["attention_mask"][i : i + 1, keep],
                "pixel_values": batch["pixel_values"][starts[i] : starts[i] + 16 * images],
                "image_grid_thw": batch["image_grid_thw"][:images],
            }
            row = {k: v[i : i + 1] for k, v in a.items()}
            assert largest(model(**single, **row).action_prediction - both[i : i + 1]) < 1e-5
            alone = model.sample_actions(**single, noise=row["noise"], action_mask=row["action_mask"])
            assert largest(alone - sampled[i : i + 1]) < 1e-5


def test_eager_equals_sdpa():
    batch, a = tiny_batch(action_tokens=5, padding=2), tiny_actions(2)
    model = tiny_model()
    assert model.action_expert.config._attn_implementation == "sdpa"
    expected = model(**batch, **a)
    expected_grads = gradients(model, expected.loss)
    model.set_attn_implementation("eager")
    assert model.action_expert.config._attn_implementation == "eager"
    output = model(**batch, **a)
    assert largest(output.action_prediction - expected.action_prediction) < 1e-5
    for name, gradient in gradients(model, output.loss).items():
        torch.testing.assert_close(gradient, expected_grads[name], atol=1e-5, rtol=1e-4, msg=name)


def test_activation_checkpointing_gives_the_same_gradients():
    batch, a = tiny_batch(action_tokens=5, padding=2), tiny_actions(2)
    model = tiny_model().train()
    expected = gradients(model, model(**batch, **a).loss)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.action_expert.layers)
    grads = gradients(model, model(**batch, **a).loss)
    assert grads.keys() == expected.keys()
    assert max(largest(grads[name] - expected[name]) for name in grads) == 0


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})


def test_lora_trains_adapters_and_heads_alone():
    """Also where no key of the first layer has a gradient, and under activation checkpointing."""
    peft = pytest.importorskip("peft")
    model = tiny_model().train()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["action_out_proj"])
    adapted = peft.get_peft_model(model, config)
    batch, a = tiny_batch(action_tokens=5, padding=2), tiny_actions(2)
    expected = gradients(adapted, adapted(**batch, **a).loss)
    assert expected and all("lora_" in name or "modules_to_save" in name for name in expected)
    assert any("vlm" in name for name in expected) and any("action_expert.layers" in name for name in expected)
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    grads = gradients(adapted, adapted(**batch, **a).loss)
    assert grads.keys() == expected.keys()
    assert max(largest(grads[name] - expected[name]) for name in grads) < 1e-6


# --- sampling


def test_sampling_is_euler_on_the_predicted_velocity():
    model, batch, a = tiny_model(), tiny_batch(), tiny_actions(2)
    a["action_mask"][:] = True
    channels, steps = a["action_mask"].any(1, keepdim=True), a["action_mask"].any(2)
    times, x = time_grid(7), a["noise"]
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:], strict=True):  # the whole model at every step
            context = model.encode_prefix(**batch)
            x = euler_step(x, model.predict_velocity(x, t.expand(2), context, channels, steps), t, t_next)
    sampled = model.sample_actions(**batch, noise=a["noise"], num_inference_steps=7)
    assert largest(sampled - x) < 1e-5
    assert not torch.equal(sampled, model.sample_actions(**batch, noise=a["noise"], num_inference_steps=3))


@pytest.mark.parametrize("steps", [0, -1])
def test_sampling_takes_at_least_one_step(steps):
    """0 is no way to say "as many as the checkpoint says"."""
    with pytest.raises(ValueError, match=f"num_inference_steps {steps}.*at least 1"):
        tiny_model().sample_actions(**tiny_batch(), num_inference_steps=steps)


def test_sampling_repeats_with_the_generator_and_hides_masked_elements():
    model, batch, mask = tiny_model(), tiny_batch(), tiny_actions(2)["action_mask"]
    chunks = [
        model.sample_actions(**batch, action_mask=mask, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(chunks[0], chunks[1]) and not torch.equal(chunks[0], chunks[2])
    assert (chunks[0][~mask] == 0).all() and (chunks[0][mask] != 0).all()
    with pytest.raises(ValueError, match=r"\(2, 4, 4\).*\(2, 8, 4\)"):
        model.sample_actions(**batch, noise=torch.zeros(2, 4, 4))


@pytest.mark.parametrize("guide", [identity_guidance, vjp_guidance])
def test_guided_sampling_continues_the_old_chunk(guide):
    """Ten steps of guidance bring the overlap closer to the old actions and leave unguided rows alone."""
    model, batch = tiny_model(), tiny_batch()
    noise = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    target = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(2))
    weights = prefix_weights(torch.tensor([3, 0]), torch.tensor([3, 0]), 8)  # only the first row is guided
    free = model.sample_actions(**batch, noise=noise, num_inference_steps=10)
    guidance = partial(guide, target=target, weights=weights, limit=10.0)
    guided = model.sample_actions(**batch, noise=noise, num_inference_steps=10, guidance=guidance)
    before, after = (largest(chunk[0, :3] - target[0, :3]) for chunk in (free, guided))
    assert after < 0.3 * before
    torch.testing.assert_close(guided[1], free[1], rtol=1e-4, atol=1e-5)


def test_prefix_conditioned_sampling_keeps_the_prefix():
    model, batch = tiny_model(), tiny_batch()
    noise, target = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(1))
    weights = prefix_weights(torch.tensor([3, 0]), torch.tensor([5, 0]), 8)
    free = model.sample_actions(**batch, noise=noise)
    held = model.sample_actions(
        **batch, noise=noise, guidance=partial(prefix_guidance, target=target, weights=weights)
    )
    torch.testing.assert_close(held[0, :3], target[0, :3], rtol=0, atol=0.01)  # sampling ends at tau = 0.999
    assert largest(held[0, 3:] - free[0, 3:]) > 1e-3, "the other steps must see the prefix"
    torch.testing.assert_close(held[1], free[1], rtol=1e-4, atol=1e-5)


def test_misspelt_inputs_are_an_error():
    with pytest.raises(TypeError, match="pixel_value"):
        tiny_model()(input_ids=torch.ones(1, 3, dtype=torch.long), pixel_value=None)


# --- files


def test_save_and_load(tmp_path):
    model, batch, a = tiny_model(), tiny_batch(), tiny_actions(2)
    model.save_pretrained(tmp_path)
    loaded, info = WallVLAForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.vlm.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.config.action_expert.num_attention_heads == 4 and loaded.config.action_token_start_id == ACTION_START
    assert torch.equal(loaded(**batch, **a).action_prediction, model(**batch, **a).action_prediction)


def test_heads_stay_in_float32(tmp_path):
    model, batch, a = tiny_model(), tiny_batch(), tiny_actions(2)
    model.save_pretrained(tmp_path)
    half = WallVLAForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {name for name, _ in half.named_parameters() if "action_expert.action_" in name}
    assert {name for name, p in half.named_parameters() if p.dtype == torch.float32} == expected and len(expected) == 4
    sampled = half.sample_actions(**batch, noise=a["noise"])
    assert sampled.dtype == torch.float32
    full = model.sample_actions(**batch, noise=a["noise"])
    assert largest(sampled - full) < 0.05 * largest(full)


def damaged(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("action_expert.norm.weight"), "1 missing: .*action_expert.norm.weight"),
        (lambda t: t.update(surplus=torch.zeros(1)), "1 unexpected: .*surplus"),
        (
            lambda t: t.update({"action_expert.action_out_proj.weight": torch.zeros(7, 128)}),
            r"1 of another shape .*action_out_proj.*\[7, 128\].*\[4, 128\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_match_is_refused(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError)) as error:
        WallVLAForConditionalGeneration.from_pretrained(tmp_path)
    # On a mismatch the framework raises once more on top of our error
    assert re.search(message, str(error.value.__context__ or error.value))


FRESH_PROCESS = """
import json, sys, torch
sys.modules["wallvla"] = None  # any import of the package fails
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
other = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "wallvla"
assert type(model).__module__.startswith("transformers_modules"), type(model)
actions = model.sample_actions(**inputs)
assert torch.equal(actions, other.sample_actions(**inputs))
buffers = {name: b.double().sum().item() for name, b in model.named_buffers()}
torch.save(actions, folder + "/outputs.pt")
json.dump(buffers, open(folder + "/buffers.json", "w"))
model.save_pretrained(folder + "/again")
"""


def test_loads_in_a_process_without_the_package(tmp_path):
    """Remote code, parameters, and the buffers that are in no checkpoint (a fresh process computes them again)."""
    model, batch, a = tiny_model(), tiny_batch(), tiny_actions(2)
    model.save_pretrained(tmp_path)
    inputs = {**batch, "noise": a["noise"]}
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-P", "-c", FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), model.sample_actions(**inputs))
    buffers = json.loads((tmp_path / "buffers.json").read_text())
    assert buffers == {name: b.double().sum().item() for name, b in model.named_buffers()} and buffers
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert set(again["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}
    assert (tmp_path / "again" / "flow_matching_wallvla.py").exists()


def test_flex_attention_is_refused_by_the_stock_model():
    """Documented limit: the stock Qwen2.5-VL layers of this transformers release do not take flex attention."""
    with pytest.raises(ValueError, match="flex_attention"):
        WallVLAForConditionalGeneration._from_config(tiny_config(), attn_implementation="flex_attention")
