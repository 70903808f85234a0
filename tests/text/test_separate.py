"""`data.documents: separate`: no token sees or predicts a token of another document."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import cli, data, init, optim, step
from jaxgpt.config import load_config
from jaxgpt.data import DataConfig, DataError, Windows
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.model import GPTConfig
from jaxgpt.text import source
from jaxgpt.text.prepare import PrepareArgs, prepare
from jaxgpt.tools import ahead
from jaxgpt.training import resolve

CONFIG = GPTConfig(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=16)
# six windows of nine tokens, the numbers of whose documents are written out; ten targets of 48 do not count
DOCUMENTS = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 2, 2, 2, 3, 3, 3, 3],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 1, 2, 3, 4, 5, 5, 5, 5],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
TOKENS = np.random.default_rng(0).integers(0, 30, DOCUMENTS.shape)


@pytest.fixture
def folder(tmp_path, text):
    """A prepared folder of many short documents, of which some are empty, and the ends of its documents."""
    lengths = np.random.default_rng(0).integers(0, 30, 600).tolist()
    cuts = np.cumsum([0, *lengths]).tolist()
    lines = [json.dumps({"text": text[a:b]}) for a, b in itertools.pairwise(cuts)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    prepare(PrepareArgs(str(tmp_path / "documents.jsonl"), str(tmp_path / "tokens"), "char", workers=1))
    return tmp_path / "tokens", np.load(tmp_path / "tokens" / "document_ends.npy")


def opened(path, documents="separate", **fields):
    found = source.open_source(DataConfig(path=str(path), documents=documents, **fields))
    found.split(sharding.make_mesh(MeshConfig(1)), 16)
    return found


@functools.cache
def first_model(**fields):
    return init.init_model(GPTConfig(**{**CONFIG.__dict__, **fields}), seed=0)


# Where documents end


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_the_tokens_of_a_window_know_their_documents(folder, sampling):
    path, ends = folder
    found, packed = opened(path, sampling=sampling), opened(path, "packed", sampling=sampling)
    tokens = np.load(path / "tokens.npy")
    of_token = np.cumsum(np.bincount(ends))[: len(tokens)]  # the documents that end before it
    where = {tuple(tokens[i : i + 17].tolist()): i for i in range(len(tokens) - 16)}
    for stream in (step.TRAIN, step.ESTIMATE, step.VAL):
        windows = found.windows(stream, 3, 5, 2, 8)
        np.testing.assert_array_equal(windows.tokens, packed.windows(stream, 3, 5, 2, 8))
        for row, numbers in zip(
            np.asarray(windows.tokens).reshape(16, 17), np.asarray(windows.documents).reshape(16, 17)
        ):
            expected = of_token[where[tuple(row.tolist())] :][:17]
            np.testing.assert_array_equal(numbers, expected - expected[0])
            np.testing.assert_array_equal(np.asarray(Windows(row, numbers).counted), np.diff(expected) == 0)
        assert not np.asarray(windows.counted).all()
    (piece,) = found.pieces("val")
    np.testing.assert_array_equal(piece.tokens, *packed.pieces("val"))
    cut = len(tokens) - len(piece.tokens)
    np.testing.assert_array_equal(piece.documents, of_token[cut:] - of_token[cut])


@pytest.mark.parametrize(
    "damage",
    [
        lambda ends: None,
        lambda ends: ends[:0],
        lambda ends: ends[:-1],
        lambda ends: ends[::-1],
        lambda ends: ends - 1,
        lambda ends: ends.astype(float),
        lambda ends: ends[:, None],
        lambda ends: np.concatenate([[-5], ends]),
    ],
)
def test_a_folder_without_the_ends_of_its_documents_is_refused(folder, damage):
    path, ends = folder
    if (damaged := damage(ends)) is None:
        (path / "document_ends.npy").unlink()
    else:
        np.save(path / "document_ends.npy", damaged)
    with pytest.raises(
        DataError, match=r"documents? end|ends of its documents.*\): prepare the folder again"
    ) as caught:
        opened(path)
    assert "document_ends.npy" in str(caught.value) and "\n" not in str(caught.value)
    opened(path, "packed")


def test_a_text_has_no_documents_to_separate(text_file):
    with pytest.raises(DataError, match=r"single document \(--data.documents, separate; .*my.txt\): make a folder"):
        opened(text_file)


# The loss


def test_the_losses_of_a_window_are_those_of_each_document_alone():
    model, losses_of = first_model(), jax.jit(step.token_losses)
    table = model.position_embedding_table.embedding[...]
    inputs, targets, documents, weights = data.batch(Windows(TOKENS, DOCUMENTS))
    losses, checked = np.asarray(losses_of(model, inputs, targets, documents=documents)), 0
    for row, numbers in enumerate(DOCUMENTS):
        for number in np.unique(numbers):
            (at,) = np.nonzero(numbers == number)  # its tokens, of which the first is no target
            alone = nnx.clone(model)
            alone.position_embedding_table.embedding[...] = jnp.roll(table, -at[0], axis=0)  # those of the window
            tokens = np.zeros((1, 9), int)  # what follows the document is not seen by it
            tokens[0, : len(at)] = TOKENS[row, at]
            expected = np.asarray(losses_of(alone, tokens[:, :-1], tokens[:, 1:]))[0, : len(at) - 1]
            np.testing.assert_allclose(losses[row, at[:-1]], expected, rtol=1e-5)  # float32
            checked += len(at) - 1
    assert checked == np.count_nonzero(weights) == 38
    packed = np.asarray(losses_of(model, inputs, targets))
    assert np.abs(packed - losses)[DOCUMENTS[:, :-1] > 0].min() > 0


def test_no_gradient_reaches_the_tokens_of_another_document():
    tokens = np.array([[1, 2, 3, 11, 12, 13, 14, 15, 16]])  # an id above 10 is in the second document
    inputs, targets, documents, weights = data.batch(Windows(tokens, tokens // 10))

    @jax.jit
    @jax.grad
    def gradient(model, of):
        losses = step.token_losses(model, inputs, targets, documents=documents) * weights
        return jnp.sum(losses, where=of)

    for of, others in ((documents == 0, slice(10, 17)), (documents == 1, slice(0, 4))):
        found = np.asarray(gradient(first_model(positions="none"), of).token_embedding_table.embedding[...])
        assert np.abs(found).sum() > 0 and (found[others] == 0).all()


def trained(windows, grad_accumulation=1, devices=1, per_device=False, loss_chunks=1):
    """Loss, gradient and its norm of one step."""
    config = optim.OptimConfig(warmup_steps=0, decay_steps=10, beta1=0.5, grad_clip=0.0)
    tx, schedule = optim.optimizer(config), optim.schedule(config)
    model = first_model()
    spec = step.StepSpec(
        nnx.graphdef(model), tx, schedule, grad_accumulation, jnp.dtype("float32"), loss_chunks, per_device
    )
    state = jax.tree.map(jnp.copy, step.init_state(step.params_of(model), tx))
    mesh = sharding.make_mesh(MeshConfig(devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state, metrics = step.train_steps(state, windows, jax.random.key(0), spec=spec)
    gradient = jax.tree.map(lambda moment: 2 * np.asarray(moment), optax.tree.get(state.opt_state, "mu"))
    return float(metrics["loss"][0]), gradient, float(metrics["grad_norm"][0])


@functools.cache
def expected():
    """The mean over all tokens of a step that count, added one by one, and its gradient."""
    graphdef, params = nnx.split(first_model())
    of_inputs = jnp.asarray(DOCUMENTS[:, :-1])

    @jax.jit
    def losses_of(params):
        return step.token_losses(nnx.merge(graphdef, params), TOKENS[:, :-1], TOKENS[:, 1:], documents=of_inputs)

    losses, pull = jax.vjp(losses_of, params)
    total, cotangent = 0.0, np.zeros((6, 8), np.float32)
    for row in range(6):
        for t in range(8):
            if DOCUMENTS[row, t] == DOCUMENTS[row, t + 1]:
                total, cotangent[row, t] = total + float(losses[row, t]), 1 / 38
    return total / 38, nnx.to_pure_dict(pull(jnp.asarray(cotangent))[0])


@pytest.mark.parametrize(
    "parts, devices, per_device, chunks",
    [
        (2, 1, False, 1),
        (3, 2, True, 2),
        pytest.param(1, 1, False, 1, marks=pytest.mark.full),
        pytest.param(1, 2, True, 1, marks=pytest.mark.full),
        pytest.param(2, 2, False, 1, marks=pytest.mark.full),
    ],
)
def test_the_loss_of_a_step_is_the_mean_over_all_its_targets_that_count(parts, devices, per_device, chunks):
    windows = Windows(jnp.asarray(TOKENS, jnp.uint8)[None], jnp.asarray(DOCUMENTS, jnp.int32)[None])
    loss, gradient, norm = trained(windows, parts, devices, per_device, chunks)
    wanted, exact = expected()
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert norm == pytest.approx(float(optax.tree.norm(exact)), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)  # float32, in another order


def test_windows_in_which_nothing_counts_have_no_loss():
    with jax.disable_jit():  # XLA may take 0 / 0 for 0
        *_, weights = data.batch(Windows(jnp.zeros((2, 3), jnp.int32), jnp.tile(jnp.arange(3), (2, 1))))
    assert (np.asarray(weights) == 0).all()


def test_an_estimate_and_an_evaluation_count_the_same_targets():
    model = first_model()
    config = optim.OptimConfig(decay_steps=10)
    spec = step.StepSpec(nnx.graphdef(model), optim.optimizer(config), optim.schedule(config), 1, jnp.dtype("float32"))
    windows = Windows(jnp.asarray(TOKENS)[None], jnp.asarray(DOCUMENTS)[None])
    assert float(step.estimate_loss(step.params_of(model), windows, spec=spec)) == pytest.approx(
        expected()[0], rel=1e-6
    )
    tokens = np.random.default_rng(1).integers(0, 30, 61)
    ends = np.array([1, 8, 8, 9, 20, 24, 40])
    documents = np.searchsorted(ends, np.arange(61), side="right")
    losses_of, nats = jax.jit(step.token_losses), []
    for start in range(0, 60, 8):
        part, numbers = (a[None, start : start + 9] for a in (tokens, documents))
        losses = losses_of(model, part[:, :-1], part[:, 1:], documents=numbers[:, :-1])
        nats += np.asarray(losses)[numbers[:, 1:] == numbers[:, :-1]].tolist()
    assert len(nats) == 60 - 6  # one of the documents is empty
    split = Windows(tokens, documents)
    assert step.evaluate(model, split, batch_size=3) == pytest.approx(np.mean(nats), rel=1e-6)
    halves = [jax.tree.map(lambda a, cut=cut: a[cut], split) for cut in (slice(0, 33), slice(32, None))]
    assert step.evaluate(model, halves, batch_size=3) == pytest.approx(np.mean(nats), rel=1e-6)


def test_packed_documents_compile_to_the_step_of_plain_windows(monkeypatch):
    """Nothing in the program knows of documents, as long as they are not kept separate."""
    model, config = first_model(), optim.OptimConfig(decay_steps=10)
    tx, schedule = optim.optimizer(config), optim.schedule(config)
    spec = step.StepSpec(nnx.graphdef(model), tx, schedule, 2, jnp.dtype("float32"))
    state = step.init_state(step.params_of(model), tx)

    def lowered(windows):
        step.train_steps.clear_cache()
        return step.train_steps.lower(state, windows, jax.random.key(0), spec=spec).as_text()

    plain = jnp.zeros((2, 4, 9), jnp.uint8)
    program = lowered(plain)
    separate = lowered(Windows(plain, jnp.zeros((2, 4, 9), jnp.int32)))
    monkeypatch.setattr(
        step,
        "token_losses",
        lambda model, inputs, targets, rngs, chunks, documents: losses(model, inputs, targets, rngs),
    )

    def losses(model, inputs, targets, rngs):
        x, _ = model.hidden(inputs, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(x), targets)

    monkeypatch.setattr(data, "batch", data.inputs_and_targets)
    assert lowered(plain) == program != separate
    step.train_steps.clear_cache()


# A whole run


def test_a_split_of_documents_of_one_token_each_has_nothing_to_predict():
    split = Windows(jnp.arange(9, dtype=jnp.uint8), jnp.arange(9))
    with pytest.raises(DataError, match=r"nothing to predict.*--data\.documents packed"):
        step.evaluate(init.init_model(CONFIG, 0), split, batch_size=3)


@pytest.mark.full
def test_a_run_evaluates_and_replays_what_it_trained_on(folder, tiny_config, tmp_path, capsys):
    path, ends = folder
    flags = [*tiny_config, "--data.path", str(path), "--data.documents", "separate", "--data.train_fraction", "0.8"]
    flags += ["--model.dropout", "0", "--data.sampling", "epochs", "--optim.grad_accumulation", "2"]
    run = jaxgpt.train(load_config(flags))
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    final = lines[-1]["val_loss"]
    n, cut = ends[-1], int(0.8 * ends[-1])
    counted = n - cut - 1 - len({end for end in ends.tolist() if cut < end < n})
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(run.dir), "--step", "last"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == counted and result["nats_per_token"] == pytest.approx(final, rel=1e-5)
    assert cli.main(["eval", "--run", str(run.dir), "--path", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == counted
    assert cli.main(["eval", "--run", str(run.dir), "--path", str(tmp_path / "my.txt"), "--split", "all"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 20_000 - 1
    assert cli.main(["replay", "--run", str(run.dir), "--step", "15"]) == 0
    (recorded,) = [line["loss"] for line in lines if line["kind"] == "train" and line["step"] == 15]
    assert f"{recorded:.4f}" in capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text("")
    assert cli.main(["plan", "--config", str(tmp_path / "recipe.yaml"), *flags, "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "xla"
    kernels = {"separate": "xla", "packed": "cudnn"}  # those of a GPU have no documents
    for documents, kernel in kernels.items():
        config = load_config([*flags, "--data.documents", documents, "--train.dtype", "bfloat16"])
        assert ahead.kernel_of(resolve(config, 22), "gpu") == kernel
