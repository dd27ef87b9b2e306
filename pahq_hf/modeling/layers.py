"""The rooms of a decoder layer, whatever its family: what the engines compute, and where hooks go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pahq_hf.circuit.graph import GraphSpec
from pahq_hf.errors import UnsupportedModelError
from pahq_hf.modeling.architectures.architecture import Architecture
from pahq_hf.modeling.attention import PAHQAttention
from pahq_hf.modeling.experts import patch_experts
from pahq_hf.modeling.norms import BlockOutput
from pahq_hf.modeling.projections import linear_from, patch_attention
from pahq_hf.precision.linear import PAHQLinear


@dataclass(frozen=True)
class MLP:
    """The MLP of a layer, or its mixture of experts: one node.

    Attributes:
        row: The family's row of the table.
        module: The MLP itself.
        linears: Its projections.
        gates: Projections among them whose results are multiplied with each other.
        output: What makes of the module's result what the block adds.
        entry: Module whose input is what the MLP reads.
        reads_stream: Whether that is the stream; else it is the stream after the norm.
        exit: Module whose output is what the block adds, up to the multiplier of `output`.
        is_routed: Whether the weights that a token meets depend on the token.
    """

    row: Architecture
    module: nn.Module
    linears: list[PAHQLinear]
    output: BlockOutput
    entry: nn.Module
    reads_stream: bool
    exit: nn.Module
    is_routed: bool = False
    gates: tuple[PAHQLinear, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """What the block adds, of the normalised stream. [..., d_model] -> [..., d_model]"""
        if not self.is_routed or x.ndim == 3:
            return self.output(self.row.mlp_run(self.module, x))
        batch = x.reshape(1, -1, x.shape[-1])  # routers unpack an input of three axes
        return self.output(self.row.mlp_run(self.module, batch)).view(x.shape)


@dataclass(frozen=True)
class Layer:
    """The rooms of one decoder layer.

    Attributes:
        block: The decoder layer itself; its input is the stream that its heads read.
        attention: Its patched attention.
        attention_norm: Norm before the attention; an identity where there is none.
        mlp_norm: Norm before the MLP; an identity where there is none.
        mlp: The MLP; its module may have no neurons in an attention-only model.
    """

    block: nn.Module
    attention: PAHQAttention
    attention_norm: nn.Module
    mlp_norm: nn.Module
    mlp: MLP


def patch_layer(block: nn.Module, row: Architecture, number: int, spec: GraphSpec) -> Layer:
    """Patch a decoder layer in place: its attention, and the projections of its MLP.

    Args:
        block: The layer.
        row: The family's row of the table.
        number: Of the layer.
        spec: The model's graph.

    Returns:
        Its rooms.

    Raises:
        UnsupportedModelError: If its attention output has a bias under a norm.
    """
    post = BlockOutput(row.optional(block, row.attention_post_norm), row.residual_multiplier, row.norm_offset)
    attention = patch_attention(row.find(block, row.attention), row, number, spec.heads, spec.kv_groups, post)
    if post.norm is not None and attention.o_proj.bias is not None:
        raise UnsupportedModelError(
            f"the output of attention {number} has a bias under a norm, which belongs to no head and is "
            "not constant: circuits of such a model are not defined"
        )
    return Layer(
        block=block,
        attention=attention,
        attention_norm=row.optional(block, row.attention_norm) or nn.Identity(),
        mlp_norm=row.optional(block, row.mlp_norm) or nn.Identity(),
        mlp=_patch_mlp(block, row),
    )


def _patch_mlp(block: nn.Module, row: Architecture) -> MLP:
    module: nn.Module = row.find(block, row.mlp)
    linears, gates = [], []
    for path, projection in row.mlp_projections(block).items():
        parent, _, name = path.rpartition(".")
        linear = linear_from(projection, row)
        setattr(row.find(module, parent), name, linear)
        linears.append(linear)
        if name in row.mlp_gates:
            gates.append(linear)
    experts = getattr(module, row.experts, None) if row.experts else None
    if experts is not None:
        patched = patch_experts(experts)
        linears += patched.linears()
        gates += [linear for linear in patched.gate_up if isinstance(linear, PAHQLinear)]
    post = row.optional(block, row.mlp_post_norm)
    own_norm = None if row.shares_norm else row.optional(block, row.mlp_norm)
    return MLP(
        row=row,
        module=module,
        linears=linears,
        output=BlockOutput(post, row.residual_multiplier, row.norm_offset),
        entry=module if own_norm is None else own_norm,
        reads_stream=not row.shares_norm,
        exit=row.optional(block, row.mlp_exit) or post or module,
        is_routed=experts is not None,
        gates=tuple(gates),
    )
