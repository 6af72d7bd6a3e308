"""The training loop: a resolved run config in, an artifact out.

What makes a run the same on any number of devices, at any micro-batch and after any kill: the order of rows and the
noise are pure functions of (seed, epoch, sample id); denominators count the global batch, which every rank can
compute by itself; a checkpoint holds weights, optimisers and the step, and nothing else is state.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn

from dllm import provenance
from dllm.algorithms import algorithm_class
from dllm.algorithms.base import Algorithm
from dllm.config import RunConfig, digest, read_yaml, write_when_changed
from dllm.core.batch import evaluation_noise, row_noise
from dllm.core.losses import denominator
from dllm.data.collate import ResponseEnd, collate, epoch_batches, row_widths, target_counts
from dllm.data.tokens import TokenRows, open_rows
from dllm.models.forward import Scores
from dllm.models.load import SIDECAR, Backbone, load_backbone
from dllm.training.optimizer import build_optimizers, set_learning_rate, share_of_peak
from dllm.training.state import MetricsLog, StateDirectory

EVALUATION_SEED = 20_240_611
"""Seed of the fixed evaluation noise, the same for every run, so that eval curves are comparable."""

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
    """Sizes of a run: rows per step and rank, accumulation, steps."""

    steps_per_epoch: int
    schedule_steps: int
    last_step: int
    rows_per_rank: int
    micro_batch: int
    eval_every: int

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step."""
        return divmod(step, self.steps_per_epoch)


