"""Keyword arguments in Python: what is known does what it says, and nothing unknown is dropped."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pahq_hf import ACDCConfig, Circuit, EngineConfig, PAHQConfig, PAHQModel, load_task
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.report import EvaluationOptions
from pahq_hf.search.arguments import AttributeOptions, DiscoverOptions, EvaluateOptions
from pahq_hf.search.attribution.options import AttributionConfig
from tests.helpers import FP32, save_tiny, wrapped
from tests.models import padded_prompts, random_task, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> PAHQModel:
    """As a user whose editor does not know types."""
    return PAHQModel.from_pretrained(folder, **options)


# -- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "fp32"}, PAHQConfig("fp32", compute="fp32")),
        ({"precision": "rtn", "format": "int8"}, PAHQConfig("rtn", "int8", compute="fp32")),
        (
            {"format": "bf16", "compute": "fp32", "split_kv_groups": True, "active": "both"},
            PAHQConfig("pahq", "bf16", True, "both", "fp32"),
        ),
        (
            {"policy": {"m*": "bf16"}, "quantize_embeddings": True, "compute": "fp32"},
            PAHQConfig(compute="fp32", policy={"m*": "bf16"}, quantize_embeddings=True),
        ),
    ],
    ids=str,
)
def test_precision_as_the_command_line_spells_it(
    options: dict[str, Any], expected: PAHQConfig, folder: Path
) -> None:
    model = load(folder, **options)
    assert model.pahq_config == expected
    assert model.patched.precision.is_low == (expected.regime != "fp32")


@pytest.mark.parametrize("options", [{}, {"precision": "fp32"}], ids=str)
def test_device_and_dtype(options: dict[str, Any], folder: Path) -> None:
    assert load(folder, device="cpu", **options).device == torch.device("cpu")
    assert load(folder, device=torch.device("cpu"), torch_dtype="float32", **options).dtype == torch.float32
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        load(folder, device="abacus", **options)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' cannot be used"):
            load(folder, device="cuda", **options)
    with pytest.raises(ConfigError, match="either device or device_map"):
        load(folder, device="cpu", device_map="auto", **options)


def test_the_older_name_of_dtype_is_not_dropped(folder: Path) -> None:
    assert load(folder, precision="fp32", torch_dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ConfigError, match=r"dtype=torch\.float32"):
        load(folder, torch_dtype="float64")
    with pytest.raises(ConfigError, match="either dtype or torch_dtype"):
        load(folder, torch_dtype="float32", dtype="float32")


@pytest.mark.parametrize("config", [None, FP32], ids=["default", "fp32"])
@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("regime", "did you mean 'precision'"),
        ("precison", "did you mean 'precision'"),
        ("trust_remote", "did you mean 'trust_remote_code'"),
        ("load_in_4bit", "format='fp8', 'int8'"),
        ("load_in_8bit", "format='fp8', 'int8'"),
        ("quantization_config", "format='fp8', 'int8'"),
        (
            "foo",
            r"it knows .*base_model.*; for others load the model yourself and wrap it: PAHQModel\(model\)",
        ),
        ("seed", "give it to discover"),
    ],
)
def test_unknown_names_are_refused(option: str, advice: str, config: PAHQConfig | None, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"from_pretrained has no option '{option}': .*{advice}") as caught:
        load(folder, pahq_config=config, **{option: True})
    assert "\n" not in str(caught.value)


def test_nothing_is_said_twice(folder: Path) -> None:
    with pytest.raises(ConfigError, match="either pahq_config or its fields"):
        load(folder, pahq_config=FP32, precision="rtn")
    with pytest.raises(ConfigError, match=r"precision must be one of .*; got 'int8'"):
        load(folder, precision="int8")
    with pytest.raises(ConfigError, match="pahq_config must be a PAHQConfig"):
        load(folder, pahq_config="fp32")


def test_variant_of_the_weights(tmp_path: Path) -> None:
    """The file of that name, also where another lies beside it."""
    tiny_llama(seed=1).save_pretrained(tmp_path, variant="fp16")
    tiny_llama(seed=0).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    ids = padded_prompts()["input_ids"]
    for options in ({}, {"precision": "rtn"}):
        model = load(tmp_path, variant="fp16", **options)
        with model.patched.precision.full_precision(), torch.no_grad():
            assert torch.allclose(model(ids).logits, tiny_llama(seed=1)(ids).logits, atol=1e-5)


def test_pickled_weights_when_asked(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    other = {name: value + 1 for name, value in load_file(tmp_path / "model.safetensors").items()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    for options in ({"precision": "fp32"}, {"precision": "rtn"}):
        norms = [
            load(tmp_path, use_safetensors=wanted, **options).model.norm.weight for wanted in (True, False)
        ]
        assert torch.equal(norms[0] + 1, norms[1])


def test_a_saved_configuration_with_another_precision(folder: Path, tmp_path: Path) -> None:
    model = load(folder, format="int8", split_kv_groups=True)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.pahq_config == model.pahq_config
    bf16 = load(tmp_path / "saved", format="bf16").pahq_config
    assert bf16 == dataclasses.replace(model.pahq_config, format="bf16")
    assert load(tmp_path / "saved", precision="fp32").pahq_config == PAHQConfig(
        "fp32", split_kv_groups=True, compute="fp32"
    )


# -- work -------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[..., Any]] = {
    "discover": lambda model, **options: model.discover(random_task(), progress=False, **options),
    "sweep": lambda model, **options: model.sweep(random_task(), thresholds=[0.5], progress=False, **options),
    "attribute": lambda model, **options: model.attribute(random_task(), **options),
    "evaluate": lambda model, **options: model.evaluate(circuit(), random_task(), **options),
}


def circuit() -> Any:
    return wrapped("llama").attribute(random_task(), topn=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("foo", "it knows "),
        ("precision", r"PAHQModel.from_pretrained\(..., precision=...\)"),
        ("batch", r"engine=EngineConfig\(batch=...\)"),
        ("n", r"load_task\(..., n=...\)"),
    ],
)
def test_methods_refuse_unknown_names(method: str, option: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} has no option '{option}': .*{advice}"):
        METHODS[method](wrapped("llama"), **{option: 1})


@pytest.mark.parametrize(
    ("method", "option", "near"),
    [
        ("discover", "treshold", "threshold"),
        ("discover", "ablations", "ablation"),
        ("sweep", "reader", "readers"),
        ("attribute", "top_n", "topn"),
        ("evaluate", "curves", "curve"),
    ],
)
def test_methods_name_the_nearest(method: str, option: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"no option '{option}': did you mean '{near}'"):
        METHODS[method](wrapped("llama"), **{option: 1})


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("discover", {"threshold": "0.01"}, "threshold must be a number; got '0.01'"),
        ("discover", {"margin": "wide"}, "margin must be a number"),
        ("discover", {"engine": "hooks"}, "engine must be an instance of EngineConfig; got 'hooks'"),
        ("sweep", {"engine": "hooks"}, "engine must be an instance of EngineConfig"),
        ("discover", {"config": {"threshold": 1}}, "config must be an instance of ACDCConfig"),
        ("attribute", {"topn": 2.5}, "topn must be a whole number from 1 on; got 2.5"),
        ("evaluate", {"samples": "20"}, "samples must be a whole number"),
        ("evaluate", {"reference": "x/acdc"}, "reference takes a Circuit .*; got str: 'x/acdc'"),
        ("discover", {"search": ["acdc"]}, r"there is no search \['acdc'\]"),
        ("discover", {"out": 3}, "an output takes the path of a folder or file; got int: 3"),
    ],
)
def test_values_of_another_type_are_one_line(method: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        METHODS[method](wrapped("llama"), **options)


def test_a_model_is_not_copied_while_a_circuit_is_applied() -> None:
    model = PAHQModel(tiny_llama(), FP32)
    circuit = model.discover(random_task(seed=1), threshold=0.0, progress=False)
    with model.apply(circuit), pytest.raises(ConfigError, match="a circuit is applied to this model"):
        copy.deepcopy(model)
    prompts = padded_prompts("right")
    assert torch.equal(copy.deepcopy(model)(**prompts).logits, model(**prompts).logits)


def test_a_model_that_is_pickled_says_what_to_do_instead(tmp_path: Path) -> None:
    """Copies work; what goes to a file or another process is the configuration."""
    model = PAHQModel.from_pretrained("demo")
    prompts = {"input_ids": torch.tensor([[3, 5, 7]])}
    logits = model(**prompts).logits
    said = (
        "cannot be pickled: keep its configuration with save_pretrained, and load it with PAHQModel.from_pre"
    )
    for act in (lambda: pickle.dumps(model), lambda: torch.save(model, tmp_path / "model.pt")):
        with pytest.raises(ConfigError, match=said):
            act()
    deep, flat = copy.deepcopy(model), copy.copy(model)
    assert flat.patched is model.patched and deep.patched is not model.patched
    task = load_task("ioi", model.tokenizer, n=2)
    scores = [each.attribute(task, topn=5, progress=False).scores for each in (model, deep, flat)]
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(scores[0], scores[2])
    model.save_pretrained(tmp_path)
    for other in (deep, flat, PAHQModel.from_pretrained(tmp_path)):
        assert torch.equal(other(**prompts).logits, logits)


def test_numbers_of_numpy_are_numbers() -> None:
    """And go to JSON as such."""
    assert json.dumps(ACDCConfig(threshold=np.float32(0.5)).to_dict()["threshold"]) == "0.5"
    assert json.dumps(EngineConfig(batch=np.int64(3)).to_dict()["batch"]) == "3"


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (DiscoverOptions, ACDCConfig),
        (AttributeOptions, AttributionConfig),
        (EvaluateOptions, EvaluationOptions),
    ],
)
def test_every_field_can_be_given(names: type, fields: type) -> None:
    assert set(names.__annotations__) == {field.name for field in dataclasses.fields(fields)}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, given: model.discover(given), "discover takes a Task (load_task(...)); got "),
        (
            lambda model, given: model.sweep(given, thresholds=[1]),
            "sweep takes a Task (load_task(...)); got ",
        ),
        (lambda model, given: model.attribute(given), "attribute takes a Task (load_task(...)); got "),
        (
            lambda model, given: model.evaluate(circuit(), given),
            "evaluate takes a Task (load_task(...)); got ",
        ),
    ],
)
@pytest.mark.parametrize("given", ["ioi", None, [1], np.ones((2, 2))])
def test_what_is_no_task_is_refused(call: Callable[..., Any], said: str, given: Any) -> None:
    with pytest.raises(ConfigError) as error:
        call(wrapped("llama"), given)
    assert str(error.value).startswith(said + type(given).__name__)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PAHQModel("demo"), "PAHQModel wraps a loaded model; got str: 'demo': load one by its name"),  # type: ignore[arg-type]
        (lambda: PAHQModel(None), "PAHQModel wraps a loaded model; got NoneType"),  # type: ignore[arg-type]
        (lambda: PAHQModel.from_pretrained(5), "from_pretrained takes a name or a folder; got int: 5"),  # type: ignore[arg-type]
        (lambda: PAHQModel.from_pretrained(None), "from_pretrained takes a name or a folder; got NoneType"),  # type: ignore[arg-type]
        (lambda: Circuit.from_pretrained(5), "from_pretrained takes a name or a folder; got int: 5"),  # type: ignore[arg-type]
        (lambda: PAHQConfig.from_pretrained(5), "from_pretrained takes a name or a folder; got int: 5"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_model_and_no_name_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value).startswith(said)
