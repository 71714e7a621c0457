"""A pretrained VLM and a new action expert as a repository: its weights are the VLM's, and it loads and acts."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prompts import LINES
from tiny import KIND_FIELDS, TINY_EXPERTS, TINY_VLMS
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BartTokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla import register_auto_classes
from wallvla.cli import main
from wallvla.conversion import composition
from wallvla.quickstart import QuickstartConfig, build_tokenizer


ROBOT = {
    "cameras": [["front", "ego"]],
    "control_frequency": 10.0,
    "action_horizon": 8,
    "state_layout": [["native", 4]],
    "action_layout": [["native", 4]],
    "normalization": "none",
}
CASES = [
    ("qwen_vla", "dit", "qwen3_5"),
    ("qwen_vla", "dit", "qwen2_5_vl"),
    ("mot_testbed", "mot", "internvl"),
    ("mot_testbed", "mot", "qwen3_vl"),
    ("x_vla", "soft_prompt", "florence2"),
]


def stock_folder(vlm: str, folder):
    """A tiny pretrained VLM with a tokenizer, as the Hub has them."""
    torch.manual_seed(0)
    values = json.loads(json.dumps(TINY_VLMS[vlm]))
    tokenizer = build_tokenizer(QuickstartConfig())
    if vlm == "florence2":
        tokenizer = BartTokenizer().train_new_from_iterator(LINES * 3, vocab_size=320, show_progress=False)
    values["text_config"]["vocab_size"] = len(tokenizer)  # and not a row more
    values["image_token_id"] = 7  # of another tokenizer
    config = AutoConfig.for_model(**values)
    stock = AutoModelForImageTextToText.from_config(config)
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if vlm.startswith("qwen"):
        size = {"shortest_edge": 16 * 16, "longest_edge": 512 * 512}
        Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=1, size=size).save_pretrained(folder)
    return stock


def make_small(monkeypatch, system: str, kind: str) -> None:
    """Lets a system have a tiny action expert."""
    whole = composition.SYSTEMS[system]
    small = {"action_expert": TINY_EXPERTS[kind], "action_dim": 4, "state_dim": 4, "action_horizon": 8}
    if kind == "soft_prompt":
        small |= {name: KIND_FIELDS[kind][name] for name in ("loss_channel_weights", "binary_channels")}

    def preset(**overrides):
        return whole.preset(**overrides, **small)

    monkeypatch.setitem(composition.SYSTEMS, system, dataclasses.replace(whole, preset=preset))


@pytest.mark.parametrize("system, kind, vlm", CASES)
def test_the_vlm_keeps_its_weights_and_the_whole_acts(system, kind, vlm, tmp_path, monkeypatch, capsys):
    stock = stock_folder(vlm, tmp_path / "vlm")
    make_small(monkeypatch, system, kind)
    (tmp_path / "robot.json").write_text(json.dumps(ROBOT))
    command = ["compose", str(tmp_path / "vlm"), str(tmp_path / "out"), "--system", system, "--dtype", "float32"]
    main([*command, "--embodiment", f"arm={tmp_path / 'robot.json'}"])
    register_auto_classes()
    model, processor = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModel, AutoProcessor))
    ours = {name.removeprefix("model."): value for name, value in model.vlm.state_dict().items()}
    for name, value in stock.state_dict().items():
        name = name.removeprefix("model.")
        if vlm == "florence2" and (name.startswith("language_model.decoder") or name == "lm_head.weight"):
            continue
        assert torch.equal(ours[name][: len(value)], value), name
    rows = model.get_input_embeddings().num_embeddings
    assert len(processor.tokenizer) <= rows or vlm == "florence2"  # whose image token needs no row
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    state = np.zeros(4)
    inputs = processor(images={"front": image}, instruction="press the button", state=state, embodiment="arm")
    if vlm in ("internvl", "florence2"):  # the published sides are larger than the tiny towers'
        assert inputs["pixel_values"].shape[-1] in (224, 448)
        return
    chunk = model.sample_actions(**inputs, generator=torch.Generator().manual_seed(0))
    assert processor.decode_actions(chunk[0], state, "arm").shape == (8, 4)
    with pytest.raises(SystemExit):
        main(command)
    assert "out exists: choose another folder" in capsys.readouterr().err


def drop_tensor(file, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_vlm_that_lacks_weights_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    """The framework would make them up at random, with a warning."""
    stock_folder("qwen3_vl", tmp_path / "vlm")
    make_small(monkeypatch, "qwen_vla", "dit")
    drop_tensor(tmp_path / "vlm" / "model.safetensors", "model.language_model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="lacks 1 parameters.*layers.1.mlp.up_proj.weight"):
        composition.compose(tmp_path / "vlm", tmp_path / "out", "qwen_vla")
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


def test_what_is_interrupted_is_not_there(tmp_path, monkeypatch):
    stock_folder("qwen3_vl", tmp_path / "vlm")
    make_small(monkeypatch, "qwen_vla", "dit")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(composition.WallVLAProcessor, "save_pretrained", interrupted)
        composition.compose(tmp_path / "vlm", tmp_path / "out", "qwen_vla")
    assert not (tmp_path / "out").exists()
    composition.compose(tmp_path / "vlm", tmp_path / "out", "qwen_vla")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "vlm"]


def test_a_vlm_that_does_not_fit_is_refused(tmp_path):
    stock_folder("internvl", tmp_path / "vlm")
    with pytest.raises(ValueError, match="is a internvl; qwen_vla takes qwen3_5"):
        composition.compose(tmp_path / "vlm", tmp_path / "out", "qwen_vla")
    assert not (tmp_path / "out").exists()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "vlm")) > 10
