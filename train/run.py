"""The run context that every loop shares: folder, start, signals, cadence, guards, resume, metrics, export.

A loop asks it for the model, the tokenizer and the state to go on from, hands it rows and checkpoints, and ends with
`finish`. It knows neither batches nor losses.

Exit status: 0 finished, 143 (128 + SIGTERM) preempted after a saved step, 2 the user's mistake, 1 a fault; a scheduler
that sees 143 may start the same command again.
"""

from __future__ import annotations

import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.convert import load_yaml, save_yaml, to_dict
from conf.errors import UserError
from conf.outcome import PREEMPTED_STATUS, finished
from conf.schema import RunConfig
from conf.validate import check, flatten, warnings
from model import Transformer
from train import checkpoint, distributed
from train.alerts import AlertWriter
from train.checkpoint import TrainState
from train.engine_base import EngineBase
from train.guards import Guard
from train.hang import Watchdog
from train.metrics import MetricsWriter, read_metrics
from train.parallel.cp import ContextParallel
from train.parallel.ep import ExpertParallel
from train.parallel.pp import PipelineParallel
from train.parallel.zero3 import Zero3
from train.progress import Progress
from train.saver import Saver
from train.stages import STAGES
from train.start import check_offload, differences, op_settings, resolve, weights_folder
from train.tracker import Tracker, make_tracker

MAY_CHANGE = (  # in a folder that holds a run; everything else is another run
    "train.steps",  # the cosine ends there: a longer run follows the longer cosine from where it goes on
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.async_save",
    "train.hang_limit_s",
    "train.micro_batches",  # where a step takes as many sequences as before
    "data.workers",  # the tokens are the same
    "rl.judge_url",  # the same model may be served elsewhere after a restart, and a budget may be raised
    "rl.judge_key_env",
    "rl.judge_timeout_s",
    "rl.judge_retries",
    "rl.judge_workers",
    "rl.judge_budget",
    "rl.servers",  # who decodes is the same engine, wherever it stands
    "parallel",
    "tracker",
    "resume",
    "output_dir",
)


