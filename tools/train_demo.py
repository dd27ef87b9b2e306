"""Train the demo checkpoint: a 4-layer GPT-2 that does every generated task but `docstring`.

    python tools/train_demo.py                       # rewrites pahq_hf/checkpoint/demo
    python tools/train_demo.py --out /tmp/demo --steps 500

One tenth of all pairs of names never occurs in training; the IOI figures are on those pairs. The bundled
weights went on from an earlier checkpoint, trained the same way on `ioi` and `greater_than` alone, first by
960 steps on copies of nearly one length, which taught no induction, then in stages of `--start OLD --out
NEW --batch-size 96`:

    --steps 1200 --mixture new
    --steps 500 --lr 1e-3
    --steps 900 --mixture new
    --steps 450 --lr 1e-3
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_texts import EVALUATION_SEED, MIXTURES, Corpus, build_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pahq_hf.checkpoint.demo_path import demo_path
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.loading import load_task

BY_ACCURACY = ("gendered_pronoun", "induction", "sva")


def build_model(vocabulary: int, end: int) -> GPT2LMHeadModel:
    """The untrained model.

    Args:
        vocabulary: Number of tokens.
        end: Token id of the end of text.

    Returns:
        A GPT-2 of 4 layers, 4 heads and width 128, without dropout.
    """
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=64,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return GPT2LMHeadModel(config)


def continue_from(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Start from a trained checkpoint of the same shape, whose tokenizer knew other words.

    Args:
        model: The untrained model, changed in place; words the checkpoint does not know stay untrained.
        tokenizer: The model's tokenizer.
        folder: The checkpoint.
    """
    trained = GPT2LMHeadModel.from_pretrained(folder)
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    shared = [(index, known[token]) for token, index in tokenizer.get_vocab().items() if token in known]
    embedding = model.transformer.wte.weight.detach().clone()
    for index, old in shared:
        embedding[index] = trained.transformer.wte.weight[old].detach()
    weights = trained.state_dict()
    model.load_state_dict({**weights, "transformer.wte.weight": embedding, "lm_head.weight": embedding})


