"""A plan of a small release on a machine that does not exist, for tests of what it depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from conductor import compatibility, quantizers
from conductor.compatibility import Device
from conductor.config import Config, load_config
from conductor.environments.builder import Environments
from conductor.models import Model
from conductor.probes.machine import Accelerator, Machine
from conductor.release_state import Plan, World
from conductor.suites import load_suite

CPU = Machine(
    device=Device.CPU,
    accelerators=(),
    processor="A processor",
    cores=2,
    memory_bytes=2**34,
    memory_available_bytes=2**33,
    system="Linux",
)
GPU = Accelerator(
    name="An accelerator", memory_bytes=2**36, driver="580.1", compute_capability=(9, 0)
)
CUDA = replace(CPU, device=Device.CUDA, accelerators=(GPU,))

SUITE: Mapping[str, Any] = {
    "name": "small",
    "description": "Two tasks.",
    "include_path": "tasks",
    "max_length": 64,
    "canary_prompts": ["One, two,"],
    "tasks": {
        "sums": {"metric": "exact_match", "kind": "generation", "samples": 3, "fewshot": 0},
        "facts": {"metric": "acc", "kind": "multiple_choice", "samples": 3, "reference": 0.9},
    },
}


@dataclass(kw_only=True)
class Ground:
    """Where a release's sources lie, and how it is asked for."""

    root: Path
    machine: Machine = CPU
    environ: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def suite(self) -> Path:
        return self.root / "suite.yaml"

    @property
    def tasks(self) -> Path:
        return self.root / "tasks"

    @property
    def calibration(self) -> Path:
        return self.root / "calibration.jsonl"

    def lay_out(self) -> Ground:
        """Write a model, a suite and a calibration."""
        self.model.mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            (self.model / name).write_text(f"the {name}", encoding="utf-8")
        self.tasks.mkdir()
        for task in SUITE["tasks"]:
            (self.tasks / f"{task}.yaml").write_text(
                f"task: {task}\ndataset_path: json\n"
                f"dataset_kwargs: {{data_files: {{test: {task}.jsonl}}}}\n",
                encoding="utf-8",
            )
            (self.tasks / f"{task}.jsonl").write_text('{"question": 1}\n', encoding="utf-8")
        self.edit_suite({})
        self.calibration.write_text('{"text": "words"}\n', encoding="utf-8")
        return self

    def edit_suite(self, fields: Mapping[str, Any]) -> None:
        """Write the suite with some fields replaced."""
        self.suite.write_text(json.dumps({**SUITE, **fields}), encoding="utf-8")

    def edit_task(self, name: str, fields: Mapping[str, Any]) -> None:
        """Write the suite with fields of one task replaced."""
        task = {**SUITE["tasks"][name], **fields}
        self.edit_suite({"tasks": {**SUITE["tasks"], name: task}})

    def edit_task_file(self, name: str, fields: Mapping[str, Any]) -> None:
        """Write a task file with some fields replaced."""
        path = self.tasks / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}))

    def plan(self) -> tuple[Config, Plan, World]:
        """Resolve the request as setup does; the model is taken for granted."""
        options = {
            "model": str(self.model),
            "recipe": "int8",
            "suite": str(self.suite),
            "calibration.data": str(self.calibration),
            **self.options,
        }
        config = load_config(None, options)
        suite = load_suite(config.suite)
        row = compatibility.choose(
            quantizers.find_recipe(config.recipe).bucket,
            self.machine.device,
            quantizers=quantizers.able(config.recipe),
            quantizer=config.quantizer,
            engine=config.engine.name,
        )
        calibration = {
            "data": config.calibration.data,
            "split": config.calibration.split,
            "text_column": config.calibration.text_column,
            "samples": config.calibration.samples,
            "max_length": config.calibration.max_length,
            "seed": config.seed,
        }
        plan = Plan(
            model=Model(
                requested=config.model,
                path=Path(config.model),
                revision=None,
                architecture="LlamaForCausalLM",
                weights_bytes=1,
                max_positions=128,
                quantized=None,
            ),
            recipe=quantizers.find_recipe(config.recipe),
            suite=suite,
            row=row,
            quantize_request=quantizers.plan(row.quantizer, config.recipe, calibration),
        )
        world = World(
            environments=Environments(
                self.root / "environments", device=self.machine.device, variables={}
            ),
            environ=self.environ,
            machine=self.machine,
        )
        return config, plan, world
