"""Load a Hugging Face causal LM from an id, a folder or a GGUF file, and find its safetensors files."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from pahq_hf.checkpoint.bars import conversion_bar, library_bars
from pahq_hf.checkpoint.dequantise import dequantise, read_as, reading_options
from pahq_hf.checkpoint.foreign import reading
from pahq_hf.checkpoint.gguf import write_header
from pahq_hf.checkpoint.placement import one_device
from pahq_hf.checkpoint.plausible import check_folder, check_sizes
from pahq_hf.checkpoint.streaming import bare_model, load_skeleton, say_loaded_whole
from pahq_hf.checkpoint.weight_files import HUB_ARGUMENTS, pick, resolve, safetensors_files
from pahq_hf.errors import ConfigError, ModelLoadError, UnsupportedModelError, first_line
from pahq_hf.modeling.architectures.assumption import assume_family
from pahq_hf.modeling.architectures.lookup import find_architecture, supported_families, unsupported
from pahq_hf.precision.fp32.source import CheckpointSource

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

_PROBE = "a"

logger = logging.getLogger(__name__)


def trusts(kwargs: Mapping[str, Any]) -> bool:
    """Whether code that comes with a model may run: only where somebody said so.

    Transformers asks on stdin where it is told neither; nothing here may ask.

    Raises:
        ConfigError: If what was said is neither yes nor no.
    """
    value = kwargs.get("trust_remote_code")
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"trust_remote_code must be True or False; got {value!r}")
    return value is True


def _wants_trust(error: BaseException) -> bool:
    return "trust_remote_code" in str(error)


def _untrusted(what: str) -> ModelLoadError:
    return ModelLoadError(
        f"{what} comes with code of its own, which runs only when you say so: read it, and if you trust it "
        "give --trust-remote-code (trust_remote_code=True)"
    )


@library_bars()
def load_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """A model's config, without its weights.

    Args:
        name: Hub id, folder, or `demo`.
        **kwargs: As for `AutoConfig.from_pretrained`, `gguf_file` and `assume_family`.

    Returns:
        The config of a supported family.

    Raises:
        ModelLoadError: If it cannot be read.
        UnsupportedModelError: If the family is not supported.
    """
    check_folder(name)
    wanted = pick(kwargs, *HUB_ARGUMENTS, "gguf_file")
    trust = trusts(kwargs)
    with reading(f"cannot read the model {name!r}"):
        try:
            config = _gguf_config(name, **wanted) if wanted.get("gguf_file") else None
            if config is None:
                config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust, **wanted)
        except (ValueError, OSError, KeyError) as error:
            if _wants_trust(error):
                # Code that would not help need not be trusted first.
                facts = PretrainedConfig.get_config_dict(resolve(name), **wanted)[0]
                family = str(facts.get("model_type", ""))
                if family and family not in supported_families() and not kwargs.get("assume_family"):
                    raise unsupported(family) from error
                raise _untrusted(f"the model {name!r}") from error
            if "model type" in str(error) or "architecture" in str(error):
                said = first_line(error)
                raise UnsupportedModelError(f"cannot tell the family of {name!r}: {said}") from error
            raise
        assume_family(config, kwargs.get("assume_family"))
        check_sizes(config, name, known=False)  # before anything is made by them
        find_architecture(config, of=lambda: bare_model(config, trust_remote_code=trust))
        check_sizes(config, name)
    return config


def _gguf_config(name: str, **kwargs: Any) -> PretrainedConfig | None:
    """The config that a GGUF file's header makes; None where reading the whole file may tell more."""
    path = Path(str(cached_file(resolve(name), kwargs["gguf_file"], **pick(kwargs, *HUB_ARGUMENTS))))
    with tempfile.TemporaryDirectory(prefix="pahq_hf-gguf-") as folder:
        header = Path(folder) / "header.gguf"
        try:
            write_header(path, header)
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=header.name)
        except Exception:  # whatever it is, reading the whole file says it
            return None
    config._name_or_path = resolve(name)
    config._commit_hash = extract_commit_hash(str(path), None)
    return config


