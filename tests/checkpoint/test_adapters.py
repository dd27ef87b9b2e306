"""LoRA adapters: merged into weights, by whose name they are known, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from pahq_hf import Circuit, PAHQConfig, PAHQModel, load_task
from pahq_hf.errors import ConfigError, ModelLoadError
from tests.helpers import run_main, save_tiny
from tests.models import VOCAB, tiny_gpt2, tiny_llama

IDS = torch.arange(12).reshape(2, 6) + 5
Tensors = dict[str, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def halves(model: PreTrainedModel, name: str, rank: int, seed: int = 0) -> Tensors:
    """A and B for a module, as PEFT lays them out: [rank, in], [out, rank]."""
    module = model.get_submodule(name)
    rows, cols = module.weight.shape  # type: ignore[union-attr,misc]
    if type(module).__name__ in ("Conv1D", "Embedding"):
        rows, cols = cols, rows
    kind, end = ("lora_embedding_", "") if isinstance(module, nn.Embedding) else ("lora_", ".weight")
    key = f"base_model.model.{name}.{kind}"
    return {f"{key}A{end}": draw(rank, cols, seed=seed), f"{key}B{end}": draw(rows, rank, seed=seed + 1)}


def write_adapter(folder: Path, base: str | Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    facts = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 6} | config
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


@contextmanager
def beside(model: PreTrainedModel, tensors: Tensors, scales: Mapping[str, float]) -> Iterator[None]:
    """What an adapter does, said otherwise than by merged weights: products run beside each module."""
    handles = []
    for key, first in tensors.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if not part.endswith(("A.weight", "embedding_A")):
            continue
        second = tensors[key.replace("_A", "_B")]

        def add(
            module: Any,
            inputs: Any,
            output: Tensor,
            a: Tensor = first,
            b: Tensor = second,
            s: float = scales[name],
        ) -> Tensor:
            middle = a.T[inputs[0]] if isinstance(module, nn.Embedding) else inputs[0] @ a.T
            return output + s * (middle @ b.T)

        handles.append(model.get_submodule(name).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
CASES: dict[str, tuple[str, list[str], dict[str, Any], list[float]]] = {
    "linear": ("llama", [ATTENTION, MLP], {}, [3, 3]),
    "embedding": ("llama", ["model.embed_tokens"], {}, [3]),
    "rank-stabilised": ("llama", [ATTENTION], {"use_rslora": True}, [6 / 2**0.5]),
    "patterns": (
        "llama",
        [ATTENTION, MLP],
        {"alpha_pattern": {"layers.0.*q_proj": 4, "down": 99}, "rank_pattern": {"k_proj": 7}},
        [2, 3],
    ),
    "Conv1D": (
        "gpt2",
        ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
        {"fan_in_fan_out": True},
        [3, 3],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merged_weights_do_what_the_adapter_does(case: Any, tmp_path: Path) -> None:
    family, names, config, scales = case
    base = save_tiny(tmp_path / "base", family)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tensors: Tensors = {}
    for number, name in enumerate(names):
        tensors |= halves(plain, name, 2, seed=number)
    with beside(plain, tensors, dict(zip(names, scales, strict=True))), torch.no_grad():
        wanted = plain(IDS).logits
    folder = write_adapter(tmp_path / "adapter", base, tensors, **config)
    model = PAHQModel.from_pretrained(folder, precision="fp32")
    with torch.no_grad():
        assert (model(IDS).logits - wanted).abs().max() < 2e-5 < (plain(IDS).logits - wanted).abs().max()
    low = PAHQModel.from_pretrained(folder, format="int8")
    assert low.identity == model.identity


def test_whole_weights_and_biases_of_an_adapter_are_the_models(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    own = {
        "base_model.model.lm_head.weight": draw(VOCAB, 32, seed=1),
        "base_model.model.model.norm.modules_to_save.weight": draw(32, seed=2),
    }
    folder = write_adapter(tmp_path / "a", base, own, modules_to_save=["lm_head", "norm"])
    model = PAHQModel.from_pretrained(folder, precision="fp32")
    assert torch.equal(model.lm_head.weight, own["base_model.model.lm_head.weight"])
    assert torch.equal(
        model.base_model.model.norm.weight, own["base_model.model.model.norm.modules_to_save.weight"]
    )
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2")
    key = "base_model.model.transformer.h.0.mlp.c_fc"
    tensors = halves(tiny_gpt2(), "transformer.h.0.mlp.c_fc", 2) | {f"{key}.lora_B.bias": draw(128, seed=3)}
    biased = PAHQModel.from_pretrained(write_adapter(tmp_path / "b", gpt2, tensors), precision="fp32")
    found = biased.transformer.h[0].mlp.c_fc.bias
    assert torch.allclose(
        found, tiny_gpt2().transformer.h[0].mlp.c_fc.bias + 3 * tensors[f"{key}.lora_B.bias"]
    )


# -- names ------------------------------------------------------------------------------------------


def test_an_adapter_is_part_of_a_models_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base")
    folder = write_adapter(tmp_path / "notes-lora", base, halves(tiny_llama(), ATTENTION, 2))
    model, plain = (PAHQModel.from_pretrained(name, precision="fp32") for name in (folder, base))
    own = model.identity
    assert (own.base_model, own.adapter, own.local) == ("base", "notes-lora", True)
    assert own.fingerprint != plain.identity.fingerprint and plain.identity.adapter is None
    circuit = Circuit(model.graph, model.graph.all_edges.copy(), *[model.graph.no_edges()] * 2, own.to_json())
    circuit.save_pretrained(tmp_path / "circuit")
    assert Circuit.from_pretrained(tmp_path / "circuit").identity == own
    assert "with the adapter notes-lora" in (tmp_path / "circuit" / "README.md").read_text()
    model.save_pretrained(tmp_path / "saved")
    assert PAHQModel.from_pretrained(tmp_path / "saved").identity == own
    assert run_main("info", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["edges"] == model.graph.edge_count
    with pytest.raises(ConfigError, match="adapter's folder, notes-lora"):
        model.push_to_hub("me/x")


def test_an_adapter_of_the_hub(tmp_path: Path) -> None:
    """As it lies in the Hub's cache."""
    base, commit, place = save_tiny(tmp_path / "base"), "c0ffee" * 6 + "c0ff", tmp_path / "models--me--lora"
    folder = write_adapter(place / "snapshots" / commit, base, halves(tiny_llama(), ATTENTION, 2))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    model = PAHQModel.from_pretrained("me/lora", precision="fp32", cache_dir=tmp_path, local_files_only=True)
    own, local = model.identity, PAHQModel.from_pretrained(folder, precision="fp32").identity
    assert (own.adapter, own.adapter_revision, own.base_model) == ("me/lora", commit, "base")
    assert own == local
    model.save_pretrained(tmp_path / "saved")
    saved = PAHQConfig.from_pretrained(tmp_path / "saved")
    assert (saved.base_model, saved.revision) == ("me/lora", commit)


