"""The command line, `jaxgpt COMMAND`. Errors become one line on stderr and an exit code."""

import dataclasses
import difflib
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxgpt import config as configs
from jaxgpt import sampling, training
from jaxgpt.config import Config, ConfigError
from jaxgpt.devices import processes
from jaxgpt.errors import describe, say_in_one_line
from jaxgpt.files import download
from jaxgpt.interop import export, importing
from jaxgpt.runs import metrics
from jaxgpt.runs.directory import load
from jaxgpt.text import prepare
from jaxgpt.tools import doctor, ladder, plan, replay
from jaxgpt.tools import evaluate as evaluation

USAGE = """usage: jaxgpt COMMAND [flags]

  train    train a recipe, or continue the run:  jaxgpt train --config configs/shakespeare_cpu.yaml
  sample   write text with a trained run:        jaxgpt sample --run runs/shakespeare_cpu --prompt "ROMEO:"
  eval     the loss of a run over a whole split: jaxgpt eval --run runs/shakespeare_cpu --split val
  import   GPT-2's weights into a run directory:  jaxgpt import --from gpt2 --run runs/gpt2
  export   a run for transformers, or StableHLO:  jaxgpt export --run runs/shakespeare_cpu --to exported
  prepare  a corpus into a folder of tokens:      jaxgpt prepare --input texts/ --out data/texts
  plan     memory, time and batch before a run:   jaxgpt plan --config configs/gpt2_124m.yaml --target v5e:2x4
  ladder   train the small rungs of the lecture:  jaxgpt ladder
  replay   where a loss stopped being finite:     jaxgpt replay --run runs/shakespeare_cpu --step 1234
  doctor   what jax finds on this machine:        jaxgpt doctor

`jaxgpt COMMAND --help` explains all flags. `--debug` shows the traceback of an error.
Exit codes: 0 done, 1 bug, 2 usage or configuration, 3 data, 4 checkpoint or run directory unusable, 5 loss not finite,
6 run directory busy or another run's, 7 storage write failed, 8 another process lost, 9 out of memory,
75 stopped and saved, 130 Ctrl-C.
"""


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Write text with a trained run. Only the text goes to stdout."""

    run: str
    """Run directory."""
    prompt: str | None = None
    """Text to continue; without one, a new text is begun."""
    prompt_file: str | None = None
    """UTF-8 file with the text to continue, instead."""
    max_new_tokens: int = 500
    """Tokens to write."""
    num_samples: int = 1
    """Texts to write, separated by a line of dashes."""
    temperature: float = 1.0
    """Below 1 more likely text, above 1 more varied; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach p."""
    seed: int = 1337
    """Another seed, another text."""
    stream: bool = False
    """Show the text while it is written; for one sample."""


def train(argv: Sequence[str]) -> None:
    """`jaxgpt train`."""
    if {"-h", "--help"} & set(argv):
        print("Flags override the recipe, which overrides the defaults below.  --config FILE  the recipe\n")
        configs.run_tyro(Config, ["--help"], "jaxgpt train --config FILE")
    _need_recipe(argv)
    training.train(configs.load_config(argv))


def plan_run(argv: Sequence[str]) -> None:
    """`jaxgpt plan`."""
    if {"-h", "--help"} & set(argv):
        configs.run_tyro(plan.PlanConfig, ["--help"], "jaxgpt plan --config FILE")
    _need_recipe(argv)
    config = configs.load_config(argv, plan.PlanConfig, "jaxgpt plan")
    record = plan.plan(config)
    print(json.dumps(record) if config.json else plan.table(record))


def _need_recipe(argv: Sequence[str]) -> None:
    if not any(word.split("=")[0] == "--config" for word in argv):
        print(recipes())
        raise ConfigError("no recipe (--config): choose one of those above")


def recipes() -> str:
    """The config files below the working directory's configs/, each with the first line of its comment."""
    files = sorted(pathlib.Path("configs").rglob("*.yaml"))
    width = max((len(str(file)) for file in files), default=0)
    lines = [
        f"  --config {file!s:{width}}  {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}"
        for file in files
    ]
    return "\n".join(lines) or "  (there is no configs/ folder here: change to a clone of the repository)"


