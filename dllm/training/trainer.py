"""The training loop: a resolved run config in, an artifact out.

What makes a run the same on any number of devices, at any micro-batch and after any kill: the order of rows and the
noise are pure functions of (seed, epoch, sample id); denominators count the global batch, which every rank can
compute by itself; a checkpoint holds weights, optimisers and the step, and nothing else is state.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError
from torch import Tensor

from dllm import provenance
from dllm.algorithms import algorithm_named, resolved
from dllm.config import RunConfig, digest, read_yaml, write_when_changed
from dllm.core.precision import has_fast_bf16
from dllm.data.collate import ResponseEnd
from dllm.data.stream import StreamedRows, open_corpus
from dllm.data.tokens import TokenRows, open_rows
from dllm.models.adapters import attach_adapter, merge_adapter, save_adapter
from dllm.models.backbone import Backbone, TokenNLL
from dllm.models.load import SIDECAR, load_backbone
from dllm.models.published import family_of
from dllm.objectives.objective import Objective, part_of_state
from dllm.training.engine import DATA_PARALLEL, Engine, scores_for
from dllm.training.optimizer import set_learning_rate, share_of_peak
from dllm.training.pipeline import Ahead, Part, Source, evaluation_parts, steps_per_epoch, training_parts
from dllm.training.state import MetricsLog, StateDirectory, check_sizes
from dllm.training.step import StepNumbers, training_step

DAMAGE = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError)
"""What loading a torn or overwritten checkpoint file raises."""

UNWRITABLE = (OSError, RuntimeError, SafetensorError)
"""What writing to a full disk raises; torch says RuntimeError."""

LOGGED = 200
"""About how many training rows a run writes to metrics.jsonl."""

INTERRUPTED = 143
"""Exit code of a run that saved its state on SIGTERM: not a success, so nothing takes it for finished."""


class Interrupted(SystemExit):
    """The run saved its state on a signal and ends with a non-zero code."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: steps, rows per step and rank, how often it is evaluated."""

    steps_per_epoch: int
    schedule_steps: int
    last_step: int
    rows_per_rank: int
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
        rows_per_rank=config.global_batch_size // ranks,
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
        _check_free(config, workdir / "runs" / config.name)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    state = StateDirectory(workdir / ".work" / f"{config.name}-{_state_key(config, workdir, device)}")
    accelerator = Accelerator(
        mixed_precision="no",  # the engine's autocast is the same under every back-end
        log_with=tracker,
        project_dir=str(state.path),
        cpu=not torch.accelerator.is_available(),  # without it, CPU ranks do not find each other
        kwargs_handlers=[DATA_PARALLEL],
    )
    _check_world(accelerator)
    try:
        with ExitStack() as held:
            waited = accelerator.is_main_process and held.enter_context(provenance.alone(state.lock))
            (finished,) = broadcast_object_list([waited and _is_finished(config, workdir)])
            if finished:
                accelerator.print(f"{config.name}: the attempt before this one has finished it")
                return workdir / "runs" / config.name
            if accelerator.is_main_process:
                state.tidy()
            return _train(config, workdir, state, accelerator, tracker, quiet)
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)  # a later run in this process may differ in precision


def _train(
    config: RunConfig,
    workdir: Path,
    state: StateDirectory,
    accelerator: Accelerator,
    tracker: str | None,
    quiet: bool,
) -> Path:
    corpus = open_corpus(workdir / config.data_path)
    test_rows = open_rows(workdir / config.data_path, "test")
    train_rows = open_rows(workdir / config.data_path, "train") if corpus is None else test_rows  # a sample of them
    backbone = _start(config, workdir)
    _check_blocks(config, workdir / config.init_path)
    _check_fit(config, backbone, train_rows)
    backbone = _adapted(config, backbone, accelerator.device)
    set_seed(config.seed)
    plan = make_plan(config, corpus.rows if corpus else len(train_rows), accelerator.num_processes)
    run = _Run(config, plan, backbone, train_rows, test_rows, accelerator, state)
    if corpus is not None:
        run.read_from(StreamedRows(corpus, backbone.tokenizer, seed=config.seed, batch_size=config.global_batch_size))
    if tracker:
        accelerator.init_trackers("dllm", config={"run": config.name, "digest": digest(config)})
    run.fit(quiet=quiet)
    target = workdir / "runs" / config.name
    weights = run.engine.weights()
    if accelerator.is_main_process:
        try:
            _finish(run, weights, target, workdir)
        except UNWRITABLE as fault:
            raise _cannot_write(config, target, "the artifact", fault) from None
        state.remove()
    if tracker:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return target