def test_circuits_of_a_base_and_its_adapted_model_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that is trained for a few steps on the demo model."""
    plain = PAHQModel.from_pretrained("demo", precision="fp32")
    task = load_task("gendered_pronoun", plain.tokenizer, n=4)
    hf = AutoModelForCausalLM.from_pretrained(plain.config.name_or_path, attn_implementation="eager")
    names = [name for name, module in hf.named_modules() if name.endswith(("q_proj", "c_attn"))][:2]
    tensors: Tensors = {}
    for number, name in enumerate(names):
        tensors |= halves(hf, name, 2, seed=number)
    trained = [tensor.requires_grad_() for tensor in tensors.values()]
    for number, name in enumerate(names):
        first, second = trained[2 * number : 2 * number + 2]
        parametrize.register_parametrization(hf.get_submodule(name), "weight", _Sum(first, second))
    steps = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        loss = hf(task.clean_ids, labels=task.corrupted_ids).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
    tensors = {key: tensor.detach() for key, tensor in tensors.items()}
    folder = write_adapter(tmp_path / "lora", plain.config.name_or_path, tensors, lora_alpha=2)
    for name, model in (("base", plain), ("adapted", PAHQModel.from_pretrained(folder, precision="fp32"))):
        circuit = model.attribute(task, method="eap", metric="logit_diff", topn=50, progress=False)
        circuit.save_pretrained(tmp_path / name)
    assert run_main("compare", str(tmp_path / "base"), str(tmp_path / "adapted"), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["edges"]["first"] == facts["edges"]["second"] == 50 and 0 < facts["scores"]["pearson"] < 1


class _Sum(nn.Module):
    """W + B A, in either layout."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self._halves = first, second

    def forward(self, weight: Tensor) -> Tensor:
        first, second = self._halves
        product = second @ first
        return weight + (product if product.shape == weight.shape else product.T)


# -- what is refused --------------------------------------------------------------------------------

