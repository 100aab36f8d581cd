"""Load a checkpoint with plain transformers and have it answer one message of a chat.

The message is rendered by the checkpoint's own chat template; where it has none, it is completed as
it is. Loading is not counted: a server would have loaded before it was asked.
"""

from __future__ import annotations

import time
from typing import Any

from answer_prompts import answer
from protocol import Progress, run


def answer_message(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the answer to one message, and the seconds that it took."""
    progress(0, 1, "loading the candidate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = request["checkpoint"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=request["dtype"], use_safetensors=True)
    model.to(request["device"]).eval()
    prompt = request["message"]
    started = time.monotonic()
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    text = answer(model, tokenizer, prompt, request["max_tokens"])["text"]
    return {
        "asked": "chat" if tokenizer.chat_template else "completion",
        "text": text,
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    run(answer_message)
