"""`convert`, `export`, `inspect` of X-VLA: every tensor accounted for, both ways, or an error and no output."""

import json

import numpy as np
import published_x_vla as published
import pytest
import torch
from safetensors.torch import load_file
from test_conversion import all_weights, assert_same_bytes, nothing_written, printed_by, put
from transformers import BartTokenizer

from wallvla import cli
from wallvla.action_space_wallvla import axis_angle_to_matrix
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.conversion import Options, convert, export, inspect, inspection_text, x_vla, x_vla_robots
from wallvla.conversion.exporter import load_processor
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration


SHARED = "vlm.language_model.model.shared.weight"
EMBED = "vlm.language_model.model.encoder.embed_tokens.weight"
QKV = "transformer.blocks.1.attn.qkv.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return published.x_vla(tmp_path_factory.mktemp("published") / "x-vla")


@pytest.fixture(scope="module")
def converted(source):
    convert(str(source), source.parent / "output")
    return source.parent / "output"


def small_files(folder):
    names = ("config.json", "preprocessor_config.json", "policy_preprocessor.json", "tokenizer.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


# --- there and back


def renamed(found, old, new):
    return {new if key == old else key: values for key, values in found.items()}


LAYOUTS = {
    "authors": lambda folder: published.x_vla(folder, dtype=torch.bfloat16),
    "authors, three files": lambda folder: published.x_vla(folder, files=3),
    "authors, native names": lambda folder: published.write(
        folder, published.native(published.weights()), published.config()
    ),
    "authors, both embeddings": lambda folder: published.write(
        folder, published.weights() | {EMBED: published.weights()[SHARED].clone()}, published.config()
    ),
    "authors, the other embedding": lambda folder: published.write(
        folder, renamed(published.weights(), SHARED, EMBED), published.config()
    ),
    "LeRobot": published.port,
    "LeRobot, Microsoft's names": lambda folder: published.port(folder, vendored=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_to_the_byte(tmp_path, layout):
    source = LAYOUTS[layout](tmp_path / "source")
    report = convert(str(source), tmp_path / "output", Options(max_shard_size=100_000))
    assert len(list((tmp_path / "output").glob("model-*.safetensors"))) > 1
    assert report["source_keys"].keys() == all_weights(source).keys()
    assert report["parameters"].keys() == all_weights(tmp_path / "output").keys()
    export(tmp_path / "output", tmp_path / "back")
    assert_same_bytes(all_weights(tmp_path / "back"), all_weights(source))
    assert small_files(tmp_path / "back") == small_files(source)
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()  # of the source, where it has one


def test_all_layouts_are_one_model(converted, tmp_path):
    for number, make in enumerate((LAYOUTS["LeRobot"], LAYOUTS["LeRobot, Microsoft's names"])):
        convert(str(make(tmp_path / f"source{number}")), tmp_path / f"output{number}")
        assert_same_bytes(all_weights(tmp_path / f"output{number}"), all_weights(converted))


def test_a_model_that_never_was_published_goes_there_and_back(converted, tmp_path):
    """Without report and published files, and with a domain more."""
    model = WallVLAForConditionalGeneration.from_pretrained(converted)
    model.add_domain("mine", "copy:libero")
    fresh = tmp_path / "fresh"
    model.save_pretrained(fresh)
    load_processor(converted).save_pretrained(fresh)
    export(fresh, tmp_path / "back")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (values["num_domains"], values["action_mode"], values["model_type"]) == (31, "ee6d", "xvla")
    found = all_weights(tmp_path / "back")
    assert found["transformer.soft_prompt_hub.weight"].shape == (31, published.PROMPTS * published.WIDE)
    assert torch.equal(
        found["transformer.soft_prompt_hub.weight"][31 - 1], found["transformer.soft_prompt_hub.weight"][3]
    )
    convert(str(tmp_path / "back"), tmp_path / "again")
    assert_same_bytes(all_weights(tmp_path / "again"), all_weights(fresh))
    old, new = (plain(WallVLAConfig.from_pretrained(folder).to_dict()) for folder in (fresh, tmp_path / "again"))
    assert old.pop("domains")[-1] == "mine" and new.pop("domains")[-1] == "domain_30"
    assert old == new


def plain(values):
    """A configuration without what says how it was stored."""
    kept = values.keys() - {"dtype", "architectures", "_name_or_path"}
    return {name: plain(values[name]) if isinstance(values[name], dict) else values[name] for name in kept}


def test_a_domain_more_changes_the_published_configuration(converted, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    for path in (path for path in converted.rglob("*") if path.is_file()):
        target = output / path.relative_to(converted)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    model = WallVLAForConditionalGeneration.from_pretrained(output)
    model.add_domain("mine")
    model.save_pretrained(output)
    export(output, tmp_path / "back")
    values, before = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", output / "published")
    )
    assert values == before | {"num_domains": 31}


def test_what_x_vla_does_not_compute_is_not_exported(converted, tmp_path):
    model = WallVLAForConditionalGeneration.from_pretrained(converted)
    for changes, message in (
        ({"loss_channel_weights": [1.0] * 19 + [2.0]}, "no action mode"),
        ({"sampler": "euler"}, 'sampler "euler"'),
    ):
        fresh = tmp_path / message[:2]
        model.config.save_pretrained(fresh)
        values = json.loads((fresh / "config.json").read_text()) | changes
        model.save_pretrained(fresh)
        (fresh / "config.json").write_text(json.dumps(values))
        load_processor(converted).save_pretrained(fresh)
        with pytest.raises(ValueError, match=message):
            export(fresh, tmp_path / "back")
        assert nothing_written(tmp_path / "back")
    with pytest.raises(ValueError, match="states as wide as actions"):
        x_vla.upstream_config(WallVLAConfig.x_vla("auto", state_dim=32))


def test_a_kind_that_nobody_published_is_not_exported(tmp_path):
    dit = {"kind": "dit", "hidden_size": 32, "num_attention_heads": 2, "mrope_section": [4, 2, 2]}
    WallVLAConfig.tiny(action_expert=dit).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="dit on qwen2_5_vl; exports are: mot on qwen2_5_vl, soft_prompt on florence2"
    ):
        export(tmp_path, tmp_path / "back")


def test_dtype_casts_all_but_heads(source, tmp_path):
    convert(str(source), tmp_path / "half", Options(dtype="bfloat16"))
    exact = {name for name, values in all_weights(tmp_path / "half").items() if values.dtype == torch.float32}
    model = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert exact == {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert len(exact) == 5  # weight and bias of the two projections, and the prompts


# --- one tensor is wrong


def damage(tmp_path, change, make=published.x_vla):
    folder = make(tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    published.save_weights(folder, {key: values.contiguous() for key, values in weights.items()})
    return folder


def fill(value):
    def change(tensor):
        tensor.view(-1)[7] = value
        return tensor

    return change


DECODER = "vlm.language_model.model.decoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(QKV), rf"1 missing: \['{QKV}'\]"),
        (lambda w: w.update({QKV.replace("qkv", "vkq"): w.pop(QKV)}), r"1 missing: .*qkv.*1 unexpected: .*vkq"),
        (lambda w: put(w, QKV, lambda t: t.T), rf"1 of another shape: .*{QKV} is \[24, 72\].*\[72, 24\]"),
        (lambda w: put(w, QKV, fill(torch.nan)), rf"{QKV} has 1 numbers that are not finite"),
        (lambda w: w.update({DECODER: torch.ones(3)}), rf"1 unexpected: \['{DECODER}'\]"),
        (lambda w: w.pop(SHARED), rf"1 missing: \['{SHARED}'\]"),
        (lambda w: w.update({EMBED: w[SHARED] + 1}), rf"{EMBED} differs from {SHARED}"),
        (lambda w: w.pop("vlm.image_projection"), r"1 missing: \['vlm.image_projection'\]"),
        (lambda w: put(w, "vlm.image_projection", lambda t: t[:-1]), r"vlm.image_projection is \[31, 32\]"),
        (
            lambda w: put(w, "transformer.soft_prompt_hub.weight", lambda t: t[:-1]),
            r"soft_prompt_hub.weight is \[29, 72\], the configuration says \[30, 72\]",
        ),
        (lambda w: put(w, "transformer.pos_emb", lambda t: t[0]), r"pos_emb is \[96, 24\].*\[1, 96, 24\]"),
        (lambda w: w.pop("vlm.visual_temporal_embed.pos_idx_to_embed"), r"1 missing: .*pos_idx_to_embed"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_written(tmp_path, change, message):
    folder = damage(tmp_path, change)
    with pytest.raises(ValueError, match="(?s)" + message):
        convert(str(folder), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


def test_names_of_both_kinds_are_refused(tmp_path):
    def mix(weights):
        weights["model.vlm.language_model.model.encoder.layers.0.fc1.weight"] = torch.ones(40, 32)

    with pytest.raises(ValueError, match="(?s)missing: .*unexpected: "):
        convert(str(damage(tmp_path, mix, published.port)), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


def test_the_bias_of_the_decoder_is_kept(tmp_path):
    key = "vlm.language_model.final_logits_bias"
    folder = damage(tmp_path, lambda weights: put(weights, key, lambda t: t + 1))
    report = convert(str(folder), tmp_path / "output")
    assert "unused.safetensors" in report["source_keys"][key]["went_to"]
    export(tmp_path / "output", tmp_path / "back")
    assert (all_weights(tmp_path / "back")[key] == 1).all()


# --- config.json and the other files


def edit(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


VISION = ("florence_config", "vision_config")


def within(values, path, **changes):
    for name in path:
        values = values[name]
    values.update(changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(use_hetero_proj=True), "use_hetero_proj"),
        (
            lambda c: c.update(action_mode="so101_bimanual"),
            "action_mode so101_bimanual; known: ee6d, agibot_ee6d, joint",
        ),
        (lambda c: c.update(depth=10**9), "depth 1000000000; it is a number from 1 to 1000"),
        (lambda c: within(c, VISION, model_type="vit"), "vision tower 'vit'"),
        (lambda c: within(c, VISION, image_feature_source=["last_frame"]), r"image_feature_source \['last_frame'\]"),
        (lambda c: within(c, VISION, image_pos_embed={"type": "rope"}), "image_pos_embed .*rope"),
        (lambda c: within(c, ("florence_config", "text_config"), model_type="t5"), "text model 't5'"),
        (lambda c: c["florence_config"]["text_config"].pop("d_model"), "no d_model of the text model"),
        (lambda c: c.pop("florence_config"), "no vocab_size, d_model"),
        (lambda c: c.update(num_domains=29), r"another shape: .*\[30, 1152\].* \[29, 1152\]"),
        (lambda c: c.update(max_len_seq=64), r"pos_emb is \[1, 96, 24\]"),
    ],
)
def test_a_configuration_that_is_not_this_model_is_refused(tmp_path, change, message):
    folder = published.x_vla(tmp_path / "source")
    edit(folder, "config.json", change)
    with pytest.raises(ValueError, match="(?s)" + message):
        convert(str(folder), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", lambda c: within(c, ("normalization_mapping",), STATE="MEAN_STD"), "normalization_mapping"),
        ("config.json", lambda c: c.update(use_proprio=False), "use_proprio false"),
        ("config.json", lambda c: c.update(num_image_views=9), "are 95 tokens, the network has positions for 91"),
        (
            "policy_preprocessor.json",
            lambda c: c["steps"][-1]["config"]["norm_map"].update(ACTION="MIN_MAX"),
            "normalises {'ACTION': 'MIN_MAX'}",
        ),
    ],
)
def test_lerobots_files_that_say_something_else_are_refused(tmp_path, name, change, message):
    folder = published.port(tmp_path / "source")
    edit(folder, name, change)
    with pytest.raises(ValueError, match=message):
        convert(str(folder), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


def test_images_that_are_cropped_are_refused(tmp_path):
    folder = published.x_vla(tmp_path / "source")
    edit(folder, "preprocessor_config.json", lambda values: values.update(do_center_crop=True))
    with pytest.raises(ValueError, match="one square of each image"):
        convert(str(folder), tmp_path / "output")


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "2toINF/X-VLA-Pt"}))
    with pytest.raises(ValueError, match="LoRA adapter of 2toINF/X-VLA-Pt.*merge_and_unload"):
        convert(str(tmp_path), tmp_path / "output")


def test_action_tokens_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="its own vocabulary"):
        convert(str(source), tmp_path / "output", Options(action_tokens=8))


def test_tokenizer_of_another_folder(tmp_path, monkeypatch):
    """LeRobot's repositories have none, only a name."""
    words = tmp_path / "words"
    published.tokenizer().save_pretrained(words)
    asked = []
    monkeypatch.setattr(x_vla_robots, "locate", lambda source, patterns: asked.append((source, patterns)) or words)
    source = published.port(tmp_path / "source", tokens=False)
    convert(str(source), tmp_path / "named")
    convert(str(source), tmp_path / "given", Options(tokenizer=str(words)))
    assert [name for name, _ in asked] == ["a/tokenizer", str(words)]
    assert not any(pattern.endswith("safetensors") for _, patterns in asked for pattern in patterns)
    for name in ("named", "given"):
        tokenizer = BartTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.convert_tokens_to_ids("<image>") == len(published.tokenizer())


# --- what the folder is


def test_configuration(converted):
    config = WallVLAConfig.from_pretrained(converted)
    assert config.domains[:4] == ["Bridge", "RT1", "Calvin", "libero"] and len(config.domains) == 30
    assert (config.action_dim, config.action_horizon, config.state_dim) == (20, 5, 20)
    assert (config.sampler, config.time_sampler, config.prediction) == ("renoise", "stratified", "action")
    assert list(config.binary_channels) == [9, 19] and config.language_tokens == 50
    expert = config.action_expert
    assert (expert.num_soft_prompts, expert.time_dim, expert.intermediate_size) == (3, 8, 48)
    assert config.vlm_config.vision_config.embed_dim == [16, 32]
    assert config.vlm_config.image_token_id == len(published.tokenizer())


def test_published_domains():
    """`DATA_DOMAIN_ID` and the handlers of the public code: place, seconds, arms, rotations."""
    names = x_vla_robots.domain_names(30, False)
    places = {"Bridge": 0, "libero": 3, "AIR-AGILEX-HQ": 5, "VLABench": 8, "AGIBOT-challenge": 9, "AIR-AGILEX": 10}
    places |= {"robomind-franka": 11, "robomind-ur": 12, "Droid-Left": 13, "Droid-Right": 14, "AGIBOT": 15}
    places |= {"robomind-agilex": 16, "robomind-franka-dual": 17, "AIRBOT": 18, "agiworld-pack": 20}
    assert {name: names.index(name) for name in places} == places and len(set(names)) == 30
    seconds = {"Bridge": 5, "RT1": 10, "Calvin": 1, "libero": 1, "AIR-AGILEX-HQ": 2, "Droid-Left": 4, "AGIBOT": 4}
    robots = {robot.domain: robot for robot in x_vla_robots.ROBOTS}
    for name, duration in seconds.items():
        robot = x_vla_robots.embodiment_of(robots[name], names, 30)
        assert robot.control_frequency == 30 / duration and robot.domain == names.index(name)
        assert robot.model_rot6d == ("columns" if name == "libero" else "interleaved")
    assert {name for name, robot in robots.items() if robot.arms == 2} == {
        *("AIR-AGILEX-HQ", "robotwin2", "AGIBOT-challenge", "AGIBOT"),
        *("robomind-agilex", "robomind-franka-dual"),
    }
    assert x_vla_robots.domain_names(4, False) == ["domain_0", "domain_1", "domain_2", "domain_3"]
    assert x_vla_robots.domain_names(30, True)[:2] == ["agiworld-challenge", "RT1"]


def test_robots_pass_the_published_numbers_through(converted):
    """Two arms, a rotation as `R[:, :2].reshape(6)`, grippers where 1 is closed: the model sees what the data has."""
    processor, rng = load_processor(converted), np.random.default_rng(0)
    rotations = axis_angle_to_matrix(rng.normal(size=(6, 2, 3)))  # a state and five anchors of two arms
    arms = [
        np.concatenate([rng.normal(size=(6, 3)), rotations[:, arm, :, :2].reshape(6, 6), [[1.0]] * 6], axis=1)
        for arm in (0, 1)
    ]
    rows = np.concatenate(arms, axis=1)
    robot = processor.embodiments["robotwin2"]
    images = {key: np.zeros((32, 32, 3), dtype=np.uint8) for key in robot.cameras}
    batch = processor(images, "stack", state=rows[0], actions=rows[1:], embodiment="robotwin2")
    np.testing.assert_allclose(batch["states"][0], rows[0], atol=1e-6)
    np.testing.assert_allclose(batch["actions"][0], rows[1:], atol=1e-6)
    assert batch["domain_ids"].tolist() == [6] and batch["action_mask"].all()
    np.testing.assert_allclose(
        processor.decode_actions(batch["actions"], embodiment="robotwin2")[0], rows[1:], atol=1e-6
    )
    one = processor({"image": images[next(iter(images))]}, "stack", state=rows[0, :10], embodiment="Bridge")
    np.testing.assert_allclose(one["states"][0], [*rows[0, :10], *[0] * 10], atol=1e-6)


def test_lerobots_robot(tmp_path):
    """Its domain, and its cameras under the names of the dataset."""
    report = convert(str(published.port(tmp_path / "source")), tmp_path / "output")
    robot = load_processor(tmp_path / "output").embodiments["libero"]
    assert list(robot.cameras) == ["observation.images.top", "observation.images.image2"] and robot.domain == 3
    assert any("domain 3 (libero)" in note for note in report["notes"])
    config = WallVLAConfig.from_pretrained(tmp_path / "output")
    assert config.num_inference_steps == 7 and config.language_tokens == 50


@pytest.mark.parametrize("mode", ["joint", "auto"])
def test_robot_of_plain_numbers(tmp_path, mode):
    changes = {"resize_imgs_with_padding": [32, 32]}
    if mode == "auto":
        changes |= {"output_features": {"action": {"type": "ACTION", "shape": [7]}}}
    report = convert(str(published.port(tmp_path / "source", mode, domain=20, **changes)), tmp_path / "output")
    robot = load_processor(tmp_path / "output").embodiments["robot"]
    assert robot.action_layout == (("native", 7 if mode == "auto" else 14),) and robot.domain == 20
    assert robot.state_layout == (("native", 8),)
    assert any("resize_imgs_with_padding" in note for note in report["notes"])
    weights = WallVLAConfig.from_pretrained(tmp_path / "output").loss_channel_weights
    assert sum(weights) == pytest.approx(1.0 if mode == "auto" else 1.1) and len(weights) == published.CHANNELS[mode]


def test_chosen_and_described_robots(source, converted, tmp_path):
    robot = load_processor(converted).embodiments["libero"].to_dict() | {"domain": 4}
    (tmp_path / "robot.json").write_text(json.dumps(robot))
    given = ["Bridge", f"widowx-air={tmp_path / 'robot.json'}"]
    convert(str(source), tmp_path / "output", Options(embodiment=given))
    robots = load_processor(tmp_path / "output").embodiments
    assert list(robots) == ["Bridge", "widowx-air"] and robots["widowx-air"].domain == 4
    with pytest.raises(ValueError, match="--embodiment nobody.*Bridge"):
        convert(str(source), tmp_path / "other", Options(embodiment=["nobody"]))


def test_inspect(source, converted, capsys):
    result = inspect(str(source))
    assert result["family"] == "x-vla" and result["parameters"] == sum(v.numel() for v in published.weights().values())
    assert (result["action_dim"], result["action_horizon"], result["domains"]) == (20, 5, 30)
    assert result["embedding_rows"] == published.VOCABULARY
    sizes = result["parts"]
    assert sizes["soft prompts"] == 30 * 3 * 24 and sizes["action heads"] == 30 * (48 * 24 + 24 + 24 * 20 + 20)
    assert "action mode ee6d; 30 domains, 3 soft prompts" in inspection_text(result)
    assert inspect(str(converted))["action_dim"] == 20
    cli.main(["inspect", str(converted)])
    assert "embodiment libero: front view, wrist view; 5 steps at 5.0 Hz" in capsys.readouterr().out


def test_at_full_size():
    """LeRobot's state dict has 603 + 300 tensors, the token embedding twice."""
    layout = x_vla.XVLALayout("model.", False, (x_vla.SHARED, x_vla.ENCODER_EMBEDDING))
    shapes = {entry.key: entry.shape for entry in x_vla.entries(WallVLAConfig.x_vla(), layout)}
    assert sum(key.startswith("model.vlm.") for key in shapes) == 603
    assert sum(key.startswith("model.transformer.") for key in shapes) == 300 and len(shapes) == 903
    assert shapes["model.transformer.action_encoder.fc.weight"] == (30, 73728)
    assert shapes["model.transformer.soft_prompt_hub.weight"] == (30, 32768)
    assert shapes["model.transformer.pos_emb"] == (1, 512, 1024)
    assert shapes["model.vlm.multi_modal_projector.image_projection.weight"] == (1024, 2048)
    assert shapes["model.vlm.language_model.encoder.embed_positions.weight"] == (4098, 1024)
    theirs = {entry.key: entry.shape for entry in x_vla.entries(WallVLAConfig.x_vla(), x_vla.XVLALayout())}
    assert theirs["vlm.image_projection"] == (2048, 1024) and len(theirs) == 902


LOAD = """
import sys
sys.modules["wallvla"] = None
from transformers import AutoModel, AutoProcessor
import numpy as np, torch
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
pictures = {"image": np.zeros((40, 60, 3), dtype=np.uint8)}
state = [0.1, 0.2, 0.3, 1, 0, 0, 1, 0, 0, 1]
inputs = processor(pictures, "pick up", state, embodiment="Bridge")
actions = model.sample_actions(**inputs, generator=torch.Generator().manual_seed(0))
print(processor.decode_actions(actions, embodiment="Bridge").shape)
"""


def test_a_fresh_process_loads_it(converted, tmp_path):
    assert printed_by(LOAD, converted, tmp_path) == "(1, 5, 10)"
