"""The training loop: a resolved run config in, an artifact out.

What makes a run the same on any number of devices, at any micro-batch and after any kill: the order of rows and the
noise are pure functions of (seed, epoch, sample id); denominators count the global batch, which every rank can
compute by itself; a checkpoint holds weights, optimisers and the step, and nothing else is state.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError

from dllm import provenance
from dllm.config import RunConfig, digest
from dllm.core.devices import best_device
from dllm.data.stream import StreamedRows, open_corpus
from dllm.data.tokens import open_rows
from dllm.numbers import bar_options
from dllm.training.artifact import UNWRITABLE, Trained, check_free, is_finished, state_key, write_artifact, writing
from dllm.training.devices import DATA_PARALLEL, StepNumbers, asked_dtype, cuts_weights, devices_for, product_dtype
from dllm.training.micro_batches import (
    MicroBatch,
    Prefetcher,
    TrainingSplit,
    evaluated_rows,
    evaluation_micro_batches,
    micro_batches,
    one_step,
    steps_per_epoch,
)
from dllm.training.optimizer import set_learning_rate, share_of_peak
from dllm.training.policy import Policy, policy_copies
from dllm.training.preferences import Preferences, learns_from_pairs
from dllm.training.setup import (
    adapted,
    check_budget,
    check_inputs,
    check_world,
    objective_of,
    response_end_of,
    scores_for,
    start_of,
)
from dllm.training.state import MetricsLog, StateDirectory, check_sizes

DAMAGE = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError)
"""What loading a torn or overwritten checkpoint file raises."""

LOGGED = 200
"""About how many training rows a run writes to metrics.jsonl."""

INTERRUPTED = 143
"""Exit code of a run that saved its state on SIGTERM: not a success, so nothing takes it for finished."""


class Interrupted(SystemExit):
    """The run saved its state on a signal and ends with a non-zero code."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: its steps, and how often it is evaluated."""

    steps_per_epoch: int
    schedule_steps: int
    last_step: int
    eval_every: int


def make_plan(config: RunConfig, rows: int, ranks: int) -> Plan:
    """Sizes of a run on `ranks` devices. Raises ValueError if the global batch does not divide among them."""
    if config.global_batch_size % ranks:
        raise ValueError(
            f"global_batch_size = {config.global_batch_size} does not divide by {ranks} processes; "
            "change one of them (the global batch is part of the experiment, the number of processes is not)"
        )
    per_epoch = steps_per_epoch(config, rows)
    total = config.steps or max(1, round(config.epochs * per_epoch))
    last = min(total, config.stop_after or total)
    return Plan(
        steps_per_epoch=per_epoch,
        schedule_steps=total,
        last_step=last,
        eval_every=max(1, last // config.evaluations),
    )


def train(
    config: RunConfig,
    workdir: str | Path = ".",
    *,
    tracker: str | None = None,
    quiet: bool = False,
    replace: bool = False,
) -> Path:
    """Train one run to its end, going on from the last complete checkpoint, and return the artifact's directory.

    An artifact of the same name is replaced only if `replace`, and only when the new one is finished. Raises
    ValueError, one line, for unusable inputs before any long work; Interrupted after a SIGTERM, with the state saved.
    """
    workdir = Path(workdir)
    if not replace:
        check_free(config, workdir / "runs" / config.name)
    device = best_device(training=True)
    state = StateDirectory(workdir / ".work" / f"{config.name}-{state_key(config, workdir, device)}")
    accelerator = Accelerator(
        mixed_precision="no",  # `Devices` casts, in the same way wherever weights are
        log_with=tracker,
        project_dir=str(state.path),
        cpu=device.type == "cpu",  # without it, CPU ranks do not find each other
        kwargs_handlers=[DATA_PARALLEL],
    )
    check_world(accelerator)
    try:
        with ExitStack() as held:
            waited = accelerator.is_main_process and held.enter_context(provenance.file_lock(state.lock))
            (finished,) = broadcast_object_list([waited and is_finished(config, workdir)])
            if finished:
                accelerator.print(f"{config.name}: the attempt before this one has finished it")
                return workdir / "runs" / config.name
            if accelerator.is_main_process:
                state.tidy()
            return _train(config, workdir, state, accelerator, tracker, quiet)
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)  # a later run in this process may differ in precision


