"""The command line, `jaxgpt COMMAND`. An error becomes one line on stderr and an exit code.

Each command imports only what it needs, so that it starts quickly.
"""

import contextlib
import difflib
import gc
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

from jaxgpt.settings.flags import ConfigError, help_text, parse, split_flags
from jaxgpt.tools.failures import fail, quieten_libraries

USAGE = """usage: jaxgpt COMMAND [flags]

  train    train a recipe, or continue its run:      jaxgpt train --config configs/shakespeare_cpu.yaml
  sample   write text with a trained run:            jaxgpt sample --run runs/shakespeare_cpu --prompt "ROMEO:"
  chat     talk to a run that has a chat template:   jaxgpt chat --run runs/smollm2
  eval     evaluate a run over a whole split:        jaxgpt eval --run runs/shakespeare_cpu --split val
  import   make a run from GPT-2, Llama and others:  jaxgpt import --from smollm2 --run runs/smollm2
  export   write a run for transformers, StableHLO:  jaxgpt export --run runs/shakespeare_cpu --to exported
  prepare  turn a corpus into a folder of tokens:    jaxgpt prepare --input texts/ --out data/texts
  plan     predict memory and time of a run:         jaxgpt plan --config configs/gpt2_124m.yaml --target v5e:2x4
  sweep    train many runs, with error bars:         jaxgpt sweep --config shakespeare_cpu --vary seed=1,2,3
  report   draw and compare runs:                    jaxgpt report --run runs/a --run runs/b --to runs.png
  ladder   train a ladder of recipes:                jaxgpt ladder
  replay   find where a loss stopped being finite:   jaxgpt replay --run runs/shakespeare_cpu --step 1234
  doctor   show what jax finds on this machine:      jaxgpt doctor

`jaxgpt train` alone lists the recipes. `jaxgpt COMMAND --help` explains all flags of a command. `--debug` shows the
traceback of an error.
Exit codes: 0 done, 1 bug, 2 usage or configuration, 3 data, 4 checkpoint or run directory unusable, 5 loss not finite,
6 run directory busy or another run's, 7 storage write failed, 8 another process lost, 9 out of memory,
75 stopped and saved, 130 Ctrl-C.
"""


def train(argv: Sequence[str]) -> None:
    """`jaxgpt train`."""
    from jaxgpt.config import Config, load_config

    if _asks_for_help(argv):
        print("Flags override the recipe, which overrides the defaults below.")
        print("--config RECIPE  a YAML file, or a name that `jaxgpt train` lists\n")
        print(help_text(Config, "jaxgpt train --config RECIPE"))
        return
    _need_recipe(argv)
    config = load_config(argv)
    from jaxgpt import training

    _imported()
    training.train(config)


def plan_run(argv: Sequence[str]) -> None:
    """`jaxgpt plan`."""
    from jaxgpt.config import load_config
    from jaxgpt.tools import plan

    if _asks_for_help(argv):
        print(help_text(plan.PlanConfig, "jaxgpt plan --config RECIPE"))
        return
    _need_recipe(argv)
    config = load_config(argv, plan.PlanConfig)
    _imported()
    record = plan.plan(config)
    print(json.dumps(record) if config.json else plan.table(record))


def sweep_settings(argv: Sequence[str]) -> None:
    """`jaxgpt sweep`."""
    from jaxgpt.config import load_config
    from jaxgpt.tools import sweep, sweep_report

    if _asks_for_help(argv):
        print(help_text(sweep.SweepConfig, "jaxgpt sweep --config RECIPE --vary FIELD=a,b,c"))
        return
    flags = split_flags(argv, sweep.SweepConfig)
    if "report" not in flags:
        _need_recipe(argv)
    config = load_config(argv, sweep.SweepConfig)
    _imported()
    if not config.report:
        ours = {"vary", "at_once", "keep", "run.dir", "run.resume"}
        sweep.sweep(config, {name: value for name, value in flags.items() if name not in ours})
    print(sweep_report.report(pathlib.Path(config.report or config.run.dir)))


def _need_recipe(argv: Sequence[str]) -> None:
    if not any(word.split("=")[0] == "--config" for word in argv):
        if argv and not argv[0].startswith("-"):
            raise ConfigError(f"no recipe (command line, {argv[0]!r}): write --config {argv[0]}")
        print(_list_of_recipes())
        raise ConfigError("no recipe (--config): choose one of those above")


def _list_of_recipes() -> str:
    """The recipes that ship with the package, and other YAML files below configs/ here, with the first line of each."""
    from jaxgpt.config import recipes

    by_name = recipes()
    shipped = {file.resolve() for file in by_name.values()}
    files_here = sorted(pathlib.Path("configs").rglob("*.yaml"))
    by_path = {str(file): file for file in files_here if file.resolve() not in shipped}
    lines = []
    names = "by name (in a clone also by path, such as --config configs/shakespeare_cpu.yaml):"
    for title, files in ((names, by_name), ("by path:", by_path)):
        width = max(map(len, files), default=0)
        opening = {name: file.read_text(encoding="utf-8").partition("\n")[0] for name, file in files.items()}
        lines += [title] * bool(files)
        lines += [f"  --config {name:{width}}  {line.lstrip('# ')}" for name, line in opening.items()]
    return "\n".join(lines)


def sample(argv: Sequence[str]) -> None:
    """`jaxgpt sample`."""
    from jaxgpt.tools.sample import SampleArgs, sample

    _run(SampleArgs, argv, "jaxgpt sample", sample)


