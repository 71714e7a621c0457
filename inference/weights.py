"""The model's weights as the engine reads them: stacked into fewer, larger products, optionally in FP8.

Stacking does not copy: the model's own parameters become views of the stacked tensors, with the same names, shapes and
numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
ALIGNMENT = 16  # elements; what FP8 products need, and what makes rows of bf16 start at 32 bytes


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`; weight (N, K), bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(states, self.weight, self.bias)

    def last_rows(self, count: int) -> "Linear":
        """The layer that computes the last `count` outputs alone."""
        return Linear(self.weight[-count:], None if self.bias is None else self.bias[-count:])


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row scaled to the range of e4m3: (M, K) -> (M, K) float8 and scales (M, 1) float32."""
    scale = values.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (values / scale).to(FP8), scale


@dataclass(frozen=True)
class Fp8Linear:
    """A `Linear` in e4m3 with one scale per output and, computed on the fly, one per row of the input.

    weight (N, K) float8, scale (1, N) float32, bias (N,) bfloat16 or None; K and N are multiples of 16. `quantize` is
    `quantize_rows` or a compiled one.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, layer: Linear, quantize: Callable) -> "Fp8Linear":
        """Quantises a bfloat16 layer."""
        weight, scale = quantize_rows(layer.weight)
        return cls(weight, scale.T.contiguous(), layer.bias, quantize)

    def __call__(self, states: Tensor) -> Tensor:
        """(..., K) bfloat16 -> (..., N) bfloat16."""
        rows, scale = self.quantize(states.flatten(0, -2))
        out = torch._scaled_mm(rows, self.weight.T, scale, self.scale, bias=self.bias, out_dtype=torch.bfloat16)
        return out.unflatten(0, states.shape[:-1])

    def last_rows(self, count: int) -> "Fp8Linear":
        """See `Linear.last_rows`."""
        bias = None if self.bias is None else self.bias[-count:]
        return Fp8Linear(self.weight[-count:], self.scale[:, -count:].contiguous(), bias, self.quantize)


def stacked(tensors: list[nn.Parameter]) -> Tensor:
    """The tensors below one another, (sum of rows, ...); afterwards they are views of the result.

    A second engine of the same model finds them stacked already.
    """
    first = tensors[0]
    ends = [each.storage_offset() + each.numel() for each in tensors]
    if (
        first.device.type != "meta"
        and len({each.untyped_storage().data_ptr() for each in tensors}) == 1
        and [each.storage_offset() for each in tensors[1:]] == ends[:-1]
    ):
        shape = (sum(map(len, tensors)), *first.shape[1:])
        return first.detach().as_strided(shape, first.stride(), first.storage_offset())
    whole = torch.cat([each.detach() for each in tensors])
    for each, piece in zip(tensors, whole.split([len(each) for each in tensors]), strict=True):
        each.data = piece
    return whole


def linear(*modules: nn.Linear) -> Linear:
    """One `Linear` for modules that read the same input; their outputs follow one another.

    Raises:
        ValueError: a module that is not a plain `nn.Linear` (LoRA, a quantised layer).
    """
    for module in modules:
        if type(module) is not nn.Linear:
            raise ValueError(
                f"Found a {type(module).__name__} where the engine reads a Linear. Merge adapters first "
                f"(`merge_and_unload`) and load the weights unquantised; the engine has FP8 of its own."
            )
    if len(modules) == 1:
        (module,) = modules
        return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())
    weight = stacked([module.weight for module in modules])
    return Linear(weight, None if modules[0].bias is None else stacked([module.bias for module in modules]))


def gate_up_down(mlp: nn.Module) -> tuple[Linear, Linear]:
    """The two products of a SwiGLU. A width that is not a multiple of 16 (Qwen2.5-VL's vision encoder: 3420) is
    padded by zeros, in a copy: unaligned rows keep a GPU from its fast products, and FP8 refuses them."""
    pad = -mlp.gate_proj.out_features % ALIGNMENT
    if not pad:
        return linear(mlp.gate_proj, mlp.up_proj), linear(mlp.down_proj)
    gate, up, down = linear(mlp.gate_proj), linear(mlp.up_proj), linear(mlp.down_proj)
    weight = torch.cat([F.pad(each.weight, (0, 0, 0, pad)) for each in (gate, up)])
    bias = None if gate.bias is None else torch.cat([F.pad(each.bias, (0, pad)) for each in (gate, up)])
    return Linear(weight, bias), Linear(F.pad(down.weight, (0, pad)), down.bias)


@dataclass(frozen=True)
class Block:
    """One transformer block: four products, the weight of the norm before each half, (C,)."""

    qkv: Linear | Fp8Linear
    output: Linear | Fp8Linear
    gate_up: Linear | Fp8Linear
    down: Linear | Fp8Linear
    norm1: Tensor
    norm2: Tensor


def decoder_block(layer: nn.Module, convert: Callable[[Linear], Linear | Fp8Linear]) -> Block:
    """A Qwen2 or Qwen2.5-VL decoder layer."""
    attention = layer.self_attn
    products = (
        linear(attention.q_proj, attention.k_proj, attention.v_proj),
        linear(attention.o_proj),
        *gate_up_down(layer.mlp),
    )
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return Block(*map(convert, products), *(weight.detach() for weight in norms))


def vision_block(block: nn.Module, convert: Callable[[Linear], Linear | Fp8Linear]) -> Block:
    """A block of Qwen2.5-VL's vision encoder."""
    products = linear(block.attn.qkv), linear(block.attn.proj), *gate_up_down(block.mlp)
    return Block(*map(convert, products), block.norm1.weight.detach(), block.norm2.weight.detach())