class Preempted(SystemExit):
    """The run was asked to stop and has saved; carries the exit status."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_STATUS)


class RunContext:
    """One run of one stage, on this rank. Make it with `open_run`, use it as a context manager."""

    def __init__(self, config: RunConfig, resumed: Path | None) -> None:
        self.config, self.stage = config, STAGES[config.stage]
        self.folder, self.resumed = Path(config.output_dir), resumed
        self.is_main = distributed.rank() == 0
        self.device = distributed.device()
        self.ops = op_settings(config, self.device)
        check_offload(config.parallel)
        pp = config.parallel.pp
        self.pp = PipelineParallel(pp, config.parallel.pp_schedule, config.model)
        self.cp, self.ep = ContextParallel(config.parallel.cp, pp), ExpertParallel(config.parallel.ep, pp)
        self.cache = self.folder.parent / ".cache"  # tokenised text, shared by the runs beside this one
        self.guard = Guard(config.train.spike_factor, config.train.max_skipped_steps)
        self.watchdog = Watchdog(self.folder, distributed.rank(), config.train.hang_limit_s)
        self.saver = Saver(self.folder, config.train.keep_checkpoints, config.train.async_save)
        self._signalled = False
        self.writer: MetricsWriter | None = None
        self.alerts: AlertWriter | None = None
        self.tracker = Tracker()
        self._tokenizer: Any = None

    def __enter__(self) -> RunContext:
        signal.signal(signal.SIGTERM, self._ask_stop)
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        hindrance = None
        if self.is_main:
            try:
                self._open_folder()
            except OSError as error:
                hindrance = f"{error.strerror} ({error.filename or self.folder})"
        (hindrance, *_) = distributed.gather_objects(hindrance)
        if hindrance is not None:
            raise UserError(f"output_dir={self.folder} cannot be written, {hindrance}: give another one")
        if self.is_main:
            goes_on = self.resumed is not None
            self.tracker = make_tracker(self.config.tracker, self.folder, to_dict(self.config), resume=goes_on)
        self.watchdog.__enter__()
        return self

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in [*self.folder.glob("error*.txt"), *self.folder.glob("preempted")]:
            stale.unlink()
        save_yaml(self.config, self.folder / "config.yaml")
        step = None if self.resumed is None else checkpoint.read_state(self.resumed).step
        self.writer = MetricsWriter(self.folder, step)
        self.alerts = AlertWriter(self.folder, self.config.tracker.alerts, read_metrics(self.writer.path)[0])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.watchdog.__exit__()
        lost = self.saver.close()  # in flight only where a fault ends the run
        if lost is not None:
            self.say(lost)
        if self.writer is not None:
            self.writer.close()
        self.tracker.finish(0 if kind is None else 1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask_stop(self, *_: object) -> None:
        self._signalled = True

    @property
    def stop_asked(self) -> bool:
        """This rank wants all to stop after the step: it got SIGTERM, or knows that a save failed, which `preempt`
        raises."""
        return self._signalled or self.saver.failed

    # What the run starts from

    @property
    def source(self) -> Path | None:
        """The Hugging Face folder that weights come from; None for a model from nothing."""
        return None if self.config.init_from is None else weights_folder(self.config.init_from)

    def tokenizer(self) -> Any:
        """The run's tokenizer, trained first where the configuration asks for it; kept in `folder/tokenizer`."""
        if self._tokenizer is None:
            kept = self.folder / "tokenizer"
            if self.is_main and not (self.resumed and kept.is_dir()):
                self._make_tokenizer(kept)
            distributed.barrier()
            from data.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(str(kept))
            size, vocab_size = len(self._tokenizer), self.config.model.vocab_size
            if size > vocab_size:
                raise UserError(
                    f"data.tokenizer={self.config.data.tokenizer} has {size} tokens and the model's vocabulary"
                    f" {vocab_size}: give a smaller tokenizer"
                )
        return self._tokenizer

    def _make_tokenizer(self, kept: Path) -> None:
        from data.chat_template import with_template
        from data.sources import tokenizer_corpus
        from data.tokenizer import load_tokenizer

        data = self.config.data
        corpus = None
        if data.tokenizer.startswith("train:"):
            self.say(f"training a tokenizer of {data.tokenizer.removeprefix('train:')} tokens")
            corpus = tokenizer_corpus(data, self.config.train.seed)
        made = with_template(load_tokenizer(data.tokenizer, corpus=corpus))
        partial = kept.with_name(".tmp_tokenizer")
        for stale in (partial, kept):
            shutil.rmtree(stale, ignore_errors=True)
        made.save_pretrained(str(partial))
        partial.rename(kept)

    def build_net(self) -> Transformer:
        """The model with the weights that the run starts from, fp32, on this rank's device.

        Of what ranks share out (experts; under ZeRO-3 every parameter) only this rank's part is read and kept.
        """
        config, seed = self.config, self.config.train.seed
        with torch.device("meta"):
            net = Transformer(config.model)
        self.pp.cut(net)
        self.ep.cut(net)
        trains = self.stage.runner != "evaluate"
        share = Zero3(config.optim, config.parallel) if trains and config.parallel.zero == 3 else None
        if self.source is None:
            net.init_weights(seed, share)
        else:
            from model.hf import load_weights

            load_weights(net, self.source, seed=seed, progress=self.listed("reading weights"), share=share)
        net.activation_checkpointing = self.config.train.activation_checkpointing
        net.use(self.ops)
        asked = f" (kernels={self.config.kernels})" if self.config.kernels != self.ops.backend else ""
        where = f"{self.ops.backend}{asked} on {self.device.type}"
        self.say(f"attention ops: {where}, workspace {self.ops.workspace >> 20} MiB")
        if self.ops.fp8_linear is not None:
            emulated = f"emulated on {self.device.type}, slower than bf16"
            self.say(f"FP8 linears: {emulated if self.ops.fp8_linear == 'emulate' else 'cuBLAS, blocks scaled'}")
        return net.to(self.device)

    def restore(self, engine: EngineBase) -> TrainState:
        """The state to go on from, with weights and optimiser in place; a fresh one where there is no checkpoint."""
        if self.resumed is None:
            return TrainState(sequences=self.sequences, model=asdict(self.config.model))
        self._refuse_other_model(self.resumed)
        if self.stage.runner == "train":
            self._refuse_other_steps(self.resumed)
        state = checkpoint.restore(engine, self.resumed)
        self.guard.load_state(state.guard)
        self.say(f"going on from {self.resumed}")
        return state

    def held(self) -> dict[str, Tensor]:
        """What this rank's loop gave to `save` beside the state that `restore` returned; a fresh run has nothing. As
        many ranks must go on as wrote it (`checkpoint.refuse_other_world`)."""
        return {} if self.resumed is None else checkpoint.read_held(self.resumed)

    @property
    def sequences(self) -> int:
        """Packed sequences that a step takes."""
        return self.cp.replicas * self.config.train.micro_batches

    def _refuse_other_model(self, resumed: Path) -> None:
        there, here = (flatten(model) for model in (checkpoint.read_state(resumed).model, asdict(self.config.model)))
        odd = [f"model.{key}={here[key]} (there {there.get(key)})" for key in here if here[key] != there.get(key)]
        if odd:
            raise UserError(f"{resumed} belongs to another architecture: {', '.join(odd)}; give another output_dir")

    def _refuse_other_steps(self, resumed: Path) -> None:
        wrote, replicas = checkpoint.read_state(resumed).sequences, self.cp.replicas
        if wrote != self.sequences:
            even = wrote % replicas == 0
            fix = f"train.micro_batches={wrote // replicas}" if even else f"a number of replicas that divides {wrote}"
            raise UserError(
                f"a step of {resumed} took {wrote} sequences and here it would take {self.sequences}"
                f" ({replicas} replicas x train.micro_batches={self.config.train.micro_batches}): give {fix}"
            )

    # While it runs

    def progress(self, state: TrainState, unit: str = "step") -> Progress:
        total = self.config.train.steps
        return Progress(total, self.config.stage, self.is_main, initial=min(state.step, total), unit=unit)

    def listed(self, what: str) -> Callable[[list[Any]], Iterable[Any]]:
        """A wrapper that shows the progress of working through a list, on rank 0."""

        def walk(items: list[Any]) -> Iterable[Any]:
            with Progress(len(items), what, self.is_main, unit="tensor") as shown:
                for item in items:
                    yield item
                    shown.update()

        return walk

    def say(self, line: str) -> None:
        """A line on rank 0's stdout: where a run ends with the user's mistake, stderr holds that reason alone."""
        if self.is_main:
            print(line, flush=True)

    def logs(self, step: int) -> bool:
        """Whether `step` (completed steps) is logged: the first, the last and every `log_every`-th."""
        return step in (1, self.config.train.steps) or step % self.config.train.log_every == 0

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """One row into metrics.jsonl and the tracker, and the alerts it brings; all ranks call it (the peak memory is
        the largest rank's)."""
        full = {**row, "perf/peak_memory_bytes": int(distributed.max_over_ranks(peak_memory_bytes(self.device)))}
        if self.writer is not None and self.alerts is not None:
            written = self.writer.write(step, full)
            self.tracker.log(step, written)
            for alert in self.alerts.see(written):
                self.say(f"alert at step {step}: {alert.text}")
                self.tracker.alert(alert.rule, f"step {step}: {alert.text}", alert.level)

    def save_due(self, step: int) -> bool:
        return step % self.config.train.save_every == 0 or step >= self.config.train.steps

    def save(self, engine: EngineBase, state: TrainState, held: Mapping[str, Tensor] | None = None) -> None:
        """Saves the step, under `train.async_save` while the next ones run; the last one is whole when it returns.

        held: tensors of this rank's loop, which `held` gives back. They are not copied: nobody may change them.
        UserError on all ranks where this save, or the one before it, could not be written.
        """
        state.guard = self.guard.state()
        self.watchdog.rest()  # the save before may be in flight
        self.saver.save(engine, state, held)
        if state.step >= self.config.train.steps:
            self.settle()
        self.watchdog.beat(f"the save of step {state.step}")

    def settle(self) -> None:
        """Waits until no save is in flight; raises what went wrong with it, on all ranks alike.

        The watchdog rests, for a large checkpoint on a slow disk is no hang; the other ranks wait for a rank's file no
        longer than `distributed.TIMEOUT`.
        """
        self.watchdog.rest()
        self.saver.wait()

    def preempt(self, engine: EngineBase, state: TrainState, held: Mapping[str, Tensor] | None = None) -> None:
        """Saves, writes `preempted` and ends the process; all ranks call it after the same step."""
        self.save(engine, state, held)
        self.settle()
        if self.is_main:
            (self.folder / "preempted").write_text(f"step {state.step}\n", encoding="utf-8")
        self.say(f"stopped by SIGTERM after step {state.step}: start the same command to go on")
        raise Preempted

    def export(self, engine: EngineBase) -> None:
        """Writes `hf/`, whole or not at all; all ranks call it and bring what they hold."""
        from model.hf import save_pretrained

        self.watchdog.rest()
        net = engine.net
        assert isinstance(net, Transformer)
        dtype = torch.float32 if self.config.precision.name == "fp32" else torch.bfloat16
        shown = self.listed("writing hf/")
        save_pretrained(
            net, self.folder / "hf", dtype, self.folder / "tokenizer",
            progress=shown, read=engine.whole, writes=self.is_main,
        )  # fmt: skip
        distributed.barrier()


