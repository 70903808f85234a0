"""One comparison of compare.py: the recipe and data of both sides, their processes, and what is made of the answers."""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import loader
import numpy as np
import whole_runs
from turns import Worker, WorkerError, compare, take_turns

from jaxgpt import load_config
from jaxgpt.config import Config
from jaxgpt.devices import chips
from jaxgpt.text.source import Text, open_source
from jaxgpt.training import resolve

HERE = pathlib.Path(__file__).parent
RECIPE, GPT2 = "shakespeare_cpu", "gpt2_124m"
NANOGPT_SEED = 1337  # its train.py takes no other
SHAKESPEARE_VOCABULARY, GPT2_VOCABULARY = 65, 50_257


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure."""

    kind: str
    """train, generate, startup or loss."""
    config: str
    """Recipe, below configs/."""
    name: str = ""
    """What tells it from the others of the same work."""
    flags: tuple[str, ...] = ()
    """Of the recipe, for both sides."""
    seconds: float = 4.0
    """Of a slice."""
    batch: int = 1
    """Texts that are generated at a time."""
    prompt: int = 1
    """Tokens of a prompt."""
    new_tokens: int = 0
    """Tokens that a call of generate adds."""


def check_same_work(facts: dict[str, dict]) -> None:
    """Both sides have the same model and see as many tokens a step.

    Raises:
        WorkerError: they do not.
    """
    for name in ("parameters", "tokens_per_step"):
        values = {side: said.get(name) for side, said in facts.items()}
        if len(set(values.values())) > 1:
            raise WorkerError(f"the sides do not do the same work ({name}, {values}): their models or flags differ")


def most(values: list[float | None]) -> float | None:
    """The largest; None where one is not known."""
    return None if None in values else max(values)


class Comparison:
    """One case with its flags, data and sides."""

    def __init__(self, case: Case, args: argparse.Namespace, flags: list[str], folder: pathlib.Path):
        self.case, self.args, self.folder = case, args, folder
        has_one = args.nanogpt and case.config in (RECIPE, GPT2)
        self.clone = str(pathlib.Path(args.nanogpt).resolve()) if has_one else None
        self.theirs = "nanogpt" if self.clone else "pytorch"
        self.flags = ["--config", str(HERE.parent / "configs" / f"{case.config}.yaml"), *case.flags]
        self.flags += ["--train.dtype", args.dtype]
        tokens = args.tokens if case.config == GPT2 else args.text
        if case.config == GPT2 and tokens is None and case.kind != "generate":
            loader.make(folder, 0.1)
            tokens = str(folder)
        if tokens:
            self.flags += ["--data.path", str(pathlib.Path(tokens).resolve())]
        self.flags += flags
        self.config, self.vocab_size, self.tokens = self._open(load_config(self.flags))

    def _open(self, config: Config) -> tuple[Config, int, str | None]:
        """The resolved configuration, the vocabulary, and the .npy file that PyTorch reads its tokens from."""
        where = "cpu" if self.args.device == "cpu" else "gpu"
        if self.case.kind == "generate":
            vocab_size = GPT2_VOCABULARY if self.case.config == GPT2 else SHAKESPEARE_VOCABULARY
            return resolve(config, vocab_size, where), vocab_size, None
        source = open_source(config.data)
        path = self.folder / "corpus.npy"
        if isinstance(source, Text):
            np.save(path, source.ids.astype(np.uint16))
        else:
            path = pathlib.Path(config.data.path, "tokens.npy")
        return resolve(config, source.tokenizer.vocab_size, where), source.tokenizer.vocab_size, str(path)

    def torch_spec(self, compiled: bool, seed: int) -> dict:
        """What PyTorch's side is told."""
        optim = self.config.optim
        optim = dataclasses.replace(optim, decay_steps=optim.decay_steps or self.config.train.steps)
        given = {"config": dataclasses.asdict(dataclasses.replace(self.config, seed=seed, optim=optim)),
                 "tokens": self.tokens}  # fmt: skip
        given |= {"reference": self.case.config, "vocab_size": self.vocab_size, "get_batch": self.args.get_batch}
        given |= {"device": self.args.device, "compile": compiled, "nanogpt": self.clone}
        return given | self._sizes()

    def _sizes(self) -> dict:
        return {name: getattr(self.case, name) for name in ("kind", "batch", "prompt", "new_tokens")}

    def in_turns(self) -> dict:
        """Training or generation."""
        env, workers = whole_runs.environment(self.args.device), {}
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")  # of a GPU: what leaves PyTorch's sides theirs
        spec = {"flags": self.flags, "vocab_size": self.vocab_size} | self._sizes()
        try:
            workers["jaxgpt"] = Worker(str(HERE / "jax_side.py"), spec, env)
            for how in self.args.pytorch:
                spec = self.torch_spec(how == "compiled", self.config.seed)
                workers[f"{self.theirs} {how}"] = Worker(str(HERE / "torch_side.py"), spec, env)
            facts = {name: worker.facts for name, worker in workers.items()}
            check_same_work(facts)
            answers = take_turns(workers, self.args.rounds, self.args.seconds or self.case.seconds)
        finally:
            for worker in workers.values():
                worker.close()
        record = {"unit": "steps/s" if self.case.kind == "train" else "tokens/s"}
        record |= compare({name: [answer["rate"] for answer in side] for name, side in answers.items()})
        record["seconds"] = self.args.seconds or self.case.seconds
        slept = {name: sum(answer["idle_s"] for answer in side) for name, side in answers.items()}
        record["idle_cpu"] = {
            name: round(sum(answer["idle_cpu_s"] for answer in answers[name]) / slept[name], 3)
            for name in answers
            if slept[name] > 1  # the last of a round is the first of the next one, and does not sleep between them
        }
        record["others"] = most([answer["others"] for side in answers.values() for answer in side])
        if self.case.kind == "train":
            last = {name: side[-1]["loss"] for name, side in answers.items()}
            record["losses"] = {name: [round(facts[name]["first_loss"], 3), round(last[name], 3)] for name in answers}
        return record | self.against_the_chip(record, facts["jaxgpt"]) | {"facts": facts}

    def against_the_chip(self, record: dict, facts: dict) -> dict:
        """MFU of training, or the rate at which weights and cache could be read once a token; nothing on a CPU."""
        chip, medians = chips.find(facts["devices"][0]), {n: side["median"] for n, side in record["sides"].items()}
        if self.case.kind == "train":
            pace = {name: round(median * facts["tokens_per_step"]) for name, median in medians.items()}
            mfu = {n: round(p * facts["flops_per_token"] / chip.flops, 3) for n, p in pace.items()} if chip else None
            return {"tokens_per_second": pace, "mfu": mfu}
        if chip is None:
            return {}
        case, size = self.case, 4 if self.args.dtype == "float32" else 2
        seen = case.prompt + case.new_tokens / 2  # on average
        cache = 2 * self.config.model.n_layer * self.config.model.width * seen * case.batch
        limit = case.batch * chip.bandwidth / (size * (facts["parameters"] + cache))
        return {"memory_limit": round(limit), "of_the_limit": {n: round(m / limit, 4) for n, m in medians.items()}}

    def from_outside(self) -> dict:
        """Whole commands: seconds to the first training loss, or to the goal."""
        first_loss, runs = self.case.kind == "startup", []
        enough = whole_runs.to_first_loss if first_loss else whole_runs.to_validation_loss(self.args.goal)
        names = ("jaxgpt", f"{self.theirs} eager")
        warm = whole_runs.empty_cache(self.folder / "cache") if self.case.name == "warm" else None
        for i in range(-1 if warm else 0, self.args.rounds):  # round -1 only fills the cache
            for side in names[:: 1 if i % 2 == 0 else -1]:
                work = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
                env = whole_runs.environment(self.args.device, warm or whole_runs.empty_cache(work / "cache"))
                seed = self.config.seed + (0 if first_loss else max(i, 0))  # jaxgpt compiles anew for another seed
                seed = NANOGPT_SEED if side == "nanogpt eager" else seed
                seen = whole_runs.watch(self.command(side, seed, work), enough, str(work), env)
                run = {"side": side, "seed": seed, "seconds": round(seen.seconds, 2), "others": seen.others}
                if not first_loss:
                    loss = whole_runs.last_validation_loss(seen.lines)
                    run |= {"val_loss": loss, "reached": loss <= self.args.goal}
                if i >= 0:
                    runs.append(run)
        sides = {side: [run["seconds"] for run in runs if run["side"] == side] for side in names}
        record = {"unit": "s", **compare(sides, lower_is_better=True), "cache": self.case.name, "runs": runs}
        record["others"] = most([run["others"] for run in runs])
        return record if first_loss else record | {"goal": self.args.goal}

    def command(self, side: str, seed: int, work: pathlib.Path) -> list[str]:
        """A new run of a side in the folder `work`."""
        if side == "jaxgpt":
            often = ["--train.log_interval", "1"] if self.case.kind == "startup" else []  # as nanoGPT's command has it
            flags = ["--config", self.args.ours, *self.flags[2:]] if self.args.ours else self.flags
            return whole_runs.jaxgpt_command([*flags, *often, "--seed", str(seed)], str(work / "run"))
        if side == "nanogpt eager":
            fraction, tokens = self.config.data.train_fraction, np.load(self.tokens)
            whole_runs.prepare_nanogpt(self.clone, tokens, self.vocab_size, fraction, work)
            return whole_runs.nanogpt_command(self.clone, self.config, self.args.device)
        spec = self.torch_spec(compiled=False, seed=seed) | {"out": str(work)}
        return [sys.executable, str(HERE / "torch_train.py"), json.dumps(spec)]
