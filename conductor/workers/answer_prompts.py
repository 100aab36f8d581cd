"""Load checkpoints with plain transformers and let each answer the canary's prompts, greedily.

The reference engine's counterpart of a served endpoint: both checkpoints are loaded by the same
library in the same process, one after the other.
"""

from __future__ import annotations

from typing import Any

from determinism import exceptions, use_deterministic_algorithms
from protocol import Progress, run
from pulse import Pulse


def answer(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Return one greedy completion in the canary's form, with a logprob per token."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    completion = output.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = [
        float(torch.log_softmax(logits[0].float(), dim=-1)[token])
        for logits, token in zip(output.logits, completion, strict=True)
    ]
    stop_ids = model.generation_config.eos_token_id
    stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    stopped = int(completion[-1]) in stop_ids
    return {
        "text": tokenizer.decode(completion, skip_special_tokens=True),
        "tokens": [str(token) for token in tokenizer.convert_ids_to_tokens(completion.tolist())],
        # JSON has no NaN: a logprob that is not finite travels as null, and the gate refuses it.
        "logprobs": [value if torch.isfinite(torch.tensor(value)) else None for value in logprobs],
        "finish_reason": "stop" if stopped else "length",
        "error": None,
    }


def answer_all(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Answer every prompt with every checkpoint; a checkpoint that does not load says why."""
    progress = Pulse(progress)
    progress(0, 0, "loading transformers")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    use_deterministic_algorithms()
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    prompts = request["prompts"]
    answers: dict[str, list[Any]] = {}
    load_errors: dict[str, str] = {}
    for number, (side, path) in enumerate(request["checkpoints"].items()):
        progress(number, len(request["checkpoints"]), f"loading the {side}")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=request["dtype"], use_safetensors=True
            )
            model.to(request["device"]).eval()
            answers[side] = [
                answer(model, tokenizer, text, request["max_tokens"]) for text in prompts
            ]
            del model  # one checkpoint at a time
        except (ValueError, RuntimeError, KeyError, OSError, ImportError) as error:
            load_errors[side] = f"{type(error).__name__}: {error}"
    return {
        "answers": answers,
        "load_errors": load_errors,
        "transformers_version": transformers.__version__,
        **exceptions(),
    }


if __name__ == "__main__":
    run(answer_all)
