"""`PAHQModel` against the untouched Hugging Face model, from memory and from checkpoints of every kind."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from pahq_hf.checkpoint.fingerprint import fingerprint
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ConfigError, ModelLoadError, SelfCheckError, UnsupportedModelError
from pahq_hf.model import PAHQModel
from pahq_hf.modeling.architectures.families import TABLE
from pahq_hf.modeling.architectures.lookup import find_architecture
from pahq_hf.modeling.architectures.position_embeddings import NO_ROTARY
from pahq_hf.precision.products import resolve_compute
from tests.helpers import FP32
from tests.models import (
    COMMON,
    FAMILIES,
    HEADS,
    PADDINGS,
    VOCAB,
    WIDTH,
    padded_prompts,
    random_task_arrays,
    relative_error,
    tiny_gpt2,
    tiny_llama,
    word_tokenizer,
)
from tests.referee import Referee

pytestmark = pytest.mark.crossing

TOLERANCE = 1e-5
RTN = PAHQConfig("rtn")

families = pytest.mark.parametrize("family", FAMILIES)


def pair(family: str) -> tuple[PAHQModel, Any]:
    """A patched model in FP32 and an untouched one with the same weights."""
    return PAHQModel(FAMILIES[family](), FP32), FAMILIES[family]()


# -- the same model -------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_logits_equal_hugging_face(family: str, padding: str) -> None:
    model, hf = pair(family)
    prompts = padded_prompts(padding)
    real = prompts["attention_mask"].bool()
    ours, theirs = (m(**prompts, use_cache=False).logits[real] for m in (model, hf))
    assert relative_error(ours, theirs) < TOLERANCE


@families
@torch.no_grad()
def test_hidden_states_and_attentions_are_unchanged(family: str) -> None:
    model, hf = pair(family)
    ids = padded_prompts()["input_ids"]
    ours, theirs = (m(ids, output_attentions=True, output_hidden_states=True) for m in (model, hf))
    for kind in ("attentions", "hidden_states"):
        assert len(ours[kind]) == len(theirs[kind]) >= 2
        for mine, its in zip(ours[kind], theirs[kind], strict=True):
            assert mine.shape == its.shape and relative_error(mine, its) < TOLERANCE
    weights = ours.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@families
@pytest.mark.parametrize("padding", ["none", "left"])
@torch.no_grad()
def test_a_cache_step_by_step(family: str, padding: str) -> None:
    """A first piece, a longer one, then single tokens, each on the cache of those before."""
    model, hf = pair(family)
    prompts = padded_prompts(padding)
    real = prompts["attention_mask"].bool()
    expected = hf(**prompts, use_cache=False).logits[real]
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in inspect.signature(hf.forward).parameters else "past_key_values"
    for subject in (model, hf):
        cache, logits, start = None, [], 0
        for stop in (3, 5, 6, 7, 8, 9):
            output = subject(
                input_ids=prompts["input_ids"][:, start:stop],
                attention_mask=prompts["attention_mask"][:, :stop],
                position_ids=prompts["position_ids"][:, start:stop],
                use_cache=True,
                **{name: cache},
            )
            cache, start = output[name], stop
            logits.append(output.logits)
        assert relative_error(torch.cat(logits, dim=1)[real], expected) < TOLERANCE


@families
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate_is_unchanged(family: str, padding: str, options: dict[str, Any]) -> None:
    model, hf = pair(family)
    prompts = {key: value for key, value in padded_prompts(padding).items() if key != "position_ids"}
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    ours, theirs = model.generate(**prompts, **options), hf.generate(**prompts, **options)
    assert torch.equal(ours, theirs)
    assert len(ours[:, 9:].unique()) > 2  # it says something


def test_sampling_is_unchanged() -> None:
    model, hf = pair("llama")
    texts = []
    for subject in (model, hf):
        torch.manual_seed(1)
        texts.append(subject.generate(padded_prompts()["input_ids"], max_new_tokens=10, do_sample=True))
    assert torch.equal(*texts)


@families
@pytest.mark.parametrize("wrapper", [True, False])
def test_text_generation_pipeline(family: str, wrapper: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Both the wrapper and its `base_model`; prompts of different lengths in one batch."""
    model, hf = pair(family)
    make: Any = pipeline  # its overloads know no wrappers
    pipes = [
        make("text-generation", model=subject, tokenizer=word_tokenizer(), device="cpu")
        for subject in (model if wrapper else model.base_model, hf)
    ]
    assert not [record.message for record in caplog.records if "not supported" in record.message]
    ours, theirs = (
        pipe(["w3 w14 w15 w9", "w26"], batch_size=2, max_new_tokens=6, do_sample=False) for pipe in pipes
    )
    assert ours == theirs
    assert [text[0]["generated_text"].count("w") for text in ours] == [4 + 6, 1 + 6]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_float64_is_float64_throughout(family: str, padding: str) -> None:
    """RMS norms and softmax too, which Hugging Face fixes to float32; against the referee."""
    model = PAHQModel(FAMILIES[family](dtype=torch.float64), FP32)
    arrays = random_task_arrays(padding=padding)
    logits = Referee(FAMILIES[family](), *arrays).circuit_logits(set())
    positions = (arrays.attention_mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        output = model(arrays.clean_ids, attention_mask=arrays.attention_mask, position_ids=positions).logits
    assert output.dtype == torch.float64
    assert relative_error(output[arrays.answer_rows, arrays.answer_positions], logits) < 1e-12


def test_the_default_is_anchored_fp8() -> None:
    """And `auto` says what it means on this machine; the other regimes have nothing to choose."""
    model = PAHQModel(tiny_llama())
    native = resolve_compute("auto", "fp8", model.device)
    assert native in ("fp32", "bf16")
    assert model.pahq_config == PAHQConfig("pahq", "fp8", False, "receiver", native)
    assert model.patched.precision.nbytes < 0.3 * model.patched.precision.nbytes_fp32
    for config in (FP32, RTN):
        assert PAHQModel(tiny_llama(), config).pahq_config == dataclasses.replace(config, compute="fp32")


def test_attributes_fall_through() -> None:
    model = PAHQModel(tiny_llama())
    assert model.config is model.base_model.config
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.get_input_embeddings() is model.base_model.model.embed_tokens
    assert not model.base_model.training
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: BioGptForCausalLM(
                BioGptConfig(
                    vocab_size=VOCAB,
                    hidden_size=WIDTH,
                    intermediate_size=WIDTH,
                    num_hidden_layers=1,
                    num_attention_heads=HEADS,
                )
            ),
            "'biogpt' is not supported; `pahq families` lists .*register_architecture",
        ),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1)),
            "mamba has state-space",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=HEADS)
            ),
            "t5 is an encoder-decoder",
        ),
    ],
    ids=["biogpt", "mamba", "t5"],
)
def test_other_families_are_refused_with_a_reason(
    make: Callable[[], PreTrainedModel], match: str, tmp_path: Path
) -> None:
    hf = make()
    with pytest.raises(UnsupportedModelError, match=match):
        PAHQModel(hf)
    hf.config.save_pretrained(tmp_path)  # told from the config: the weights need not even be there
    with pytest.raises(UnsupportedModelError, match=match):
        PAHQModel.from_pretrained(tmp_path)


