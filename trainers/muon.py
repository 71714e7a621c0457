"""Muon on the matrices and AdamW on the rest, as one optimizer, for one process or for FSDP2 (Wall-OSS-0.5, 2.2.4).

Muon moves a matrix along the orthogonalised momentum: the nearest matrix whose singular values are all about one. The
size of a gradient drops out, which is what two experts with very different gradients need in one run.

Under FSDP2 a matrix is sharded by rows. Momentum and weights never leave their rank; only the direction does. Each
matrix has one owner rank, chosen so that the Newton-Schulz work is even. One all-to-all brings the rows of a bucket of
matrices to their owners, the owners orthogonalise same-shaped matrices together, one all-to-all brings the rows of the
updates back. While a bucket is orthogonalised the next one travels. In one process the same code has one owner and
sends nothing.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from re import search
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adamw import adamw


# Keller Jordan's quintic, tuned for a steep start rather than an exact fixed point: singular values end in about
# [0.7, 1.2] (https://kellerjordan.github.io/posts/muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
MATRICES = r"(^|\.)(layers?|blocks)\.\d+\."  # InternVL's vision tower has `layer`
STACKED = {"qkv": 3, "modulation": 6}  # matrices of a fused projection, by its name
BUCKET_SIZE = 2**26


def choose_gram(rows: int, columns: int, steps: int = 5, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `newton_schulz` takes the Gram form: in float32, where it has fewer operations.

    It squares the singular values, so rounding is amplified: with a condition number of 1e6 the relative error is 3e-4
    in float32, but over 1 in bfloat16, where it is therefore never taken (`tests/test_muon.py`).
    """
    gram, plain = (newton_schulz_flops(rows, columns, steps, gram=form) for form in (True, False))
    return dtype == torch.float32 and gram < plain


def newton_schulz_flops(
    rows: int, columns: int, steps: int = 5, gram: bool | None = None, dtype: torch.dtype = torch.float32
) -> int:
    """Floating point operations of the matrix products in `newton_schulz` of one matrix; same arguments."""
    m, n = min(rows, columns), max(rows, columns)
    if choose_gram(rows, columns, steps, dtype) if gram is None else gram:
        return 4 * m * m * n + (8 * steps - 6) * m**3
    return steps * (4 * m * m * n + 2 * m**3)


