"""Muon: orthogonality, agreement with torch's, and the same training on 1, 2 and 4 processes."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from test_action_experts import each_pair
from tiny import tiny_model_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.florence2.modeling_florence2 import Florence2VisionBlock

from wallvla.trainers.muon import (
    COEFFICIENTS,
    OPTIMIZERS,
    MuonWithAdamW,
    choose_gram,
    count_parts,
    is_muon_parameter,
    logical_matrices,
    newton_schulz,
    newton_schulz_flops,
    orthogonalize,
    plan_buckets,
)


def quintic(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """In float64: the singular vectors stay, each singular value goes through the polynomial."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vh


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 9)])
@pytest.mark.parametrize("gram", [True, False])
def test_newton_schulz_is_the_quintic_on_the_singular_values(shape, gram):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(matrix, gram=gram).double(), quintic(matrix), atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (32, 172), (64, 32)])
def test_updates_are_nearly_orthogonal(shape):
    """All singular values end between 0.6 and 1.3, and the singular vectors are those of the matrix (float64 SVD)."""
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    update = newton_schulz(matrix)[0].double()
    u, _, vh = torch.linalg.svd(matrix[0].double(), full_matrices=False)
    inside = u.T @ update @ vh.T
    values = inside.diagonal()
    assert (inside - torch.diag(values)).abs().max() < 1e-4
    # a random square matrix has singular values near zero, which five steps lift by 3.4^5 only
    assert values.max() < 1.3 and (values.min() > 0.6 or shape[0] == shape[1])
    assert values.median() > 0.6