def test_a_config_without_a_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises((UnsupportedModelError, ModelLoadError), match=str(tmp_path)):
        PAHQModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_refused(dtype: torch.dtype, saved: Callable[..., Path]) -> None:
    match = f"the model is in {dtype}.*dtype=torch.float32"
    with pytest.raises(ConfigError, match=match):
        PAHQModel(tiny_llama(dtype=dtype))
    with pytest.raises(ConfigError, match=match):
        PAHQModel.from_pretrained(saved("llama", dtype), dtype="auto")


@pytest.mark.parametrize("config", [None, RTN], ids=["default", "rtn"])
def test_float64_goes_with_the_fp32_regime_only(config: PAHQConfig | None) -> None:
    with pytest.raises(ConfigError, match=r"dtype=torch\.float32"):
        PAHQModel(tiny_gpt2(dtype=torch.float64), config)


def test_other_attention_implementations(saved: Callable[..., Path]) -> None:
    """Asked for, they are refused; a model in memory that has one is changed over."""
    with pytest.raises(ConfigError, match="must be 'eager'"):
        PAHQModel.from_pretrained(saved("llama"), attn_implementation="sdpa")
    hf, reference = tiny_llama(), tiny_llama()
    hf.set_attn_implementation("sdpa")
    model = PAHQModel(hf, FP32)
    prompts = padded_prompts("right")
    real = prompts["attention_mask"].bool()
    assert relative_error(model(**prompts).logits[real], reference(**prompts).logits[real]) < TOLERANCE


@pytest.mark.parametrize("config", [FP32, None], ids=["fp32", "default"])
def test_a_patched_model_is_not_patched_again(config: PAHQConfig | None) -> None:
    model = PAHQModel(tiny_gpt2(), config)
    before = model(padded_prompts()["input_ids"]).logits
    with pytest.raises(ConfigError, match="patched already"):
        PAHQModel(model.base_model, config)
    assert torch.equal(model(padded_prompts()["input_ids"]).logits, before)


