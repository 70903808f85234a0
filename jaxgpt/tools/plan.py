"""`jaxgpt plan`: memory, traffic and time of a run, before it runs. The compilation is in ahead.py."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from jaxgpt.config import Config, ConfigError
from jaxgpt.devices import chips, sharding
from jaxgpt.errors import ArgumentError
from jaxgpt.runs import metrics
from jaxgpt.step import params_of, trained_of
from jaxgpt.text import corpus, token_folder
from jaxgpt.tokenizer import CharTokenizer
from jaxgpt.tools import ahead
from jaxgpt.tools.ahead import Needs, Target
from jaxgpt.training import abstract_model, mesh_config, resolve

# characters of the named corpora, which are pinned, so that planning downloads nothing
CHARACTERS = {"shakespeare": 1_132_176, "tiny_shakespeare": 1_115_394}
GPT2_IDS = 50_257


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """Predict the memory, traffic and time of a run. Takes all flags of train, and these."""

    target: str | None = None
    """Devices to plan for: v5e:2x4, v5p:2x2x1, v6e:16x16 (TPUs, compiled; v5e:1x1 is one chip) or h200:8 (GPUs,
    estimated); by default the devices of this machine."""
    mfu: float = 0.4
    """Assumed fraction of the peak FLOP/s that the run reaches, in (0, 1]; 0.3 to 0.5 is common."""
    search: bool = True
    """Search for the largest batch that fits, with a few more compilations."""
    json: bool = False
    """Print one line of JSON instead of the table."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mfu <= 1:
            raise ArgumentError(f"mfu is {self.mfu}: use a number above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Text:
    """Facts about the training text that need no tokens to be loaded."""

    vocab_size: int
    tokens: int | None
    """Number of tokens of the training split; None if they are not on this machine."""
    on_device: bool
    """Whether each device holds the whole split, as with a text of characters."""


def find_text(config: Config) -> Text:
    """Find the vocabulary size and the length of the text that a configuration trains on.

    Raises:
        ConfigError: the vocabulary size is not known.
        CorpusError: the file is not a text.
    """
    path, vocab_size, whole = config.data.path, config.model.vocab_size, None
    chars = config.data.tokenizer == "char"
    local = pathlib.Path(path or "")
    if path is not None and (local / "dataset.json").is_file():
        facts = token_folder.facts_of(epath.Path(local))
        return Text(facts["vocab_size"], int(config.data.train_fraction * facts["tokens"]), on_device=False)
    if chars and path is None and vocab_size in (0, len(corpus.SHAKESPEARE_ALPHABET)):
        vocab_size, whole = len(corpus.SHAKESPEARE_ALPHABET), CHARACTERS.get(config.data.name)
    elif chars and path is not None and local.is_file():
        text = corpus.load(config.data.name, path).text
        vocab_size, whole = CharTokenizer.from_text(text).vocab_size, len(text)
    elif config.data.tokenizer == "gpt2":
        vocab_size = vocab_size or GPT2_IDS
    if not vocab_size:
        raise ConfigError(
            f"the size of the vocabulary is not known ({path} is not here): add --model.vocab_size, 50257 for GPT-2's"
        )
    return Text(vocab_size, whole and int(config.data.train_fraction * whole), on_device=whole is not None)


def count_parameters(config: Config) -> int:
    """Return the number of parameters of the model, its adapters included."""
    return _count(params_of(abstract_model(config, "cpu")))


def count_adapters(config: Config) -> int:
    """Return the number of those parameters that LoRA trains; 0 without LoRA."""
    return _count(trained_of(abstract_model(config, "cpu"))) if config.lora.rank else 0


def _count(params: dict[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def computed_again(config: Config) -> int:
    """Count the FLOPs per token that the backward pass spends on recomputing what was not kept."""
    model = config.model
    attention = 4 * model.n_layer * model.n_head * model.channels_per_head * model.span
    matmuls = 2 * model.n_layer * (model.attention_parameters + model.feed_forward_parameters)
    again = {"none": 0, "dots": attention, "full": attention + matmuls}[model.remat]
    return again + (2 * model.vocab_size * model.width if config.train.loss_chunks > 1 else 0)


def largest_batch(needs_of: Callable[[int], Needs], room: int, batch: int, needs: Needs) -> int | None:
    """Find the largest of 1, 2, 3, 4, 6, 8, 12, ... windows per device that fits, with few calls of `needs_of`.

    Memory grows almost linearly with the batch, so a line through the known sizes gives the next batch to try.

    Args:
        needs_of: returns the needs of a number of windows per device; slow.
        room: bytes of memory per device.
        batch: windows per device whose needs are known.
        needs: the needs of `batch`.

    Returns:
        Windows per device; None if no batch was found to fit.
    """
    known = {batch: needs}
    sizes = sorted({f << e for e in range(16) for f in (2, 3)} | {1})
    for _ in range(4):
        sized = sorted((b, each.total) for b, each in known.items() if each.total is not None)
        if not sized:
            return None
        (b0, least), (b1, most) = (0, needs.arguments) if len(sized) == 1 else sized[0], sized[-1]
        slope = max((most - least) / (b1 - b0), 1)
        bound = min((b for b, each in known.items() if not each.fits), default=math.inf)
        guess = max((b for b in sizes if b < bound and most + slope * (b - b1) <= room), default=1)
        if guess in known or guess >= bound:
            break
        known[guess] = needs_of(guess)
    return max((b for b, each in known.items() if each.fits), default=None)


def plan(config: PlanConfig) -> dict[str, Any]:
    """Plan a run.

    Returns:
        Everything that `jaxgpt plan` prints, as a record for JSON; unknown values are None.

    Raises:
        ValueError: target, mesh, batch and vocabulary do not fit together; the subclass says which.
    """
    if config.target is None:  # the mesh that training on this machine would use
        config = dataclasses.replace(config, mesh=mesh_config(config))
    target, text = ahead.find_target(config.target), find_text(config)
    config = resolve(config, text.vocab_size, target.platform)
    sizes = sharding.sizes_of(config.mesh, target.n)
    target = target._replace(n=math.prod(sizes.values()))  # the mesh may leave some devices out
    parameters, adapters = count_parameters(config), count_adapters(config)
    shards = sizes["data"] * sizes["fsdp"]

    def needs_of(batch: int) -> Needs:
        sized = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch * shards))
        if target.devices is None:
            return ahead.estimate_step(sized, target, parameters, adapters)
        return ahead.compile_step(sized, target, text.tokens if text.on_device else None)

    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), sharding.AXES)
    sharding.check_sizes(mesh, config.data.batch_size, *config.model.split_sizes)
    batch = config.data.batch_size // shards
    needs = needs_of(batch)
    best = largest_batch(needs_of, target.room, batch, needs) if config.search and target.room else None
    return {
        "target": target.name,
        "devices": target.n,
        "chip": target.chip and target.chip.name,
        "mesh": sizes,
        "parameters": parameters,
        "adapters": adapters,
        "dtype": config.train.dtype,
        "attention": ahead.kernel_of(config, target.platform),
        "windows": config.data.batch_size * config.optim.grad_accumulation,
        "block_size": config.model.block_size,
        "batch_a_device": batch,
        "steps": config.train.steps,
        "epoch_tokens": text.tokens,
        "estimated": target.devices is None,
        **dataclasses.asdict(needs),
        "room": target.room,
        "searched": bool(config.search and target.room),
        "fitting_batch_a_device": best,
        "fitting_batch_size": best and best * shards,
        **pace(config, target, parameters, needs, adapters),
    }