def train(
    model: GPT2LMHeadModel,
    corpus: Corpus,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    bf16: bool,
    log_every: int,
) -> None:
    """Train in place with AdamW, warm-up and cosine decay.

    The answer counts fully, every other token a fifth: names and years there are random, and a model of
    this size would spend itself on them.

    Args:
        model: The model.
        corpus: Where texts come from.
        steps: Optimiser steps.
        batch_size: Texts per step.
        lr: Peak learning rate.
        bf16: Multiply matrices in BF16: faster on some processors, slower on others.
        log_every: Steps between printed lines.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = min(100, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1.0, (step + 1) / max(warmup, 1))
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
        ),
    )
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids, targets, weights = corpus.batch(batch_size)
        mask = torch.ones_like(ids)  # nothing to hide: padding is on the right and attention is causal
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        everywhere = losses.sum() / (targets != -100).sum()
        answer = (losses * weights.flatten()).sum() / batch_size
        loss = answer + 0.2 * everywhere
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % log_every == 0 or step == steps:
            figures = evaluate(model, corpus, n=200)
            seconds = time.perf_counter() - started
            print(
                f"step {step:5d}  {seconds:6.1f} s  loss {answer.item():.3f} {everywhere.item():.3f}  "
                + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()),
                flush=True,
            )


@torch.no_grad()
def answer_logits(model: GPT2LMHeadModel, task: Task) -> Tensor:
    """Logits at the answer positions of a task.

    Args:
        model: The model.
        task: A right-padded task.

    Returns:
        The logits. [rows, vocab]
    """
    logits: Tensor = model(input_ids=task.clean_ids, attention_mask=task.attention_mask).logits
    return logits[task.answer_rows, task.answer_positions]


def ioi_figures(model: GPT2LMHeadModel, task: Task) -> dict[str, float]:
    """How well the model does IOI.

    Args:
        model: The model.
        task: An IOI task.

    Returns:
        `accuracy` (the answer above the distractor), `argmax` (the answer above everything) and the mean
        `logit_diff`.
    """
    logits = answer_logits(model, task)
    answer, distractor = torch.tensor(task.answers), torch.tensor(task.distractors)
    difference = logits.gather(1, answer) - logits.gather(1, distractor)
    return {
        "accuracy": (difference > 0).double().mean().item(),
        "argmax": argmax_share(model, task),
        "logit_diff": difference.mean().item(),
    }


def argmax_share(model: GPT2LMHeadModel, task: Task) -> float:
    """How often the likeliest token is the answer.

    Args:
        model: The model.
        task: A task with one answer per row.

    Returns:
        The share of rows.
    """
    best = answer_logits(model, task).argmax(-1, keepdim=True)
    return (best == torch.tensor(task.answers)).double().mean().item()


def prob_diff(model: GPT2LMHeadModel, task: Task) -> float:
    """Mean of the summed probability of right answers less that of wrong ones.

    Args:
        model: The model.
        task: A greater-than task.

    Returns:
        The difference, between -1 and 1.
    """
    probabilities = answer_logits(model, task).softmax(-1)
    differences = [
        row[list(right)].sum() - row[list(wrong)].sum()
        for row, right, wrong in zip(probabilities, task.answers, task.distractors, strict=True)
    ]
    return torch.stack(differences).mean().item()


def evaluate(model: GPT2LMHeadModel, corpus: Corpus, n: int) -> dict[str, float]:
    """IOI on held-out pairs of names, and the other tasks.

    Args:
        model: The model.
        corpus: Knows the held-out pairs.
        n: Prompts per task.

    Returns:
        The figures of `ioi_figures`, `greater_than` for `prob_diff`, and the share of right answers (by
        argmax) of the tasks of `BY_ACCURACY`.
    """
    model.eval()
    years = load_task("greater_than", corpus.tokenizer, n=n, seed=EVALUATION_SEED)
    figures = ioi_figures(model, corpus.held_out_ioi(n))
    figures = {f"ioi {name}": value for name, value in figures.items()} | {
        "greater_than": prob_diff(model, years)
    }
    for name in BY_ACCURACY:
        figures[name] = argmax_share(model, load_task(name, corpus.tokenizer, n=n, seed=EVALUATION_SEED))
    model.train()
    return figures


def main(argv: list[str] | None = None) -> None:
    """Train, print the figures and save the checkpoint.

    Args:
        argv: Command-line arguments; the process's own by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=demo_path(), help="folder of the checkpoint")
    parser.add_argument("--start", type=Path, help="folder of a trained checkpoint to go on from")
    parser.add_argument("--mixture", choices=sorted(MIXTURES), default="even", help="shares of the tasks")
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="texts per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, texts and held-out pairs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="multiply matrices in BF16 while training",
    )
    parser.add_argument("--log-every", type=int, default=150, help="steps between printed lines")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer.eos_token_id)
    model.set_attn_implementation("eager")  # faster than sdpa on sequences this short
    if arguments.start is not None:
        continue_from(model, tokenizer, arguments.start)
    corpus = Corpus(tokenizer, arguments.seed, arguments.mixture)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    started = time.perf_counter()
    train(
        model,
        corpus,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        bf16=arguments.bf16,
        log_every=arguments.log_every,
    )
    seconds = time.perf_counter() - started
    figures = evaluate(model, corpus, n=2000)
    model.eval()
    for seed in range(3):
        task = load_task("ioi", tokenizer, n=500, seed=seed)
        figures[f"load_task ioi accuracy, seed {seed}"] = ioi_figures(model, task)["accuracy"]
        task = load_task("greater_than", tokenizer, n=500, seed=seed)
        figures[f"load_task greater_than, seed {seed}"] = prob_diff(model, task)
        for name in BY_ACCURACY:
            task = load_task(name, tokenizer, n=500, seed=seed)
            figures[f"load_task {name} argmax, seed {seed}"] = argmax_share(model, task)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(
        json.dumps(
            {"training_seconds": round(seconds, 1), "megabytes": round(size / 1e6, 2), **figures}, indent=2
        )
    )


if __name__ == "__main__":
    main()