def chat(argv: Sequence[str]) -> None:
    """`jaxgpt chat`."""
    from jaxgpt.tools.chat import ChatArgs, chat

    _run(ChatArgs, argv, "jaxgpt chat", chat)


def evaluate(argv: Sequence[str]) -> None:
    """`jaxgpt eval`."""
    from jaxgpt.tools.evaluate import EvalArgs, evaluate

    _run(EvalArgs, argv, "jaxgpt eval", lambda args: print(json.dumps(evaluate(args))))


def import_weights(argv: Sequence[str]) -> None:
    """`jaxgpt import`."""
    from jaxgpt.interop.importing import ImportArgs, import_run

    def command(args: ImportArgs) -> None:
        made = import_run(args)
        sizes = f"{made.model.n_layer} layers, {made.model.n_embd} channels, {made.model.block_size:,} positions"
        left_out = f", {made.padding} rows of padding left out" if made.padding else ""
        print(f"model    {made.parameters:,} parameters: {sizes}, {made.model.vocab_size:,} ids{left_out}")
        print(f"run      {args.run}, step 0\nmore     jaxgpt sample --run {args.run}")

    _run(ImportArgs, argv, "jaxgpt import", command)


def export_run(argv: Sequence[str]) -> None:
    """`jaxgpt export`."""
    from jaxgpt.interop.export import ExportArgs, export

    _run(ExportArgs, argv, "jaxgpt export", lambda args: print(f"files    {args.to}: {', '.join(export(args))}"))


def prepare_tokens(argv: Sequence[str]) -> None:
    """`jaxgpt prepare`."""
    from jaxgpt.text.prepare import PrepareArgs, prepare

    _run(PrepareArgs, argv, "jaxgpt prepare", prepare)


def report_runs(argv: Sequence[str]) -> None:
    """`jaxgpt report`."""
    from jaxgpt.tools.report import ReportArgs, report

    _run(ReportArgs, argv, "jaxgpt report", lambda args: print(report(args)))


def replay_step(argv: Sequence[str]) -> None:
    """`jaxgpt replay`."""
    from jaxgpt.tools.replay import ReplayArgs, replay

    def command(args: ReplayArgs) -> None:
        found = replay(args)
        print(f"step     {found.step:,} of {args.run}, repeated from checkpoint {found.checkpoint:,}")
        first = f"first    not finite: {found.first} ({found.values})"
        print(first if found.first else f"finite   loss {found.loss:.4f}")

    _run(ReplayArgs, argv, "jaxgpt replay", command)


def climb_ladder(argv: Sequence[str]) -> None:
    """`jaxgpt ladder`."""
    from jaxgpt.tools.ladder import LadderArgs, climb

    def command(args: LadderArgs) -> None:
        picture = climb(args)
        print(f"\n{picture.with_name('ladder.md').read_text(encoding='utf-8')}\npicture  {picture}")

    _run(LadderArgs, argv, "jaxgpt ladder", command)


def examine_machine(argv: Sequence[str]) -> None:
    """`jaxgpt doctor`."""
    if _asks_for_help(argv):
        print("usage: jaxgpt doctor\n\nShow what jax finds on this machine; a line with ! has a remedy.")
        return
    if argv:
        raise ConfigError(f"doctor takes no flags (command line, {argv[0]}): run `jaxgpt doctor`")
    from jaxgpt.tools import doctor

    print(doctor.report())


def _asks_for_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(argv))


def _run(cls: type, argv: Sequence[str], prog: str, command: Callable) -> None:
    """Call a command with its flags as a dataclass, or print its help."""
    if _asks_for_help(argv):
        print(help_text(cls, prog))
    else:
        _imported()
        command(parse(cls, split_flags(argv, cls), "command line"))


def _imported() -> None:
    """Search for garbage again, but not in what the imports made. None was searched for meanwhile, so that training
    starts 0.3 s sooner."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "sample": sample,
    "chat": chat,
    "eval": evaluate,
    "import": import_weights,
    "export": export_run,
    "prepare": prepare_tokens,
    "plan": plan_run,
    "replay": replay_step,
    "sweep": sweep_settings,
    "report": report_runs,
    "ladder": climb_ladder,
    "doctor": examine_machine,
}


RESULTS = {"sample", "chat", "eval", "plan", "report", "replay", "doctor"}  # where a write that fails is an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal cannot show becomes \x..
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    from jaxgpt.files.screen import Lenient

    searches = gc.isenabled()
    try:
        if "jax" not in sys.modules:
            gc.disable()  # until `_imported`
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, 1) or ["--help"]
            raise ConfigError(f"no such command ({argv[0]}): perhaps you meant `jaxgpt {near[0]}`")
        quieten_libraries(debug)
        if not _asks_for_help(argv):
            from jaxgpt.files.compiled import keep_compiled

            keep_compiled()
        if argv[0] in RESULTS:
            COMMANDS[argv[0]](argv[1:])
            if sys.stdout is not None:
                sys.stdout.flush()  # now, while a full disk can still be reported as an error
        else:
            with contextlib.redirect_stdout(Lenient(sys.stdout)):
                COMMANDS[argv[0]](argv[1:])
    except BaseException as error:
        with contextlib.redirect_stderr(Lenient(sys.stderr)):
            return fail(error, debug)
    finally:
        (gc.enable if searches else gc.disable)()
    return 0
