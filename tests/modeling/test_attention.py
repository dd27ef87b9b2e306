"""The head-wise pieces of the patched attention: against Hugging Face, and at every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization import Float8Tensor, PerRow
from transformers import PreTrainedModel

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture
from pahq_hf.capture.substitutes import with_streams
from pahq_hf.config import PAHQConfig
from pahq_hf.model import PAHQModel
from pahq_hf.modeling.attention import PAHQAttention
from pahq_hf.precision.linear import PAHQLinear
from tests.helpers import FP32
from tests.models import (
    FAMILIES,
    HEADS,
    LENGTH,
    PADDINGS,
    WIDTH,
    random_task,
    relative_error,
    tiny_attention_only,
)

pytestmark = pytest.mark.crossing

D_HEAD = WIDTH // HEADS
FORMATS: tuple[str, ...] = ("fp8", "int8", "bf16")

families = pytest.mark.parametrize("family", FAMILIES)


def wrap(family: str, config: PAHQConfig = FP32, **options: Any) -> PAHQModel:
    return PAHQModel(FAMILIES[family](**options), config)


def attention_of(model: PAHQModel, layer: int = 1) -> PAHQAttention:
    return model.patched.layers[layer].attention


def normed(seed: int = 0) -> Tensor:
    """Something an attention norm could have put out. [batch, pos, d_model]"""
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def pieces(attention: PAHQAttention, x: Tensor) -> dict[str, Tensor]:
    """What can be computed head by head; heads or groups on the first axis."""
    z = normed(1).view(2, LENGTH, HEADS, -1)
    return {
        "q": attention.q(x).transpose(0, 1),
        "k": attention.k(x).transpose(0, 1),
        "v": attention.v(x).transpose(0, 1),
        "out": attention.contributions(z).movedim(2, 0),
    }


def hf_projections(hf: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """The attention weights of an untouched model as [out, in], by the names of the patched one."""
    weights = hf.state_dict()
    if hf.config.model_type == "gpt2":  # Conv1D keeps [in, out]; q, k and v lie side by side
        prefix = f"transformer.h.{layer}."
        q, k, v = weights[prefix + "attn.c_attn.weight"].chunk(3, dim=1)
        found = {
            "q_proj": q.t(),
            "k_proj": k.t(),
            "v_proj": v.t(),
            "o_proj": weights[prefix + "attn.c_proj.weight"].t(),
        }
        mlp = {name: weights[f"{prefix}mlp.{name}.weight"].t() for name in ("c_fc", "c_proj")}
    else:
        prefix = f"model.layers.{layer}."
        found = {f"{n}_proj": weights[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkvo"}
        mlp = {f"{n}_proj": weights[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
    return {**found, **{f"mlp.{name}": weight for name, weight in mlp.items()}}


def projections(model: PAHQModel, layer: int) -> dict[str, Any]:
    """The same of a patched model, as modules."""
    found = {f"{n}_proj": getattr(attention_of(model, layer), f"{n}_proj") for n in "qkvo"}
    mlp = zip(model.patched.arch.mlp_linears, mlp_linears(model, layer), strict=True)
    return {**found, **{f"mlp.{name}": linear for name, linear in mlp}}


def mlp_linears(model: PAHQModel, layer: int) -> list[PAHQLinear]:
    return model.patched.mlp_linears(model.patched.layers[layer])


# -- against Hugging Face -------------------------------------------------------------------------


@families
@pytest.mark.parametrize("padding", PADDINGS)
def test_contributions_sum_to_the_residual_stream(family: str, padding: str) -> None:
    model = wrap(family)
    task = random_task(padding=padding)
    run = capture(model.patched, task, task.clean_ids)
    added = with_streams(model.patched, run)
    summed = [*added.attention_in, *added.mlp_in, added.final_in]
    read = [*run.attention_in, *run.mlp_in, run.final_in]
    assert len(summed) == len(read) == 2 * len(model.patched.layers) + 1
    for number, (ours, theirs) in enumerate(zip(summed, read, strict=True)):
        assert relative_error(ours, theirs) < 1e-5, number


@families
def test_one_heads_contribution_is_what_zeroing_the_others_leaves(family: str) -> None:
    """Against an untouched model whose output projection gets one head's z only."""
    model = wrap(family)
    hf: Any = FAMILIES[family]()
    task = random_task()
    attention = attention_of(model, 0)
    block = hf.get_decoder().layers[0] if family != "gpt2" else hf.transformer.h[0]
    output = block.self_attn.o_proj if family != "gpt2" else block.attn.c_proj
    z = capture(model.patched, task, task.clean_ids).z[0]
    contributions = attention.contributions(z)
    inputs: list[Tensor] = []
    with output.register_forward_pre_hook(lambda _, args: inputs.append(args[0])), torch.no_grad():
        hf(input_ids=task.clean_ids, attention_mask=task.attention_mask)
    for head in range(HEADS):
        alone = torch.zeros_like(inputs[0])
        alone[..., head * D_HEAD : (head + 1) * D_HEAD] = inputs[0][..., head * D_HEAD : (head + 1) * D_HEAD]
        expected = output(alone) - output(torch.zeros_like(alone))  # without the bias
        assert relative_error(contributions[..., head, :], expected) < 1e-5


