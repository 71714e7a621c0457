"""`convert`, `export`, `inspect`: every tensor accounted for, both ways, or an error that names it and no output."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import published
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from wallvla import cli
from wallvla.action_space_wallvla import normalize, unnormalize
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.conversion import Options, convert, converter, export, inspect, inspection_text
from wallvla.conversion.exporter import load_processor
from wallvla.conversion.tensor_files import read_header, read_headers
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration


QKV = "model.layers.1.self_attn.qkv_proj_experts.1.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return published.wall_oss_05(tmp_path_factory.mktemp("published") / "wall-oss-0.5", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def converted(source):
    convert(str(source), source.parent / "output")
    return source.parent / "output"


def all_weights(folder):
    return {key: values for file in folder.glob("model*.safetensors") for key, values in load_file(file).items()}


def assert_same_bytes(found, wanted):
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].dtype == values.dtype and found[key].shape == values.shape, key
        assert torch.equal(found[key].view(torch.uint8), values.view(torch.uint8)), key


def nothing_written(output):
    return not output.exists() and not output.with_name(output.name + ".partial").exists()


# --- there and back


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"vision_fused": False},
        {"vision_width": 20},
        {"vision_fused": False, "vision_width": 20},
        {"fused": False},
        {"files": 3},
        {"in_weights": False},
        {"in_files": False},
    ],
    ids=str,
)
def test_there_and_back_is_the_same_to_the_byte(tmp_path, layout):
    source = published.wall_oss_05(tmp_path / "source", dtype=torch.bfloat16, **layout)
    convert(str(source), tmp_path / "output", Options(max_shard_size=100_000))
    assert len(list((tmp_path / "output").glob("model-*.safetensors"))) > 1
    export(tmp_path / "output", tmp_path / "back")
    assert_same_bytes(all_weights(tmp_path / "back"), all_weights(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    for path in source.glob("*.pth"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_what_was_exported_converts_again(converted, tmp_path):
    export(converted, tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again")
    assert_same_bytes(all_weights(tmp_path / "again"), all_weights(converted))


def test_a_model_that_never_was_published_goes_there_and_back(converted, tmp_path):
    """Without report and published files: config.json, tables and config.yml are written from what the model is."""
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for path in converted.iterdir():
        if path.is_file() and not path.name.startswith("conversion_report"):
            (fresh / path.name).write_bytes(path.read_bytes())
    export(fresh, tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again")
    assert_same_bytes(all_weights(tmp_path / "again"), all_weights(converted))
    old, new = (WallVLAConfig.from_pretrained(folder).to_dict() for folder in (converted, tmp_path / "again"))
    assert {name for name in old if old[name] != new[name]} <= {"vlm_config"}  # fields of the text model that are off
    robots = [load_processor(folder).embodiments["x2_normal"] for folder in (converted, tmp_path / "again")]
    for kind in ("state", "action"):
        for name in ("q01", "q99"):
            np.testing.assert_allclose(*(r.statistics[kind][name] for r in robots), atol=1e-6)


def test_dtype_casts_all_but_norms_and_heads(source, tmp_path):
    convert(str(source), tmp_path / "output", Options(dtype="float32"))
    assert {values.dtype for values in all_weights(tmp_path / "output").values()} == {torch.float32}
    full = published.wall_oss_05(tmp_path / "full")
    convert(str(full), tmp_path / "half", Options(dtype="bfloat16"))
    exact = {name for name, values in all_weights(tmp_path / "half").items() if values.dtype == torch.float32}
    model = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert exact == {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert len(exact) == 2 * 2 * 2 + 2 + 4  # two norms of each layer of each expert, the last ones, the heads


# --- one tensor is wrong


def damage(source, tmp_path, change):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({key: values.contiguous() for key, values in weights.items()}, folder / "model.safetensors")
    return folder


def put(weights, key, change):
    weights[key] = change(weights[key].clone())


def fill(value):
    def change(tensor):
        tensor.view(-1)[7] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(QKV), rf"1 missing: \['{QKV}'\]"),
        (lambda w: w.update({QKV.replace("qkv", "vkq"): w.pop(QKV)}), r"1 missing: .*qkv.*1 unexpected: .*vkq"),
        (lambda w: put(w, QKV, lambda t: t.T), rf"1 of another shape: .*{QKV} is \[32, 128\].*\[128, 32\]"),
        (lambda w: put(w, QKV, lambda t: t[:-1]), rf"{QKV} is \[127, 32\]"),
        (lambda w: put(w, QKV, fill(torch.nan)), rf"{QKV} has 1 numbers that are not finite"),
        (lambda w: put(w, QKV, fill(-torch.inf)), rf"{QKV} has 1 numbers that are not finite"),
        (lambda w: w.update({"model.norms.2.weight": torch.ones(3)}), r"1 unexpected: \['model.norms.2.weight'\]"),
        (
            lambda w: put(w, "visual.blocks.1.mlp.down_proj.weight", lambda t: t + 1),
            r"visual.blocks.1.mlp.down_proj.weight .*numbers of the padding are not zero",
        ),
        (
            lambda w: put(w, "model.embed_tokens.weight", lambda t: t[:50]),
            r"tokenizer has \d+ tokens, the embedding 50 rows",
        ),
        (lambda w: w.pop("model.embed_tokens.weight"), r"no model.embed_tokens.weight"),
        (
            lambda w: w.pop("action_preprocessor.normalizer_action.min.x2_normal"),
            r"normaliser action of 'x2_normal' in the weights has only delta",
        ),
        (
            lambda w: put(w, "action_preprocessor.normalizer_action.min.x2_normal", lambda t: t + 1),
            r"normaliser action of 'x2_normal' differs .*--tables",
        ),
        (lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}), r"lm_head.weight differs from"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_written(source, tmp_path, change, message):
    folder = damage(source, tmp_path, change)
    with pytest.raises(ValueError, match="(?s)" + message):
        convert(str(folder), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


def test_a_truncated_file_is_named(source, tmp_path):
    folder = damage(source, tmp_path, lambda weights: None)
    path = folder / "model.safetensors"
    last = max(read_header(path), key=lambda name: list(read_header(path)).index(name))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{last} .*truncated"):
        convert(str(folder), tmp_path / "output")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="model.safetensors has 100 bytes .*truncated"):
        convert(str(folder), tmp_path / "output")
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}" * 100)  # never allocate what a header asks for
    with pytest.raises(ValueError, match=f"a header of {1 << 40}"):
        convert(str(folder), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"a .*shape \[2\].*8 bytes"),
        ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, "a .*dtype I8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a .*bytes 4 to 8"),
        ({"a": {"dtype": "F32"}}, "a .*no dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes after its last tensor"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, header, message):
    encoded = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * 8)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_index_and_files_must_agree(tmp_path):
    source = published.wall_oss_05(tmp_path / "source", files=3)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = content["weight_map"][QKV]
    content["weight_map"][QKV] = next(name for name in content["weight_map"].values() if name != moved)
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)1 keys are not where the index says.*{QKV}"):
        read_headers(source)
    (source / moved).unlink()
    with pytest.raises(ValueError, match=f"names the file {moved}, which is not"):
        convert(str(source), tmp_path / "output")


def test_a_pickle_that_runs_code_is_refused(source, tmp_path):
    folder = damage(source, tmp_path, lambda weights: None)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (folder / "normalizer_action.pth").write_bytes(pickle.dumps({"min.x2_normal": Evil()}))
    with pytest.raises(ValueError, match="normalizer_action.pth is not a table of tensors"):
        convert(str(folder), tmp_path / "output")
    assert not (tmp_path / "owned").exists() and nothing_written(tmp_path / "output")


def test_tables_that_disagree_can_be_chosen(source, tmp_path):
    key = "action_preprocessor.normalizer_action.min.x2_normal"
    folder = damage(source, tmp_path, lambda weights: put(weights, key, lambda t: t - 0.5))
    weights = load_file(folder / "model.safetensors")[key]
    files = torch.load(folder / "normalizer_action.pth", weights_only=True)["min.x2_normal"]
    for choice, wanted in (("weights", weights), ("files", files)):
        convert(str(folder), tmp_path / choice, Options(tables=choice))
        robot = load_processor(tmp_path / choice).embodiments["x2_normal"]
        np.testing.assert_allclose(robot.statistics["action"]["q01"], wanted.double().numpy())


# --- interruptions


def test_an_interrupted_conversion_goes_on(source, converted, tmp_path, monkeypatch):
    options, output = Options(max_shard_size=60_000), tmp_path / "output"
    real, calls = converter.write_tensors, []

    def interrupted(path, infos, tensors):
        if path.name.startswith("model-"):
            calls.append(path.name)
            if len(calls) == 3:
                next(iter(tensors))
                raise KeyboardInterrupt
        return real(path, infos, tensors)

    monkeypatch.setattr(converter, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), output, options)
    partial = tmp_path / "output.partial"
    assert not output.exists() and len(list(partial.glob("model-*.safetensors"))) == 2
    convert(str(source), output, options)
    assert calls[2] == calls[3] and len(set(calls)) == len(calls) - 1, "two shards were not written again"
    assert_same_bytes(all_weights(output), all_weights(converted))
    assert not partial.exists() and not list(output.glob("*.crc.json")) and not list(output.glob("*unfinished"))


def test_leftovers_of_another_conversion_are_not_used(source, converted, tmp_path, monkeypatch):
    partial = tmp_path / "output.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"old")
    (partial / "model.safetensors.crc.json").write_text("{}")
    (partial / "fingerprint").write_text("other")
    convert(str(source), tmp_path / "output")
    assert_same_bytes(all_weights(tmp_path / "output"), all_weights(converted))
    with pytest.raises(ValueError, match="output exists"):
        convert(str(source), tmp_path / "output")


def test_a_disk_that_forgets_is_noticed(source, tmp_path, monkeypatch):
    real = converter.write_tensors

    def forgetful(path, infos, tensors):
        checksums = real(path, infos, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return checksums

    monkeypatch.setattr(converter, "write_tensors", forgetful)
    with pytest.raises(OSError, match="is not what was written"):
        convert(str(source), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_too_little_space_is_said_before_writing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="0.0 GB free"):
        convert(str(source), tmp_path / "output")


# --- the report, the repository, the robots


def test_the_report_has_both_directions(source, converted):
    report = json.loads((converted / "conversion_report.json").read_text())
    assert set(report["source_keys"]) == set(load_file(source / "model.safetensors"))
    assert set(report["parameters"]) == set(all_weights(converted))
    went = report["source_keys"][QKV]["went_to"]
    names = [f"action_expert.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv"]
    assert [(piece["parameter"], piece["first_row"]) for piece in went] == list(zip(names, (0, 64, 96), strict=True))
    came = report["parameters"][names[1]]["came_from"]
    assert came == {"key": QKV, "first_row": 64, "rows": 32}
    text = (converted / "conversion_report.txt").read_text()
    assert all(name in text for name in [*report["source_keys"], *report["parameters"]])
    assert "state_bins 512" in text and "vocab_size" in text


LOAD = """
import sys
sys.modules["wallvla"] = None
from transformers import AutoModel, AutoProcessor
import numpy as np, torch
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = np.zeros((40, 60, 3), dtype=np.uint8)
robot = processor.embodiments["x2_normal"]
inputs = processor(images={key: image for key in robot.cameras}, instruction="pick up the red cube",
                   state=np.zeros(26), embodiment="x2_normal")