class _Run:
    """One attempt at a run: prepared objects and the loop over steps."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        backbone: Backbone,
        train_rows: TokenRows,
        test_rows: TokenRows,
        accelerator: Accelerator,
        state: StateDirectory,
    ):
        self.config, self.plan, self.backbone, self.state = config, plan, backbone, state
        self.algorithm, self.objective = algorithm_named(config.algorithm), _objective(config, backbone)
        _check_budget(config, self.objective)
        end = _response_end(config, train_rows, backbone)
        ids = {"pad_id": backbone.pad_id, "mask_id": backbone.mask_id}
        self.train_source = Source(train_rows, self.objective, end, **ids)
        # test responses end as training ones do, without the random extra blocks
        self.test_source = Source(test_rows, self.objective, end and replace(end, extra_blocks=0), **ids)
        shifted = replace(backbone, prediction="next") if self.algorithm.causal else backbone
        module = resolved(self.algorithm.module)
        scores = scores_for(config, shifted, partial(module, config) if module else TokenNLL)
        self.parameters = sum(p.numel() for p in scores.parameters())
        products = product_dtype(config, accelerator.device)
        bf16 = products == "bf16" and config.recipe.parameters == "fp32"  # bf16 parameters need no autocast
        self.engine = Engine(accelerator, scores, config.optimizer, bf16=bf16)
        if products != asked_dtype(config):
            self._say(f"{config.name}: no fast bf16 on this device, so matrix products are computed in fp32")
        self.metrics = MetricsLog(state.path / "metrics.jsonl")
        self.parts: Iterator[Part] = iter(())
        self.tokens = 0
        self.started = time.perf_counter()
        self.wall_before = 0.0
        self.interrupted = False

    def read_from(self, stream: StreamedRows) -> None:
        """Take the rows of training steps from a stream in place of files; its place becomes part of the state."""
        self.train_source = replace(self.train_source, stream=stream)

    @property
    def wall_seconds(self) -> float:
        """Seconds of training so far, over all attempts."""
        return self.wall_before + time.perf_counter() - self.started

    def fit(self, *, quiet: bool) -> None:
        """Train from the last complete checkpoint to the last step, evaluating and saving on the way."""
        first = self._resume()
        if _in_main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGUSR1, self._on_signal)
        if first == 0:
            self._evaluate(0)
        layout = {"rank": self.engine.rank, "ranks": self.engine.ranks}
        parts = training_parts(self.train_source, self.config, first=first, last=self.plan.last_step, **layout)
        with Ahead(parts, pin=self._pins) as self.parts, self._bar(first, quiet) as bar:
            self._steps(first, bar)
        self._evaluate(self.plan.last_step, final=True)

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
            self.interrupted = self.engine.anywhere(self.interrupted)  # all ranks then save the same step
            if self.interrupted:
                self._save(done)
                raise Interrupted(INTERRUPTED)

    def _step(self, step: int) -> StepNumbers:
        """One optimiser step on the global batch; its numbers stay on the device."""
        self.rate = set_learning_rate(
            self.engine.optimizers, share_of_peak(step, self.plan.schedule_steps, self.config.optimizer.warmup_share)
        )
        numbers = training_step(self.engine, self.objective, _until_last(self.parts), scale=self._gradient_scale)
        self.tokens += numbers.tokens
        return numbers

    def _read(self, done: int, numbers: StepNumbers) -> dict[str, float]:
        """The row that is logged for a step, over all processes; the only place where the host waits for the device."""
        own = torch.stack([numbers.loss, numbers.nll, torch.full_like(numbers.loss, numbers.masked)])
        loss, nll, masked = self.engine.summed(own).tolist()
        return {
            "epoch": done / self.plan.steps_per_epoch,
            "loss": loss * self._gradient_scale / self.engine.ranks,
            "nll": nll / masked if masked else math.nan,
            "learning_rate": self.rate,
            "grad_norm": float(numbers.gradient_norm),
            "tokens": float(self.tokens),
        }

    @property
    def _gradient_scale(self) -> int:
        """Data-parallel wrappers average gradients over ranks: undone where the denominator already counts them all."""
        return self.engine.ranks if self.config.recipe.denominator == "global" else 1

    @property
    def _pins(self) -> bool:
        """Whether inputs go through page-locked memory."""
        return self.engine.device.type == "cuda"

    @torch.no_grad()
    def _evaluate(self, step: int, *, final: bool = False) -> None:
        """Log the loss bound per target token on the test split, in nats, with its standard error over rows.

        The last evaluation (`final`) reads the whole split with the fixed noise, whatever the recipe says, so that
        the runs of an ablation are compared on equal masks.
        """
        config, source, engine = self.config, self.test_source, self.engine
        limit = None if final else config.eval_rows
        rows = numpy.arange(min(len(source.rows), limit or len(source.rows)))
        drawn = config.recipe.eval_noise == "drawn" and not final
        if not drawn:
            source = replace(source, objective=_objective(config, self.backbone, exact=True))
        layout = {"rank": engine.rank, "ranks": engine.ranks}
        # published fault F6: other masks at every evaluation
        parts = evaluation_parts(source, config, rows, draw_seed=config.seed + step if drawn else None, **layout)
        found = []
        engine.model.eval()
        with Ahead(parts, pin=self._pins) as parts:
            for part in parts:
                rows_of = engine.forward(source.objective, part).rows
                if part.counts:
                    found.append((part.numbers, rows_of))
        engine.model.train()
        sums = torch.zeros(len(rows), dtype=torch.float64)
        for numbers, nats in found:
            sums[numbers] += nats.cpu().double() / config.eval_draws
        sums = engine.summed(sums)
        targets = source.counted(rows).double()
        mean = float(sums.sum() / targets.sum())
        spread = (sums - mean * targets).square().sum().sqrt() / targets.sum()
        self._log(
            {
                "step": step,
                "epoch": step / self.plan.steps_per_epoch,
                "split": "final" if final else "eval",
                "loss": mean,
                "standard_error": float(spread),
                "targets": int(targets.sum()),
                "rows": len(rows),
            }
        )

    def _resume(self) -> int:
        """Load the newest checkpoint that can be loaded and return its step (0: none).

        Raises ValueError, one line, for a checkpoint in shards that this launch cannot put together.
        """
        for step in reversed(self.state.steps()):
            path = self.state.checkpoint(step)
            fault, saved = self._loaded(path)
            if self.engine.anywhere(fault is not None):  # all processes go on from the same step
                self._say(f"checkpoint {path} is damaged ({fault or 'another process says so'}); trying an older one")
                continue
            self.tokens, self.wall_before = saved["tokens"], saved["wall_seconds"]
            if self.train_source.stream is not None:
                self.train_source.stream.load_state(saved["stream"])
            self.started = time.perf_counter()
            if self.engine.is_main:
                self.metrics.rewind(step)
            self._say(f"going on from step {step} of {self.plan.last_step}")
            return step
        if self.engine.is_main:
            self.metrics.rewind(-1)
        return 0

    def _loaded(self, path: Path) -> tuple[Exception | None, dict]:
        """Load a checkpoint: what was wrong with it (None: nothing), and its progress."""
        fault, saved = None, {}
        try:
            saved = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            check_sizes(path)
        except DAMAGE as found:
            fault = found
        if self.engine.anywhere(fault is not None):  # nobody starts to load: loading may need all processes
            return fault or ValueError("a file is damaged"), saved
        layout = saved.get("layout", "replicated")
        if layout != self.engine.backend.layout:
            raise ValueError(
                f"{path}: its shards were written by {layout}, and this is {self.engine.backend.layout}; go on with "
                f"what wrote it, or delete {path.parent} to start again"
            )
        try:
            self.engine.load(path)
        except DAMAGE as found:
            fault = found
        return fault, saved

    def _save(self, step: int) -> None:
        """Write the checkpoint of a step; it appears whole or not at all."""
        if step == self.plan.last_step and not self.interrupted:
            return  # the artifact follows at once
        try:
            self._checkpoint(step)
        except UNWRITABLE as fault:
            self.state.abandon(step)
            raise _cannot_write(self.config, self.state.path, f"the checkpoint of step {step}", fault) from None

    def _checkpoint(self, step: int) -> None:
        """Write it, all processes together."""
        scratch = self.state.path / f".step-{step}"
        if self.engine.is_main:
            self.state.begin(step)
        self.engine.wait()
        self.engine.save(scratch)
        if self.engine.is_main:
            progress = {"step": step, "tokens": self.tokens, "wall_seconds": self.wall_seconds}
            progress["layout"] = self.engine.backend.layout
            if self.train_source.stream is not None:
                progress["stream"] = self.train_source.stream.state(step)
            (scratch / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        self.engine.wait()  # until every process has written its share
        if self.engine.is_main:
            self.state.finish(step)

    def _say(self, line: str) -> None:
        self.engine.accelerator.print(line)

    def _log(self, values: dict) -> None:
        values = {"step": values["step"], "epoch": round(values["epoch"], 6), "split": values["split"]} | values
        values["wall_seconds"] = round(self.wall_seconds, 3)
        if self.engine.is_main:
            self.metrics.write(values)
        named = {f"{values['split']}/{k}": v for k, v in values.items() if k not in ("step", "split")}
        self.engine.accelerator.log(named, step=values["step"])

    def _bar(self, first: int, quiet: bool):
        from tqdm import tqdm

        hidden = quiet or not self.engine.is_main
        return tqdm(
            total=self.plan.last_step,
            initial=first,
            desc=self.config.name,
            unit="step",
            disable=hidden,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    def _on_signal(self, number, frame) -> None:
        self.interrupted = True


def _until_last(parts: Iterator[Part]) -> Iterator[Part]:
    """The parts of one step."""
    for part in parts:
        yield part
        if part.last:
            return


def _in_main_thread() -> bool:
    """Whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def _objective(config: RunConfig, backbone: Backbone, *, exact: bool = False) -> Objective:
    """The run's objective; `exact` swaps in the least noisy unbiased estimate, for evaluation."""
    bound = {"corruption": "exact", "weight": "elbo", "time_low": 0.0, "time_high": 1.0}
    recipe = config.recipe.model_copy(update=bound) if exact else config.recipe
    algorithm, known = algorithm_named(config.algorithm), {"max_length": backbone.max_length, **vars(config)}
    return algorithm.part("objective")(recipe, **{name: known[name] for name in algorithm.takes})


