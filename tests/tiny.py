"""Tiny random models and batches that several test files share. CPU, milliseconds."""

import torch

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration


IMAGE_ID, ACTION_START, NUM_ACTION_TOKENS, VOCABULARY = 500, 400, 64, 512


def tiny_config(**overrides) -> WallVLAConfig:
    config = WallVLAConfig.tiny(
        vocab_size=VOCABULARY,
        action_token_start_id=ACTION_START,
        num_action_tokens=NUM_ACTION_TOKENS,
        **overrides,
    )
    config.vlm_config.image_token_id = IMAGE_ID
    return config


def tiny_model(seed: int = 0, **overrides) -> WallVLAForConditionalGeneration:
    """A model whose weights are larger than at initialisation, so that differences show."""
    torch.manual_seed(seed)
    model = WallVLAForConditionalGeneration(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tiny_batch(
    images: tuple[int, ...] = (1, 2), text: int = 6, action_tokens: int = 0, padding: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Samples with that many images (of 32 pixels, 4 tokens each), left padded to one length.

    With `action_tokens` each sample ends in as many discrete tokens and one end-of-turn token, all labelled.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    rows = []
    for count in images:
        row = integers(10, 300, 3)
        for _ in range(count):
            row += [5, *[IMAGE_ID] * 4, 6]
        row += integers(10, 300, text)
        if action_tokens:
            row += [*integers(ACTION_START, ACTION_START + NUM_ACTION_TOKENS, action_tokens), 7]
        rows.append(row)
    length = max(map(len, rows)) + padding
    batch = {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(sum(images) * 16, 3 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(images)),
    }
    if action_tokens:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, -action_tokens - 1 :] = batch["input_ids"][:, -action_tokens - 1 :]
    return batch


def tiny_actions(batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Actions, noise and times; the mask hides channel 3 everywhere and the last steps of the last sample."""
    generator = torch.Generator().manual_seed(seed)
    actions, noise = torch.randn(2, batch_size, 8, 4, generator=generator)
    mask = torch.ones(batch_size, 8, 4, dtype=torch.bool)
    mask[..., 3] = False
    mask[-1, 5:] = False
    return {
        "actions": actions,
        "noise": noise,
        "action_mask": mask,
        "time": torch.rand(batch_size, generator=generator) * 0.99,
    }


SHARDING_CASES = [(labels, checkpointing) for labels in (True, False) for checkpointing in (False, True)]


def loss_and_gradients(model: WallVLAForConditionalGeneration, labels: bool) -> tuple[torch.Tensor, dict]:
    """Of one batch, with or without text to learn."""
    batch = tiny_batch(action_tokens=5, padding=2)
    if not labels:
        batch.pop("labels")
    model.zero_grad()
    loss = model(**batch, **tiny_actions(2)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