def peak_memory_bytes(device: torch.device) -> int:
    """High-water mark of this process: the GPU's allocations, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_run(config: RunConfig, overrides: frozenset[str]) -> RunContext | None:
    """Resolves what is open, checks everything that can be checked before a model is built, and finds where to go on.

    None where the run has finished already. Raises UserError with the reason on one line. The process group is up.
    """
    folder = Path(config.output_dir)
    stored = load_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    if stored is not None and stored.stage != config.stage:
        raise UserError(f"{folder} holds a run of stage {stored.stage}: give another output_dir")
    resumed = checkpoint.newest(folder)
    exported = finished(folder)
    begun = stored is not None and (resumed is not None or exported)
    config = resolve(config, overrides, stored if begun else None)
    check(config, distributed.world_size())
    if begun:
        assert stored is not None
        _refuse_other_run(stored, config, folder)
        done = checkpoint.read_state(resumed).step if resumed is not None else stored.train.steps
        if exported and done >= config.train.steps and stored.train.steps <= config.train.steps:
            return None
        if resumed is not None and STAGES[config.stage].runner == "rl":
            checkpoint.refuse_other_world(resumed)  # a rank rolls out its own prompts
    context = RunContext(config, resumed)
    for line in warnings(config):
        context.say(f"note: {line}")
    if config.init_from is not None and "init_from" not in overrides:
        context.say(f"init_from={config.init_from}")
    return context


def _refuse_other_run(stored: RunConfig, config: RunConfig, folder: Path) -> None:
    if config.resume == "never":
        raise UserError(f"{folder} holds a run and resume=never: give another output_dir")
    found = differences(stored, config, MAY_CHANGE)
    if found:
        raise UserError(
            f"{folder} holds a run with another configuration: {', '.join(found)}; give another output_dir, or the old"
            f" {'values' if len(found) > 1 else 'value'} to go on"
        )


class Clock:
    """Seconds spent in steps since it was last read."""

    def __init__(self) -> None:
        self._spent, self._since = 0.0, time.monotonic()

    def start(self) -> None:
        self._since = time.monotonic()

    def stop(self) -> None:
        self._spent += time.monotonic() - self._since

    def read(self) -> float:
        spent, self._spent = max(self._spent, 1e-9), 0.0
        return spent
