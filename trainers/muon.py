"""Muon on the matrices and AdamW on the rest, as one optimizer, for one process or for FSDP2 (Wall-OSS-0.5, 2.2.4).

Muon moves a matrix along the orthogonalised momentum: the nearest matrix whose singular values are all about one. The
size of a gradient drops out, which is what two experts with very different gradients need in one run.

Under FSDP2 a matrix is sharded by rows. Momentum and weights never leave their rank; only the direction does. Each
matrix has one owner rank, chosen so that the Newton-Schulz work is even. One all-to-all brings the shards of a bucket
of matrices to their owners, the owners orthogonalise same-shaped matrices together, one all-to-all brings the rows
back. While a bucket is orthogonalised the next one travels.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


# Keller Jordan's quintic, tuned for a steep start rather than an exact fixed point: singular values end in about
# [0.7, 1.2] (https://kellerjordan.github.io/posts/muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
LAYER_NAME = re.compile(r"(^|\.)(layers|blocks)\.\d+\.")


def newton_schulz(matrices: Tensor, steps: int = 5, gram: bool | None = None) -> Tensor:
    """Orthogonalises each matrix: `U S V^T` becomes about `U V^T`.

    Iterates `X <- (a + b A + c A^2) X`, `A = X X^T`, from `X / |X|`. In Gram form only the small square
    matrices are multiplied: with `P = a + b A + c A^2` the next `A` is `P A P`, and `X` is multiplied once, at the
    end, by the product of all `P`. That is cheaper for a matrix that is at least twice as wide as high.

    Args:
        matrices: (..., m, n), any floating dtype; computed in float32.
        steps: iterations.
        gram: force the Gram form or the plain one; `None` takes the cheaper one.

    Returns:
        (..., m, n) float32.
    """
    a, b, c = COEFFICIENTS
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    if gram is None:
        gram = x.shape[-1] >= 2 * x.shape[-2]
    square = x @ x.mT  # (..., m, m)
    identity = torch.eye(square.shape[-1], device=x.device, dtype=x.dtype)
    product = None  # of the polynomials so far
    for step in range(steps):
        polynomial = a * identity + b * square + c * (square @ square)
        if gram:
            product = polynomial if product is None else polynomial @ product
            if step + 1 < steps:
                square = polynomial @ square @ polynomial
        else:
            x = polynomial @ x
            if step + 1 < steps:
                square = x @ x.mT
    if gram:
        x = product @ x
    return x.mT if tall else x


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> int:
    """Floating point operations that `newton_schulz` needs for one matrix, in its cheaper form."""
    m, n = min(rows, columns), max(rows, columns)
    plain = steps * (4 * m * m * n + 2 * m**3)
    gram = 4 * m * m * n + steps * 2 * m**3 + (steps - 1) * 6 * m**3
    return gram if n >= 2 * m else plain


def assign_owners(shapes: list[tuple[int, int]], world_size: int, steps: int = 5) -> list[int]:
    """The owner rank of each matrix: the most expensive one first, always to the rank with the least work so far."""
    work, owners = [0] * world_size, [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda i: (-newton_schulz_flops(*shapes[i], steps), i)):
        owners[index] = min(range(world_size), key=lambda rank: (work[rank], rank))
        work[owners[index]] += newton_schulz_flops(*shapes[index], steps)
    return owners


def is_muon_parameter(name: str, parameter: nn.Parameter) -> bool:
    """The matrices inside the layers of both experts and of the vision tower.

    AdamW keeps embeddings, the LM head, the action heads, norms and biases. The paper leaves the visual embeddings to
    AdamW; so does this, by name, while the matrices of the vision blocks go to Muon as in the published training code.
    """
    return parameter.ndim == 2 and LAYER_NAME.search(name) is not None


class MuonWithAdamW(torch.optim.Optimizer):
    r"""
    Muon for the parameters that a predicate chooses, AdamW for the others.

    Args:
        named_parameters: of the model; those without `requires_grad` are left out.
        lr: learning rate of both. Muon's update is scaled by `0.2 sqrt(max(m, n))`, which gives it the size of an
            AdamW update (Moonlight, https://huggingface.co/papers/2502.16982), so that one rate and one schedule fit.
        weight_decay: decoupled, for matrices and embeddings; vectors are not decayed.
        momentum: of Muon, with Nesterov.
        betas, eps: of AdamW.
        steps: Newton-Schulz iterations.
        is_muon: `(name, parameter) -> bool`.
        bucket_size: matrices that travel together under FSDP2.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        steps: int = 5,
        is_muon: Callable[[str, nn.Parameter], bool] = is_muon_parameter,
        bucket_size: int = 64,
    ):
        chosen: dict[str, list] = {"muon": [], "decayed": [], "plain": []}
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            if is_muon(name, parameter):
                if parameter.ndim != 2:
                    raise ValueError(f"Muon orthogonalises matrices, but {name} has shape {tuple(parameter.shape)}.")
                chosen["muon"].append(parameter)
            else:
                chosen["decayed" if parameter.ndim >= 2 else "plain"].append(parameter)
        groups = [
            {"params": chosen["muon"], "muon": True},
            {"params": chosen["decayed"], "muon": False},
            {"params": chosen["plain"], "muon": False, "weight_decay": 0.0},
        ]
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "steps": steps,
            "muon": False,
        }
        self.bucket_size = bucket_size
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon_step if group["muon"] else self._adamw_step)(group, parameters)
        return loss

    def _adamw_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            step = state["step"].item()
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))

    def _muon_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        directions = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
        if isinstance(parameters[0], DTensor):
            updates = orthogonalize_sharded(directions, group["steps"], self.bucket_size)
        else:
            updates = orthogonalize(directions, group["steps"])
        for p, update in zip(parameters, updates, strict=True):
            local = p.to_local() if isinstance(p, DTensor) else p
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update.to(local.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """`newton_schulz` of each matrix, those of one shape (also transposed) together. (m, n) each, float32."""
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        batches[min(matrix.shape), max(matrix.shape)].append(index)
    results: list[Tensor] = [None] * len(matrices)
    for indices in batches.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].mT for i in indices]
        for i, result in zip(indices, newton_schulz(torch.stack(wide), steps), strict=True):
            results[i] = result if matrices[i].shape[0] <= matrices[i].shape[1] else result.mT
    return results