def plain_heads(**change: Any) -> LlamaForCausalLM:
    """A Llama whose q, k and v projections have one shape, so that any two can be taken for each other."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **sizes, num_attention_heads=HEADS, **change))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"qkv": ("k_proj", "q_proj", "v_proj")}, "logits"),
        ({"qkv": ("q_proj", "v_proj", "k_proj")}, "logits"),
        ({"rotary": NO_ROTARY}, "logits"),
        ({"attention_norm": "post_attention_layernorm"}, "the heads of layer 0"),
        ({"mlp_norm": "input_layernorm"}, "the MLP of layer 0"),
        ({"mlp": "self_attn.o_proj", "mlp_linears": ()}, "the MLP of layer 0"),
        ({"final_norm": "model.layers.1.input_layernorm"}, "logits reads"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_self_check_finds_a_wrong_row_of_the_table(
    change: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PAHQModel(plain_heads())
    wrong = dataclasses.replace(find_architecture(LlamaConfig()), **change)
    monkeypatch.setitem(TABLE, "llama", lambda config: wrong)
    with pytest.raises(SelfCheckError, match=f"self-check failed.*{what}.*differ by"):
        PAHQModel(plain_heads())


def test_self_check_finds_wrong_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that forgets the attention mask."""
    from pahq_hf.modeling.attention import PAHQAttention

    weights = PAHQAttention.weights
    monkeypatch.setattr(
        PAHQAttention, "weights", lambda self, q, k, mask, *rest: weights(self, q, k, None, *rest)
    )
    with pytest.raises(SelfCheckError, match="logits"):
        PAHQModel(tiny_gpt2())


def test_a_model_that_gives_nan_is_refused() -> None:
    hf = tiny_llama()
    hf.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(SelfCheckError, match="NaN"):
        PAHQModel(hf)


# -- accelerate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FP32, RTN], ids=["fp32", "rtn"])
def test_device_map(config: PAHQConfig, saved: Callable[..., Path], spill_folder: Path) -> None:
    folder = saved("llama")
    mapped = PAHQModel.from_pretrained(folder, config, device_map={"": "cpu"})
    plain = PAHQModel.from_pretrained(folder, config)
    ids = padded_prompts()["input_ids"]
    assert torch.equal(mapped(ids).logits, plain(ids).logits)
    assert torch.equal(mapped.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))
    assert not list(spill_folder.iterdir())


def silence_head(model: PAHQModel, head: int) -> Tensor:
    """Logits when one head of layer 1 reads zeros through a reader input of its own."""
    layer = model.patched.layers[1]
    normed: list[Tensor] = []

    def inputs(kind: str) -> Tensor | None:
        if kind != "q":
            return None
        each = normed[-1].repeat(HEADS, 1, 1, 1)
        each[head] = 0
        return each

    with (
        layer.attention_norm.register_forward_hook(lambda _, __, output: normed.append(output)),
        layer.attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "reader_inputs": inputs}), with_kwargs=True
        ),
    ):
        logits: Tensor = model(padded_prompts()["input_ids"]).logits
    return logits


@families
def test_models_with_accelerates_hooks_use_the_patched_attention(family: str) -> None:
    """Its hooks keep a reference to the forward they replaced: that one must be ours."""
    hooked = PAHQModel(dispatch_model(FAMILIES[family](), device_map={"": "cpu"}, force_hooks=True), FP32)
    plain = PAHQModel(FAMILIES[family](), FP32)
    ids = padded_prompts()["input_ids"]
    assert torch.equal(hooked(ids).logits, plain(ids).logits)
    assert torch.equal(silence_head(hooked, 2), silence_head(plain, 2))
    assert not torch.allclose(silence_head(hooked, 2), plain(ids).logits)
    assert torch.equal(hooked.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="offloaded"):
        PAHQModel(cpu_offload(tiny_llama(), execution_device=torch.device("cpu")))


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_sees_every_weight_and_no_precision(family: str) -> None:
    original = FAMILIES[family]()
    mark = fingerprint(original)
    assert fingerprint(FAMILIES[family]()) == mark
    assert PAHQModel(FAMILIES[family](), PAHQConfig(regime="rtn")).identity.fingerprint == mark
    for name, _ in original.named_parameters():
        edited = FAMILIES[family]()
        with torch.no_grad():
            edited.get_parameter(name).flatten()[-1] += 1e-3
        assert fingerprint(edited) != mark, name
