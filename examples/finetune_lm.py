"""Fine-tunes a small language model on chats, with LoRA or QLoRA, end to end.

    python examples/finetune_lm.py                         # the default task, minutes on two cores
    python examples/finetune_lm.py --data chats.jsonl --model Qwen/Qwen2.5-0.5B-Instruct
    python examples/finetune_lm.py --data HuggingFaceH4/ultrachat_200k:train_sft --max-rows 3000

You will see, in this order: the model and its adapter; the loss on held-out rows, and some answers;
training; and then the adapter saved, for jaxlora and for PEFT, read again, merged, and exported
as a model that Transformers opens, whose loss and answers are the table's last column.

A run that ends early, by Ctrl-C, SIGTERM, SIGKILL or a power cut, goes on with `--resume`, to the
same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import answers
import batches
import chat_data
import chat_template
import encoding
import generate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orders_task
import pretrained
import training
from batches import Example
from finetune_settings import Settings, parse_args
from models import hf, llama
from run_log import RunLog, draw, peak_memory
from safetensors import SafetensorError
from tqdm import tqdm

import jaxlora
from jaxlora import checkpoint, peft


class RunError(Exception):
    """A folder, or settings, with which a run cannot begin or go on."""


EXPECTED = (
    RunError,
    chat_data.DataError,
    chat_template.TemplateError,
    hf.ModelError,
    jaxlora.TargetError,
    OSError,
    SafetensorError,
)


def main(argv: Sequence[str] | None = None) -> int:
    args, settings = parse_args(argv, __doc__ or "")
    try:
        return run(settings, args)
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFinite as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1


def run(settings: Settings, args: argparse.Namespace) -> int:
    began = time.time()
    prepare(args.out, args.resume, args.overwrite)
    heading("1. The model, the data, the adapter")
    dtype = pretrained.dtype_of(settings.dtype)
    if settings.attention == "cudnn" and (jax.default_backend(), dtype) != ("gpu", jnp.bfloat16):
        raise RunError(
            f"--attention cudnn: got {dtype.__name__} on a {jax.default_backend()}, expected "
            "bfloat16 on a gpu; xla is for all others."
        )
    base = pretrained.load(settings.model, dtype)
    remat = {"none": None, "layer": ()}.get(settings.remat, settings.remat.split(","))
    checkpoints = training.Checkpoints(args.out / "checkpoints")
    done = checkpoints.latest() if args.resume else None
    begun = {} if done is None else checkpoints.notes(done)
    today = begun.get("today", datetime.datetime.now().isoformat())  # some templates say it
    tokenizer = dataclasses.replace(base.tokenizer, today=datetime.datetime.fromisoformat(today))
    base = base._replace(tokenizer=tokenizer)
    kernel = None if settings.attention == "xla" else settings.attention
    model = llama.Llama(base.config, dtype=dtype, remat=remat, implementation=kernel)
    layers, width = base.config.num_hidden_layers, base.config.hidden_size
    print(f"{base.source}: {layers} layers of width {width}, in {dtype.__name__}")
    rows, held_out = load_rows(settings)
    name = settings.data or "orders"
    train_set = encoding.encoded(base.tokenizer, rows, settings.max_length, name)
    name = settings.eval_data or f"{name}, held out"
    eval_set = encoding.encoded(base.tokenizer, held_out, settings.max_length, name)
    params, base = base.params, base._replace(params=None)  # floats are deleted when quantized
    if settings.quantize != "none":
        params = pretrained.quantized(params, settings.quantize)
    config = jaxlora.LoraConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=settings.targets.split(","),
    )
    lora = jaxlora.init(jax.random.key(settings.seed), params, config, roles=llama.ROLES)
    print(jaxlora.summary(lora))
    trainable, frozen = jaxlora.partition(lora)
    del lora  # its factors are donated to the first step

    data, length = dataset(train_set, settings, base.tokenizer.pad)
    tx, rate = optimizer(settings, len(data))
    state, iterator = training.start(tx, trainable), iter(data.to_iter_dataset())
    notes = {
        "today": today,
        "settings": dataclasses.asdict(settings),
        "rows": batches.digest(train_set),
        "held-out rows": batches.digest(eval_set),
    }
    if done is not None:
        check_same(notes, begun)
        state = checkpoints.restore(done, state, params, iterator)
        print(f"resumed after step {done} of {len(data)}")
    log = RunLog(args.out / "log.jsonl", done, args.tensorboard)
    measure = examination(model, base.tokenizer, eval_set, held_out, settings)

    if done is None:
        heading("2. Before")
        log("start", 0, **notes, steps=len(data))
        log("eval", 0, **measure(params))
        report(log.of("eval")[-1])

    per_step = f"{settings.batch * settings.accumulate} x {length} tokens"
    heading(f"3. Training: {len(data)} steps of {per_step}")
    step = training.make_step(model, tx, seed=settings.seed, dropout=settings.dropout > 0)
    with Terminated() as terminated:
        for now in train(step, state, frozen, iterator, len(data), rate, log, args):
            state, at = now.state, now.step
            if args.eval_every and at % args.eval_every == 0 and at < len(data):
                lora = jaxlora.combine(state.trainable, frozen)
                log("eval", at, **measure(lora, answers_too=False))
            every = args.save_every and at % args.save_every == 0
            if every or at == len(data) or terminated.asked:
                checkpoints.save(state, frozen, iterator, notes)
            if terminated.asked:
                checkpoints.close()
                name = signal.Signals(terminated.asked).name
                print(f"\n{name}: saved after step {at}; the same command with --resume goes on")
                return 128 + terminated.asked
    checkpoints.close()

    heading("4. Saved, read again, merged, exported")
    exported = finish(jaxlora.combine(state.trainable, frozen), params, base, config, args.out)
    del state, frozen, params

    heading("5. After: what the exported model does")
    log("eval", len(data), **measure(exported))
    report(log.of("eval")[-1])
    table(log, settings)
    log("end", len(data), seconds=round(time.time() - began, 1))
    log.close()
    title = f"{base.source}, {len(train_set):,} rows, rank {settings.rank}"
    draw(log, title, args.out / "loss.png")
    print(f"{args.out}: adapter, peft, model, loss.png, log.jsonl; {time.time() - began:.0f} s")
    return 0


def optimizer(
    settings: Settings, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with its rate, gradients cut to the largest norm."""
    warmup = math.ceil(settings.warmup * steps)
    rate = training.schedule(settings.schedule, settings.learning_rate, steps, warmup)
    adamw = optax.adamw(rate, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw), rate


