"""Training of an action codec: what `wallvla train-codec` runs (Wall-OSS-0.5, section 2.1.2)."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from ..action_codec_wallvla import WallVLAActionCodec, WallVLAActionCodecConfig
from ..action_space_wallvla import Embodiment
from ..data.action_chunks import ActionChunks
from ..data.lerobot import LeRobotDataset
from ..data.statistics import compute_statistics
from ..data.vision_features import cache_vision_features
from ..modeling_wallvla import WallVLAForConditionalGeneration
from .fine_tuning import native_embodiment


CODEC_LOSSES = ("reconstruction_loss", "alignment_loss", "next_frame_loss", "dct_loss", "commitment_loss")
INITIAL_CHUNKS = 8192  # chunks of the k-means that starts the codebooks


@dataclass
class CodecTrainingConfig(TrainingArguments):
    r"""
    All of [`~transformers.TrainingArguments`], with defaults for a small network on small batches of numbers. What the
    codec itself depends on, its loss weights included, is [`WallVLAActionCodecConfig`].
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Of AdamW."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    min_horizon: int | None = field(
        default=None,
        metadata={"help": "Half of the batches are cut to a random length from this on: one codec for many lengths."},
    )
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Chunks of a batch."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: a number of steps, or a share below 1."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two log lines."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide non-finite losses."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches hold what the codec takes."})