def newton_schulz(
    matrices: Tensor, steps: int = 5, gram: bool | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Orthogonalises each matrix: `U S V^T` becomes about `U V^T`.

    Iterates `X <- a X + (b A + c A^2) X`, `A = X X^T`, from `X / |X|`. In Gram form only the small square matrices
    are multiplied: with `P = a + b A + c A^2` the next `A` is `P A P`, and `X` is multiplied once, at the end, by the
    product of all `P`. With five steps that is cheaper for matrices more than one and a half times as wide as high.

    Args:
        matrices: (batch, m, n), any floating dtype.
        steps: iterations.
        gram: force the Gram form or the plain one; `None` asks `choose_gram`.
        dtype: of the iteration.

    Returns:
        (batch, m, n) of `dtype`.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)
    if choose_gram(*x.shape[-2:], steps, dtype) if gram is None else gram:
        product = None  # of the polynomials so far
        square = x @ x.mT  # (batch, m, m)
        for step in range(steps):
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
            product = polynomial if product is None else polynomial @ product
            if step + 1 < steps:
                square = polynomial @ square @ polynomial
        x = product @ x
    else:
        for _ in range(steps):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize(matrices: list[Tensor], steps: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`newton_schulz` of each matrix (m, n), those of one shape (also transposed) together. (m, n) each, `dtype`."""
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        batches[min(matrix.shape), max(matrix.shape)].append(index)
    results: list[Tensor] = [None] * len(matrices)
    for indices in batches.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].mT for i in indices]
        for i, result in zip(indices, newton_schulz(torch.stack(wide), steps, dtype=dtype), strict=True):
            results[i] = result if matrices[i].shape[0] <= matrices[i].shape[1] else result.mT
    return results


@dataclass(frozen=True)
class Matrix:
    """A logical matrix: the rows [start, stop) of a parameter with `height` rows, sharded by rows as torch does it."""

    parameter: int
    start: int
    stop: int
    columns: int
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.columns

    def rows(self, rank: int, ranks: int) -> slice:
        """The rows of this matrix in the shard of `rank`, counted from the first row of the shard."""
        chunk = -(-self.height // ranks)
        first, last = min(rank * chunk, self.height), min((rank + 1) * chunk, self.height)
        return slice(min(max(self.start, first), last) - first, min(max(self.stop, first), last) - first)

    def size(self, rank: int, ranks: int) -> int:
        """Elements of this matrix in the shard of `rank`."""
        rows = self.rows(rank, ranks)
        return (rows.stop - rows.start) * self.columns


def logical_matrices(shapes: Iterable[tuple[int, int]], parts: Iterable[int]) -> tuple[Matrix, ...]:
    """The matrices in parameters of these shapes, each of which is that many equal matrices on top of each other."""
    matrices = []
    for index, ((rows, columns), count) in enumerate(zip(shapes, parts, strict=True)):
        height = rows // count
        matrices += [Matrix(index, k * height, (k + 1) * height, columns, rows) for k in range(count)]
    return tuple(matrices)


@lru_cache(maxsize=8)
def plan_buckets(
    matrices: tuple[Matrix, ...],
    ranks: int,
    steps: int = 5,
    bucket_size: int = BUCKET_SIZE,
    dtype: torch.dtype = torch.float32,
) -> list[list[list[int]]]:
    """Who orthogonalises what, and when: `plan[bucket][rank]` are the numbers of the matrices that `rank` owns there.

    The most expensive matrix first, always to the rank with the least work so far. Bucket k is then the k-th share of
    every rank, at most `bucket_size` elements (or one matrix), so that each bucket is even as well.
    """
    work, shares = [0] * ranks, [[[]] for _ in range(ranks)]
    held = [0] * ranks
    cost = [newton_schulz_flops(*matrix.shape, steps, dtype=dtype) for matrix in matrices]
    for index in sorted(range(len(matrices)), key=lambda i: (-cost[i], matrices[i].shape, i)):
        owner = min(range(ranks), key=lambda rank: (work[rank], rank))
        work[owner] += cost[index]
        size = math.prod(matrices[index].shape)
        if held[owner] and held[owner] + size > bucket_size:
            shares[owner].append([])
            held[owner] = 0
        shares[owner][-1].append(index)
        held[owner] += size
    count = max(map(len, shares))
    return [[share[k] if k < len(share) else [] for share in shares] for k in range(count)]


class Shards(NamedTuple):
    """Over how many ranks rows are sharded, which of them this is, and how they talk (`None` in one process)."""

    rank: int
    ranks: int
    group: dist.ProcessGroup | None


def shards_of(parameters: list[nn.Parameter]) -> Shards:
    """How the rows of all these parameters are sharded.

    Raises:
        ValueError: otherwise than by rows over one dimension of a common mesh; other dimensions must be replicas.
    """
    if not any(isinstance(p, DTensor) for p in parameters):
        return Shards(0, 1, None)
    mesh, placements = parameters[0].device_mesh, parameters[0].placements
    allowed = [place for place in placements if not isinstance(place, Replicate)] == [Shard(0)]
    if not allowed or any(not isinstance(p, DTensor) or p.placements != placements for p in parameters):
        found = {str(p.placements) if isinstance(p, DTensor) else "not sharded" for p in parameters}
        raise ValueError(
            f"Muon needs all its matrices sharded by rows over one mesh dimension, found {sorted(found)}: use "
            "fully_shard with its default placement."
        )
    dimension = placements.index(Shard(0))
    return Shards(mesh.get_local_rank(dimension), mesh.size(dimension), mesh.get_group(dimension))


def local(tensor: Tensor) -> Tensor:
    """The shard of this rank, sharing memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Transfer(NamedTuple):
    """Numbers on their way: `out` holds `sizes[r]` of them from each rank r once `work` is done."""

    out: Tensor
    sizes: list[int]
    work: dist.Work | None

    def wait(self) -> list[Tensor]:
        if self.work is not None:
            self.work.wait()
        return list(self.out.split(self.sizes))


def exchange(
    pieces: list[list[Tensor]], sizes: list[int], shards: Shards, device: torch.device | str, dtype: torch.dtype
) -> Transfer:
    """Starts one all-to-all: `pieces[r]` go to rank r, `sizes[r]` numbers come from it."""
    flat = [piece.reshape(-1).to(dtype) for to_rank in pieces for piece in to_rank]
    sent = torch.cat(flat) if flat else torch.empty(0, device=device, dtype=dtype)
    if shards.group is None:
        return Transfer(sent, sizes, None)
    out = torch.empty(sum(sizes), device=device, dtype=dtype)
    counts = [sum(piece.numel() for piece in to_rank) for to_rank in pieces]
    work = dist.all_to_all_single(out, sent, sizes, counts, group=shards.group, async_op=True)
    return Transfer(out, sizes, work)


def orthogonalize_sharded(
    direction: Callable[[int], Tensor],
    matrices: tuple[Matrix, ...],
    shards: Shards,
    device: torch.device | str = "cpu",
    steps: int = 5,
    bucket_size: int = BUCKET_SIZE,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Tensor]]:
    """Each matrix orthogonalised on its owner rank: one all-to-all there and one back per bucket.

    Args:
        direction: number of a matrix -> the rows of it that this rank holds, (local rows, n); asked once for each.
        matrices: the same on every rank.
        shards: how their rows are shared out.
        device: where the rows are.
        steps: Newton-Schulz iterations.
        bucket_size: elements that a rank owns in a bucket; while one is orthogonalised the next one travels.
        dtype: in which numbers travel and are orthogonalised.

    Yields:
        (number of a matrix, the rows of its update that this rank holds, (local rows, n) of `dtype`), each once.
    """
    everyone, me = range(shards.ranks), shards.rank

    def sizes(numbers: list[int], rank: int) -> list[int]:
        return [matrices[i].size(rank, shards.ranks) for i in numbers]

    def to_owners(bucket: list[list[int]]) -> Transfer:
        pieces = [[direction(i) for i in bucket[owner]] for owner in everyone]
        return exchange(pieces, [sum(sizes(bucket[me], rank)) for rank in everyone], shards, device, dtype)

    def whole(bucket: list[list[int]], received: list[Tensor]) -> list[Tensor]:
        rows = [part.split(sizes(bucket[me], rank)) for rank, part in enumerate(received)]
        return [torch.cat(parts).view(matrices[i].shape) for i, *parts in zip(bucket[me], *rows, strict=True)]

    def to_holders(bucket: list[list[int]], updates: list[Tensor]) -> Transfer:
        rows = [
            update.split(
                [size // matrices[i].columns for size in (matrices[i].size(r, shards.ranks) for r in everyone)]
            )
            for i, update in zip(bucket[me], updates, strict=True)
        ]
        pieces = [[parts[rank] for parts in rows] for rank in everyone]
        return exchange(pieces, [sum(sizes(bucket[owner], me)) for owner in everyone], shards, device, dtype)

    def unpacked(bucket: list[list[int]], received: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for owner, part in enumerate(received):
            for i, rows in zip(bucket[owner], part.split(sizes(bucket[owner], me)), strict=True):
                yield i, rows.view(-1, matrices[i].columns)

    plan = plan_buckets(matrices, shards.ranks, steps, bucket_size, dtype)
    there, back = to_owners(plan[0]), None
    for number, bucket in enumerate(plan):
        received = there.wait()
        if number + 1 < len(plan):
            there = to_owners(plan[number + 1])
        updates = orthogonalize(whole(bucket, received), steps, dtype)
        if back is not None:
            yield from unpacked(plan[number - 1], back.wait())
        back = to_holders(bucket, updates)
    yield from unpacked(plan[-1], back.wait())


def is_muon_parameter(name: str, parameter: nn.Parameter, matrices: str = MATRICES) -> bool:
    """The matrices inside the layers of both experts and of the vision tower.

    AdamW keeps embeddings, the LM head, the action heads, norms and biases. The paper gives Muon "the 2D parameters of
    each expert" and leaves the visual embeddings to AdamW; the published training code gives it every 2-D weight whose
    name has no embedding, LM head or norm in it, action heads included. Ours is between them: the blocks of the vision
    tower are matrices of the VL expert, patch embedding, merger and action heads are not.
    """
    return parameter.ndim == 2 and search(matrices, name) is not None


def count_parts(name: str) -> int:
    """How many matrices a parameter is on top of each other: a fused `qkv` is three, a DiT layer's modulation six.

    `in_proj_qkv` of linear attention (Qwen3.5) counts as one, since its parts differ in size.
    """
    return STACKED.get(name.split(".")[-2], 1) if "." in name else 1


class MuonWithAdamW(torch.optim.Optimizer):
    r"""
    Muon for the parameters that a predicate chooses, AdamW for the others.

    Args:
        named_parameters: of the model; those without `requires_grad` are left out. The others must be float32, the
            master weights: an update of 1e-4 is lost in bfloat16.
        lr: learning rate of both, or a function from a parameter's name to it. Muon's update is scaled by
            `0.2 sqrt(max(m, n))`, which gives it the size of an AdamW update (Moonlight,
            https://huggingface.co/papers/2502.16982), so that one rate and one schedule fit.
        weight_decay: decoupled, for matrices and embeddings; vectors are not decayed.
        momentum: of Muon, with Nesterov.
        betas, eps: of AdamW.
        steps: Newton-Schulz iterations.
        is_muon: `(name, parameter) -> bool`.
        parts: name of a parameter -> how many matrices it is on top of each other; they are orthogonalised apart.
        dtype: in which directions travel and are orthogonalised: float32, or bfloat16 where it is much faster.
        bucket_size: elements that a rank orthogonalises at a time.

    Raises:
        ValueError: a parameter is not float32, or the predicate chose one that is no matrix.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float | Callable[[str], float] = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        steps: int = 5,
        is_muon: Callable[[str, nn.Parameter], bool] = is_muon_parameter,
        parts: Callable[[str], int] = count_parts,
        dtype: torch.dtype = torch.float32,
        bucket_size: int = BUCKET_SIZE,
    ):
        groups: dict[tuple, dict] = {}
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {parameter.dtype}: load the model with dtype float32 and train with bf16."
                )
            muon = is_muon(name, parameter)
            if muon and parameter.ndim != 2:
                raise ValueError(f"Muon orthogonalises matrices, but {name} has shape {tuple(parameter.shape)}.")
            group = {
                "muon": muon,
                "parts": parts(name) if muon else 1,
                "lr": lr(name) if callable(lr) else lr,
                "weight_decay": weight_decay if parameter.ndim >= 2 else 0.0,
            }
            groups.setdefault(tuple(group.values()), group | {"params": []})["params"].append(parameter)
        defaults = {"momentum": momentum, "betas": betas, "eps": eps, "steps": steps}
        self.dtype, self.bucket_size = dtype, bucket_size
        # Muon first, whatever the order of the parameters
        super().__init__(sorted(groups.values(), key=lambda group: not group["muon"]), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon_step([group for group in self.param_groups if group["muon"]])
        for group in self.param_groups:
            if not group["muon"]:
                self._adamw_step(group)
        return loss

    def _adamw_step(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                # On the CPU, as torch.optim.AdamW has it: reading it does not wait for the device
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters],
            [local(self.state[p]["exp_avg"]) for p in parameters],
            [local(self.state[p]["exp_avg_sq"]) for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon_step(self, groups: list[dict]) -> None:
        """All Muon groups together, so that they share collectives and batches."""
        chosen = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
        if not chosen:
            return
        for _, p in chosen:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        parameters = [p for _, p in chosen]
        shards = shards_of(parameters)
        matrices = logical_matrices([tuple(p.shape) for p in parameters], [group["parts"] for group, _ in chosen])

        def direction(number: int) -> Tensor:
            matrix = matrices[number]
            group, p = chosen[matrix.parameter]
            rows = matrix.rows(shards.rank, shards.ranks)
            gradient, momentum = local(p.grad)[rows], local(self.state[p]["momentum"])[rows]
            momentum.lerp_(gradient, 1 - group["momentum"])
            return gradient.lerp(momentum, group["momentum"])  # Nesterov

        device = local(parameters[0]).device
        for number, update in self._orthogonalize(direction, matrices, shards, chosen[0][0]["steps"], device):
            matrix = matrices[number]
            group, p = chosen[matrix.parameter]
            weight = local(p)[matrix.rows(shards.rank, shards.ranks)]
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))

    def _orthogonalize(
        self,
        direction: Callable[[int], Tensor],
        matrices: tuple[Matrix, ...],
        shards: Shards,
        steps: int,
        device: torch.device,
    ) -> Iterator[tuple[int, Tensor]]:
        """Number of a matrix and this rank's rows of its update, for each matrix."""
        return orthogonalize_sharded(direction, matrices, shards, device, steps, self.bucket_size, self.dtype)


class NaiveMuonWithAdamW(MuonWithAdamW):
    """The baseline without owners: every rank gathers every matrix whole and orthogonalises all of them."""

    def _orthogonalize(
        self,
        direction: Callable[[int], Tensor],
        matrices: tuple[Matrix, ...],
        shards: Shards,
        steps: int,
        device: torch.device,
    ) -> Iterator[tuple[int, Tensor]]:
        for number, matrix in enumerate(matrices):
            rows = direction(number)
            if shards.group is not None:
                # A collective of equal shares: shards are padded to the largest
                counts = [matrix.size(rank, shards.ranks) // matrix.columns for rank in range(shards.ranks)]
                padded = rows.new_zeros(max(counts), matrix.columns)
                padded[: len(rows)] = rows
                gathered = [torch.empty_like(padded) for _ in counts]
                dist.all_gather(gathered, padded, group=shards.group)
                rows = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
            update = newton_schulz(rows[None], steps, dtype=self.dtype)[0]
            if shards.group is not None:
                update = update.split(counts)[shards.rank]
            yield number, update


class TorchMuonWithAdamW(MuonWithAdamW):
    """The baseline `torch.optim.Muon`: one matrix at a time, in bfloat16, fused matrices whole; under FSDP2 each of
    its matrix products communicates."""

    # It is lent our groups and our state at each step, so that they save and load as those of the others do

    def _muon_step(self, groups: list[dict]) -> None:
        engine = torch.optim.Muon([nn.Parameter(torch.zeros(1, 1))], adjust_lr_fn="match_rms_adamw")
        engine.state = self.state
        engine.param_groups = [
            engine.defaults
            | {key: group[key] for key in ("params", "lr", "weight_decay", "momentum")}
            | {"ns_steps": group["steps"]}
            for group in groups
        ]
        engine.step()


OPTIMIZERS = {"muon": MuonWithAdamW, "muon_naive": NaiveMuonWithAdamW, "torch_muon": TorchMuonWithAdamW}
