"""Circuit discovery for Hugging Face causal language models.

PAHQ (arXiv 2510.23264) and ACDC (Conmy et al. 2023) on the models people really use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pahq_hf.precision.quiet import quiet_imports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.config import EngineConfig, PAHQConfig
    from pahq_hf.errors import PAHQError
    from pahq_hf.model import PAHQModel
    from pahq_hf.modeling.architectures.architecture import Architecture
    from pahq_hf.modeling.architectures.lookup import register_architecture
    from pahq_hf.precision.formats.registry import LowFormat, register_format
    from pahq_hf.search.acdc_options import ACDCConfig
    from pahq_hf.search.attribution.options import AttributionConfig
    from pahq_hf.search.bootstrap_options import BootstrapConfig
    from pahq_hf.search.registry import register_search
    from pahq_hf.search.sweep_result import Sweep
    from pahq_hf.tasks.base import Task
    from pahq_hf.tasks.loading import load_task
    from pahq_hf.tasks.metric_spec import MetricSpec
    from pahq_hf.tasks.metrics import register_metric

__all__ = [
    "ACDCConfig",
    "Architecture",
    "AttributionConfig",
    "BootstrapConfig",
    "Circuit",
    "EngineConfig",
    "LowFormat",
    "MetricSpec",
    "PAHQConfig",
    "PAHQError",
    "PAHQModel",
    "Sweep",
    "Task",
    "load_task",
    "register_architecture",
    "register_format",
    "register_metric",
    "register_search",
]

_ROOMS = {
    "ACDCConfig": "search.acdc_options",
    "Architecture": "modeling.architectures.architecture",
    "AttributionConfig": "search.attribution.options",
    "BootstrapConfig": "search.bootstrap_options",
    "Circuit": "circuit.circuit",
    "EngineConfig": "config",
    "LowFormat": "precision.formats.registry",
    "MetricSpec": "tasks.metric_spec",
    "PAHQConfig": "config",
    "PAHQError": "errors",
    "PAHQModel": "model",
    "Sweep": "search.sweep_result",
    "Task": "tasks.base",
    "load_task": "tasks.loading",
    "register_architecture": "modeling.architectures.lookup",
    "register_format": "precision.formats.registry",
    "register_metric": "tasks.metrics",
    "register_search": "search.registry",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: `pahq show` need not wait for torch and transformers."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet_imports():
        room = import_module(f"{__name__}.{_ROOMS[name]}")
    return getattr(room, name)