class CodecTrainer(Trainer):
    r"""
    Trains a [`WallVLAActionCodec`] on [`ActionChunks`]. Logs every loss apart, and per level the share of codes in use
    and their perplexity since the last log.

    Dropped levels and revived codes are drawn from (seed, rank, step, micro batch), so runs repeat. A codec that was
    never trained starts from k-means codebooks of random chunks.

    Args:
        model, args, train_dataset: the codec, the options, the chunks.
    """

    # The codec has no keyword for a global number of items; its losses are means over the micro batch
    model_accepts_loss_kwargs = False

    def __init__(self, model: WallVLAActionCodec, args: CodecTrainingConfig, train_dataset: ActionChunks):
        if not model.quantizer.initialised:
            start_codec(model, train_dataset, args.seed)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=_identity)
        self._sums, self._batches = torch.zeros(len(CODEC_LOSSES)), 0
        self._counts = torch.zeros(model.config.num_levels, model.config.codebook_size, dtype=torch.int64)
        self._draws = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """The weighted sum of the losses, from draws that depend on the step alone."""
        key = [self.args.seed, self.accelerator.process_index, self.state.global_step, self._draws]
        self._draws = (self._draws + 1) % self.args.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        output = model(**self._cut(inputs, generator), generator=generator)
        for i, name in enumerate(CODEC_LOSSES):
            if output.get(name) is not None:
                self._sums[i] += output[name].detach().cpu()
        self._batches += 1
        uses = torch.bincount(output.ids.flatten().cpu(), minlength=self._counts.numel())
        self._counts += uses.view_as(self._counts)
        return (output.loss, output) if return_outputs else output.loss

    def _cut(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Half of the time shorter chunks; what is seen after them is then not known."""
        horizon = inputs["actions"].shape[1]
        if self.args.min_horizon is None or torch.rand((), generator=generator) < 0.5:
            return inputs
        steps = int(torch.randint(min(self.args.min_horizon, horizon), horizon + 1, (), generator=generator))
        cut = {name: inputs[name][:, :steps] for name in ("actions", "action_mask")}
        return {name: values for name, values in inputs.items() if name != "next_features"} | cut

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss and the use of each level since the last log."""
        if self._batches:
            config = self.accelerator.unwrap_model(self.model).config
            for name, total in zip(CODEC_LOSSES, self._sums.tolist(), strict=True):
                if config.feature_dim or name not in ("alignment_loss", "next_frame_loss"):
                    logs[name] = total / self._batches
            for level, (usage, perplexity) in enumerate(codebook_use(self._counts)):
                logs[f"usage_{level}"], logs[f"perplexity_{level}"] = usage, perplexity
            self._sums.zero_()
            self._counts.zero_()
            self._batches = 0
        super().log(logs, start_time)


def _identity(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def codebook_use(counts: Tensor) -> list[tuple[float, float]]:
    """(share of codes that occur, perplexity exp(entropy)) of each level, from occurrences (L, K) int64."""
    share = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    perplexity = (-(share * share.clamp(min=1e-12).log()).sum(dim=1)).exp()
    return list(zip((counts > 0).double().mean(dim=1).tolist(), perplexity.tolist(), strict=True))


def random_chunks(chunks: ActionChunks, seed: int) -> dict[str, Tensor]:
    """A batch of up to `INITIAL_CHUNKS` random chunks."""
    order = np.random.default_rng(seed).permutation(len(chunks))[:INITIAL_CHUNKS]
    return chunks.__getitems__(order.tolist())


def start_codec(codec: WallVLAActionCodec, chunks: ActionChunks, seed: int) -> None:
    """Sets the statistics of the vision features and the codebooks of a new codec from random chunks.

    Raises:
        ValueError: the chunks have no vision features, or of another width; fewer latents than codes.
    """
    batch = random_chunks(chunks, seed)
    features, _ = batch.pop("features", None), batch.pop("next_features", None)
    if codec.config.feature_dim:
        found = 0 if features is None else features.shape[1]
        if found != codec.config.feature_dim:
            raise ValueError(
                f"The codec has feature_dim {codec.config.feature_dim}, the chunks have vision features of width "
                f"{found}. Give the features of the VLM, or a codec of their width (0 for none)."
            )
        codec.set_feature_statistics(features.mean(dim=0), features.std(dim=0))
    codec.initialise_codebooks(**batch, generator=torch.Generator().manual_seed(seed))


class VisionEmbedder:
    """The pooled vision features of any image-text model of transformers.

    Args:
        path: folder or Hub id of a WallVLA checkpoint or of another model that has `get_image_features`.
        device: where it runs.
    """

    def __init__(self, path: str, device: str = "cpu"):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32").to(device).eval()
        if isinstance(model, WallVLAForConditionalGeneration):
            model, self.image_processor = model.vlm, AutoProcessor.from_pretrained(path).image_processor
        else:
            self.image_processor = AutoImageProcessor.from_pretrained(path)
        self.model = model

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the weights and of the image processor."""
        digest = hashlib.sha256(self.image_processor.to_json_string().encode())
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        """Images uint8 (h, w, 3) -> the mean of each one's vision tokens, as the language model sees them."""
        inputs = self.image_processor(images=images, return_tensors="pt").to(self.model.device)
        tokens = self.model.get_image_features(**inputs).pooler_output
        return torch.stack([each.float().mean(dim=0) for each in tokens]).cpu().numpy()


@dataclass
class CodecArguments:
    """What a codec is trained on, and its sizes; how it is trained is `CodecTrainingConfig`."""

    dataset: list[str] = field(metadata={"help": "LeRobot dataset folders of one robot."})
    vision: str | None = field(default=None, metadata={"help": "VLM whose vision features align the tokens."})
    model: str | None = field(default=None, metadata={"help": "Checkpoint whose robot and statistics are used."})
    embodiment: str | None = field(default=None, metadata={"help": "Name of the robot in --model, if it has several."})
    action_horizon: int | None = field(
        default=None, metadata={"help": "Steps of a chunk. Default: the robot's, or 32."}
    )
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras of the vision features. Default: all."})
    latent_steps: int = field(default=8, metadata={"help": "Latents of a chunk."})
    num_levels: int = field(default=4, metadata={"help": "Codes of a latent."})
    codebook_size: int = field(default=1024, metadata={"help": "Codes of a level."})
    hidden_size: int = field(default=256, metadata={"help": "Width of encoder and decoder."})
    alignment_weight: float = field(default=0.005, metadata={"help": "Weight of the visual-action alignment."})
    next_frame_weight: float = field(default=0.01, metadata={"help": "Weight of the next-frame prediction."})
    dct_weight: float = field(default=0.2, metadata={"help": "Weight of the reconstruction in the DCT domain."})
    vision_cache: str | None = field(default=None, metadata={"help": "Folder of cached features. Default: in output."})


def train_codec(options: CodecArguments, args: CodecTrainingConfig) -> Path:
    """Trains a codec and saves it in `args.output_dir`.

    Raises:
        ValueError: visual objectives without `vision`; datasets, robot and sizes that do not fit together.
    """
    processor = None if options.model is None else AutoProcessor.from_pretrained(options.model)
    robot = None if processor is None else processor.get_embodiment(options.embodiment)
    horizon = options.action_horizon or (32 if robot is None else robot.action_horizon)
    cameras = options.cameras if options.vision else []
    datasets = [
        LeRobotDataset(path, embodiment="robot", cameras=cameras, action_horizon=horizon) for path in options.dataset
    ]
    if robot is None:
        robot = native_embodiment(LeRobotDataset(options.dataset[0], embodiment="robot", action_horizon=1), horizon)
        robot = Embodiment.from_dict(robot.to_dict() | {"statistics": compute_statistics(datasets, robot)})
    elif robot.action_horizon != horizon:
        robot = Embodiment.from_dict(robot.to_dict() | {"action_horizon": horizon})
    features = None
    if options.vision:
        embedder = VisionEmbedder(options.vision, "cpu" if args.use_cpu else str(args.device))
        folder = options.vision_cache or Path(args.output_dir) / "vision"
        name = embedder.fingerprint()
        features = [cache_vision_features(dataset, embedder, name, folder) for dataset in datasets]
    action_dim = len(robot.action_channels) if processor is None else processor.action_dim
    state_dim = int(robot.state_channels.max(initial=0)) + 1
    if robot.action_layout[0][0] != "native":
        state_dim = action_dim
    codec = WallVLAActionCodec(
        WallVLAActionCodecConfig(
            action_dim=action_dim,
            state_dim=state_dim,
            latent_steps=options.latent_steps,
            num_levels=options.num_levels,
            codebook_size=options.codebook_size,
            hidden_size=options.hidden_size,
            feature_dim=0 if features is None else features[0].shape[1],
            alignment_weight=options.alignment_weight if options.vision else 0.0,
            next_frame_weight=options.next_frame_weight if options.vision else 0.0,
            dct_weight=options.dct_weight,
        )
    )
    chunks = ActionChunks(datasets, robot, action_dim, state_dim, features)
    trainer = CodecTrainer(codec, args, chunks)
    trainer.train()
    codec.save_pretrained(args.output_dir)
    return Path(args.output_dir)