def make_plan(config: RunConfig, rows: int, ranks: int) -> Plan:
    """Sizes of a run on `ranks` devices. Raises ValueError if the global batch does not divide among them."""
    if config.global_batch_size % ranks:
        raise ValueError(
            f"global_batch_size = {config.global_batch_size} does not divide by {ranks} processes; "
            "change one of them (the global batch is part of the experiment, the number of processes is not)"
        )
    per_epoch = max(1, rows // config.global_batch_size)
    total = config.steps or max(1, round(config.epochs * per_epoch))
    last = min(total, config.stop_after or total)
    per_rank = config.global_batch_size // ranks
    return Plan(
        steps_per_epoch=per_epoch,
        schedule_steps=total,
        last_step=last,
        rows_per_rank=per_rank,
        micro_batch=min(per_rank, config.micro_batch_size),
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
    state = StateDirectory(workdir / ".work" / f"{config.name}-{_state_key(config, workdir)}")
    precision = _mixed_precision(config.recipe)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=tracker,
        project_dir=str(state.path),
        cpu=not torch.accelerator.is_available(),  # without it, CPU ranks do not find each other
    )
    _check_world(accelerator)
    try:
        if accelerator.is_main_process:
            state.lock()
        accelerator.wait_for_everyone()
        return _train(config, workdir, state, accelerator, tracker, quiet)
    finally:
        state.unlock()
        AcceleratorState._reset_state(reset_partial_state=False)  # a later run in this process may differ in precision


def _train(
    config: RunConfig,
    workdir: Path,
    state: StateDirectory,
    accelerator: Accelerator,
    tracker: str | None,
    quiet: bool,
) -> Path:
    train_rows, test_rows = (open_rows(workdir / config.data_path, split) for split in ("train", "test"))
    dtype = torch.bfloat16 if config.recipe.parameters == "bf16" else torch.float32
    backbone = load_backbone(
        workdir / config.init_path, dtype=dtype, entry=config.model, causal=config.algorithm == "ar"
    )
    _check_fit(config, backbone, train_rows)
    set_seed(config.seed)
    plan = make_plan(config, len(train_rows), accelerator.num_processes)
    run = _Run(config, plan, backbone, train_rows, test_rows, accelerator, state)
    if tracker:
        accelerator.init_trackers("dllm", config={"run": config.name, "digest": digest(config)})
    run.fit(quiet=quiet)
    target = workdir / "runs" / config.name
    if accelerator.is_main_process:
        _finish(run, target, workdir)
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
        self.config, self.plan, self.backbone = config, plan, backbone
        self.train_rows, self.test_rows = train_rows, test_rows
        self.accelerator, self.state = accelerator, state
        self.algorithm = _algorithm(config)
        self.end = _response_end(config, train_rows, backbone)
        prediction = "next" if config.algorithm == "ar" else backbone.prediction
        scores = Scores(backbone.model, prediction).train()
        self.model = accelerator.prepare(scores)
        self.optimizers = [accelerator.prepare(o) for o in build_optimizers(scores, config.optimizer)]
        self.metrics = MetricsLog(state.path / "metrics.jsonl")
        self.tokens = 0
        self.started = time.perf_counter()
        self.wall_before = 0.0
        self.interrupted = False
        self.order_epoch, self.order = -1, numpy.zeros(0)

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
        every = max(1, self.plan.last_step // LOGGED)
        if first == 0:
            self._evaluate(0)
        bar = self._bar(first, quiet)
        mark = (time.perf_counter(), self.tokens)
        for step in range(first, self.plan.last_step):
            row = self._step(step)
            done = step + 1
            bar.update()
            if done % every == 0 or done == self.plan.last_step:
                now = (time.perf_counter(), self.tokens)
                speed = (now[1] - mark[1]) / max(1e-9, now[0] - mark[0])
                mark = now
                values = {key: float(value) for key, value in row.items()}
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
            if self._stop_now():
                self._save(done)
                bar.close()
                raise Interrupted(INTERRUPTED)
        bar.close()
        self._evaluate(self.plan.last_step, final=True)

    def _step(self, step: int) -> dict:
        """One optimiser step on the global batch; returns its numbers as tensors (no device synchronisation)."""
        config, plan, accelerator = self.config, self.plan, self.accelerator
        epoch, position = plan.epoch_of(step)
        numbers = self._batch_rows(epoch, position)
        counts = target_counts(self.train_rows, numbers, self.end, epoch)
        longest = int(self.train_rows.lengths[numbers].max())
        total = denominator(torch.from_numpy(counts), config.recipe.normalisation)
        rank = accelerator.process_index
        mine = numbers[rank * plan.rows_per_rank : (rank + 1) * plan.rows_per_rank]
        micro_batches = [mine[i : i + plan.micro_batch] for i in range(0, len(mine), plan.micro_batch)]
        rate = set_learning_rate(
            self.optimizers, share_of_peak(step, plan.schedule_steps, config.optimizer.warmup_share)
        )
        loss = nll = masked = 0
        for index, part in enumerate(micro_batches):
            batch = collate(
                self.train_rows, part, pad_id=self.backbone.pad_id, end=self.end, epoch=epoch, fill_to=longest
            ).to(accelerator.device)
            noise = row_noise(config.seed, epoch, batch.sample_ids, batch.tokens.shape[1])
            share = self._denominator(total, part, epoch)
            last = index == len(micro_batches) - 1
            with _synchronised(accelerator, self.model, last), accelerator.autocast():
                terms = self.algorithm.training_loss(
                    self.model, batch, noise, mask_id=self.backbone.mask_id, denominator=share
                )
            accelerator.backward(terms.loss * self._gradient_scale)
            loss, nll, masked = loss + terms.loss.detach(), nll + terms.nll, masked + terms.masked
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += int(self.train_rows.lengths[numbers].sum())
        if accelerator.num_processes > 1:
            loss, nll, masked = accelerator.reduce(torch.stack([loss, nll, masked.to(nll)]), "sum")
            loss = loss * self._gradient_scale / accelerator.num_processes
        return {
            "epoch": (step + 1) / plan.steps_per_epoch,
            "loss": loss,
            "nll": nll / masked,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": self.tokens,
        }

    @property
    def _gradient_scale(self) -> int:
        """Data-parallel wrappers average gradients over ranks: undone where the denominator already counts them all."""
        return self.accelerator.num_processes if self.config.recipe.denominator == "global" else 1

    def _denominator(self, total: float, part: numpy.ndarray, epoch: int) -> float:
        """What a micro-batch's summed loss is divided by: the global count, or its own as published (fault F5)."""
        if self.config.recipe.denominator == "global":
            return total
        own = target_counts(self.train_rows, part, self.end, epoch)
        return denominator(torch.from_numpy(own), self.config.recipe.normalisation)

    def _batch_rows(self, epoch: int, position: int) -> numpy.ndarray:
        if epoch != self.order_epoch:
            grouped = self.end is not None
            widths = row_widths(self.train_rows, self.end)
            self.order = epoch_batches(widths, self.config.global_batch_size, self.config.seed, epoch, grouped=grouped)
            self.order_epoch = epoch
        return self.order[position]

    @torch.no_grad()
    def _evaluate(self, step: int, *, final: bool = False) -> None:
        """Log the loss bound per target token on the test split, in nats, with its standard error over rows.

        The last evaluation (`final`) reads the whole split with the fixed noise, whatever the recipe says, so that
        the runs of an ablation are compared on equal masks.
        """
        config, accelerator = self.config, self.accelerator
        limit = None if final else config.eval_rows
        rows = numpy.arange(min(len(self.test_rows), limit or len(self.test_rows)))
        drawn = config.recipe.eval_noise == "drawn" and not final
        algorithm = self.algorithm if drawn else _algorithm(config, exact=True)
        self.model.eval()
        sums = torch.zeros(len(rows), dtype=torch.float64)
        counts = target_counts(self.test_rows, rows, self._eval_end, 0)
        # neighbours in length share a batch; the fixed noise is keyed by row, so this changes no number
        by_length = rows[numpy.argsort(self.test_rows.lengths[rows], kind="stable")]
        batches = [by_length[i : i + config.micro_batch_size] for i in range(0, len(rows), config.micro_batch_size)]
        longest = int(self.test_rows.lengths[rows].max())
        for part in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = collate(self.test_rows, part, pad_id=self.backbone.pad_id, end=self._eval_end, fill_to=longest).to(
                accelerator.device
            )
            for draw in range(config.eval_draws):
                width = batch.tokens.shape[1]
                if drawn:  # published fault F6: other masks at every evaluation
                    noise = row_noise(config.seed + step, draw, batch.sample_ids, width)
                else:
                    noise = evaluation_noise(EVALUATION_SEED, draw, batch.sample_ids, width)
                with accelerator.autocast():
                    terms = algorithm.training_loss(
                        self.model, batch, noise, mask_id=self.backbone.mask_id, denominator=1.0
                    )
                sums[part] += terms.rows.double().cpu() / config.eval_draws
        self.model.train()
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        targets = torch.from_numpy(counts).double()
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
            }
        )

    @property
    def _eval_end(self) -> ResponseEnd | None:
        """Test responses end as training ones do, without the random extra blocks."""
        end = self.end
        return end and replace(end, extra_blocks=0)

    def _resume(self) -> int:
        """Load the newest checkpoint that can be loaded and return its step (0: none)."""
        for step in reversed(self.state.steps()):
            try:
                saved = json.loads((self.state.checkpoint(step) / "progress.json").read_text(encoding="utf-8"))
                self.accelerator.load_state(str(self.state.checkpoint(step)))
            except DAMAGE as fault:
                self.accelerator.print(
                    f"checkpoint {self.state.checkpoint(step)} is damaged ({fault}); trying an older one"
                )
                continue
            self.tokens, self.wall_before = saved["tokens"], saved["wall_seconds"]
            self.started = time.perf_counter()
            if self.accelerator.is_main_process:
                self.metrics.rewind(step)
            self.accelerator.print(f"going on from step {step} of {self.plan.last_step}")
            return step
        if self.accelerator.is_main_process:
            self.metrics.rewind(-1)
        return 0

    def _save(self, step: int) -> None:
        """Write the checkpoint of a step; it appears whole or not at all."""
        if step == self.plan.last_step and not self.interrupted:
            return  # the artifact follows at once
        accelerator = self.accelerator
        scratch = self.state.path / f".step-{step}"
        if accelerator.is_main_process:
            self.state.begin(step)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(scratch))
        if accelerator.is_main_process:
            progress = {"step": step, "tokens": self.tokens, "wall_seconds": self.wall_seconds}
            (scratch / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.state.finish(step)

    def _log(self, values: dict) -> None:
        values = {"step": values["step"], "epoch": round(values["epoch"], 6), "split": values["split"]} | values
        values["wall_seconds"] = round(self.wall_seconds, 3)
        if self.accelerator.is_main_process:
            self.metrics.write(values)
        named = {f"{values['split']}/{k}": v for k, v in values.items() if k not in ("step", "split")}
        self.accelerator.log(named, step=values["step"])

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
            dynamic_ncols=True,
        )

    def _on_signal(self, number, frame) -> None:
        self.interrupted = True

    def _stop_now(self) -> bool:
        """Whether any rank was told to stop (all ranks then save the same step)."""
        if self.accelerator.num_processes == 1:
            return self.interrupted
        flag = torch.tensor([float(self.interrupted)], device=self.accelerator.device)
        self.interrupted = bool(self.accelerator.reduce(flag, "sum").item())
        return self.interrupted


