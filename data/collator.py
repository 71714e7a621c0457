"""From a list of samples to a batch, through the processor."""


class Collator:
    """Collate function of a data loader: `processor.encode(samples)`.

    Args:
        processor: a `WallVLAProcessor`, or anything with `encode(list of sample dicts) -> batch`.

    An error of one sample is raised as a ValueError that names the sample.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, samples: list[dict]):
        """The batch of `docs/architecture.md` for action and multimodal samples, in any mixture."""
        try:
            return self.processor.encode(samples)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._culprit(samples)}: {error}") from error

    def _culprit(self, samples: list[dict]) -> str:
        """The sample that cannot be encoded alone; all of them if each one can."""
        for position, sample in enumerate(samples):
            try:
                self.processor.encode([sample])
            except (KeyError, TypeError, ValueError):
                return f"Sample {position} of the batch ({_origin(sample)})"
        return f"Batch of {len(samples)} samples ({'; '.join(_origin(sample) for sample in samples)})"


def _origin(sample: dict) -> str:
    """What a sample says about where it comes from."""
    kind = "action" if "instruction" in sample else "multimodal"
    names = [name for name in ("embodiment", "dataset_index", "episode_index", "frame_index") if name in sample]
    return ", ".join([kind, *(f"{name} {sample[name]}" for name in names)])