@library_bars()
def load(
    name: str, *, streamed: bool, quantize_embeddings: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, CheckpointSource | None]:
    """A model and where its FP32 weights can be read again.

    Args:
        name: Hub id, folder, or `demo`.
        streamed: Leave projections in their files where that can be done.
        quantize_embeddings: Embedding and unembedding too.
        **kwargs: As for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model, and its safetensors files if it has any.

    Raises:
        ModelLoadError: If the checkpoint is missing, incomplete or damaged.
        UnsupportedModelError: If the family is not supported.
        ConfigError: If another attention implementation than `eager` is asked for, or several devices.
    """
    _check_attention(kwargs)
    device = one_device(kwargs.get("device_map"), kwargs.pop("max_memory", None))
    if kwargs.get("device_map") is not None:
        kwargs["device_map"] = {"": device}
    config = load_config(name, **kwargs)
    origin, arguments = name, kwargs
    if kwargs.get("gguf_file"):
        try:
            origin = str(converted(name, **kwargs))
            arguments = {key: kwargs[key] for key in ("dtype", "device_map") if key in kwargs}
        except _UnkeptError:
            if streamed:
                raise
    pickled = kwargs.get("use_safetensors") is False
    quantised = read_as(config)
    files = [] if pickled or quantised else safetensors_files(origin, **arguments)
    source = CheckpointSource(files) if files else None
    full = kwargs.get("dtype", torch.float32) in (torch.float32, "float32")
    reason = f"its weights are in {quantised}" if quantised else _cannot_stream(source, full)
    if streamed and source is not None and reason is None:
        model = load_skeleton(
            config, source, device, quantize_embeddings=quantize_embeddings, trust_remote_code=trusts(kwargs)
        )
        if model is not None:
            _load_generation_config(model, origin, **arguments)
            return model, source
    model = load_model(origin, **arguments)
    if streamed and reason is not None and model.dtype == torch.float32:  # others will be refused
        say_loaded_whole(f"{name}: {reason}")
    model.config._name_or_path = config._name_or_path
    return model, source


def _cannot_stream(source: CheckpointSource | None, full: bool) -> str | None:
    """Why a checkpoint cannot be read tensor by tensor; None if it can."""
    if source is None:
        return "there are no safetensors files"
    return None if full else "a dtype other than float32 is asked for"


def _check_attention(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("attn_implementation", "eager") != "eager":
        raise ConfigError(
            "attn_implementation must be 'eager': attention is cut into heads and needs its explicit mask"
        )


def _load_generation_config(model: PreTrainedModel, name: str, **kwargs: Any) -> None:
    with reading(f"cannot read the generation config of {name!r}"):
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                resolve(name), **pick(kwargs, *HUB_ARGUMENTS)
            )
        except OSError:
            return  # most have none; the model made one from its config


def converted(name: str, **kwargs: Any) -> Path:
    """A GGUF checkpoint as safetensors, converted once and kept in the cache.

    Args:
        name: Folder or Hub id.
        **kwargs: `gguf_file` and Hub arguments.

    Returns:
        The folder of the converted checkpoint: `gguf/...` below `$PAHQ_CACHE` or `~/.cache/pahq_hf`.

    Raises:
        ModelLoadError: If the file cannot be read, or the cache not be written.
    """
    folder = _conversion(name, **kwargs)
    if folder.exists():
        return folder
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock, tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            if not folder.exists():  # another process was faster
                _convert(name, Path(unfinished) / "model", **kwargs)
                os.rename(Path(unfinished) / "model", folder)
            Path(lock.lock_file).unlink(missing_ok=True)
    except OSError as error:
        raise _UnkeptError(f"cannot keep the converted {name!r} in {folder}: {error}") from error
    except ModelLoadError:
        Path(lock.lock_file).unlink(missing_ok=True)
        raise
    return folder


