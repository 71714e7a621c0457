"""`wallvla eval-grounding`: a checkpoint, and perhaps a baseline, on benchmarks of grounding and visual questions.

The baseline is any image-text-to-text model of transformers, such as the backbone that the checkpoint started from
(table 7 of Wall-OSS-0.5): both get the same questions in the same run.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from . import register_auto_classes
from .evaluation.grounding import Subject, evaluate_grounding, evaluate_questions
from .evaluation.grounding_benchmarks import BENCHMARKS, load_questions
from .evaluation.grounding_scenes import VARIANTS, altered_scenes
from .evaluation.grounding_subjects import CheckpointSubject, VLMSubject, chat_encoder
from .evaluation.metaworld import EVALUATION_SEED_START
from .grounding_wallvla import grounding_prompt
from .processing_wallvla import WallVLAProcessor


# Away from the scenes that the quickstart's own report looks at
FIRST_SEED = EVALUATION_SEED_START + 10_000
SIMULATOR = tuple(f"simulator/{variant}" for variant in VARIANTS)
SCENE_METRICS = ("point_in_object", "point_on_mask", "point_in_object_when_swapped")


@dataclass
class GroundingOptions:
    """What to evaluate.

    path: checkpoint folder or Hub id.
    benchmarks: names of `SIMULATOR`, or NAME=PATH with a name of `BENCHMARKS` and its local file or folder.
    baseline: another checkpoint, or any image-text-to-text model.
    baseline_scale: what stands for the full width in the baseline's coordinates, None for pixels after resizing.
    kind: "box" or "point", of the simulator's questions.
    tasks, scenes, image_size: of the simulator; scenes of each task.
    constrained: decode well-formed coordinates only (WallVLA checkpoints).
    limit: questions of each public benchmark, None for all.
    """

    path: str
    tasks: Sequence[str]
    benchmarks: Sequence[str] = SIMULATOR
    baseline: str | None = None
    baseline_scale: float | None = None
    kind: str = "box"
    scenes: int = 20
    image_size: int = 64
    constrained: bool = False
    limit: int | None = None
    batch_size: int = 16
    device: str = "cpu"
    trust_remote_code: bool = False
    files: dict[str, str] = field(init=False)

    def __post_init__(self):
        names = [benchmark.partition("=")[::2] for benchmark in self.benchmarks]
        for name, path in names:
            if name not in SIMULATOR and (name not in BENCHMARKS or not path):
                known = ", ".join([*SIMULATOR, *(f"{name}=PATH" for name in BENCHMARKS)])
                raise ValueError(f"Unknown benchmark {name!r}{'' if path else ' or no PATH'}. Known: {known}.")
        if self.scenes < 1:
            raise ValueError(f"scenes is {self.scenes}: it must be at least 1.")
        self.files = dict(names)


def load_subject(path: str, options: GroundingOptions) -> Subject:
    """A checkpoint of ours with its processor, or any other vision-language model."""
    if not options.trust_remote_code:
        register_auto_classes()
    remote = {"trust_remote_code": options.trust_remote_code}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    config = AutoConfig.from_pretrained(path, **remote)
    if config.model_type == "wallvla":
        model = AutoModel.from_pretrained(path, dtype=dtype, **remote).to(options.device)
        processor = AutoProcessor.from_pretrained(path, **remote)
        return CheckpointSubject(model, processor, options.constrained)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **remote).to(options.device)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        # Our prompt is Qwen's chat template, to the letter; its own processor needs torchvision for videos
        processor = WallVLAProcessor(
            AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path), longest_side=None
        )
        patch_size = processor.image_processor.patch_size

        def encode(images: list, texts: list[str]):
            return processor(images=images, text=texts, return_tensors="pt")
    else:
        processor, patch_size = AutoProcessor.from_pretrained(path, **remote), 14
        encode = chat_encoder(processor)

    def decode(tokens: torch.Tensor) -> list[str]:
        return processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return VLMSubject(model, encode, decode, grounding_prompt, options.baseline_scale, patch_size)


def evaluate_checkpoints(options: GroundingOptions, output: Path) -> dict:
    """Runs all benchmarks, writes `output`/results.json and returns what it holds.

    Returns:
        `results`: by benchmark and by subject ("checkpoint", "baseline") the report of `evaluate_grounding` or
        `evaluate_questions`; `seconds`: by benchmark and subject.
    """
    paths = {"checkpoint": options.path} | ({"baseline": options.baseline} if options.baseline else {})
    subjects = {name: load_subject(path, options) for name, path in paths.items()}
    results, seconds = {}, {}
    for benchmark, path in options.files.items():
        if benchmark in SIMULATOR:
            seeds = range(FIRST_SEED, FIRST_SEED + options.scenes)
            variant = benchmark.partition("/")[2]
            scenes = altered_scenes(options.tasks, seeds, variant, options.image_size)
            asked = [sample for scene in scenes for sample in scene]
        else:
            asked = load_questions(benchmark, path, options.limit)
        for name, subject in subjects.items():
            begun = time.perf_counter()
            if benchmark in SIMULATOR:
                report = evaluate_grounding(subject, asked, options.kind, options.batch_size)
            else:
                report = evaluate_questions(subject, asked, options.batch_size)
            results.setdefault(benchmark, {})[name] = report
            seconds.setdefault(benchmark, {})[name] = round(time.perf_counter() - begun, 1)
    written = {"models": paths, "results": results, "seconds": seconds}
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(written, indent=2) + "\n")
    return written


def format_results(results: dict) -> str:
    """A table: one line for each benchmark and metric, one column for each subject, with 95% intervals."""
    lines = []
    for benchmark, by_subject in results.items():
        reports = list(by_subject.values())
        count = reports[0]["samples" if benchmark in SIMULATOR else "questions"]
        rows: dict[str, list[str]] = {}
        for report in reports:
            metrics = {name: report[name] for name in SCENE_METRICS} if benchmark in SIMULATOR else report["metrics"]
            for name, value in metrics.items():
                cell = "-" if value is None else "{rate:.1%} [{low:.1%}, {high:.1%}]".format(**value)
                rows.setdefault(name, []).append(cell)
            for name in ("mean_iou", "iou_50", "malformed_rate", "refusal_rate"):
                if name in report:
                    rows.setdefault(name, []).append(f"{report[name]:.1%}")
        lines.append(f"{f'{benchmark}, {count} questions':<40}" + "".join(f"{name:>26}" for name in by_subject))
        lines += [f"  {name:<38}" + "".join(f"{cell:>26}" for cell in cells) for name, cells in rows.items()]
    return "\n".join(lines)