# --------------------------------------------------------------------------------------------------
# Data


def load_rows(settings: Settings) -> tuple[list[chat_data.Row], list[chat_data.Row]]:
    """Training and held-out rows."""
    if settings.data is None:
        count = 420 if settings.max_rows is None else settings.max_rows
        made = orders_task.make(count, settings.eval_rows)
        numbered = [
            [chat_data.Row(i, tuple(order.messages())) for i, order in enumerate(orders, 1)]
            for orders in made
        ]
        print(f"orders: {len(numbered[0])} to train on, {len(numbered[1])} held out")
        return numbered[0], numbered[1]
    rows, left_out = chat_data.read(settings.data)
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    rows = [rows[i] for i in order]
    if settings.eval_data is not None:
        held_out = chat_data.read(settings.eval_data).rows[: settings.eval_rows]
    else:
        if len(rows) < 2:
            raise chat_data.DataError(f"{settings.data}: has 1 row, expected one to hold out too.")
        count = min(settings.eval_rows, max(1, len(rows) // 5))
        held_out, rows = rows[:count], rows[count:]
    rows = rows[: settings.max_rows]
    without = f" ({left_out} without a human's answer left out)" if left_out else ""
    print(f"{settings.data}: {len(rows)} to train on, {len(held_out)} held out{without}")
    return rows, held_out


def dataset(examples: Sequence[Example], settings: Settings, pad: int) -> tuple[Any, int]:
    """The steps, as grain gives them, and how long their rows are."""
    bins, length = batches.bins_of(examples, settings.max_length, settings.packing, settings.seed)
    data = batches.dataset(
        bins,
        length,
        batch=settings.batch,
        accumulate=settings.accumulate,
        epochs=settings.epochs,
        pad=pad,
        seed=settings.seed,
    )
    return data, length


# --------------------------------------------------------------------------------------------------
# Training


class Now(NamedTuple):
    """After a step: its number, and the state, which is donated to the next one."""

    step: int
    state: training.State


class NonFinite(Exception):
    """A loss, a gradient or an adapter that is no number."""


def train(
    step: Callable[..., Any],
    state: training.State,
    frozen: Any,
    iterator: Any,
    total: int,
    rate: optax.Schedule,
    log: RunLog,
    args: argparse.Namespace,
) -> Iterator[Now]:
    """Trains from the state's step to `total`; logs each step."""
    first = int(state.step) + 1
    with tqdm(total=total, initial=first - 1, unit="step", disable=None) as bar:
        for at in range(first, total + 1):
            batch, rows = next(iterator)
            began = time.time()
            state, found = step(state, frozen, batch)
            loss, norm, size = (float(x) for x in (found.loss, found.norm, found.size))
            if not all(math.isfinite(x) for x in (loss, norm, size)):
                raise NonFinite(
                    f"step {at}: the loss is {loss}, the gradient's norm {norm}, the adapter's "
                    f"after it {size}. Its rows are {sorted(rows)}. Nothing of this step was "
                    "saved. Look at these rows, or try a smaller --learning-rate."
                )
            speed = float((batch.segment_ids > 0).sum()) / (time.time() - began)
            memory = peak_memory() / 2**30
            log(
                "train",
                at,
                loss=loss,
                accuracy=float(found.accuracy),
                norm=norm,
                rate=float(rate(at - 1)),
                tokens_per_s=round(speed, 1),
                memory_gib=round(memory, 3),
            )
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s, {memory:.2f} GiB")
            bar.update()
            if at % args.log_every == 0 and bar.disable:
                print(f"step {at:5} of {total}  loss {loss:.4f}  {speed:,.0f} tokens/s", flush=True)
            yield Now(at, state)


class Terminated:
    """While it is entered, SIGTERM and Ctrl-C only set `asked`: the step is finished, and saved.

    A second one ends it at once.
    """

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Terminated:
        signals = signal.SIGTERM, signal.SIGINT
        self._before = {each: signal.signal(each, self._ask) for each in signals}
        return self

    def _ask(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_: Any) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)


PRODUCTS = "checkpoints", "adapter", "peft", "model", "log.jsonl", "loss.png"


def prepare(out: Path, resume: bool, overwrite: bool) -> None:
    """A folder to write to, before minutes are spent. A run in it is not lost by mistake."""
    log, checkpoints = out / "log.jsonl", out / "checkpoints"
    saved = checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())
    finished = log.is_file() and '"event": "end"' in log.read_text()
    if resume and finished:
        raise RunError(f"{out}: has a finished run, expected --overwrite, or another --out.")
    if not resume:
        there = [name for name in PRODUCTS if (out / name).exists()]
        if there and not (log.is_file() and log.read_text()[:18] in ("", '{"event": "start",')):
            raise RunError(
                f"{out}: has {', '.join(there)}, and no log of a run of this; expected an --out of "
                "its own: they would be replaced."
            )
        if saved and not overwrite:
            way = "--overwrite" if finished else "--resume to go on with it, --overwrite"
            what = "a finished run" if finished else "an unfinished run"
            raise RunError(f"{out}: has {what}, expected {way}, or another --out.")
        for path in (out / name for name in PRODUCTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    log.touch()
    if resume and not saved:
        print(f"{checkpoints}: has no step to resume from; begins at step 0")


def check_same(notes: dict[str, Any], begun: dict[str, Any]) -> None:
    now, before = ({**x["settings"], **x, "settings": None} for x in (notes, begun))
    odd = [
        f"{k}: got {now.get(k)!r}, had {before.get(k)!r}" for k in now if now[k] != before.get(k)
    ]
    if odd:
        raise RunError(
            "--resume: expected the settings of the run that began:\n  " + "\n  ".join(odd)
        )


# --------------------------------------------------------------------------------------------------
# Before and after


def examination(
    model: llama.Llama,
    tokenizer: chat_template.ChatTokenizer,
    examples: Sequence[Example],
    rows: Sequence[chat_data.Row],
    settings: Settings,
) -> Callable[..., dict[str, Any]]:
    """(params or lora) -> the loss of held-out rows, answers to some of them, the metric of these.

    With `answers_too=False`, the loss alone.
    """
    evaluate = training.make_evaluation(model)
    bins, length = batches.bins_of(examples, settings.max_length, settings.packing, settings.seed)
    pairs = [bins[i : i + 2] for i in range(0, len(bins), 2)]
    filled = [batches.fill(pair, 2, length, tokenizer.pad) for pair in pairs]
    plain = model.clone(implementation=None)  # the flash kernel is for whole rows
    generator = generate.Generator(plain, tokenizer.stop, tokenizer.pad)
    asked = [row for row in rows if row.messages][: settings.metric_rows]

    def measure(params: Any, answers_too: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = dict(evaluate(params, filled)._asdict())
        if not math.isfinite(found["loss"]):
            raise NonFinite(
                f"the loss of held-out rows is {found['loss']}: try a smaller --learning-rate, or "
                "another --dtype."
            )
        if not (asked and answers_too):
            return found
        limits = settings.max_length, settings.max_new_tokens
        said, speed = answers.greedy(generator, params, tokenizer, asked, *limits)
        found |= {"answers": said, "generated_per_s": round(speed, 1), "asked": len(asked)}
        if settings.metric != "none":
            right = answers.METRICS[settings.metric]
            hits = [right(got, row.answer) for got, row in zip(said, asked, strict=True)]
            found["metric"] = sum(hits) / len(hits)
        return found

    return measure


def finish(
    lora: Any,
    params: Any,
    base: pretrained.Pretrained,
    config: jaxlora.LoraConfig,
    out: Path,
) -> Any:
    """Saves the adapter twice, reads it twice, merges, exports; the exported params."""
    names = llama.names(base.config)
    checkpoint.save(out / "adapter", lora, config=config)
    peft.save(out / "peft", lora, names, base_model_name=base.source, task_type="CAUSAL_LM")
    trained = jaxlora.partition(lora)[0]
    for name, again in {
        "adapter": checkpoint.restore(out / "adapter", params),
        "peft": peft.load(out / "peft", params, names),
    }.items():
        pairs = zip(
            jax.tree.leaves(trained), jax.tree.leaves(jaxlora.partition(again)[0]), strict=True
        )
        if not all(np.array_equal(x, y) for x, y in pairs):
            raise RunError(f"{out / name}: read again, it has other values than were trained.")
        size = sum(p.stat().st_size for p in (out / name).rglob("*") if p.is_file())
        print(f"{out / name}: {size / 2**20:.1f} MiB, reads back bit for bit")
    pretrained.save(out / "model", jaxlora.merge(again), base)
    print(f"{out / 'model'}: merged, as Transformers reads it")
    return hf.load(out / "model")[1]


def report(found: dict[str, Any]) -> None:
    print(f"held-out loss {found['loss']:.4f} nats a token")
    if "answers" in found:
        print(f"answers, generated at {found['generated_per_s']} tokens/s (compiling included):")
    for text in found.get("answers", [])[:3]:
        print(f"  {text if len(text) <= 300 else text[:297] + '...'!r}")


def table(log: RunLog, settings: Settings) -> None:
    before, after = log.of("eval")[0], log.of("eval")[-1]
    rows = {
        "held-out loss, nats a token": ("loss", "{:.4f}"),
        "held-out tokens predicted": ("accuracy", "{:.1%}"),
    }
    if settings.metric == "exact":
        rows[f"exact match, {after['examples']} held-out rows"] = "exact", "{:.1%}"
    rows[f"{settings.metric} match, {after.get('asked')} generated"] = "metric", "{:.1%}"
    print(f"\n{'':42}{'before':>10}{'after':>10}")
    for name, (key, form) in rows.items():
        if key in before and key in after:
            print(f"{name:42}{form.format(before[key]):>10}{form.format(after[key]):>10}")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
