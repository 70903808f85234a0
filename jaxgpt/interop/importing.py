"""`jaxgpt import`: make a run directory from GPT-2's weights in Hugging Face's files or nanoGPT's ckpt.pt."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config, RunConfig, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.devices.sharding import AXES
from jaxgpt.errors import CheckpointError
from jaxgpt.files import lock, storage
from jaxgpt.interop import gpt2, hf_tokenizer, hub
from jaxgpt.interop.torch_checkpoint import Tensor, TorchFile, unpickle
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig, optimizer
from jaxgpt.runs.directory import TOKENIZER, OtherRunError, open_run
from jaxgpt.tokenizer import CharTokenizer, Tokenizer, TokenizerError

INDEX, ONE_FILE, PICKLED = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
GPT2_ROWS = (50257, 50304)  # rows of GPT-2's vocabulary: its ids, and the padded table of nanoGPT


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Make a run directory from GPT-2's weights, to sample from it, evaluate it and continue its training."""

    from_: str
    """Folder saved by transformers (config.json, model.safetensors, tokenizer.json), nanoGPT's ckpt.pt, or a name on
    Hugging Face's hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME@COMMIT."""
    run: str
    """Run directory to create."""
    tokenizer: str | None = None
    """gpt2, a tokenizer.json, or nanoGPT's meta.pkl; by default the tokenizer.json beside the weights, or gpt2 for a
    ckpt.pt with GPT-2's vocabulary."""


class Weights(NamedTuple):
    """The weights of a model in its files; values are read only by `read`."""

    names: dict[str, Any]
    """GPT-2's name of each tensor -> its location, the argument of `read`."""
    read: Callable[[Any], np.ndarray]
    model: Callable[[int], GPTConfig]
    """Returns the configuration for a number of ids."""
    transposed: bool
    folder: pathlib.Path


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
        CheckpointError: the weights are missing, damaged, or not GPT-2's.
        TokenizerError: there is no tokenizer, or it does not fit the weights.
        DownloadError: the model cannot be downloaded.
    """
    target = epath.Path(args.run)
    if target.exists() and any(target.iterdir()):
        raise OtherRunError(f"the run directory is not empty (--run, {args.run}): name another")
    weights = find(args.from_)
    tokenizer = find_tokenizer(args, weights)
    rows, ids = weights.read(weights.names["wte.weight"]).shape[0], tokenizer.vocab_size
    if rows < ids:
        raise TokenizerError(
            f"the model has {rows} ids, the tokenizer {ids} (--tokenizer): name the model's own tokenizer"
        )
    model = weights.model(ids)
    params = gpt2.to_params(
        weights.names, lambda name: weights.read(weights.names[name]), model, transposed=weights.transposed
    )
    config = configuration(args.run, model)
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer(config.optim).init(params)}
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


def find(source: str) -> Weights:
    """Find the weights that `--from` names.

    Raises:
        CheckpointError: there are no weights of a known format.
        DownloadError: the model cannot be downloaded.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists() and hub.is_name(source):
        path = hub.fetch(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return huggingface(path)
        path = path / "ckpt.pt"  # nanoGPT's out_dir
    elif path.suffix == ".safetensors" and path.is_file():
        return huggingface(path.parent)
    if path.suffix == ".pt" and path.is_file():
        return nanogpt(path)
    raise CheckpointError(
        f"no weights found (--from, {source}): name a folder with config.json and {ONE_FILE}, nanoGPT's ckpt.pt, "
        f"{', '.join(hub.PINNED)}, or OWNER/NAME@COMMIT on the hub"
    )


def huggingface(folder: pathlib.Path) -> Weights:
    """Open a folder saved by transformers: one safetensors file, several with an index, or PyTorch's archive.

    Raises:
        CheckpointError: the files are missing, damaged, or not GPT-2's.
    """
    stored = _json(folder / "config.json")
    if (folder / INDEX).is_file():
        files = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        files = [ONE_FILE] if (folder / ONE_FILE).is_file() else []
    try:
        opened = [safe_open(folder / name, framework="np") for name in files]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"damaged safetensors ({folder}, {error}): copy the file again") from None
    where = {gpt2.plain(name): (file, name) for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def read(found):
        file, name = found
        return file.get_tensor(name)

    if not files and (folder / PICKLED).is_file():
        file = TorchFile(folder / PICKLED)
        where, read = _state_dict(file.content), file.read
    elif not files:
        raise CheckpointError(f"no weights ({folder}): put {ONE_FILE} beside config.json")
    return Weights(_named(where, folder), read, lambda ids: gpt2.to_config(stored, ids), False, folder)


def nanogpt(path: pathlib.Path) -> Weights:
    """Open nanoGPT's ckpt.pt. The activation is assumed to be nn.GELU, since the file does not name it.

    Raises:
        CheckpointError: the file is damaged, is not nanoGPT's, or holds more than tensors and plain data.

    Source: github.com/karpathy/nanoGPT, train.py and model.py.
    """
    file = TorchFile(path)
    content = file.content if isinstance(file.content, dict) else {}
    names, stored = _named(_state_dict(content.get("model")), path), content.get("model_args")
    if not isinstance(stored, dict):
        raise CheckpointError(f"no model_args ({path}): import nanoGPT's ckpt.pt")
    head, embedding = names.get("lm_head.weight"), names["wte.weight"]
    tied = head is None or head == embedding or np.array_equal(file.read(head), file.read(embedding))
    return Weights(names, file.read, lambda ids: gpt2.nanogpt_config(stored, ids, tied), True, path.parent)


def find_tokenizer(args: ImportArgs, weights: Weights) -> Tokenizer:
    """Find the tokenizer that `--tokenizer` names, or the one that belongs to the weights.

    Args:
        args: the arguments of the command.
        weights: the weights to import.

    Raises:
        TokenizerError: there is no tokenizer, or it cannot be used.
    """
    beside, spec = weights.folder / hf_tokenizer.FILE, args.tokenizer
    if spec is None and beside.is_file():
        spec = str(beside)
    rows = weights.read(weights.names["wte.weight"]).shape[0]
    if spec == "gpt2" or (spec is None and weights.transposed and rows in GPT2_ROWS):
        return tokenizers.gpt2()
    if spec is None or not pathlib.Path(spec).is_file():
        raise TokenizerError(
            f"no tokenizer ({f'--tokenizer, {spec}' if spec else f'{weights.folder}, no {hf_tokenizer.FILE}'}): "
            "add --tokenizer with gpt2, a tokenizer.json, or nanoGPT's meta.pkl"
        )
    if spec.endswith(".pkl"):
        with open(spec, "rb") as file:
            meta = unpickle(file, spec)
        try:
            return CharTokenizer("".join(meta["itos"][i] for i in range(len(meta["itos"]))))
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"not nanoGPT's meta.pkl (--tokenizer, {spec}, {error}): name that file") from None
    return hf_tokenizer.read(pathlib.Path(spec))


def _state_dict(state: Any) -> dict[str, Tensor]:
    """The tensors of a state_dict, by GPT-2's names."""
    tensors = state.items() if isinstance(state, dict) else ()
    return {gpt2.plain(name): tensor for name, tensor in tensors if isinstance(tensor, Tensor)}


def _named(names: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    if "wte.weight" not in names:
        raise CheckpointError(f"no GPT-2 weights ({path}): import nanoGPT's ckpt.pt, or a folder saved by transformers")
    return names


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return stored
        error = "not a JSON object"
    except (OSError, ValueError) as caught:
        error = caught
    raise CheckpointError(f"cannot read the file ({path}, {error}): restore it") from None