@pytest.mark.parametrize("config", [FP32, PAHQConfig("rtn")], ids=lambda config: config.regime)
@families
def test_packed_output_projections_are_the_output_projection(family: str, config: PAHQConfig) -> None:
    """Head by head, at the precision of the time; and as stored, whatever is raised."""
    model, heads = wrap(family, config), [2, 0, 3]
    attention, z = attention_of(model), normed(1).view(2, LENGTH, HEADS, D_HEAD)
    first = z[..., heads, :].flatten(0, 1).transpose(0, 1)  # heads first

    def packed() -> Tensor:
        found = attention.packed_head_outputs(first, heads).transpose(0, 1).unflatten(0, (2, LENGTH))
        return attention.output.weighted(found)

    stored = attention.contributions(z)[..., heads, :]
    torch.testing.assert_close(packed(), stored)
    model.activate("a1.h0")
    torch.testing.assert_close(packed(), attention.contributions(z)[..., heads, :])
    if config is not FP32:
        assert not torch.allclose(packed(), stored, rtol=1e-4)  # the raised head's part is another
    torch.testing.assert_close(attention.stored_contributions(z[..., heads, :], heads), stored)
    with model.patched.precision.full_precision():
        exact = attention_of(wrap(family)).contributions(z)[..., heads, :]
        torch.testing.assert_close(packed(), exact)
        torch.testing.assert_close(attention.stored_contributions(z[..., heads, :], heads), exact)
    model.patched.precision.release()


def test_probabilities_are_taken_in_fp32() -> None:
    """Also of half precision: in it, a sum over many keys stops growing."""
    attention = attention_of(wrap("llama"))
    products = torch.zeros(1, 1, 1, 5000, dtype=torch.bfloat16)
    bias = torch.zeros(1, 5000, dtype=torch.bfloat16)
    bias[:, 1000:] = -3.0
    found = attention.probabilities(products, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0, 0], bias.float().softmax(-1).bfloat16(), rtol=0, atol=0)


@families
def test_pieces_of_some_heads_are_those_of_all(family: str) -> None:
    attention, x = attention_of(wrap(family)), normed()
    heads = [2, 0, 3]
    groups = [attention.n_groups - 1, 0]
    torch.testing.assert_close(attention.q(x, heads), attention.q(x)[:, heads])
    torch.testing.assert_close(attention.k(x, groups), attention.k(x)[:, groups])
    torch.testing.assert_close(attention.v(x, groups), attention.v(x)[:, groups])
    z = normed(1).view(2, LENGTH, HEADS, D_HEAD)
    each = attention.contributions(z)
    torch.testing.assert_close(attention.contributions(z[..., heads, :], heads), each[..., heads, :])
    torch.testing.assert_close(attention.out(z[..., heads, :], heads), each[..., heads, :].sum(-2))
    bias = 0 if attention.o_proj.bias is None else attention.o_proj.bias
    torch.testing.assert_close(attention.out(z), each.sum(-2) + bias)