def _train(
    config: RunConfig, workdir: Path, state: StateDirectory, accelerator: Accelerator, tracker: str | None, quiet: bool
) -> Path:
    run = _Run(config, workdir, accelerator, state)
    if tracker:
        accelerator.init_trackers("dllm", config={"run": config.name, "digest": digest(config)})
    run.fit(quiet=quiet)
    target = workdir / "runs" / config.name
    weights = run.devices.weights()
    if accelerator.is_main_process:
        with writing(config, target, "the artifact"):
            write_artifact(run.trained(), weights, workdir)
        state.remove()
    if tracker:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return target


class _Run:
    """One attempt at a run: prepared objects and the loop over steps."""

    def __init__(self, config: RunConfig, workdir: Path, accelerator: Accelerator, state: StateDirectory):
        self.config, self.accelerator, self.state = config, accelerator, state
        corpus = open_corpus(workdir / config.data_path)
        test_rows = open_rows(workdir / config.bound_path, "test")
        train_rows = open_rows(workdir / config.data_path, "train") if corpus is None else test_rows  # a sample of them
        backbone = start_of(config, workdir)
        check_inputs(config, backbone, train_rows, workdir / config.init_path)
        self.backbone = backbone = adapted(config, backbone, accelerator.device)
        set_seed(config.seed)
        self.plan = make_plan(config, corpus.rows if corpus else len(train_rows), accelerator.num_processes)
        self.stream: StreamedRows | None = None
        """Where the rows of training steps come from, if not from files; its place is part of the state."""
        if corpus is not None:
            size = config.global_batch_size
            self.stream = StreamedRows(corpus, backbone.tokenizer, seed=config.seed, batch_size=size)
        self.objective = objective_of(config, backbone)
        check_budget(config, self.objective)
        end = response_end_of(config, train_rows, backbone)
        ids: dict[str, Any] = {"pad_id": backbone.pad_id, "mask_id": backbone.mask_id}
        self.train_split = TrainingSplit(train_rows, self.objective, end, **ids, stream=self.stream)
        # test responses end as training ones do, without the random extra blocks
        self.test_split = TrainingSplit(test_rows, self.objective, end and replace(end, extra_blocks=0), **ids)
        scores = scores_for(config, backbone)
        self.parameters = sum(p.numel() for p in scores.parameters())
        copies = policy_copies(config, backbone, accelerator.device, sharded=cuts_weights())
        products = product_dtype(config, accelerator.device)
        bf16 = products == "bf16" and config.recipe.parameters == "fp32"  # bf16 parameters need no autocast
        self.devices = devices_for(accelerator, scores, config.optimizer, bf16=bf16)
        if products != asked_dtype(config):
            accelerator.print(f"{config.name}: no fast bf16 on this device, so matrix products are computed in fp32")
        self.policy: Policy | Preferences | None = None
        if config.policy:
            splits = (train_rows, open_rows(workdir / config.data_path, "test"))
            self.policy = Policy(config, backbone, self.devices, self.objective, splits, copies, workdir)
        elif learns_from_pairs(config):
            self.policy = Preferences(config, backbone, self.devices, copies[1], end, workdir)
        self.metrics = MetricsLog(state.path / "metrics.jsonl")
        self.layout = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
        self.parts: Iterator[MicroBatch] = iter(())
        self._pins = accelerator.device.type == "cuda"
        """Whether inputs go through page-locked memory."""
        self.evaluated: tuple[Any, dict[str, Any]] = (None, {})
        """What was evaluated last, and what it gave."""
        self.tokens = 0
        self.started = time.perf_counter()
        self.wall_before = 0.0
        self.interrupted = False

    @property
    def wall_seconds(self) -> float:
        """Seconds of training so far, over all attempts."""
        return self.wall_before + time.perf_counter() - self.started

    def fit(self, *, quiet: bool) -> None:
        """Train from the last complete checkpoint to the last step, evaluating and saving on the way."""
        first = self._resume()
        if threading.current_thread() is threading.main_thread():  # no other may set signal handlers
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGUSR1, self._on_signal)
        if first == 0:
            self._evaluate(0)
        with self._made(first) as self.parts, self._bar(first, quiet) as bar:
            self._steps(first, bar)
        self._evaluate(self.plan.last_step, final=True)

    def _made(self, first: int) -> AbstractContextManager[Iterator[MicroBatch]]:
        """The micro-batches of all steps from `first` on; answers cannot be drawn ahead of their step."""
        if self.policy:
            return nullcontext(self.policy.micro_batches(first, self.plan.last_step))
        parts = micro_batches(self.train_split, self.config, first=first, last=self.plan.last_step, **self.layout)
        return Prefetcher(parts, pin=self._pins)

    def _steps(self, first: int, bar) -> None:
        """The steps from `first` on, logged, evaluated and saved."""
        every = max(1, self.plan.last_step // LOGGED)
        mark = (time.perf_counter(), self.tokens)
        for step in range(first, self.plan.last_step):
            numbers = self._step(step)
            done = step + 1
            bar.update()
            if done % every == 0 or done == self.plan.last_step:
                values = self._read(done, numbers)
                now = (time.perf_counter(), self.tokens)
                speed = (now[1] - mark[1]) / max(1e-9, now[0] - mark[0])
                mark = now
                self._log(values | {"step": done, "split": "train", "tokens_per_second": round(speed, 1)})
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s")
                if not math.isfinite(values["loss"]):
                    raise ValueError(
                        f"{self.config.name}: the loss is {values['loss']} at step {done}; lower learning_rate "
                        f"(now {self.config.optimizer.learning_rate}) or lengthen warmup_share"
                    )
            at_end = done == self.plan.last_step
            if (done % self.plan.eval_every == 0 and self.plan.last_step - done >= self.plan.eval_every // 2) or at_end:
                self._evaluate(done)
                self._save(done)
            self.interrupted = self.devices.anywhere(self.interrupted)  # all ranks then save the same step
            if self.interrupted:
                self._save(done)
                raise Interrupted(INTERRUPTED)

    def _step(self, step: int) -> StepNumbers:
        """One optimiser step on the global batch; its numbers stay on the device."""
        self.rate = set_learning_rate(
            self.devices.optimizers, share_of_peak(step, self.plan.schedule_steps, self.config.optimizer.warmup_share)
        )
        numbers = self.devices.step(self.objective, one_step(self.parts), scale=self._gradient_scale)
        self.tokens += numbers.tokens
        return numbers

    def _read(self, done: int, numbers: StepNumbers) -> dict[str, float]:
        """The row that is logged for a step, over all processes; the only place where the host waits for the device."""
        masked = torch.full_like(numbers.loss, numbers.masked)
        own = torch.stack([numbers.loss, numbers.nll, masked, *numbers.sums.values()])
        loss, nll, masked, *sums = self.devices.summed(own).tolist()
        return {
            "epoch": done / self.plan.steps_per_epoch,
            "loss": loss * self._gradient_scale / self.accelerator.num_processes,
            "nll": nll / masked if masked else math.nan,
            "learning_rate": self.rate,
            "grad_norm": float(numbers.gradient_norm),
            "tokens": float(self.tokens),
            **{name: value / masked for name, value in zip(numbers.sums, sums, strict=True)},
            **(self.policy.numbers() if self.policy else {}),
        }

    @property
    def _gradient_scale(self) -> int:
        """Data-parallel wrappers average gradients over ranks: undone where the denominator already counts them all."""
        return self.accelerator.num_processes if self.config.recipe.denominator == "global" else 1

    @torch.no_grad()
    def _evaluate(self, step: int, *, final: bool = False) -> None:
        """Log the loss bound per target token on the test split, in nats, with its standard error over rows.

        The last evaluation (`final`) reads the whole split, or `test_rows` rows of it, with the fixed noise, whatever
        the recipe says, so that the runs of an ablation are compared on equal masks. Where the one before it, at the
        same step, has read just that, its numbers are logged again.
        """
        drawn = self.config.recipe.eval_noise == "drawn" and not final
        what = (step, drawn, final and self.config.eval_rows is not None)
        if self.evaluated[0] != what:
            rewarded = self.policy.evaluate(final=final) if self.policy else {}
            self.evaluated = (what, self._bound(step, drawn=drawn, final=final) | rewarded)
        split = {"split": "final" if final else "eval"}
        self._log({"step": step, "epoch": step / self.plan.steps_per_epoch} | split | self.evaluated[1])

    def _bound(self, step: int, *, drawn: bool, final: bool) -> dict[str, Any]:
        """The bound on the test split's rows; drawn: with masks of this step's own."""
        config, split, devices = self.config, self.test_split, self.devices
        rows = split.ended(evaluated_rows(config, len(split.rows), final=final))
        if not drawn:
            split = replace(split, objective=objective_of(config, self.backbone, exact=True))
        # published fault F6: other masks at every evaluation
        draw_seed = config.seed + step if drawn else None
        parts = evaluation_micro_batches(split, config, rows, draw_seed=draw_seed, **self.layout)
        evaluated = []
        devices.model.eval()
        with Prefetcher(parts, pin=self._pins) as parts:
            for part in parts:
                rows_of = devices.forward(split.objective, part).rows
                if part.counts:
                    evaluated.append((part.numbers, rows_of))
        devices.model.train()
        sums = torch.zeros(len(rows.numbers), dtype=torch.float64)
        for numbers, nats in evaluated:
            sums[numpy.searchsorted(rows.numbers, numbers)] += nats.cpu().double() / config.eval_draws
        sums = devices.summed(sums)
        targets = torch.from_numpy(rows.targets).double()
        mean = float(sums.sum() / targets.sum())
        spread = (sums - mean * targets).square().sum().sqrt() / targets.sum()
        read = {"targets": int(targets.sum()), "rows": len(rows.numbers)}
        return {"loss": mean, "standard_error": float(spread)} | read

    def _resume(self) -> int:
        """Load the newest checkpoint that can be loaded and return its step (0: none).

        Raises ValueError, one line, for a checkpoint in shards that this launch cannot put together.
        """
        for step in reversed(self.state.steps()):
            path = self.state.checkpoint(step)
            error, saved = self._loaded(path)
            if self.devices.anywhere(error is not None):  # all processes go on from the same step
                self.accelerator.print(
                    f"checkpoint {path} is damaged ({error or 'another process says so'}); trying an older one"
                )
                continue
            self.tokens, self.wall_before = saved["tokens"], saved["wall_seconds"]
            if self.stream is not None:
                self.stream.load_state(saved["stream"])
            if self.policy:
                self.policy.load_state(saved.get("policy"))
            self.started = time.perf_counter()
            if self.accelerator.is_main_process:
                self.metrics.rewind(step)
            self.accelerator.print(f"going on from step {step} of {self.plan.last_step}")
            return step
        if self.accelerator.is_main_process:
            self.metrics.rewind(-1)
        return 0

    def _loaded(self, path: Path) -> tuple[Exception | None, dict]:
        """Load a checkpoint: what was wrong with it (None: nothing), and its progress."""
        error, saved = None, {}
        try:
            saved = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            check_sizes(path)
        except DAMAGE as damage:
            error = damage
        if self.devices.anywhere(error is not None):  # nobody starts to load: loading may need all processes
            return error or ValueError("a file is damaged"), saved
        layout = saved.get("layout", "replicated")
        if layout != self.devices.layout:
            raise ValueError(
                f"{path}: its shards were written by {layout}, and this is {self.devices.layout}; go on with "
                f"what wrote it, or delete {path.parent} to start again"
            )
        try:
            self.devices.load(path)
        except DAMAGE as damage:
            error = damage
        return error, saved

    def _save(self, step: int) -> None:
        """Write the checkpoint of a step; it appears whole or not at all."""
        if step == self.plan.last_step and not self.interrupted:
            return  # the artifact follows at once
        with writing(self.config, self.state.path, f"the checkpoint of step {step}"):
            try:
                self._checkpoint(step)
            except UNWRITABLE:
                self.state.abandon(step)
                raise

    def _checkpoint(self, step: int) -> None:
        """Write it, all processes together."""
        scratch = self.state.scratch(step)
        if self.accelerator.is_main_process:
            self.state.begin(step)
        self.accelerator.wait_for_everyone()
        self.devices.save(scratch)
        if self.accelerator.is_main_process:
            progress: dict[str, Any] = {"step": step, "tokens": self.tokens, "wall_seconds": self.wall_seconds}
            progress["layout"] = self.devices.layout
            if self.stream is not None:
                progress["stream"] = self.stream.state(step)
            if self.policy:
                progress["policy"] = self.policy.state(step)
            (scratch / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        self.accelerator.wait_for_everyone()  # until every process has written its share
        if self.accelerator.is_main_process:
            self.state.finish(step)

    def _log(self, values: dict) -> None:
        values = {"step": values["step"], "epoch": round(values["epoch"], 6), "split": values["split"]} | values
        values["wall_seconds"] = round(self.wall_seconds, 3)
        if self.accelerator.is_main_process:
            self.metrics.write(values)
        named = {f"{values['split']}/{k}": v for k, v in values.items() if k not in ("step", "split", "samples")}
        self.accelerator.log(named, step=values["step"])

    def trained(self) -> Trained:
        """The run as its artifact takes it."""
        numbers = (self.wall_seconds, self.tokens, self.parameters)
        return Trained(self.config, self.backbone, self.devices, self.metrics.path, *numbers)

    def _bar(self, first: int, quiet: bool):
        from tqdm import tqdm

        hidden = quiet or not self.accelerator.is_main_process
        return tqdm(
            total=self.plan.last_step,
            initial=first,
            desc=self.config.name,
            unit="step",
            disable=hidden,
            mininterval=1.0,
            **bar_options(rate=""),
        )

    def _on_signal(self, number, frame) -> None:
        self.interrupted = True