def ill_conditioned(rows: int = 32, columns: int = 172) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    u, s, vh = torch.linalg.svd(torch.randn(1, rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag_embed(10 ** -torch.linspace(0, 6, rows)[None]) @ vh


def test_the_gram_form_is_for_float32():
    """With singular values over six decades it loses four digits in float32 and everything in bfloat16."""
    matrix = ill_conditioned()
    expected = quintic(matrix)

    def error(**options) -> float:
        return ((newton_schulz(matrix, **options).double() - expected).norm() / expected.norm()).item()

    assert error(gram=False) < 2e-5 and error(gram=True) < 1e-3
    assert error(gram=False, dtype=torch.bfloat16) < 0.3 < 1 < error(gram=True, dtype=torch.bfloat16)
    assert choose_gram(32, 172) and not choose_gram(32, 172, dtype=torch.bfloat16)
    assert error(dtype=torch.bfloat16) == error(gram=False, dtype=torch.bfloat16)


def test_batching_by_shape_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    matrices = [torch.randn(*shape, generator=generator) for shape in [(4, 9), (9, 4), (4, 9), (5, 5), (9, 4)]]
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        assert result.shape == matrix.shape
        torch.testing.assert_close(result, newton_schulz(matrix[None])[0], atol=1e-5, rtol=1e-5)


def test_flops_count_the_cheaper_form():
    """Counted from the matrix products that run; 8 x 12 is where the two forms cost the same."""
    for shape in [(8, 8), (8, 11), (8, 12), (8, 13), (8, 40), (64, 8)]:
        counted = {}
        for gram in (True, False, None):
            with FlopCounterMode(display=False) as counter:
                newton_schulz(torch.randn(1, *shape), gram=gram)
            counted[gram] = counter.get_total_flops()
            assert counted[gram] == newton_schulz_flops(*shape, gram=gram)
        assert counted[None] == min(counted.values())
        assert choose_gram(*shape) == (max(shape) > 1.5 * min(shape))


def test_the_plan_shares_the_work_and_bounds_the_memory():
    shapes = [(64, 64)] * 7 + [(8, 64)] * 20 + [(192, 64)]
    matrices = logical_matrices(shapes, [1] * 27 + [3])
    assert len(matrices) == 30 and sum(m.shape == (64, 64) for m in matrices) == 10
    plan = plan_buckets(matrices, 4, bucket_size=4096)
    owned = [[i for bucket in plan for i in bucket[rank]] for rank in range(4)]
    assert sorted(sum(owned, [])) == list(range(30))
    work = [sum(newton_schulz_flops(*matrices[i].shape) for i in numbers) for numbers in owned]
    assert max(work) - min(work) <= newton_schulz_flops(64, 64)
    for bucket in plan:
        assert all(sum(64 * matrices[i].shape[0] for i in numbers) <= 4096 for numbers in bucket)
    # with room for everything there is one collective each way
    assert len(plan_buckets(matrices, 4)) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rows_of_a_fused_matrix_are_those_of_the_shards(ranks):
    """Against torch.chunk, which is how fully_shard cuts."""
    fused = torch.arange(10 * 3 * 2).view(30, 2)
    shards = [*fused.chunk(ranks), *[fused[:0]] * ranks][:ranks]
    for k, matrix in enumerate(logical_matrices([(30, 2)], [3])):
        parts = [shard[matrix.rows(rank, ranks)] for rank, shard in enumerate(shards)]
        assert torch.equal(torch.cat(parts), fused[10 * k : 10 * k + 10])
        assert [part.numel() for part in parts] == [matrix.size(rank, ranks) for rank in range(ranks)]


class Attention(nn.Module):
    """A fused projection under the name that the vision tower gives it."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.tanh(q) * torch.tanh(k) + v


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = Attention(width)

    def forward(self, x):
        return self.attn(x)


class Net(nn.Module):
    """Layers of several shapes, rows that two and four ranks do not share evenly, an embedding and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        widths = [(12, 10), (10, 14), (14, 6), (6, 12)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in widths)
        self.blocks = nn.ModuleList([Block(10)])
        self.norm = nn.LayerNorm(12)

    def forward(self, ids):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if number == 0:
                x = self.blocks[0](x)
        return self.norm(x)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (8,), generator=generator), torch.randn(8, 12, generator=generator)


def optimizer_of(model: nn.Module, name: str = "muon") -> MuonWithAdamW:
    # buckets of about two matrices, so that the overlapping path runs
    return OPTIMIZERS[name](model.named_parameters(), lr=0.02, weight_decay=0.1, bucket_size=200)


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
    assert [(group["muon"], group["parts"]) for group in optimizer.param_groups[:2]] == [(True, 1), (True, 3)]
    assert groups[0] == {f"layers.{i}.weight" for i in range(4)} and groups[1] == {"blocks.0.attn.qkv.weight"}
    assert groups[2] == {"embed.weight"}
    assert optimizer.param_groups[3]["weight_decay"] == 0.0 and "norm.weight" in groups[3]
    rates = MuonWithAdamW(model.named_parameters(), lr=lambda name: 0.1 if "layers" in name else 0.2)
    assert {group["lr"] for group in rates.param_groups if group["muon"] and group["parts"] == 1} == {0.1}
    assert {group["lr"] for group in rates.param_groups if group["parts"] == 3} == {0.2}
    with pytest.raises(ValueError, match=r"layers.0.bias has shape \(10,\)"):
        MuonWithAdamW(model.named_parameters(), is_muon=lambda name, p: True)
    with pytest.raises(ValueError, match="embed.weight is torch.bfloat16: load the model with dtype float32"):
        MuonWithAdamW(Net().bfloat16().named_parameters())


def test_every_logical_matrix_of_the_model_is_orthogonalised_apart():
    """q, k, v, gate and up; in the vision tower q, k and v are one parameter and three matrices."""
    from tiny import tiny_model  # here, because the processes below import this file

    chosen = {name: p for name, p in tiny_model().named_parameters() if is_muon_parameter(name, p)}
    assert sum(map(count_parts, chosen)) == 4 * 7 + 4 * 7 + 2 * 7
    assert not any("gate_up" in name for name in chosen)
    fused = [name for name in chosen if count_parts(name) == 3]
    assert len(fused) == 2 and all(chosen[name].shape == (3 * 128, 128) for name in fused)
    only_language = [name for name, p in chosen.items() if is_muon_parameter(name, p, r"\.layers\.")]
    assert len(only_language) == 4 * 7 + 4 * 7


@each_pair
def test_matrices_of_every_kind(kind, vlm):
    """All of the layers, whatever a VLM calls them, and each fused one as its parts."""
    model = tiny_model_of(kind, vlm)
    chosen = {name: p for name, p in model.named_parameters() if is_muon_parameter(name, p)}
    layers = [m for m in model.modules() if isinstance(m, (GradientCheckpointingLayer, Florence2VisionBlock))]
    assert {id(p) for p in chosen.values()} == {id(p) for m in layers for p in m.parameters() if p.ndim == 2}
    stacked = {(name.split(".")[-2], count_parts(name)) for name in chosen if count_parts(name) > 1}
    expected = {"mot": set(), "soft_prompt": {("qkv", 3)}, "dit": {("qkv", 3), ("modulation", 6)}}[kind]
    assert expected <= stacked <= {("qkv", 3), ("modulation", 6)}
    for name, p in chosen.items():
        width = {"qkv": p.shape[0] // 3, "modulation": p.shape[1]}.get(name.split(".")[-2], p.shape[0])
        assert p.shape[0] == count_parts(name) * width


def test_a_fused_update_is_three_orthogonal_matrices():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.zeros(48, 16))
    fused.grad = torch.randn(48, 16) * torch.tensor([1.0, 1e-3, 10.0]).repeat_interleave(16)[:, None]
    gradients = fused.grad.clone().chunk(3)
    MuonWithAdamW([("blocks.0.attn.qkv.weight", fused)], lr=1.0, weight_decay=0.0).step()
    for update, gradient in zip(fused.detach().chunk(3), gradients, strict=True):
        # the first momentum is parallel to the gradient; the scale is that of a 16 x 16 matrix, not of 48 x 16
        expected = -0.2 * 16**0.5 * quintic(gradient[None])[0]
        torch.testing.assert_close(update.double(), expected, atol=1e-4, rtol=0)


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
    ours, theirs, lent = (nn.Parameter(start.clone()) for _ in range(3))
    mine = MuonWithAdamW([("layers.0.weight", ours)], lr=0.02)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    baseline = OPTIMIZERS["torch_muon"]([("layers.0.weight", lent)], lr=0.02)
    for step in range(5):
        gradient = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        for p, optimizer in ((ours, mine), (theirs, reference), (lent, baseline)):
            p.grad = gradient.clone()
            optimizer.step()
        baseline.load_state_dict(baseline.state_dict())
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    assert torch.equal(lent, theirs)
    assert (ours - start).abs().max() > 0.02


def sharded_run(rank: int, ranks: int, port: int, folder: str, first: int, last: int, name: str, mesh: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    model = Net()
    for layer in [*model.layers, *model.blocks]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model, name)
    if first:
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


def run_on(ranks: int, folder, first: int = 0, last: int = 20, name: str = "muon", mesh: tuple | None = None) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded_run, (ranks, port, str(folder), first, last, name, mesh or (ranks,)), nprocs=ranks)
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_process() -> dict[str, torch.Tensor]:
    model = Net()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer_of(model), range(20))
    assert all((p - start[name]).abs().max() > 0.01 for name, p in model.named_parameters())
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_equals_one_process(ranks, one_process, tmp_path):
    assert_equal(run_on(ranks, tmp_path), one_process)


def test_four_processes_then_two_equal_one(one_process, tmp_path):
    """Optimizer state saved by four ranks in the middle goes on with two."""
    run_on(4, tmp_path, 0, 10)
    assert_equal(run_on(2, tmp_path, 10, 20), one_process)


def test_replicas_of_shards_equal_one_process(one_process, tmp_path):
    """Two replicas of two shards each (hybrid sharding)."""
    assert_equal(run_on(4, tmp_path, mesh=(2, 2)), one_process)


def test_the_naive_baseline_gives_the_same(one_process, tmp_path):
    assert_equal(run_on(2, tmp_path, name="muon_naive"), one_process)


def test_other_shardings_are_refused(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match="sharded by rows over one mesh dimension"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(sharded_by_columns, (port,), nprocs=1)


def sharded_by_columns(rank: int, port: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    weight.grad = torch.zeros_like(weight)
    MuonWithAdamW([("layers.0.weight", weight)]).step()