def _synchronised(accelerator: Accelerator, model: nn.Module, last: bool):
    """Gradients are exchanged with the last micro-batch of a step only."""
    return contextlib.nullcontext() if last or accelerator.num_processes == 1 else accelerator.no_sync(model)


def _in_main_thread() -> bool:
    """Whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def _algorithm(config: RunConfig, *, exact: bool = False) -> Algorithm:
    """The run's algorithm; `exact` swaps in the least noisy unbiased estimate, for evaluation."""
    cls = algorithm_class(config.algorithm)
    recipe = config.recipe.model_copy(update={"corruption": "exact", "weight": "elbo"}) if exact else config.recipe
    return cls(recipe, config.mlm_share) if config.algorithm == "mlm" else cls(recipe)


def _response_end(config: RunConfig, rows: TokenRows, backbone: Backbone) -> ResponseEnd | None:
    """How responses end; None for text, which has no prompts."""
    if not rows.prompts.any():
        return None
    recipe = config.recipe
    kind = "one" if config.algorithm == "ar" else recipe.response_end
    return ResponseEnd(
        kind, backbone.eos_id, recipe.block_size, recipe.extra_blocks, config.seed, longest=config.length
    )


def _mixed_precision(recipe) -> str:
    """Autocast dtype for accelerate; bf16 parameters need none."""
    return "bf16" if recipe.autocast == "bf16" and recipe.parameters == "fp32" else "no"