PLAIN = halves(tiny_llama(), ATTENTION, 2)
FIRST, SECOND = PLAIN
REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "another kind": (PLAIN, {"peft_type": "PROMPT_TUNING"}, "is of type PROMPT_TUNING; only LORA"),
    "DoRA": (PLAIN, {"use_dora": True}, "has use_dora, which is not merged here: let PEFT merge it"),
    "DoRA's vectors": (
        PLAIN | {SECOND.replace("lora_B", "lora_magnitude_vector"): draw(32, seed=0)},
        {},
        "no part of",
    ),
    "PiSSA": (PLAIN, {"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
    "LoRA-GA": (PLAIN, {"init_lora_weights": "lora_ga"}, "changes the model's own weights"),
    "experts": (PLAIN, {"target_parameters": ["experts.down_proj"]}, "has target_parameters"),
    "one half": ({FIRST: PLAIN[FIRST]}, {}, "has only lora_A"),
    "no product": ({FIRST: PLAIN[FIRST], SECOND: draw(32, 3, seed=0)}, {}, "no product of low rank"),
    "another width": ({FIRST: draw(2, 8, seed=0), SECOND: PLAIN[SECOND]}, {}, "is of another model"),
    "another module": (
        {key.replace("q_proj", "qkv"): value for key, value in PLAIN.items()},
        {},
        "another model",
    ),
    "nothing": ({}, {}, "has no weights"),
    "a base in words": (PLAIN, {"base_model_name_or_path": 7}, "does not say which model"),
    "a base that is gone": (PLAIN, {"base_model_name_or_path": "/no/where"}, "the base model of the adapter"),
    "no scale": (PLAIN, {"lora_alpha": "six"}, "no usable lora_alpha: six"),
    "no pattern": (PLAIN, {"alpha_pattern": {"(": 2}}, "has a pattern that is none"),
    "patterns in a list": (PLAIN, {"alpha_pattern": [1]}, "are objects"),
}


@pytest.mark.parametrize(("tensors", "config", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_lora_of_the_model_is_refused(
    tensors: Tensors, config: dict[str, Any], match: str, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, tensors, **config)
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(folder, precision="fp32")
    assert match in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "gpt2")
    tied = write_adapter(tmp_path / "tied", base, halves(tiny_gpt2(), "transformer.wte", 2))
    pickled = write_adapter(tmp_path / "pickled", base, PLAIN)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    cut = write_adapter(tmp_path / "cut", base, PLAIN)
    (cut / "adapter_model.safetensors").write_bytes(b"\x10")
    config = write_adapter(tmp_path / "config", base, PLAIN)
    (config / "adapter_config.json").write_text("[")
    for folder, match in (
        (tied, "ties to another"),
        (pickled, "pickled"),
        (cut, "cannot read"),
        (config, "cannot read"),
    ):
        with pytest.raises(ModelLoadError, match=match):
            PAHQModel.from_pretrained(folder, precision="fp32")


# -- with PEFT itself -------------------------------------------------------------------------------


def with_peft(change: Callable[[Any, Any], Any], **options: Any) -> Any:
    """What PEFT makes of a tiny model, with weights that do something."""
    peft = pytest.importorskip("peft")
    hf = tiny_llama()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
    adapted = change(hf, config)
    for number, (name, parameter) in enumerate(hf.named_parameters()):
        if "lora_B" in name:
            parameter.data = draw(*parameter.shape, seed=number)
    return adapted


@pytest.mark.parametrize("way", ["wrapped", "wrapped with DoRA", "loaded into"])
def test_models_of_peft_are_merged_into_a_copy(way: str) -> None:
    peft = pytest.importorskip("peft")
    if way == "loaded into":
        adapted = with_peft(lambda hf, config: peft.inject_adapter_in_model(config, hf, "mine"))
    else:
        adapted = with_peft(peft.get_peft_model, use_dora="DoRA" in way)
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(IDS).logits
        model = PAHQModel(adapted, PAHQConfig("fp32"))
        assert (model(IDS).logits - wanted).abs().max() < 2e-5
        assert torch.equal(adapted(IDS).logits, wanted)
    assert model.identity.adapter == ("mine" if way == "loaded into" else "default")
    with pytest.raises(ConfigError, match="load the model by the adapter's name"):
        model.save_pretrained("nowhere")
    if way == "wrapped":
        with adapted.disable_adapter(), pytest.raises(ModelLoadError, match="not active"):
            PAHQModel(adapted, PAHQConfig("fp32"))


def test_folders_that_peft_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_tiny(tmp_path / "base")
    adapted = with_peft(peft.get_peft_model, use_rslora=True, modules_to_save=["lm_head"], bias="lora_only")
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    model = PAHQModel.from_pretrained(tmp_path / "adapter", precision="fp32")
    with torch.no_grad():
        assert (model(IDS).logits - adapted.eval()(IDS).logits).abs().max() < 2e-5
    assert (model.identity.base_model, model.identity.adapter) == ("base", "adapter")
