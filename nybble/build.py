"""The one place where engine, runner, model and tokenizer meet.

locate the checkpoint → resolve the settings → load the weights → size the memory → runner → warm-up → engine. What was
measured or chosen on the way is in the `StartupReport`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from nybble.core.config import EngineConfig, HardwareFacts, ResolvedConfig, resolve
from nybble.core.errors import ConfigError, MemoryBudgetError
from nybble.core.log import logger
from nybble.engine.engine import Engine
from nybble.grammar.compiler import GrammarCompiler
from nybble.grammar.vocabulary import Vocabulary
from nybble.models.checkpoint import Checkpoint
from nybble.models.decoder import CausalLM
from nybble.models.load import load_model
from nybble.runner.measure import plan_memory, warm_up
from nybble.runner.memory import KVBudget, MemoryFacts
from nybble.runner.model_runner import ModelRunner
from nybble.text.tokenizer import Tokenizer


@dataclass
class StartupReport:
    """What the start found, chose and took."""

    phase_seconds: dict[str, float] = field(default_factory=dict)
    weights_bytes: int = 0
    workspace_bytes: int = 0  # a step's temporaries at their worst, the runner's state, CUDA graphs; 0 on a CPU
    kv_bytes: int = 0
    num_kv_blocks: int = 0
    num_kv_tokens: int = 0
    kernels: dict[str, str] = field(default_factory=dict)  # operation → implementations in use

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phase_seconds[name] = time.perf_counter() - begin
        logger.info("start: %s %.2f s", name, self.phase_seconds[name])

    def lines(self) -> list[str]:
        """For printing: one fact a line."""
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phase_seconds.items())
        return [
            f"ready in {sum(self.phase_seconds.values()):.2f} s ({phases})",
            f"weights {self.weights_bytes / 1e9:.2f} GB, workspace {self.workspace_bytes / 1e9:.2f} GB",
            f"KV cache {self.kv_bytes / 1e9:.2f} GB: {self.num_kv_blocks} blocks, {self.num_kv_tokens} tokens",
            *(f"kernel {operation}: {names}" for operation, names in self.kernels.items()),
        ]


@dataclass(frozen=True)
class Built:
    """An engine and what it was made from."""

    engine: Engine
    runner: ModelRunner
    config: ResolvedConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    report: StartupReport


def build(config: EngineConfig) -> Built:
    """Make an engine ready to serve.

    Raises:
        ConfigError, ModelError, MemoryBudgetError: what the user can mend, each naming the remedy.
    """
    report = StartupReport()
    with report.phase("locate"):
        hardware = find_hardware(config)
        if hardware.device == "cuda":
            _let_segments_grow()
        checkpoint = Checkpoint.locate(config)
        resolved = resolve(config, checkpoint.facts(), hardware)
        tokenizer = _load_tokenizer(checkpoint, config)
    with report.phase("load weights"):
        model = load_model(
            checkpoint,
            dtype=getattr(torch, resolved.dtype),
            device=torch.device(resolved.device),
            load_format=resolved.load_format,
            kernels=resolved.kernels,
            max_model_len=resolved.max_model_len,
        )
    with report.phase("measure memory"):
        facts, budget = plan_memory(model, resolved)
        resolved = _shorten(resolved, budget)
    logger.info("settings: %s", ", ".join(f"{name} = {value}" for name, value in resolved.table()))
    with report.phase("warm up"):
        runner = _make_runner(model, resolved, budget.num_blocks)
        warm_up(runner, resolved)
    _record(report, model.weight_bytes, facts, budget, resolved.block_size, model.kernels)
    vocab_size, end_ids = checkpoint.facts().vocab_size, _end_ids(checkpoint, tokenizer)
    grammars = None
    if tokenizer is not None and tokenizer.knows_bytes:
        grammars = GrammarCompiler(partial(Vocabulary.of, tokenizer, end_ids, vocab_size))
    engine = Engine(
        runner, resolved, tokenizer=tokenizer, eos_token_ids=end_ids, vocab_size=vocab_size, grammars=grammars
    )
    return Built(engine, runner, resolved, checkpoint, tokenizer, report)


def build_engine(config: EngineConfig) -> Engine:
    """`build` for callers that want nothing but the engine."""
    return build(config).engine


def find_hardware(config: EngineConfig) -> HardwareFacts:
    """The device to use: the GPU where there is one, unless the user says otherwise.

    Raises:
        ConfigError: device = cuda without a CUDA device.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda, but torch finds no CUDA device; use device = cpu or see `nybble doctor`")
    if config.device == "cpu" or not torch.cuda.is_available():
        return HardwareFacts(device="cpu", supports_bfloat16=True)
    return HardwareFacts(device="cuda", supports_bfloat16=torch.cuda.get_device_capability() >= (8, 0))


def _end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> set[int]:
    """What ends a text. A chat model may name the end of its turns in tokenizer_config.json only."""
    ids = set(checkpoint.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return ids


def _make_runner(model: CausalLM, config: ResolvedConfig, num_blocks: int) -> ModelRunner:
    try:
        return ModelRunner(model, config, num_blocks=num_blocks)
    except (MemoryError, RuntimeError) as error:  # numpy's and torch's: not enough memory
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise MemoryBudgetError(
            f"the KV cache and the state of max_num_seqs = {config.max_num_seqs} sequences of up to "
            f"{config.max_model_len} tokens do not fit in memory ({str(error).splitlines()[0]}); lower max_num_seqs, "
            f"max_model_len or {config.memory.name}"
        ) from error


def _let_segments_grow() -> None:
    """Let the CUDA allocator join what it reserved into one growing segment; a choice in the environment stays.

    Separate segments leave holes that a slightly smaller step does not fit: with them the memory in use grew by up to
    0.8 GB after everything had been measured. torch reads its environment when it is imported, which is too early here.
    """
    if not (os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _load_tokenizer(checkpoint: Checkpoint, config: EngineConfig) -> Tokenizer | None:
    """Dummy weights may come without a tokenizer: they are run on token ids."""
    if config.load_format == "dummy" and not (checkpoint.path / "tokenizer.json").exists():
        return None
    return Tokenizer.load(checkpoint.path)


def _shorten(config: ResolvedConfig, budget: KVBudget) -> ResolvedConfig:
    if budget.max_model_len == config.max_model_len:
        return config
    logger.warning(
        "max_model_len is %d instead of the model's %d: the KV cache holds no more tokens (%s)",
        budget.max_model_len,
        config.max_model_len,
        config.memory,
    )
    return replace(config, max_model_len=budget.max_model_len)


def _record(
    report: StartupReport,
    weights_bytes: int,
    facts: MemoryFacts,
    budget: KVBudget,
    block_size: int,
    kernels: dict[str, str],
) -> None:
    report.weights_bytes = weights_bytes
    report.workspace_bytes = facts.workspace_bytes
    report.kv_bytes = budget.kv_bytes
    report.num_kv_blocks = budget.num_blocks
    report.num_kv_tokens = budget.num_blocks * block_size
    report.kernels = dict(kernels)
    for line in report.lines():
        logger.info("%s", line)