chunk = model.sample_actions(**inputs, generator=torch.Generator().manual_seed(0))
print(processor.decode_actions(chunk, embodiment="x2_normal").shape)
"""


def printed_by(script, folder, tmp_path):
    """The last line of a script that runs in a fresh process, without this package, on a folder."""
    command = [sys.executable, "-P", "-c", script, str(folder)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_output_is_a_complete_hub_repository(converted, tmp_path):
    assert printed_by(LOAD, converted, tmp_path) == "(1, 6, 26)"


def test_robots_normalise_as_upstream_does(source, converted):
    tables = torch.load(source / "normalizer_action.pth", weights_only=True)
    robot = load_processor(converted).embodiments["arx/5.v1"]
    low, delta = tables["min.arx/5.v1"].double(), tables["delta.arx/5.v1"].double()
    delta = torch.where(delta == 0, 1.0, delta)  # channel 3
    values = torch.randn(5, 26, generator=torch.Generator().manual_seed(0)).double()
    # Rotations would be orthonormalised on the way, so the statistics are compared, not a decoded chunk
    wanted = ((values - low) / delta * 2 - 1).clamp(-1, 1)
    np.testing.assert_allclose(normalize(values, robot.statistics["action"]), wanted, atol=1e-12)
    np.testing.assert_allclose(
        unnormalize(wanted, robot.statistics["action"]), (wanted + 1) / 2 * delta + low, atol=1e-12
    )


def test_channels_that_a_robot_lacks_are_its_normalised_zero(source, tmp_path):
    """In the prompt and in the action: (0 - min) / delta * 2 - 1, clamped, of the table of that very robot."""
    arm = {
        "cameras": {"observation.images.face_view": "front view"},
        "control_frequency": 6,
        "action_horizon": 5,
        "state_layout": [["right_ee_position", 3], ["right_gripper", 1]],
        "action_layout": [["right_ee_position", 3], ["right_gripper", 1]],
    }
    (tmp_path / "arm.json").write_text(json.dumps(arm))
    options = Options(embodiment=["x2_normal", f"arx/5.v1={tmp_path / 'arm.json'}"])
    report = convert(str(source), tmp_path / "output", options)
    assert report["embodiments"] == ["x2_normal", "arx/5.v1"]
    processor = load_processor(tmp_path / "output")
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    views = list(processor.embodiments["x2_normal"].cameras)
    states = np.zeros((2, 26))
    states[0, [3, 7, 13, 17]] = 1  # a robot that has rotations has valid ones
    batch = processor(
        images=[dict.fromkeys(views, image), {"face_view": image}],
        instruction=["pick up", "place it"],
        state=[states[0], np.zeros(4)],
        embodiment=["x2_normal", "arx/5.v1"],
    )
    for row, name in enumerate(["x2_normal", "arx/5.v1"]):
        for kind, batch_key in (("action", "action_padding"), ("propri", None)):
            table = torch.load(source / f"normalizer_{kind}.pth", weights_only=True)
            low, delta = table[f"min.{name}"].double(), table[f"delta.{name}"].double()
            delta = torch.where(delta == 0, 1.0, delta)
            if batch_key:
                zero = ((0 - low) / delta * 2 - 1).clamp(-1, 1)
                torch.testing.assert_close(batch[batch_key][row].double(), zero, atol=1e-6, rtol=0)
            else:
                values = ((torch.tensor(states[row]) - low) / delta * 2 - 1).clamp(-1, 1)
                bins = np.digitize(values.numpy(), np.linspace(-1, 1, 513)[:-1]) - 1
                text = processor.tokenizer.decode(batch["input_ids"][row])
                assert f"Proprioception: {' '.join(map(str, bins))}\n" in text
    assert batch["action_mask"][0].all() and batch["action_mask"][1].sum() == 5 * 4
    with pytest.raises(ValueError, match="no table of that name. It has x2_normal, arx/5.v1"):
        convert(str(source), tmp_path / "other", Options(embodiment=["franka"]))


def test_config_yml_names_layout_cameras_and_sizes(tmp_path):
    recipe = """
