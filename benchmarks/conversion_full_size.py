"""Converts a synthetic checkpoint of the published shapes and measures time and memory of each step.

    python benchmarks/conversion_full_size.py --folder /tmp/conversion
    python benchmarks/conversion_full_size.py --folder /tmp/conversion --model x-vla

Needs 25 GB of disk (X-VLA: 11 GB), removed at the end. The weights are random; shapes, dtypes, keys and padding are
those of the published checkpoint. Wall-OSS-0.5: 837 weights, 56 robots with normalisers, 155,765 embedding rows,
vision width 3456 for 3420. X-VLA: 903 tensors in float32 under its authors' names.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BartTokenizer, Qwen2Tokenizer

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.conversion import x_vla
from wallvla.conversion.layouts import WallLayout, wall_entries
from wallvla.conversion.tensor_files import DTYPES, TensorInfo, read_headers, read_tensor, write_tensors


ROWS, ROBOTS = 155_765, 56


def published_config() -> dict:
    """Fields of the published `config.json` that the converter reads."""
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "num_experts": 2,
        "experts": [
            {"hidden_size": 2048, "intermediate_size": 11008},
            {"hidden_size": 1024, "intermediate_size": 2048},
        ],
        "dim_inputs": [2048, 1024],
        "causal_action_attention_mask": True,
        "use_x_loss": True,
        "action_horizon_flow": 32,
    }


def write_x_vla(folder: Path) -> None:
    """The synthetic X-VLA, one tensor at a time."""
    folder.mkdir(parents=True)
    config, layout = WallVLAConfig.x_vla(), x_vla.XVLALayout()
    shapes = {entry.key: entry.shape for entry in x_vla.entries(config, layout)}
    shapes[layout.prefix + x_vla.LOGITS_BIAS] = (1, config.vlm_config.text_config.vocab_size)
    infos = {key: TensorInfo(Path(), "F32", shape) for key, shape in shapes.items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def tensors():
        for key, shape in shapes.items():
            count = torch.Size(shape).numel()
            yield key, noise.repeat(-(-count // len(noise)))[:count].reshape(shape)

    write_tensors(folder / "model.safetensors", infos, tensors())
    (folder / "config.json").write_text(json.dumps(x_vla.upstream_config(config)))
    tokenizer = BartTokenizer().train_new_from_iterator(["0123456789"], vocab_size=300, show_progress=False)
    tokenizer.save_pretrained(folder)


def write_wall_oss(folder: Path) -> None:
    """The synthetic Wall-OSS-0.5, one tensor at a time. Numbers repeat after 2^20, which makes no step faster."""
    folder.mkdir(parents=True)
    config = WallVLAConfig()
    config.vlm_config.text_config.vocab_size = ROWS
    entries = wall_entries(config, WallLayout(vision_width=3456))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    infos, pieces = {}, {}
    for entry in entries:
        exact = ("norm" in entry.key and "visual" not in entry.key) or entry.key.startswith("action_preprocessor.")
        infos[entry.key] = TensorInfo(Path(), "F32" if exact else "BF16", entry.shape)
        pieces[entry.key] = entry.pieces
    for kind in ("action", "propri"):
        for column in ("min", "delta"):
            for i in range(ROBOTS):
                infos[f"action_preprocessor.normalizer_{kind}.{column}.robot_{i}"] = TensorInfo(Path(), "F32", (26,))

    def tensors():
        for key, info in infos.items():
            dtype = DTYPES[info.dtype]
            count = torch.Size(info.shape).numel()
            tensor = noise.to(dtype).repeat(-(-count // len(noise)))[:count].reshape(info.shape)
            if key in pieces and sum(torch.Size(p.shape).numel() for p in pieces[key]) < count:
                padded = torch.zeros_like(tensor)
                for piece in pieces[key]:
                    here = (slice(piece.start, piece.start + piece.shape[0]), *map(slice, piece.shape[1:]))
                    padded[here] = tensor[here]
                tensor = padded
            yield key, tensor.abs() if "normalizer" in key else tensor

    write_tensors(folder / "model.safetensors", infos, tensors())
    (folder / "config.json").write_text(json.dumps(published_config()))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["0123456789"], vocab_size=300, show_progress=False)
    special = [f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)


def measured(*arguments: str) -> dict:
    """Runs a command of the package in a process of its own. Seconds and peak memory in GB, mapped files included."""
    code = "import resource, sys; from wallvla.cli import main; main(sys.argv[1:]); " + (
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak = int(done.stdout.splitlines()[-1].split()[1]) / 1e6
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak, 2)}


def equal(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same tensors, byte by byte."""
    found, wanted = read_headers(first), read_headers(second)
    return found.keys() == wanted.keys() and all(
        torch.equal(read_tensor(found[key], key).view(torch.uint8), read_tensor(info, key).view(torch.uint8))
        for key, info in wanted.items()
    )


SOURCES = {"wall-oss": write_wall_oss, "x-vla": write_x_vla}


def main() -> None:
    """Writes the synthetic checkpoint, measures, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="folder that does not exist yet")
    parser.add_argument("--model", choices=list(SOURCES), default="wall-oss")
    parser.add_argument("--max-shard-size", default="4GB")
    options = parser.parse_args()
    folder = Path(options.folder)
    source, output, back = folder / "source", folder / "output", folder / "back"
    try:
        SOURCES[options.model](source)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
        result = {"source_gb": round(size, 2), "max_shard_size": options.max_shard_size}
        result["inspect"] = measured("inspect", str(source))
        result["convert"] = measured("convert", str(source), str(output), "--max-shard-size", options.max_shard_size)
        result["export"] = measured("export", str(output), str(back))
        result["exported_equals_source"] = equal(back, source)
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
