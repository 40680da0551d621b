"""The suite `train`: a step of training beside a bare loop, and how much of it is padding, waiting, and products.

Everything is taken in turn, as in benchmark.py: the trainer's steps with those of a bare loop on the same batches, and
one arm twice.
"""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelm.data.module import Batch, Batches, ClipData, GroupedBatches
from reelm.engine import fit, store
from reelm.engine.benchmark import TOLERANCE, Arm, Settings, ceilings, circumstances, flops, measure, show
from reelm.engine.benchmark_loop import STEPS, Place, bare_steps, beside_a_bare_loop, training
from reelm.engine.lm_training import LMTraining
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_lm import VideoLM
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import Special
from reelm.tasks.task import Mixture, Task

WINDOW = GroupedBatches.WINDOW


def some_batches(data: ClipData, count: int) -> list[Batch]:
    """Batches from evenly spaced moments of a training."""
    order = GroupedBatches(data.train, data.groups, data.batch_size, STEPS, data.seed, length=data.text_length)
    windows = STEPS // WINDOW
    made = Batches(data.train, order)
    return [made[windows * i // count * WINDOW + i % WINDOW] for i in range(count)]


def filled(sequence: Sequence) -> int:
    """Columns that only fill up: `<pad>`, and embedded text that does not count."""
    pads = int((sequence.ids == int(Special.pad)).sum())
    return pads if sequence.context_mask is None else pads + int((~sequence.context_mask).sum())


@torch.no_grad()
def share_of_tokens(module: LMTraining, batches: list[Batch]) -> dict[str, float]:
    """Of all columns of the batches, those that are no padding, as trained by default and packed.

    Prompts left out for guidance are padding here, as is the rest of a prompt's last eight slots.
    """
    packer, generator = module.model.packer, torch.Generator().manual_seed(0)
    columns, pads = {"default": 0, "packed": 0}, {"default": 0, "packed": 0}
    for batch in batches:
        task = module.tasks[batch.name]
        given, target = task.split(batch.clip, generator)
        tokens = packer.tokenizer.encode(target.video) if target.tokens is None else target.tokens
        drop = torch.rand(len(given), generator=generator) < module.text_drop
        for name, pack in (("default", packer.pack), ("packed", packer.pack_in_one_row)):
            sequence = pack(given, task.marker, tokens, unprompted=drop)
            columns[name] += sequence.ids.numel()
            pads[name] += filled(sequence)
    return {name: 1 - pads[name] / columns[name] for name in columns}


def waiting(work: Callable[[Batch], None], data: ClipData, steps: int) -> dict[str, float]:
    """Share of wall time that steps wait for the loader, with a process of its own at least."""
    data.workers = max(data.workers, 1)
    batches = iter(data.train_dataloader())
    work(next(batches))  # the worker starts and fills its queue
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        work(batch)
    return {"workers": data.workers, "share": waited / (time.perf_counter() - began)}


def step_arm(lm: nn.Module, sequence: Sequence, cost: float, bf16: bool, **settings: bool) -> Arm:
    """Forward, backward and step; `amount` are tokens that are no padding."""
    lm = copy.deepcopy(lm).float().train().requires_grad_(True)
    lm.transformer.checkpointing = settings.get("checkpointing", False)
    if settings.get("compile"):
        for block in lm.transformer.blocks:
            block.compile(dynamic=True)
    optimizer = Optimisation(lr=1e-4, muon=True).configure(lm, STEPS, inner=lm.transformer)["optimizer"]

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = lm.loss(sequence)
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    tokens = sequence.ids.numel() - filled(sequence)
    return Arm(work, tokens, "tokens/s", cost, "gemm bf16" if bf16 else "gemm fp32")


def steps_of_the_model(model: VideoLM, module: LMTraining, batch: Batch, settings: Settings) -> dict[str, Any]:
    """Rates of a step on one batch in several ways, and the share of the products that the machine could do.

    The cost counted is that of the plain model's forward and backward pass on the plain (or packed) columns, so that
    what is computed twice counts once.
    """
    packer, task = module.model.packer, module.tasks[batch.name]
    with torch.no_grad():
        given, target = task.split(batch.clip)
        tokens: Tensor = packer.tokenizer.encode(target.video) if target.tokens is None else target.tokens
        plain, packed = (pack(given, task.marker, tokens) for pack in (packer.pack, packer.pack_in_one_row))
    bf16 = fit.best_precision() == "bf16-mixed"
    counted = copy.deepcopy(model.lm).float().train().requires_grad_(True)
    costs = [float(flops(lambda s=s: counted.loss(s)[0].backward())) for s in (plain, packed)]
    arms = {n: arm for n, arm in ceilings(settings.quick).items() if n.startswith(("gemm fp32", "gemm bf16"))}
    lm = model.lm
    arms["step"] = step_arm(lm, plain, costs[0], bf16)
    arms["step, packed"] = step_arm(lm, packed, costs[1], bf16)
    arms["step, checkpointing"] = step_arm(lm, plain, costs[0], bf16, checkpointing=True)
    if not settings.quick and shutil.which(os.environ.get("CXX", "g++")):
        arms["step, compiled"] = step_arm(lm, plain, costs[0], bf16, compile=True)
    arms["step again"] = step_arm(lm, plain, costs[0], bf16)
    measure(arms, 3 if settings.quick else settings.rounds, settings.threads)
    rates: dict[str, Any] = {}
    for name, arm in arms.items():
        rates[name] = {"rate": arm.rate, "unit": arm.unit}
        if arm.ceiling:
            products = arm.rate / arm.amount * arm.cost
            rates[name] |= {"products_per_s": products, "share": products / arms[arm.ceiling].rate}
            rates[name] |= {"ceiling": arm.ceiling}
    pairs = zip(arms["step again"].rates, arms["step"].rates, strict=True)
    return {"clips": len(batch.clip), "rates": rates, "same_twice": statistics.median(a / b for a, b in pairs)}


def run(
    model: VideoLM, data: ClipData, task: Task | Mixture, settings: Settings, output: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Measures, prints a table and writes it as JSON."""
    torch.set_num_threads(settings.threads)
    fit.keep_freed_memory()
    quick = settings.quick
    with tempfile.TemporaryDirectory() as folder:
        store.save(model.tokenizer, folder)
        module = training(model, task, Path(folder))
        place = Place(data)
        module.trainer = place
        module.setup("fit")
        looked_at = some_batches(data, 4 if quick else 32)
        data.batch_size = 2 if quick else settings.batch
        batches = some_batches(data, 2 if quick else 4)
        one = next((b for b in reversed(batches) if b.clip.video.shape[2] > 1), batches[0])
        results: dict[str, Any] = {
            **about,
            **circumstances(settings),
            "parameters": sum(p.numel() for p in model.lm.parameters()),
            "tokens": share_of_tokens(module, looked_at),
            "loop": beside_a_bare_loop(model, data, task, Path(folder), batches, settings),
            "steps": steps_of_the_model(model, module, one, settings),
            "waiting": _waiting(module, data, 4 if quick else 24),
        }
    same = (results["loop"]["same_twice"], results["steps"]["same_twice"])
    results["trustworthy"] = all(abs(value - 1) <= TOLERANCE for value in same) and not quick
    return show(results, table(results), output)


def _waiting(module: LMTraining, data: ClipData, steps: int) -> dict[str, float]:
    current: list[Batch] = []
    step = bare_steps(module, data, current, fit.best_precision() == "bf16-mixed")

    def work(batch: Batch) -> None:
        current[:] = [batch]
        step()

    return waiting(work, data, steps)


def table(results: dict[str, Any]) -> str:
    """What a person reads."""
    loop, steps, tokens, wait = (results[name] for name in ("loop", "steps", "tokens", "waiting"))
    lines = [f"{'a step':24}{1e3 * seconds:10.1f} ms  {name}" for name, seconds in loop["seconds_a_step"].items()]
    same = f"(the same twice: {loop['same_twice']:.3f})"
    lines.append(f"{'trainer over bare loop':24}{loop['trainer_over_bare']:10.3f}  {same}")
    lines += [f"{'no padding, ' + name:24}{share:10.1%}" for name, share in tokens.items()]
    lines.append(f"{'waiting for data':24}{wait['share']:10.1%}  with {wait['workers']} worker(s), wall time")
    for name, entry in steps["rates"].items():
        if "share" in entry:
            lines.append(f"{name:24}{entry['rate']:10.1f} tokens/s  {entry['share']:.0%} of {entry['ceiling']}")
        else:
            lines.append(f"{name:24}{entry['rate'] / 1e9:10.1f} G{entry['unit']}")
    load = ", ".join(f"{value:.1f}" for value in results["load_average"])
    verdict = "" if results["trustworthy"] else " (not to be trusted: a busy machine, or quick=true)"
    lines.append(
        f"{results['machine']}, {results['threads']} thread(s), {results['clock']}, {loop['precision']}, load {load}; "
        f"the same step twice: {steps['same_twice']:.3f}{verdict}"
    )
    return "\n".join(lines)