def _check_fit(config: RunConfig, backbone: Backbone, rows: TokenRows) -> None:
    """Rows and their ends fit the model's positions, and the data was tokenized with its vocabulary."""
    if config.length > backbone.max_length:
        raise ValueError(
            f"{config.name}: length = {config.length} is longer than the model allows ({backbone.max_length}); "
            "lower `length` or start from another model"
        )
    highest = int(rows.tokens[: 1 << 20].max()) if len(rows.tokens) else 0
    if highest >= backbone.vocab_size:
        raise ValueError(
            f"{config.data_path}: holds token id {highest}, the model knows {backbone.vocab_size}; "
            "the data was prepared with another tokenizer: prepare it again"
        )


def _check_world(accelerator: Accelerator) -> None:
    """Raise ValueError if this process was launched as one of several and yet stands alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE = {launched}, but accelerate sees {accelerator.num_processes} process(es): each would train "
            "alone; on CPUs use distributed_type: MULTI_GPU with use_cpu: true in the accelerate configuration"
        )


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


def _state_key(config: RunConfig, workdir: Path) -> str:
    """Digest of everything that decides the run's numbers, so that nothing resumes from foreign state."""
    inputs = [provenance.read_record(workdir / f"{path}.json")["digest"] for path in input_paths(config)]
    return digest({"config": digest(config), "inputs": inputs})[:16]


def input_paths(config: RunConfig) -> list[str]:
    """The artifacts a run reads, below the work directory: its data, and its init's artifact."""
    return [config.data_path, config.init_path.removesuffix("/model")]


def _finish(run: _Run, target: Path, workdir: Path) -> None:
    """Write the artifact in a scratch place, move it to its name, then write its record."""
    config, accelerator = run.config, run.accelerator
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "model").mkdir(parents=True)
    model = accelerator.unwrap_model(run.model).model
    model.save_pretrained(scratch / "model")
    run.backbone.tokenizer.save_pretrained(scratch / "model")
    entry = config.model
    sidecar = {
        "algorithm": config.algorithm,
        "run": config.name,
        "family": run.backbone.family,
        "prediction": "next" if config.algorithm == "ar" else run.backbone.prediction,
        "response_end": config.recipe.response_end,
        "block_size": config.recipe.block_size,
        "length": config.length,
        "special_tokens": {"mask": entry.mask_token, "eos": entry.end_token, "end_of_turn": entry.end_of_turn},
        "chat_template": entry.chat_template,
    }
    (scratch / "model" / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    write_when_changed(scratch / "config.yaml", config)
    shutil.copy2(run.state.path / "metrics.jsonl", scratch / "metrics.jsonl")
    inputs = {path: provenance.read_record(workdir / f"{path}.json")["digest"] for path in input_paths(config)}
    facts = provenance.collect(
        run=config.name,
        seed=config.seed,
        config_digest=digest(config),
        data_digest=inputs[config.data_path],
        device=str(accelerator.device),
        hardware=_hardware(accelerator),
        processes=accelerator.num_processes,
        wall_seconds=round(run.wall_seconds, 1),
        tokens=run.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    (scratch / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    provenance.replace_directory(scratch, target)
    provenance.write_record(target, kind="run", name=config.name, config_digest=digest(config), inputs=inputs)


def _hardware(accelerator: Accelerator) -> str:
    """The accelerators a run used, or else the processor."""
    if accelerator.device.type != "cuda":
        return provenance.hardware()
    return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}, {provenance.hardware()}"