@families
def test_mix_of_one_head_is_its_part_of_the_whole(family: str) -> None:
    model = wrap(family)
    task = random_task(padding="left")
    run = capture(model.patched, task, task.clean_ids)
    for number, layer in enumerate(model.patched.layers):
        attention = layer.attention
        x = layer.attention_norm(run.attention_in[number])
        per_group = HEADS // attention.n_groups
        for head in range(HEADS):
            group, tables = head // per_group, run.rotary[number]
            q = attention.finish("q", attention.q(x, [head]), tables, [head])
            k = attention.finish("k", attention.k(x, [group]), tables, [group])
            z = attention.mix(q, k, attention.v(x, [group]), run.masks[number])
            assert relative_error(z[:, :, 0], run.z[number][:, :, head]) < 1e-5


def readers_apart(model: PAHQModel, task: Any, changed: str | None, index: int = 0) -> Activations:
    """A run in which the readers of one kind get inputs of their own; reader `index` gets another one."""
    layer = model.patched.layers[1]
    stream: list[Tensor] = []

    def give(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def inputs(kind: str) -> Tensor | None:
            if changed is None or kind != changed:
                return None
            readers = model.graph.layer_readers(1, kind)  # type: ignore[arg-type]
            each = torch.stack([layer.attention_norm(stream[0])] * len(readers))
            each[index] = layer.attention_norm(stream[0].flip(-1))
            return each

        return args, {**kwargs, "reader_inputs": inputs}

    with (
        layer.attention_norm.register_forward_pre_hook(lambda _, args: stream.append(args[0])),
        layer.attention.register_forward_pre_hook(give, with_kwargs=True),
    ):
        return capture(model.patched, task, task.clean_ids)


@families
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_readers_with_inputs_of_their_own(family: str, split: bool, kind: str) -> None:
    """Only the heads that use reader 1 read out something else than in the plain run."""
    model = wrap(family, PAHQConfig(regime="fp32", split_kv_groups=split))
    task = random_task()
    plain = readers_apart(model, task, None).z[1]
    apart = readers_apart(model, task, kind, index=1).z[1]
    reader = model.graph.readers[model.graph.layer_readers(1, kind)[1]]  # type: ignore[arg-type]
    used_by = {model.graph.writers[node].head for node in reader.nodes}
    assert len(used_by) == (1 if kind == "q" or split or family == "gpt2" else 2)
    for head in range(HEADS):
        differs = relative_error(apart[:, :, head], plain[:, :, head])
        assert (differs > 1e-2) if head in used_by else (differs < 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_only_gpt2_runs(dtype: torch.dtype) -> None:
    """Hugging Face's own forward fails on MLPs without neurons; ours adds their bias."""
    model = PAHQModel(tiny_attention_only(dtype=dtype), FP32)
    assert not model.graph.spec.mlps
    task = random_task()
    run = capture(model.patched, task, task.clean_ids)
    total = run.embedding
    for layer, z in zip(model.patched.layers, run.z, strict=True):
        attention: Any = layer.attention
        mlp: Any = layer.mlp.module
        total = total + attention.contributions(z).sum(-2) + attention.o_proj.bias + mlp.c_proj.bias
    logits = model.patched.unembedding(model.patched.final_norm(total))
    assert relative_error(run.logits, logits[task.answer_rows, task.answer_positions]) < 1e-5


# -- low precision --------------------------------------------------------------------------------


@families
def test_fp8_store_is_torchaos(family: str) -> None:
    """Per output row of every projection, whatever the checkpoint's orientation."""
    model = wrap(family, PAHQConfig("rtn", "fp8"))
    for layer in range(2):
        ours = projections(model, layer)
        theirs = hf_projections(FAMILIES[family](), layer)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            rounded = Float8Tensor.from_hp(weight.contiguous(), granularity=PerRow()).dequantize(
                torch.float32
            )
            assert torch.equal(ours[name].dense(), rounded), name


@families
@pytest.mark.parametrize("config", [FP32, PAHQConfig("rtn")], ids=["fp32", "rtn"])
def test_one_heads_weights_lie_together(family: str, config: PAHQConfig) -> None:
    """Every projection is [out, in] in memory too, also when cut out of a Conv1D."""
    for linear in wrap(family, config).patched.linears():
        stored: Any = linear.weight if linear.low is None else linear.low
        values = stored.codes if linear.low is not None else stored
        assert values.shape == (linear.out_features, linear.in_features) and values.is_contiguous()
        assert linear.dense(slice(0, D_HEAD)).is_contiguous()


@families
@pytest.mark.parametrize("fmt", FORMATS)
def test_active_head_is_fp32_and_others_stay_low(family: str, fmt: str) -> None:
    full, low, raised = (
        wrap(family),
        wrap(family, PAHQConfig("rtn", fmt)),
        wrap(family, PAHQConfig("rtn", fmt)),
    )
    assert raised.activate("a1.h2")
    x = normed()
    exact, rounded, mixed = (pieces(attention_of(model), x) for model in (full, low, raised))
    groups = attention_of(full).n_groups
    for kind in ("q", "k", "v", "out"):
        own = 2 if kind in ("q", "out") else 2 * groups // HEADS
        for index in range(len(mixed[kind])):
            assert not torch.equal(exact[kind][index], rounded[kind][index])
            expected = exact if index == own else rounded
            assert torch.equal(mixed[kind][index], expected[kind][index]), (kind, index)
    below = [pieces(attention_of(model, 0), x) for model in (low, raised)]
    assert all(torch.equal(a, b) for a, b in zip(below[0].values(), below[1].values(), strict=True))


@families
def test_active_mlp_is_fp32_and_its_neighbours_stay_low(family: str) -> None:
    full, low, raised = wrap(family), wrap(family, PAHQConfig("rtn")), wrap(family, PAHQConfig("rtn"))
    raised.activate("m0")
    x = normed()
    exact, rounded, mixed = (
        [layer.mlp(x) for layer in model.patched.layers] for model in (full, low, raised)
    )
    assert torch.equal(mixed[0], exact[0]) and not torch.equal(mixed[0], rounded[0])
    assert torch.equal(mixed[1], rounded[1])


@families
def test_deactivate_restores_and_frees(family: str) -> None:
    model = wrap(family, PAHQConfig("rtn"))
    control = model.patched.precision
    ids = random_task().clean_ids
    before, low = model(ids).logits, control.nbytes
    head_bytes = 4 * WIDTH * 4 * D_HEAD  # its rows of q, k, v and its columns of o
    model.activate("a1.h2")
    assert control.nbytes == low + head_bytes
    active = model(ids).logits
    assert not torch.equal(active, before)
    model.activate("m0")  # the head goes, the MLP comes
    assert control.nbytes == low + sum(4 * w.in_features * w.out_features for w in mlp_linears(model, 0))
    model.deactivate()
    assert control.nbytes == low
    assert torch.equal(model(ids).logits, before)
    model.activate("a1.h2")
    assert torch.equal(model(ids).logits, active)


@families
@pytest.mark.parametrize("fmt", FORMATS)
def test_everything_raised_is_the_fp32_model(family: str, fmt: str) -> None:
    model = wrap(family, PAHQConfig("rtn", fmt))
    control = model.patched.precision
    ids = random_task().clean_ids
    exact, low = wrap(family)(ids).logits, model(ids).logits
    assert relative_error(low, exact) > 1e-4
    with control.full_precision():
        assert torch.equal(model(ids).logits, exact)
    assert torch.equal(model(ids).logits, low)
    model.activate(*(writer.name for writer in model.graph.writers if not writer.is_input))
    assert torch.equal(model(ids).logits, exact)
