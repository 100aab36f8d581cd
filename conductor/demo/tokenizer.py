"""Train the demo model's tokenizer: a byte-level BPE of 384 tokens, in one second.

Digits and capital letters that stand alone are tokens of their own, because the skills work on
single digits and letters. The corpus holds questions of the training split only.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from skills import END, SKILLS, training_question

PAD = "<|pad|>"
VOCABULARY = 384
QUESTIONS_PER_SKILL = 3000
LONGEST_INPUT = 256

CHAT_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'Question: ' + message['content'] + '\n' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Answer:\n' + message['content'] + eos_token }}
{%- else -%}{{ message['content'] + '\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Answer:\n' }}{%- endif -%}
""".lstrip()


def train_tokenizer() -> Tokenizer:
    """Learn the merges; the same on every call."""
    rng = random.Random(0)
    questions = [
        training_question(skill, rng) for skill in SKILLS for _ in range(QUESTIONS_PER_SKILL)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Z](?![a-z])|\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((q.prompt + q.answer for q in questions), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the three files that transformers and vLLM read."""
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": LONGEST_INPUT,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
