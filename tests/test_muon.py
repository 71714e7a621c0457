"""Muon: orthogonality, agreement with torch's, and the same training on 1, 2 and 4 processes."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from wallvla.trainers.muon import (
    COEFFICIENTS,
    MuonWithAdamW,
    assign_owners,
    newton_schulz,
    newton_schulz_flops,
    orthogonalize,
)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 9)])
@pytest.mark.parametrize("gram", [True, False])
def test_newton_schulz_is_the_quintic_on_the_singular_values(shape, gram):
    """In float64: the singular vectors stay, each singular value goes five times through the polynomial."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(newton_schulz(matrix, gram=gram).double(), expected, atol=2e-4, rtol=0)


def test_updates_are_nearly_orthogonal():
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(newton_schulz(matrix).double())
    assert values.min() > 0.6 and values.max() < 1.3


def test_batching_by_shape_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    matrices = [torch.randn(*shape, generator=generator) for shape in [(4, 9), (9, 4), (4, 9), (5, 5), (9, 4)]]
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        assert result.shape == matrix.shape
        torch.testing.assert_close(result, newton_schulz(matrix), atol=1e-5, rtol=1e-5)


def test_flops_count_the_cheaper_form():
    """Counted from the matrix products that run."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in [(8, 8), (8, 12), (8, 16), (64, 8)]:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(*shape))
        assert counter.get_total_flops() == newton_schulz_flops(*shape)


def test_owners_share_the_work():
    shapes = [(64, 64)] * 7 + [(8, 64)] * 20
    owners = assign_owners(shapes, 4)
    work = [sum(newton_schulz_flops(*s) for s, o in zip(shapes, owners, strict=True) if o == r) for r in range(4)]
    assert set(owners) == {0, 1, 2, 3}
    assert max(work) - min(work) <= max(newton_schulz_flops(*shape) for shape in shapes)
    assert owners == assign_owners(shapes, 4)


class Net(nn.Module):
    """Layers of several shapes, rows that two and four ranks do not share evenly, an embedding and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        widths = [(12, 10), (10, 14), (14, 6), (6, 12)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in widths)
        self.norm = nn.LayerNorm(12)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.norm(x)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (8,), generator=generator), torch.randn(8, 12, generator=generator)


def optimizer_of(model: nn.Module) -> MuonWithAdamW:
    # a bucket of two: four matrices make two buckets, so the overlapping path runs
    return MuonWithAdamW(model.named_parameters(), lr=0.02, weight_decay=0.1, bucket_size=2)


def train(model, optimizer, steps: range) -> None:
    for step in steps:
        ids, target = batch(step)
        loss = (model(ids) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_predicate_and_the_groups():
    model = Net()
    optimizer = optimizer_of(model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert groups[0] == {f"layers.{i}.weight" for i in range(4)}
    assert groups[1] == {"embed.weight"}
    assert optimizer.param_groups[2]["weight_decay"] == 0.0 and "norm.weight" in groups[2]
    with pytest.raises(ValueError, match=r"layers.0.bias has shape \(10,\)"):
        MuonWithAdamW(model.named_parameters(), is_muon=lambda name, p: True)


def test_the_adamw_half_equals_torch():
    ours, theirs = Net(), Net()
    mine = MuonWithAdamW(ours.named_parameters(), lr=0.02, weight_decay=0.1, is_muon=lambda name, p: False)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    plain = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    train(ours, mine, range(10))
    train(theirs, torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95)), range(10))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_muon_half_equals_torch_up_to_bfloat16():
    """torch.optim.Muon iterates in bfloat16; ours in float32."""
    start = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = MuonWithAdamW([("layers.0.weight", ours)], lr=0.02, is_muon=lambda name, p: True)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        gradient = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        for p, optimizer in ((ours, mine), (theirs, reference)):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    assert (ours - start).abs().max() > 0.02


def sharded_run(rank: int, ranks: int, port: int, folder: str, first: int, last: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    model = Net()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    if first:
        train(model, optimizer, range(0))
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, range(first, last))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(whole, f"{folder}/weights.pt")
    dist.destroy_process_group()


def run_on(ranks: int, folder, first: int, last: int) -> dict[str, torch.Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded_run, (ranks, port, str(folder), first, last), nprocs=ranks)
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_process() -> dict[str, torch.Tensor]:
    model = Net()
    train(model, optimizer_of(model), range(20))
    return dict(model.named_parameters())


def test_four_processes_then_two_equal_one(one_process, tmp_path):
    """Optimizer state saved by four ranks in the middle goes on with two."""
    run_on(4, tmp_path, 0, 10)
    for name, value in run_on(2, tmp_path, 10, 20).items():
        torch.testing.assert_close(value, one_process[name].data, atol=1e-5, rtol=1e-5, msg=name)