def orthogonalize_sharded(matrices: list[DTensor], steps: int = 5, bucket_size: int = 64) -> list[Tensor]:
    """`orthogonalize` of row-sharded matrices: each on its owner rank, one all-to-all there and one back per bucket.

    Args:
        matrices: DTensors, `Shard(0)` over one mesh dimension.
        steps: Newton-Schulz iterations.
        bucket_size: matrices of a bucket; while one is orthogonalised the next one travels.

    Returns:
        The local rows of each orthogonalised matrix, (local rows, n) float32.

    Raises:
        ValueError: another placement.
    """
    mesh = matrices[0].device_mesh
    for matrix in matrices:
        if tuple(matrix.placements) != (Shard(0),) or matrix.device_mesh != mesh:
            raise ValueError(
                f"Muon needs matrices sharded by rows over one mesh dimension, found {matrix.placements} on "
                f"{matrix.device_mesh}: use fully_shard with its default placement."
            )
    owners = assign_owners([tuple(matrix.shape) for matrix in matrices], mesh.size(), steps)
    buckets = [range(i, min(i + bucket_size, len(matrices))) for i in range(0, len(matrices), bucket_size)]
    results: list[Tensor] = [None] * len(matrices)
    travelling = _send_to_owners(matrices, buckets[0], owners)
    returning = None
    for number, bucket in enumerate(buckets):
        shards, sizes, work = travelling
        work.wait()
        if number + 1 < len(buckets):
            travelling = _send_to_owners(matrices, buckets[number + 1], owners)
        owned = _assemble(matrices, bucket, owners, shards, sizes)
        updates = orthogonalize(owned, steps) if owned else []
        if returning is not None:
            _unpack(*returning, results)
        returning = _send_back(matrices, bucket, owners, updates)
    _unpack(*returning, results)
    return results


