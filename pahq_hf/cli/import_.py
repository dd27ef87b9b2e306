"""`pahq import`: another tool's circuit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.declared import Command
from pahq_hf.cli.groups import SourceChoice
from pahq_hf.cli.options import SplitOption
from pahq_hf.cli.output import JsonOption, print_json
from pahq_hf.errors import ConfigError

logger = logging.getLogger(__name__)


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="JSON of EAP-IG or MIB, or edges of ACDC, AutoCircuit, Edge Pruning."
        ),
    ],
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    source: SourceChoice,
    model: Annotated[
        str | None,
        typer.Option(help="The circuit's model, of which the config is read; lists of edges need it."),
    ] = None,
    split_kv_groups: SplitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a circuit folder of another tool's circuit."""
    from pahq_hf.circuit.files import refuse_overwrite
    from pahq_hf.circuit.interchange import Imported, import_circuit, read_circuit_file

    given = [name for name, value in vars(source).items() if value]
    if model is None and (split_kv_groups or given):
        name = "split_kv_groups" if split_kv_groups else given[0]
        raise ConfigError(f"--{name.replace('_', '-')} is about the model: give it too (--model)")
    refuse_overwrite(out)
    if model is None:
        found = Imported(read_circuit_file(file))
    else:
        from pahq_hf.checkpoint.fingerprint import identity_in
        from pahq_hf.checkpoint.saved_config import load_config_of
        from pahq_hf.modeling.architectures.lookup import graph_spec

        config = load_config_of(model, **source.arguments())
        spec = graph_spec(config, split_kv_groups=split_kv_groups)
        found = import_circuit(file, spec, identity_in(config, model))
    circuit = found.circuit
    circuit.save_pretrained(out)
    if as_json:
        print_json({"out": str(out), "edges": circuit.edge_count, "folded": found.folded})
    elif found.folded:
        logger.warning(
            "%s edges into keys or values that heads share were of some of these heads only; the circuit has "
            "them whole (--split-kv-groups tells heads apart)",
            f"{found.folded:,}",
        )


import_command = Command(import_)