class _UnkeptError(ModelLoadError):
    """A converted checkpoint cannot be kept."""


def _conversion(name: str, **kwargs: Any) -> Path:
    """The folder of a GGUF file's conversion, there or not: by the file's place, size and time."""
    with reading(f"cannot read the model {name!r}"):
        path = cached_file(resolve(name), kwargs["gguf_file"], **pick(kwargs, *HUB_ARGUMENTS))
        status = os.stat(str(path))
    identity = f"2:{os.path.realpath(str(path))}:{status.st_size}:{status.st_mtime_ns}"
    cache = Path(os.environ.get("PAHQ_CACHE", "~/.cache/pahq_hf")).expanduser()
    return cache / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _convert(name: str, folder: Path, **kwargs: Any) -> None:
    """Write a GGUF file's model and tokenizer as a checkpoint of the plain kind."""
    wanted = pick(kwargs, *HUB_ARGUMENTS, "gguf_file", "trust_remote_code")
    load_model(name, **wanted).save_pretrained(folder)
    tokenizer = _read_tokenizer(name, **wanted)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@library_bars()
def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """The Hugging Face model, in FP32 unless `dtype` says otherwise, with eager attention.

    Args:
        name: Hub id, folder, or `demo`.
        **kwargs: As for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model.

    Raises:
        ModelLoadError: If the checkpoint is missing, incomplete or damaged.
        UnsupportedModelError: If the family is not supported.
        ConfigError: If another attention implementation than `eager` is asked for.
    """
    _check_attention(kwargs)
    config = load_config(name, **kwargs)
    kwargs.pop("assume_family", None)
    kwargs |= reading_options(config)
    kwargs["trust_remote_code"] = trusts(kwargs)
    kwargs.setdefault("dtype", torch.float32)
    if kwargs.get("gguf_file"):
        from transformers import GgufConfig

        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    bar = conversion_bar() if kwargs.get("gguf_file") else nullcontext()
    with reading(f"cannot load the weights of {name!r}"), bar:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name), attn_implementation="eager", output_loading_info=True, **kwargs
        )
    model: PreTrainedModel
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelLoadError(
            f"the checkpoint {name!r} is incomplete: it lacks {len(missing)} tensors, such as {missing[0]}"
        )
    if read_as(config) is not None:
        dequantise(model)
    return model


@library_bars()
def load_tokenizer(name: str, **kwargs: Any) -> Any | None:
    """The model's tokenizer, or None when its folder has none.

    Args:
        name: Hub id, folder, or `demo`.
        **kwargs: Hub arguments, `gguf_file` and `trust_remote_code` are passed on.

    Raises:
        ModelLoadError: If it comes with code of its own that nobody trusts.
    """
    if kwargs.get("gguf_file"):
        folder = _conversion(name, **kwargs)
        if folder.exists():
            return _read_tokenizer(str(folder))
    return _read_tokenizer(name, **kwargs)


def _read_tokenizer(name: str, **kwargs: Any) -> Any | None:
    wanted = pick(kwargs, *HUB_ARGUMENTS, "gguf_file")
    trust = trusts(kwargs)
    try:
        with reading(f"cannot read the tokenizer of {name!r}"):
            tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust, **wanted)
            tokenizer(_PROBE)  # some settings are wrong only where they are used
            # Where there are no files, GPT-2's class makes a tokenizer that knows its special tokens only.
            return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None
    except ModelLoadError as error:
        if error.__cause__ is not None and _wants_trust(error.__cause__):
            raise _untrusted(f"the tokenizer of {name!r}") from error
        if any(os.path.exists(Path(resolve(name)) / file) for file in _TOKENIZER_FILES):
            logger.warning("%s: prompts have to be token ids", error)
        return None  # a model without a tokenizer is fine: tasks may give token ids
