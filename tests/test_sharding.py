"""FSDP2 on two processes gives the loss and the gradients of one, layer by layer sharded, on the CPU."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_actions, tiny_batch, tiny_model
from torch.distributed.fsdp import fully_shard


CASES = [(labels, checkpointing) for labels in (True, False) for checkpointing in (False, True)]


def loss_and_gradients(model, labels: bool) -> tuple[torch.Tensor, dict]:
    batch = tiny_batch(action_tokens=5, padding=2)
    if not labels:
        batch.pop("labels")
    model.zero_grad()
    loss = model(**batch, **tiny_actions(2)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = []
    for labels, checkpointing in CASES:
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        layers = [*model.vlm.model.language_model.layers, *model.vlm.model.visual.blocks, *model.action_expert.layers]
        for module in [*layers, model]:
            fully_shard(module)
        loss, gradients = loss_and_gradients(model, labels)
        results.append((loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}))
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded, (port, str(tmp_path / "results.pt")), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for (labels, checkpointing), (loss, gradients) in zip(CASES, results, strict=True):
        expected_loss, expected = loss_and_gradients(tiny_model().train(), labels)
        assert loss == pytest.approx(expected_loss.item(), abs=1e-6), (labels, checkpointing)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
