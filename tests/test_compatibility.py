import pytest

from conductor.compatibility import TABLE, Device, Engine, Quantizer, Row, check_loadable, choose
from conductor.failure import Failure

BOTH = (Quantizer.MODELOPT, Quantizer.LLMCOMPRESSOR)


def pick(
    bucket: str,
    device: Device,
    quantizer: Quantizer | None = None,
    engine: Engine | None = None,
    quantizers: tuple[Quantizer, ...] = BOTH,
) -> Row:
    return choose(bucket, device, quantizers=quantizers, quantizer=quantizer, engine=engine)


@pytest.mark.parametrize(
    ("bucket", "device", "quantizer", "engine"),
    [
        ("INT8", Device.CPU, Quantizer.LLMCOMPRESSOR, Engine.VLLM),
        ("FP8", Device.CPU, Quantizer.LLMCOMPRESSOR, Engine.VLLM),
        ("INT4", Device.CPU, Quantizer.LLMCOMPRESSOR, Engine.VLLM),
        ("NVFP4", Device.CPU, Quantizer.LLMCOMPRESSOR, Engine.TRANSFORMERS),
        ("NVFP4", Device.CUDA, Quantizer.MODELOPT, Engine.VLLM),
        ("FP8", Device.CUDA, Quantizer.MODELOPT, Engine.VLLM),
        ("INT8", Device.CUDA, Quantizer.LLMCOMPRESSOR, Engine.VLLM),
    ],
)
def test_the_table_picks(bucket: str, device: Device, quantizer: Quantizer, engine: Engine) -> None:
    row = pick(bucket, device)
    assert (row.quantizer, row.engine) == (quantizer, engine)


def test_what_is_asked_for_is_kept() -> None:
    row = pick("FP8", Device.CUDA, Quantizer.LLMCOMPRESSOR, Engine.TRANSFORMERS)
    assert (row.quantizer, row.engine) == (Quantizer.LLMCOMPRESSOR, Engine.TRANSFORMERS)


def test_only_the_reference_engine_is_emulated() -> None:
    assert {row.emulated for row in TABLE if row.engine is Engine.TRANSFORMERS} == {True}
    assert {row.emulated for row in TABLE if row.engine is Engine.VLLM} == {False}


@pytest.mark.parametrize(
    ("bucket", "device", "quantizer", "engine", "words"),
    [
        pytest.param(
            "FP8",
            Device.CPU,
            Quantizer.MODELOPT,
            Engine.TRANSFORMERS,
            ["garbage", "--quantizer llmcompressor --engine vllm on cpu"],
            id="silently-garbage",
        ),
        pytest.param(
            "NVFP4",
            Device.CPU,
            None,
            Engine.VLLM,
            ["--quantizer llmcompressor --engine transformers"],
            id="nvfp4-served-on-a-cpu",
        ),
        pytest.param(
            "INT8",
            Device.CUDA,
            Quantizer.MODELOPT,
            None,
            ["no loader", "--quantizer llmcompressor --engine vllm"],
            id="modelopt-int8",
        ),
        pytest.param("FP6", Device.CPU, None, None, ["nothing works"], id="unknown-format"),
    ],
)
def test_refusals_say_why_and_what_works(
    bucket: str,
    device: Device,
    quantizer: Quantizer | None,
    engine: Engine | None,
    words: list[str],
) -> None:
    with pytest.raises(Failure) as caught:
        pick(bucket, device, quantizer, engine)
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    for word in words:
        assert word in caught.value.message


def test_a_quantizer_that_cannot_do_the_recipe_is_not_chosen() -> None:
    with pytest.raises(Failure, match="on cuda"):
        pick("NVFP4", Device.CPU, quantizers=(Quantizer.MODELOPT,))


@pytest.mark.parametrize(
    ("quantized", "engine"),
    [
        (None, Engine.TRANSFORMERS),
        (("compressed-tensors", "FP8"), Engine.VLLM),
        (("compressed-tensors", "NVFP4"), Engine.TRANSFORMERS),
        (("awq", "INT4"), Engine.VLLM),
    ],
)
def test_what_the_table_has_may_be_loaded(
    quantized: tuple[str, str] | None, engine: Engine
) -> None:
    check_loadable(quantized, engine, Device.CPU)


@pytest.mark.parametrize(
    ("quantized", "engine", "words"),
    [
        (("modelopt", "FP8"), Engine.TRANSFORMERS, "garbage"),
        (("modelopt", "INT8"), Engine.VLLM, "no loader"),
        (("compressed-tensors", "NVFP4"), Engine.VLLM, "--engine transformers"),
        (("compressed-tensors", "unknown"), Engine.VLLM, "never seen"),
    ],
)
def test_what_would_answer_garbage_is_not_loaded(
    quantized: tuple[str, str], engine: Engine, words: str
) -> None:
    with pytest.raises(Failure, match=words):
        check_loadable(quantized, engine, Device.CPU)
