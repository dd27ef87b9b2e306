"""ACDC on random weights of GPT-2 small's shape, where every edge is tested, and by verified estimates.

What a random model keeps depends on how it is initialised. As GPT-2 is, one MLP adds to the stream 16 times
what a head adds: most heads are dead, and their readers go untested. Here heads' output projections are
larger, so that every writer weighs about the same, and so are logits, so that each of them counts more than
tau: `logits` keeps all, and every reader is searched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.verified import compared, processor
from pahq_hf import ACDCConfig, PAHQConfig, PAHQModel
from pahq_hf.engine.setting import Setting
from pahq_hf.tasks.base import Pair, Task, collate

_HEADS, _LOGITS = 8.0, 7.0  # times what GPT-2 begins with
_FORWARDS = 5
_EPILOG = """\
figures, one JSON object
  forward        CPU seconds of a bare forward pass of the clean prompts, median of five, all logits.
  tested, kept, flips, slopes, exact, audited, wrong, at_most, sides   As in benchmarks.verified.
  ms_per_test    CPU milliseconds for an edge that `all` tests, capture included, by either.
  x_forward      `tested` x `forward` / CPU seconds, by either.
What `all` finds is kept beside --out and not searched again.
"""


def random_model(layers: int, vocab: int, seed: int) -> GPT2LMHeadModel:
    """GPT-2 small, or fewer layers and tokens of it, all writers of about the same weight."""
    config = GPT2Config(
        n_layer=layers, vocab_size=vocab, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
        for block in model.transformer.h:
            block.attn.c_proj.weight.mul_(_HEADS)
        model.transformer.ln_f.weight.mul_(_LOGITS)
    return model


def random_task(examples: int, length: int, vocab: int, seed: int) -> Task:
    """Random prompts, scored at the last token; corrupted ones are others from the second quarter on."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(vocab, (2, examples, length), generator=generator).unbind()
    same = max(1, length // 4)
    corrupted[:, :same] = clean[:, :same]
    pairs = [Pair(one.tolist(), other.tolist()) for one, other in zip(clean, corrupted, strict=True)]
    return collate(pairs, name="random", metric="kl")


def time_forward(model: GPT2LMHeadModel, task: Task) -> float:
    """CPU seconds of an untouched forward pass, after one that is not counted."""
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + _FORWARDS):
            start = time.process_time()
            model(input_ids=task.clean_ids, attention_mask=task.attention_mask, use_cache=False)
            seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both searches; returns the exit code."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    hf = random_model(args.layers, args.vocab, args.seed)
    task = random_task(args.n, args.length, args.vocab, args.seed)
    forward = time_forward(hf, task)
    model = PAHQModel(hf, PAHQConfig(regime="fp32"), base_model="random")
    setting = Setting(model.patched, task, "kl", "corrupted", model.pahq_config)
    config = ACDCConfig(args.threshold, "kl", readers=args.readers, tests="verified", audit=args.audit)
    found = compared(setting, config, args.out.with_suffix(".npz"))
    cpu = {name: side["cpu"] for name, side in found["sides"].items()}
    row = {
        "processor": processor("cpu"),
        "edges": model.graph.edge_count,
        "forward": forward,
        **found,
        "ms_per_test": {name: 1000 * seconds / max(1, found["tested"]) for name, seconds in cpu.items()},
        "x_forward": {name: found["tested"] * forward / seconds for name, seconds in cpu.items()},
    }
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_gpt2",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = {"layers": 12, "vocab": 50257, "n": 16, "length": 16, "seed": 0, "threads": 1}
    for name, value in whole.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--threshold", type=float, default=0.0005, help="tau (default: 0.0005)")
    parser.add_argument("--audit", type=float, default=0.02, help="share of estimates that are audited")
    parser.add_argument("--readers", help="globs of the readers that are searched")
    parser.add_argument("--out", type=Path, default=Path("random_gpt2.json"), help="where figures are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