def pace(config: PlanConfig, target: Target, parameters: int, needs: Needs, adapters: int = 0) -> dict[str, Any]:
    """Compute the FLOPs, the roofline and the duration of a run.

    Args:
        config: resolved configuration.
        target: the devices; their chip may be unknown.
        parameters: number of parameters of the model.
        needs: memory and traffic of one step on one device.
        adapters: number of those parameters that LoRA trains; 0 = all are trained.

    Returns:
        The part of the record of `plan` about time; unknown values are None.
    """
    model, chip = config.model, target.chip
    per_token = metrics.flops_per_token(model, parameters, parameters - adapters if adapters else 0)
    tokens = config.data.batch_size * config.optim.grad_accumulation * model.block_size
    again = computed_again(config)
    compute = chip and tokens * (per_token + again) / target.n / chip.flops
    traffic = chip and needs.moved and needs.moved / chip.bandwidth
    speed = chip and config.mfu * chip.flops * target.n / per_token
    return {
        "tokens_a_step": tokens,
        "flops_a_step": tokens * per_token,
        "flops_computed_again": tokens * again,
        "bytes_a_token": needs.moved and needs.moved * target.n / tokens,
        "compute_s": compute,
        "traffic_s": traffic,
        "roofline_s": traffic and max(compute, traffic),
        "bound_by": traffic and ("memory traffic" if traffic > compute else "FLOPs"),
        "roofline_mfu": traffic and tokens * per_token / target.n / chip.flops / max(compute, traffic),
        "mfu": config.mfu,
        "tokens_a_second": speed,
        "hours": speed and config.train.steps * tokens / speed / 3600,
    }