def _rows(matrix: DTensor, rank: int) -> tuple[int, int]:
    """First row and past-the-end row that `rank` holds: torch shards by `ceil(rows / ranks)`."""
    rows, ranks = matrix.shape[0], matrix.device_mesh.size()
    chunk = -(-rows // ranks)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def _exchange(pieces: list[Tensor], received: list[int], matrices: list[DTensor]):
    """Starts one all-to-all: `pieces[r]` (flat float32) goes to rank r, `received[r]` numbers come from it."""
    out = torch.empty(sum(received), device=pieces[0].device, dtype=torch.float32)
    work = dist.all_to_all_single(
        out,
        torch.cat(pieces),
        output_split_sizes=received,
        input_split_sizes=[len(piece) for piece in pieces],
        group=matrices[0].device_mesh.get_group(),
        async_op=True,
    )
    return out, work


def _flat(tensors: list[Tensor], like: Tensor) -> Tensor:
    parts = [tensor.reshape(-1).float() for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, device=like.device)


def _send_to_owners(matrices: list[DTensor], bucket: range, owners: list[int]):
    """Starts sending this rank's rows of the bucket. Returns (received numbers, sizes by sender, handle)."""
    mesh = matrices[0].device_mesh
    local = [matrices[i].to_local() for i in bucket]
    pieces = [
        _flat([rows for i, rows in zip(bucket, local, strict=True) if owners[i] == rank], local[0])
        for rank in range(mesh.size())
    ]
    mine = [i for i in bucket if owners[i] == mesh.get_local_rank()]
    sizes = [
        sum((_rows(matrices[i], rank)[1] - _rows(matrices[i], rank)[0]) * matrices[i].shape[1] for i in mine)
        for rank in range(mesh.size())
    ]
    out, work = _exchange(pieces, sizes, matrices)
    return out, sizes, work


def _assemble(matrices: list[DTensor], bucket: range, owners: list[int], shards: Tensor, sizes: list[int]) -> list:
    """The whole matrices of the bucket that this rank owns, from the rows of all ranks."""
    mesh = matrices[0].device_mesh
    mine = [i for i in bucket if owners[i] == mesh.get_local_rank()]
    whole = [[] for _ in mine]
    for rank, part in enumerate(shards.split(sizes)):
        offset = 0
        for place, i in enumerate(mine):
            start, stop = _rows(matrices[i], rank)
            count = (stop - start) * matrices[i].shape[1]
            whole[place].append(part[offset : offset + count].view(stop - start, matrices[i].shape[1]))
            offset += count
    return [torch.cat(parts) for parts in whole]


def _send_back(matrices: list[DTensor], bucket: range, owners: list[int], updates: list[Tensor]):
    """Starts sending each rank its rows of the updates. Returns what `_unpack` takes."""
    mesh = matrices[0].device_mesh
    mine = [i for i in bucket if owners[i] == mesh.get_local_rank()]
    like = matrices[bucket[0]].to_local()
    pieces = [
        _flat([update[slice(*_rows(matrices[i], rank))] for i, update in zip(mine, updates, strict=True)], like)
        for rank in range(mesh.size())
    ]
    sizes = [sum(matrices[i].to_local().numel() for i in bucket if owners[i] == rank) for rank in range(mesh.size())]
    out, work = _exchange(pieces, sizes, matrices)
    return matrices, bucket, owners, out, sizes, work


def _unpack(
    matrices: list[DTensor], bucket: range, owners: list[int], out: Tensor, sizes: list[int], work, results: list
) -> None:
    """Waits for the updates of a bucket and puts this rank's rows into `results`."""
    work.wait()
    for rank, part in enumerate(out.split(sizes)):
        offset = 0
        for i in bucket:
            if owners[i] == rank:
                shape = matrices[i].to_local().shape
                results[i] = part[offset : offset + shape.numel()].view(shape)
                offset += shape.numel()