task:
  dof_config:
    {master_right_ee_cartesian_pos: 3, master_right_ee_rotation: 3, master_right_gripper: 1, action_padding: 19}
  agent_pos_config:
    {follow_right_ee_cartesian_pos: 3, follow_right_ee_rotation: 3, follow_right_gripper: 2, action_padding: 18}
data:
  resolution: {face_view: 256, right_wrist_view: 256}
  state_bins: 256
  key_mappings:
    camera: {observation.images.faceImg: face_view, observation.images.rightImg: right_wrist_view}
"""
    source = published.wall_oss_05(tmp_path / "source", recipe=recipe)
    convert(str(source), tmp_path / "output")
    processor = load_processor(tmp_path / "output")
    robot = processor.embodiments["x2_normal"]
    assert (processor.longest_side, processor.state_bins, processor.state_dim) == (256, 256, 26)
    assert robot.action_layout == (("native", 7),) and robot.state_layout == (("native", 8),)
    assert robot.cameras == {
        "observation.images.faceImg": "front view",
        "observation.images.rightImg": "right wrist view",
    }
    assert (tmp_path / "output" / "published" / "config.yml").read_text() == recipe


# --- the other families


def test_lerobots_port(source, tmp_path):
    folder = damage(source, tmp_path, lambda weights: None)
    settings = json.loads((folder / "config.json").read_text())
    cameras = {"observation.images.top": "face_view", "observation.images.wrist": "left_wrist_view"}
    port = {"type": "wall_oss_05", "chunk_size": 4, "camera_key_mapping": cameras, "vlm_config": settings}
    del settings["action_horizon_flow"]
    for path in folder.glob("*.pth"):
        path.unlink()
    weights = {
        f"model.{key}": values
        for key, values in load_file(folder / "model.safetensors").items()
        if ".normalizer_" not in key
    }
    save_file(weights, folder / "model.safetensors")
    quantiles = {
        f"{name}.{q}": torch.full((26,), v)
        for name in ("action", "observation.state")
        for q, v in (("q01", -0.5), ("q99", 1.5))
    }
    save_file(
        quantiles | {"action.count": torch.tensor([5])},
        folder / "policy_preprocessor_step_5_normalizer_processor.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(port))
    convert(str(folder), tmp_path / "output")
    processor = load_processor(tmp_path / "output")
    robot = processor.embodiments["lerobot"]
    assert processor.action_horizon == 4 and robot.statistics["action"]["q99"] == [1.5] * 26
    assert robot.cameras == {"observation.images.top": "front view", "observation.images.wrist": "left wrist view"}
    export(tmp_path / "output", tmp_path / "back")
    back = all_weights(tmp_path / "back")
    assert_same_bytes({key: back[key] for key in weights}, weights)


@pytest.mark.parametrize("new_names", [False, True])
def test_a_bare_qwen_gets_an_action_expert(tmp_path, new_names):
    tokens = published.tokenizer(action_tokens=0)
    rows = len(tokens) + 3
    weights = published.qwen_weights(rows, new_names=new_names)
    settings = {name: value for name, value in published.config(tokens).items() if name != "experts"}
    source = published.write(tmp_path / "source", weights, settings, tokens)
    convert(str(source), tmp_path / "output", Options(action_tokens=32, seed=5))
    config = WallVLAConfig.from_pretrained(tmp_path / "output")
    processor = load_processor(tmp_path / "output")
    assert (config.num_action_tokens, config.action_token_start_id) == (32, len(tokens) + 2)
    assert processor.tokenizer.convert_tokens_to_ids("<|action_token_31|>") == len(tokens) + 33
    table = config.vlm_config.text_config.vocab_size
    assert table == -(-len(processor.tokenizer) // 64) * 64
    model = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "output", dtype=torch.float32)
    stock = Qwen2_5_VLForConditionalGeneration(config.vlm_config)
    embedding = next(values for key, values in weights.items() if key.endswith("embed_tokens.weight"))
    assert torch.equal(model.get_input_embeddings().weight[:rows], embedding)
    extra = model.get_input_embeddings().weight[rows:]
    assert 0.01 < extra.std() < 0.03
    plain = {key.removeprefix("model."): v for key, v in weights.items()}
    names = {name.removeprefix("model.") for name, _ in stock.named_parameters()}
    for key, values in plain.items():
        name = key if key.startswith(("visual.", "language_model.")) else f"language_model.{key}"
        assert name in names
        if "embed_tokens" not in key:
            assert torch.equal(model.vlm.model.get_parameter(name), values), key
    expert = dict(model.action_expert.named_parameters())
    assert all((p == 1).all() for name, p in expert.items() if "norm" in name)
    assert all(0.015 < p.std() < 0.025 for name, p in expert.items() if p.ndim == 2)
    convert(str(source), tmp_path / "again", Options(action_tokens=32, seed=5, max_shard_size=50_000))
    assert_same_bytes(all_weights(tmp_path / "again"), all_weights(tmp_path / "output"))
    damaged = damage(source, tmp_path, lambda w: w.pop(next(key for key in w if key.endswith("1.mlp.up_proj.weight"))))
    with pytest.raises(ValueError, match="1 missing: .*layers.1.mlp.up_proj.weight"):
        convert(str(damaged), tmp_path / "damaged_output")


def test_a_qwen_with_a_head_of_its_own(tmp_path):
    """As the 7B has it; here both tables grow."""
    tokens = published.tokenizer(action_tokens=0)
    weights = published.qwen_weights(len(tokens))
    weights["lm_head.weight"] = published.Draw(9)(len(tokens), published.HIDDEN)
    settings = published.config(tokens, tie_word_embeddings=False)
    source = published.write(tmp_path / "source", weights, settings, tokens)
    convert(str(source), tmp_path / "output", Options(dtype="bfloat16"))
    model = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "output", dtype="auto")
    head = model.vlm.lm_head.weight
    assert head.shape[0] > len(tokens) and head is not model.get_input_embeddings().weight
    assert torch.equal(head[: len(tokens)], weights["lm_head.weight"].bfloat16())
    heads = {name for name, values in all_weights(tmp_path / "output").items() if values.dtype == torch.float32}
    assert heads == {
        f"action_expert.action_{name}.weight" for name in ("in_proj", "time_mlp_in", "time_mlp_out", "out_proj")
    }
    export(tmp_path / "output", tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again")
    assert_same_bytes(all_weights(tmp_path / "again"), all_weights(tmp_path / "output"))


def test_wall_oss_flow_01_with_a_projected_state(tmp_path):
    """Unfused, 20 channels, and proprioception through a projection that is narrower than the network."""
    tokens = published.tokenizer(action_tokens=0)
    weights = published.wall_weights(
        len(tokens) + 2, fused=False, vision_fused=False, vision_width=20, action_dim=20, state_rows=60
    )
    settings = published.config(tokens, state_hidden_size=60, flow_loss_weight=10.0)
    for name in ("action_horizon_flow", "use_state_string_representation", "use_x_loss", "ar_loss_weight"):
        del settings[name]
    source = published.write(tmp_path / "source", weights, settings, tokens, published.tables(("umi",), 20))
    convert(str(source), tmp_path / "output")
    config = WallVLAConfig.from_pretrained(tmp_path / "output")
    assert (config.action_dim, config.proprioception, config.state_dim, config.loss_space) == (
        20,
        "projected",
        20,
        "velocity",
    )
    model = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "output", dtype=torch.float32)
    processor = load_processor(tmp_path / "output")
    assert processor.embodiments["umi"].action_layout == (("native", 20),)
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    views = processor.embodiments["umi"].cameras
    state = np.linspace(-1, 1, 20)
    batch = processor(images=dict.fromkeys(views, image), instruction="pick up", state=state, embodiment="umi")
    here = batch["input_ids"] == config.state_token_id
    assert here.sum() == 1 and batch["state_mask"].all() and batch["states"].shape == (1, 20)

    captured = []
    layer = model.vlm.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with torch.no_grad():
        model.sample_actions(**batch)
    table = torch.load(source / "normalizer_propri.pth", weights_only=True)
    low, delta = table["min.umi"], table["delta.umi"]
    values = ((torch.tensor(state) - low) / torch.where(delta == 0, 1.0, delta) * 2 - 1).clamp(-1, 1).float()
    wanted = torch.cat([values, torch.ones(20)]) @ weights["action_preprocessor.propri_proj.weight"].T
    found = captured[0][here][0]
    torch.testing.assert_close(found[:60], wanted, atol=1e-5, rtol=1e-5)
    assert (found[60:] == 0).all()
    del batch["states"]
    with pytest.raises(ValueError, match="token for the state but there are no `states`"):
        model.sample_actions(**batch)
    export(tmp_path / "output", tmp_path / "back")
    assert_same_bytes(all_weights(tmp_path / "back"), all_weights(source))


def test_the_first_generation_is_refused_with_a_way_out(source, tmp_path):
    def shared(weights):
        for key in list(weights):
            if "_experts.1." in key or "norms.1." in key:
                del weights[key]
            elif "_experts.0." in key or "norms.0." in key:
                weights[key.replace("_experts.0.", ".").replace("norms.0.", "norm.")] = weights.pop(key)

    folder = damage(source, tmp_path, shared)
    with pytest.raises(ValueError, match="first-generation Wall-OSS .*wall-oss-0.5"):
        convert(str(folder), tmp_path / "output")
    assert "wall-oss-0.5" in inspection_text(inspect(str(folder)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_adarms": True}, "use_adarms"),
        ({"use_x_pred": True}, "use_x_pred"),
        ({"attention_moe": False}, "attention_moe false"),
        ({"noise_scheduler": {"time_shift": 3.0}}, "time_shift 3.0"),
        ({"dim_inputs": [64, 64]}, r"dim_inputs \[64, 64\]"),
        ({"rope_scaling": {"type": "yarn"}}, "multi-section rope"),
        ({"hidden_size": 128}, "hidden_size 128"),
        ({"num_hidden_layers": 3}, "14 missing: .*model.layers.2."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; it is a number from 1 to 1000"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(source, tmp_path, change, message):
    folder = damage(source, tmp_path, lambda weights: None)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        convert(str(folder), tmp_path / "output")
    assert nothing_written(tmp_path / "output")


def test_what_is_no_checkpoint_is_said(converted, tmp_path):
    with pytest.raises(ValueError, match="already in the layout"):
        convert(str(converted), tmp_path / "output")
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        convert(str(tmp_path / "nowhere"), tmp_path / "output")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        convert(str(tmp_path / "empty"), tmp_path / "output")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="0 safetensors files"):
        convert(str(tmp_path / "empty"), tmp_path / "output")
    save_file({"something.weight": torch.ones(2)}, tmp_path / "empty" / "model.safetensors")
    with pytest.raises(ValueError, match="None of the 1 keys is known"):
        convert(str(tmp_path / "empty"), tmp_path / "output")
    with pytest.raises(ValueError, match="no repository of this package"):
        export(tmp_path / "empty", tmp_path / "output")


def test_a_hub_id_is_resolved_in_the_cache(source, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--x-square-robot--wall-oss-0.5" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(source, target_is_directory=True)
    refs = tmp_path / "models--x-square-robot--wall-oss-0.5" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest; from wallvla.conversion import inspect; "
        "print(inspect('x-square-robot/wall-oss-0.5')['family'])"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    folder = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "wall-oss", done.stderr


# --- the commands


def test_the_commands(source, tmp_path, capsys):
    output, back = str(tmp_path / "output"), str(tmp_path / "back")
    cli.main(["convert", str(source), output, "--embodiment", "x2_normal", "--max-shard-size", "100KB"])
    assert "embodiments: x2_normal" in capsys.readouterr().out
    cli.main(["inspect", output])
    text = capsys.readouterr().out
    assert "wallvla" in text and "embodiment x2_normal" in text and "action expert" in text
    cli.main(["inspect", str(source), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "wall-oss" and found["action_dim"] == 26
    assert found["normalisers"]["action"] == ["arx/5.v1", "x2_normal"]
    cli.main(["export", output, back])
    assert_same_bytes(all_weights(tmp_path / "back"), all_weights(source))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(source), output])
    assert "output exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(source), output, "--max-shard-size", "4 apples"])


def test_inspect_reads_no_weights(source, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("safetensors.safe_open", forbidden)
    monkeypatch.setattr("wallvla.conversion.tensor_files.safe_open", forbidden)
    parts = inspect(str(source))["parts"]
    weights = load_file(source / "model.safetensors")
    assert sum(parts.values()) == sum(values.numel() for values in weights.values())


def test_two_resizes_are_not_one(converted):
    """The published way: uint8 between two resizes. What a single resize to the same size would change."""
    processor = load_processor(converted)
    processor.longest_side, processor.image_processor.patch_size = 448, 14
    processor.image_processor.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}
    noise = np.random.default_rng(0).integers(0, 256, (31, 54, 3), dtype=np.uint8)
    for size, first, last in (((848, 480), (448, 253), (448, 252)), ((640, 480), (448, 336), (448, 336))):
        picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        assert processor.resized_size(size) == last
        two = np.asarray(picture.resize(first).resize(last, Image.Resampling.BICUBIC)).astype(int)
        one = np.asarray(picture.resize(last, Image.Resampling.BICUBIC)).astype(int)
        assert np.array_equal(processor._resized(np.asarray(picture)), two)
        assert (np.abs(two - one).mean() > 0.01) == (first != last)
