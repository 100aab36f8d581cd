"""Train the demo model from scratch on a CPU: 1.67 million parameters, about 8 minutes.

Run as a script in the reference environment, which has torch and transformers:

    OMP_WAIT_POLICY=PASSIVE <reference environment>/bin/python conductor/demo/train.py --output DIR

The result depends on the seed, the number of steps, the number of threads and the kind of CPU,
and on nothing else. Progress goes to standard output, one JSON object a line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizer import LONGEST_INPUT, PAD, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from skills import END, training_question

MIX = {
    "addition": 2.5,
    "sorting": 0.6,
    "reverse": 0.7,
    "majority": 0.6,
    "compare": 1.5,
    "facts": 3.0,
}
"""How often each skill comes up: the ones that are harder to learn more often."""

ROWS_PER_BATCH = 128
WARMUP_STEPS = 60
FLAT_SHARE = 0.1
"""Share of the steps at the full learning rate; it then falls to 1 % in a straight line."""

IGNORED = -100
"""Label of a position that does not count: the prompt and the padding."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Questions with answers: token ids and labels, both [rows, tokens], and each row's skill."""

    ids: torch.Tensor
    labels: torch.Tensor
    skills: list[str]


def main() -> None:
    """Train, report progress, and write a checkpoint that transformers and vLLM can load."""
    arguments = parse_arguments()
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    train(model, batches(tokenizer, arguments.seed), arguments.steps, arguments.log_every)
    save(model, tokenizer, arguments.output)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the defaults are those of the shipped model."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100, metavar="STEPS")
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory; giving it back after every step is up to 5 times slower."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # parameter numbers of glibc's malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 512 * 2**20)


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build a Llama with random weights; heads of 32, the smallest that vLLM serves on a CPU."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LONGEST_INPUT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Draw training questions for ever; only the answers have labels."""
    rng = random.Random(seed + 1)
    pad = tokenizer.token_to_id(PAD)
    while True:
        skills = rng.choices(list(MIX), list(MIX.values()), k=ROWS_PER_BATCH)
        questions = [training_question(skill, rng) for skill in skills]
        prompts = [e.ids for e in tokenizer.encode_batch([q.prompt for q in questions])]
        answers = [e.ids for e in tokenizer.encode_batch([q.answer + END for q in questions])]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((ROWS_PER_BATCH, longest), pad)
        labels = torch.full((ROWS_PER_BATCH, longest), IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield Batch(ids=ids, labels=labels, skills=skills)


def train(model: LlamaForCausalLM, source: Iterator[Batch], steps: int, log_every: int) -> None:
    """Take `steps` optimizer steps; every `log_every` print the mean loss and that per skill."""
    optimizers, clipped = build_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    losses: dict[str, list[float]] = {skill: [] for skill in MIX}
    start = time.monotonic()
    for step in range(1, steps + 1):
        factor = rate_factor(step, steps)
        for group, full_rate in zip(groups, full_rates, strict=True):
            group["lr"] = full_rate * factor
        batch = next(source)
        token_losses, rows = answer_losses(model, batch)
        token_losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row_losses = torch.zeros(ROWS_PER_BATCH).index_add_(0, rows, token_losses.detach())
        for skill, loss in zip(batch.skills, row_losses.tolist(), strict=True):
            losses[skill].append(loss)
        if step % log_every == 0 or step == steps:
            report(step, steps, time.monotonic() - start, losses)
            losses = {skill: [] for skill in MIX}


def build_optimizers(
    model: LlamaForCausalLM,
) -> tuple[list[torch.optim.Optimizer], list[torch.nn.Parameter]]:
    """Return Muon for the matrices inside the layers and AdamW for the rest, and that rest.

    Muon halves the steps that this model needs; it is made for hidden matrices only. The
    embeddings take a higher rate, because each token's row gets a gradient in few batches.
    """
    hidden, clipped = [], []
    for name, parameter in model.named_parameters():
        is_hidden_matrix = parameter.ndim == 2 and ".layers." in name
        (hidden if is_hidden_matrix else clipped).append(parameter)
    embedding = model.model.embed_tokens.weight
    others = [parameter for parameter in clipped if parameter is not embedding]
    adam = torch.optim.AdamW(
        [{"params": [embedding], "lr": 0.01}, {"params": others, "lr": 3e-3}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    muon = torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.01, ns_steps=5)
    return [adam, muon], clipped


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the full learning rate for a step, counted from 1."""
    done = (step - 1) / steps
    warmup = min(1.0, step / WARMUP_STEPS)
    decay = 1.0 if done < FLAT_SHARE else max(0.01, (1 - done) / (1 - FLAT_SHARE))
    return warmup * decay


def answer_losses(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy (nats) of every answer token, [tokens], and the row of each."""
    targets = batch.labels[:, 1:]
    counted = targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch.ids).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[counted])
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[counted], reduction="none")
    return losses, counted.nonzero()[:, 0]


def report(step: int, steps: int, seconds: float, losses: dict[str, list[float]]) -> None:
    """Print one line of progress: the mean loss of an answer, in nats, all over and per skill."""
    drawn = [loss for skill_losses in losses.values() for loss in skill_losses]
    line = {
        "step": step,
        "steps": steps,
        "seconds": round(seconds, 1),
        "loss": round(sum(drawn) / len(drawn), 4),
        "skills": {skill: round(sum(v) / len(v), 4) for skill, v in losses.items() if v},
    }
    print(json.dumps(line), flush=True)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint in BF16 with its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(PAD)
    )
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # written for the owner alone
    save_tokenizer(tokenizer, directory)


if __name__ == "__main__":
    main()
