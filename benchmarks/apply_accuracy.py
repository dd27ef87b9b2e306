"""What circuits say inside `model.apply`, on unseen prompts: beside corrupted prompts, and plainly."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.nn import functional

from pahq_hf import Circuit, PAHQModel, Task, load_task
from pahq_hf.circuit.ablation import is_poor
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.config import Ablation, PAHQConfig
from pahq_hf.errors import AblationWarning, PAHQError
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.search.attribution.kinds import MethodName

_DESCRIPTION = """\
Find a task's circuits, let the model speak as each of them on prompts of another seed, and count right
answers."""

_EPILOG = """\
circuits, given as ABLATION:SEARCH
  corrupted:acdc:0.05         ACDC at a threshold.
  mean:acdc:0.01:eap-ig:0.05  The same after a screen, which leaves the best 5 % of edges to be tested.
  mean:eap-ig:2000            The best edges of an attribution.

figures
  faith.     Faithfulness on the unseen prompts, under the circuit's own ablation.
  full, corrupted=, plain
             Share of unseen prompts whose first generated token is a right answer: of the model, of the
             circuit beside its corrupted prompts, and in plain apply().
  warns      The figure of the warning that plain apply() gives, if it gives one, and whether it is poor.
  says       What the model, and plain apply(), say after the first unseen prompt.
"""


@dataclass(frozen=True)
class Search:
    """How a circuit is found.

    Attributes:
        text: As given.
        ablation: What stands in for removed edges.
        method: `acdc` or an attribution.
        amount: Threshold, or edges to keep.
        screen: Of ACDC.
    """

    text: str
    ablation: Ablation
    method: str
    amount: float
    screen: str | None

    @classmethod
    def parse(cls, text: str) -> Search:
        """Read `ABLATION:acdc:TAU[:SCREEN]` or `ABLATION:METHOD:EDGES`."""
        ablation, method, amount, *rest = text.split(":")
        return cls(text, cast(Ablation, ablation), method, float(amount), ":".join(rest) or None)

    def run(self, model: PAHQModel, task: Task, metric: str | None) -> Circuit:
        """Find it."""
        if self.method == "acdc":
            return model.discover(
                task,
                threshold=self.amount,
                ablation=self.ablation,
                metric=metric,
                screen=self.screen,
                progress=False,
            )
        method, count = cast(MethodName, self.method), int(self.amount)
        return model.attribute(task, method=method, topn=count, ablation=self.ablation, metric=metric)


@dataclass(frozen=True)
class Row:
    """What one circuit says.

    Attributes:
        task: Name.
        search: How it was found.
        edges: Kept.
        faithfulness: Under its own ablation, on unseen prompts.
        full: Accuracy of the model on them.
        beside: Of the circuit beside corrupted prompts.
        plain: Of the circuit in plain `apply()`.
        warning: What entering plain `apply()` warned of, or None.
        measured: The figure that it carries for plain `apply()`, of its own prompts.
        poor: Whether that is poor.
        says: The tokens of the model, beside corrupted prompts, and in plain `apply()`, after one prompt.
        same: Share of prompts to which plain `apply()` says just what the model says.
    """

    task: str
    search: str
    edges: int
    faithfulness: float | None
    full: float
    beside: float
    plain: float
    warning: str | None
    measured: float
    poor: bool
    says: tuple[str, str, str]
    same: float


def measure(model: PAHQModel, circuit: Circuit, task: str, unseen: Task, search: str, tokens: int) -> Row:
    """Let the model speak as a circuit.

    Args:
        model: The model.
        circuit: The circuit.
        task: Name.
        unseen: Prompts it was not found on.
        search: How it was found.
        tokens: How many to generate.
    """
    full = _said(model, nullcontext(), unseen, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AblationWarning)
        beside = _said(model, _beside(model, circuit, unseen), unseen, tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = _said(model, model.apply(circuit), unseen, tokens)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, AblationWarning)]
    section = circuit.discovery["apply"]
    share, best = section["accuracy"][section["ablation"]], section["accuracy"]["full"]
    return Row(
        task,
        search,
        circuit.edge_count,
        _faithfulness(model, circuit, unseen),
        _right(full, unseen),
        _right(beside, unseen),
        _right(plain, unseen),
        told[0] if told else None,
        share,
        is_poor(share, best),
        tuple(model.tokenizer.decode(said[0]) for said in (full, beside, plain)),  # type: ignore[arg-type]
        float((plain == full).all(dim=1).float().mean()),
    )


def _faithfulness(model: PAHQModel, circuit: Circuit, task: Task) -> float | None:
    ran = circuit.discovery["arguments"]
    evaluator = Evaluator(model.patched, task, ran["metric"], ran["ablation"])
    return faithfulness(evaluator.metric_of(circuit.kept), evaluator.full, evaluator.empty)


def _beside(model: PAHQModel, circuit: Circuit, task: Task) -> AbstractContextManager[Any]:
    return model.apply(circuit, corrupted=task.corrupted_ids, corrupted_mask=task.attention_mask)


def _said(model: PAHQModel, inside: AbstractContextManager[Any], task: Task, count: int) -> Tensor:
    """What the model says after the prompts. [batch, count]"""
    with inside:
        ids: Tensor = model.generate(
            task.clean_ids,
            attention_mask=task.attention_mask,
            max_new_tokens=count,
            min_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )
    said = ids[:, task.length :]
    return functional.pad(said, (0, count - said.shape[1]))  # where all ended early


def _right(said: Tensor, task: Task) -> float:
    hits = [token in answers for token, answers in zip(said[:, 0].tolist(), task.answers, strict=True)]
    return sum(hits) / len(hits)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| task | found by | edges | faith. | full | corrupted= | plain | warns | says |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        faithful = "–" if row.faithfulness is None else f"{row.faithfulness:.3f}"
        warned = "–" if row.warning is None else f"{row.measured:.2f}" + (", poor" if row.poor else "")
        says = " / ".join("`" + text.replace("\n", "⏎").replace("|", "¦") + "`" for text in row.says[::2])
        lines.append(
            f"| {row.task} | {row.search} | {row.edges:,} | {faithful} | {row.full:.2f} | {row.beside:.2f} | "
            f"{row.plain:.2f} | {warned} | {says} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns an exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.apply_accuracy",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="Hub id, folder, or demo")
    parser.add_argument("--tasks", default="ioi,sva,gendered_pronoun,greater_than", help="comma-separated")
    parser.add_argument("--circuits", nargs="+", default=["corrupted:acdc:0.05", "mean:acdc:0.01"])
    parser.add_argument("--metric", help="of all searches; each task's own by default")
    parser.add_argument("--n", type=int, default=24, help="prompt pairs of the search")
    parser.add_argument("--unseen", type=int, default=50, help="prompts that are counted")
    parser.add_argument("--seed", type=int, default=7, help="of the unseen prompts; searches have 0")
    parser.add_argument("--tokens", type=int, default=3, help="to generate")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(arguments)
    try:
        model = PAHQModel.from_pretrained(given.model, PAHQConfig(regime="fp32"))
        rows = []
        for name in given.tasks.split(","):
            task = load_task(name, model.tokenizer, n=given.n)
            unseen = load_task(name, model.tokenizer, n=given.unseen, seed=given.seed)
            for text in given.circuits:
                circuit = Search.parse(text).run(model, task, given.metric)
                rows.append(measure(model, circuit, name, unseen, text, given.tokens))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    except PAHQError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