def sample(argv: Sequence[str]) -> None:
    """`jaxgpt sample`."""
    args: SampleArgs = _parse(SampleArgs, argv, "jaxgpt sample")
    rules = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    sampling.make_rule(**rules)  # before the model is loaded
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)} (command line): use 1 or more")
    if args.stream and args.num_samples > 1:
        raise ConfigError("one text at a time can be streamed (--num_samples): leave out --stream")
    prompt = args.prompt
    if args.prompt_file is not None:
        try:
            prompt = pathlib.Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the prompt ({args.prompt_file}, {error}): name a UTF-8 text file") from None
    run = load(args.run)
    print(f"run {args.run}, step {run.step:,}", file=sys.stderr)
    start = run.tokenizer.start if prompt is None else run.tokenizer.encode(prompt)
    tokens = np.tile(start, (args.num_samples, 1))
    key = jax.random.key(args.seed)
    show = metrics.harmless if sys.stdout.isatty() else str
    if args.stream:
        print(show(run.tokenizer.decode(start)), end="", flush=True)
        for new in sampling.stream(run.model, tokens, key, args.max_new_tokens, **rules):
            print(show(run.tokenizer.decode(np.asarray(new)[0])), end="", flush=True)
        print()
        return
    out = sampling.generate(run.model, tokens, key, args.max_new_tokens, **rules)
    print(f"\n{'-' * 15}\n".join(show(run.tokenizer.decode(row)) for row in np.asarray(out)))


def evaluate(argv: Sequence[str]) -> None:
    """`jaxgpt eval`."""
    print(json.dumps(evaluation.evaluate(_parse(evaluation.EvalArgs, argv, "jaxgpt eval"))))


def import_weights(argv: Sequence[str]) -> None:
    """`jaxgpt import`."""
    args: importing.ImportArgs = _parse(importing.ImportArgs, argv, "jaxgpt import")
    made = importing.import_run(args)
    sizes = f"{made.model.n_layer} layers, {made.model.n_embd} channels, {made.model.block_size:,} positions"
    left_out = f", {made.padding} rows of padding left out" if made.padding else ""
    print(f"model    {made.parameters:,} parameters: {sizes}, {made.model.vocab_size:,} ids{left_out}")
    print(f"run      {args.run}, step 0\nmore     jaxgpt sample --run {args.run}")


def export_run(argv: Sequence[str]) -> None:
    """`jaxgpt export`."""
    args: export.ExportArgs = _parse(export.ExportArgs, argv, "jaxgpt export")
    print(f"files    {args.to}: {', '.join(export.export(args))}")


def prepare_tokens(argv: Sequence[str]) -> None:
    """`jaxgpt prepare`."""
    prepare.prepare(_parse(prepare.PrepareArgs, argv, "jaxgpt prepare"))


def replay_step(argv: Sequence[str]) -> None:
    """`jaxgpt replay`."""
    args: replay.ReplayArgs = _parse(replay.ReplayArgs, argv, "jaxgpt replay")
    found = replay.replay(args)
    print(f"step     {found.step:,} of {args.run}, repeated from checkpoint {found.checkpoint:,}")
    print(f"first    not finite: {found.first} ({found.values})" if found.first else f"finite   loss {found.loss:.4f}")


def climb_ladder(argv: Sequence[str]) -> None:
    """`jaxgpt ladder`."""
    args: ladder.LadderArgs = _parse(ladder.LadderArgs, argv, "jaxgpt ladder")
    if args.seeds < 1:
        raise ConfigError(f"seeds is {args.seeds} (command line): use 1 or more")
    picture = ladder.climb(args)
    print(f"\n{picture.with_name('ladder.md').read_text(encoding='utf-8')}\npicture  {picture}")


def examine_machine(argv: Sequence[str]) -> None:
    """`jaxgpt doctor`."""
    if argv and argv[0] not in ("-h", "--help"):
        raise ConfigError(f"doctor takes no flags (command line, {argv[0]}): run `jaxgpt doctor`")
    print(doctor.report() if not argv else "usage: jaxgpt doctor\n\nWhat jax finds on this machine; ! marks a remedy.")


def _parse(cls: type, argv: Sequence[str], prog: str):
    if {"-h", "--help"} & set(argv):
        configs.run_tyro(cls, ["--help"], prog)
    return configs.parse_flags(cls, argv, prog)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "import": import_weights,
    "export": export_run,
    "prepare": prepare_tokens,
    "plan": plan_run,
    "replay": replay_step,
    "ladder": climb_ladder,
    "doctor": examine_machine,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, 1) or ["--help"]
            raise ConfigError(f"no such command ({argv[0]}): perhaps you meant `jaxgpt {near[0]}`")
        keep_compiled()
        say_in_one_line(debug)
        COMMANDS[argv[0]](argv[1:])
    except BaseException as error:
        if isinstance(error, SystemExit):  # --help
            return int(error.code or 0)
        if debug:
            traceback.print_exc()
        code, message = describe(error)
        if code:
            print(message if code in (75, 130) else f"jaxgpt: error: {message}", file=sys.stderr)
        if code == 1 and not debug:
            print(
                "This is a bug in jaxgpt: repeat the command with --debug and report what it prints.", file=sys.stderr
            )
        if processes.several():  # jax would wait for the others at exit, who wait for this process
            processes.leave(code)
        return code
    return 0


def keep_compiled() -> None:
    """Keep what XLA compiles in the user's cache folder, if it can be written."""
    try:
        folder = download.cache_dir() / "xla"
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, download.DownloadError):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