def table(r: dict[str, Any]) -> str:
    """Format a record of `plan` as a table with one line per topic."""
    chip, tokens = r["chip"] and chips.named(r["chip"]), r["tokens_a_step"]
    each = f", each {_flops(chip.flops)}/s, {_bytes(chip.memory)}, {_bytes(chip.bandwidth)}/s" if chip else ""
    trained = f", of which {r['adapters']:,} are adapters and trained" if r["adapters"] else ""
    again = f", and {_flops(r['flops_computed_again'])} to recompute what is not kept"
    lines = {
        "target": f"{r['target']}{each}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in r["mesh"].items()),
        "model": f"{r['parameters']:,} parameters{trained}, computed in {r['dtype']}, attention {r['attention']}",
        "step": f"{r['windows']:,} windows x {r['block_size']:,} = {tokens:,} tokens: {_flops(r['flops_a_step'])}"
        + (again if r["flops_computed_again"] else ""),
        "epoch": f"{r['epoch_tokens']:,} tokens, {r['epoch_tokens'] / tokens:,.1f} steps"
        if r["epoch_tokens"]
        else "length unknown, the tokens are not on this machine",
        "memory": _memory(r),
        "traffic": f"{_at_most(r)}{_bytes(r['moved'])} per step and device between chip and memory, "
        f"{_bytes(r['bytes_a_token'])} per token"
        if r["moved"]
        else "unknown",
    }
    if chip:
        lines |= _speed(r)
    else:
        lines["pace"] = "unknown: this device is not in the table of jaxgpt/devices/chips.py"
    if r["searched"]:
        batch, size = r["fitting_batch_a_device"], r["fitting_batch_size"]
        fits = batch and f"{batch:,} windows per device fit (--data.batch_size {size:,})"
        lines["batch"] = fits or "none found that fits: see memory"
    return "\n".join(f"{topic:8} {text}" for topic, text in lines.items())


def _speed(r: dict[str, Any]) -> dict[str, str]:
    compute, traffic = (seconds and f"{seconds * 1e3:,.4g} ms" for seconds in (r["compute_s"], r["traffic_s"]))
    roofline = f"{compute} per step for the FLOPs, unknown for the traffic"
    if traffic:
        roofline = (
            f"{r['roofline_s'] * 1e3:,.4g} ms per step, bound by {r['bound_by']} (FLOPs {compute}, traffic "
            f"{_at_most(r)}{traffic}): MFU up to {r['roofline_mfu']:.0%}"
        )
    pace = f"{r['tokens_a_second']:,.0f} tokens/s at {r['mfu']:.0%} MFU (--mfu)"
    return {"roofline": roofline, "pace": f"{pace}: {r['steps']:,} steps in {r['hours']:,.3g} hours"}


def _at_most(r: dict[str, Any]) -> str:
    return "at most " if r["moved_at_most"] else ""


def _memory(r: dict[str, Any]) -> str:
    about = "estimated " if r["estimated"] else ""
    if r["temporaries"] is None:
        said = f"{_bytes(r['arguments'])} state, and temporaries"
    else:
        total = r["arguments"] + r["temporaries"]
        said = f"{_bytes(r['arguments'])} state + {_bytes(r['temporaries'])} temporaries = {_bytes(total)} per device"
    if r["fits"] is None:
        return about + said
    if r["fits"]:
        return f"{about}{said}: fits {_bytes(r['room'])}"
    return (
        f"{about}{said}: DOES NOT FIT {_bytes(r['room'])}; use a smaller --data.batch_size (with more "
        "--optim.grad_accumulation), --model.remat dots, or --mesh.fsdp over more devices"
    )


def _bytes(n: float) -> str:
    return _scaled(n, "B")


def _flops(n: float) -> str:
    return _scaled(n, "FLOP")


def _scaled(n: float, unit: str) -> str:
    power = max(0, min(5, (len(str(int(n))) - 1) // 3))
    return f"{n / 1000**power:.4g} {' kMGTP'[power].strip()}{unit}"