def _start(config: RunConfig, workdir: Path) -> Backbone:
    """The backbone that a run starts from."""
    dtype = torch.bfloat16 if config.recipe.parameters == "bf16" else torch.float32
    return load_backbone(
        workdir / config.init_path, dtype=dtype, entry=config.model, causal=algorithm_named(config.algorithm).causal
    )


def _adapted(config: RunConfig, backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone with the run's adapter, if it has one."""
    if config.adapter is None:
        return backbone
    return attach_adapter(
        backbone,
        config.adapter,
        seed=config.seed,
        device=device,
        bf16=config.recipe.autocast == "bf16" and has_fast_bf16(device),
        causal=algorithm_named(config.algorithm).causal,
    )


def _response_end(config: RunConfig, rows: TokenRows, backbone: Backbone) -> ResponseEnd | None:
    """How responses end; None for text, which has no prompts."""
    if not rows.prompts.any():
        return None
    recipe = config.recipe
    kind = "one" if algorithm_named(config.algorithm).causal else recipe.response_end
    return ResponseEnd(
        kind, backbone.eos_id, recipe.block_size, recipe.extra_blocks, config.seed, longest=config.length
    )


def asked_dtype(config: RunConfig) -> str:
    """`bf16` or `fp32`: in what a run's recipe wants matrix products computed."""
    return "bf16" if "bf16" in (config.recipe.autocast, config.recipe.parameters) else "fp32"


def product_dtype(config: RunConfig, device: torch.device) -> str:
    """`bf16` or `fp32`: in what they are computed on a device; bf16 only where it is fast."""
    return asked_dtype(config) if has_fast_bf16(device) else "fp32"


def _check_fit(config: RunConfig, backbone: Backbone, rows: TokenRows) -> None:
    """Rows and their ends fit the model's positions, and the data was tokenized with its vocabulary."""
    room = backbone.max_length - algorithm_named(config.algorithm).prefix_positions
    if config.length > room:
        raise ValueError(
            f"{config.name}: length = {config.length} is longer than the model allows ({room}); "
            "lower `length` or start from another model"
        )
    highest = int(rows.tokens[: 1 << 20].max()) if len(rows.tokens) else 0
    if highest >= backbone.vocab_size:
        raise ValueError(
            f"{config.data_path}: holds token id {highest}, the model knows {backbone.vocab_size}; "
            "the data was prepared with another tokenizer: prepare it again"
        )


def _check_blocks(config: RunConfig, init: Path) -> None:
    """Raise ValueError if a published model that attends block-causally would be trained in another way."""
    family = family_of(init)
    if family is not None and family.block_size is not None and config.algorithm != family.algorithm:
        raise ValueError(
            f"{config.name}: algorithm = {config.algorithm!r} is not for {config.init}: {family.name} attends "
            f"block-causally; allowed: {family.algorithm}; set algorithm: {family.algorithm}, or start from another "
            "model"
        )


def _check_budget(config: RunConfig, objective: Objective) -> None:
    """Raise ValueError if the tokens that an objective forwards for the longest row may not fit into a micro-batch."""
    most = objective.forward_lengths(numpy.array([config.length]), numpy.array([0])).item()
    if config.micro_batch_tokens is not None and config.micro_batch_tokens < most:
        raise ValueError(
            f"{config.name}: micro_batch_tokens = {config.micro_batch_tokens} is smaller than the longest row, for "
            f"which algorithm = {config.algorithm!r} forwards up to {most} tokens; allowed: {most} and up; raise it or "
            "lower length"
        )


def _check_world(accelerator: Accelerator) -> None:
    """Raise ValueError if this process was launched as one of several and yet stands alone."""
    name = "DLLM_PROCESSES" if "DLLM_PROCESSES" in os.environ else "WORLD_SIZE"  # the launcher knows best
    launched = int(os.environ.get(name, "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{name} = {launched}, but accelerate sees {accelerator.num_processes} process(es): each would train "
            "alone; on CPUs use distributed_type: MULTI_GPU with use_cpu: true in the accelerate configuration"
        )


def _cannot_write(config: RunConfig, place: Path, what: str, fault: Exception) -> OSError:
    """One line about what could not be written; on a full disk these faults have many names and say little."""
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**20
    said = " ".join(str(fault).split()) or type(fault).__name__
    return OSError(
        f"{config.name}: {what} could not be written to {place}, where {free:,.0f} MiB are free ({said[:200]}); make "
        "room and start the same command again: it goes on from the last complete checkpoint"
    )


def _is_finished(config: RunConfig, workdir: Path) -> bool:
    """Whether the artifact of this very configuration, from these very inputs, is there."""
    target = workdir / "runs" / config.name
    record = Path(f"{target}.json")
    if not (record.exists() and target.exists()):
        return False
    found = provenance.read_record(record)
    return found["config_digest"] == digest(config) and found["inputs"] == _input_digests(config, workdir)


def _check_free(config: RunConfig, target: Path) -> None:
    """Raise ValueError if a finished run of this name is there: it may be another configuration's."""
    if not (target / "config.yaml").exists():
        return
    old = read_yaml(target / "config.yaml")
    new = config.model_dump(mode="json")
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if changed:
        what = ", ".join(changed)
        raise ValueError(
            f"{target}: holds a run of another configuration (it differs in {what}); pass --replace to "
            "train this one and put it there when it is finished, or give the run another name"
        )
    raise ValueError(f"{target}: this run is finished already; pass --replace to train it again")


def _state_key(config: RunConfig, workdir: Path, device: torch.device) -> str:
    """Digest of everything that decides the run's numbers, so that nothing resumes from foreign state."""
    inputs = list(_input_digests(config, workdir).values())
    key = {"config": digest(config), "inputs": inputs}
    if product_dtype(config, device) != asked_dtype(config):
        key["products"] = product_dtype(config, device)
    return digest(key)[:16]


def _input_digests(config: RunConfig, workdir: Path) -> dict[str, str]:
    """The digest of each artifact that a run reads, by its path."""
    return {path: provenance.read_record(workdir / f"{path}.json")["digest"] for path in input_paths(config)}


def input_paths(config: RunConfig) -> list[str]:
    """The artifacts a run reads, below the work directory: its data, and its init's artifact."""
    return [config.data_path, config.init_path.removesuffix("/model")]


def _finish(run: _Run, weights: dict[str, Tensor], target: Path, workdir: Path) -> None:
    """Write the artifact in a scratch place, move it to its name, then write its record.

    weights: of the module that scores, whole (`Engine.weights`).
    """
    config, accelerator = run.config, run.engine.accelerator
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "model").mkdir(parents=True)
    state = part_of_state(weights, "model")
    if config.adapter is None:
        run.backbone.model.save_pretrained(scratch / "model", state_dict=state)
    else:
        save_adapter(run.backbone.model, state, scratch / "adapter")
        # the start once more, as it was: under a back-end with shards, this process holds a part of it only
        whole = _adapted(config, _start(config, workdir), accelerator.device).model
        whole.load_state_dict(state, strict=False)
        merge_adapter(whole).save_pretrained(scratch / "model")
    run.backbone.tokenizer.save_pretrained(scratch / "model")
    entry = config.model
    sidecar = {
        "algorithm": config.algorithm,
        "run": config.name,
        "family": run.backbone.family,
        "prediction": "next" if run.algorithm.causal else run.backbone.prediction,
        "response_end": config.recipe.response_end,
        "block_size": config.recipe.block_size,
        "block_anchor": config.recipe.block_anchor,
        "length": config.length,
        "products": product_dtype(config, accelerator.device),
        "special_tokens": {"mask": entry.mask_token, "eos": entry.end_token, "end_of_turn": entry.end_of_turn},
        "chat_template": entry.chat_template,
    }
    if run.algorithm.save:
        sidecar |= resolved(run.algorithm.save)(config, run.engine.backend.scores, weights, scratch / "model")
    (scratch / "model" / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    write_when_changed(scratch / "config.yaml", config)
    shutil.copy2(run.state.path / "metrics.jsonl", scratch / "metrics.jsonl")
    inputs = _input_digests(config, workdir)
    facts = provenance.collect(
        run=config.name,
        seed=config.seed,
        config_digest=digest(config),
        data_digest=inputs[config.data_path],
        device=str(accelerator.device),
        products=product_dtype(config, accelerator.device),
        hardware=_hardware(accelerator),
        processes=accelerator.num_processes,
        wall_seconds=round(run.wall_seconds, 1),
        tokens=run.tokens,
        parameters=run.parameters,
    )
    (scratch / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    provenance.replace_directory(scratch, target)
    provenance.write_record(target, kind="run", name=config.name, config_digest=digest(config), inputs=inputs)


def _hardware(accelerator: Accelerator) -> str:
    """The accelerators a run used, or else the processor."""
    if accelerator.device.type != "cuda":
        return provenance.hardware()
    return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}, {provenance.hardware()}"
