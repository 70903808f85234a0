"""What becomes of an error of a command: one line on stderr, and an exit code."""

import logging
import sys
import traceback
import warnings

from jaxgpt.errors import JaxgptError, JaxgptWarning, one_line

_format_warning = warnings.formatwarning


def fail(error: BaseException, debug: bool) -> int:
    """Print why a command failed, and return its exit code."""
    from jaxgpt.files.screen import flush_or_drop

    if debug:
        traceback.print_exc()
    code, message = describe(error)
    if code:
        print(message if code in (75, 130) else f"jaxgpt: error: {message}", file=sys.stderr)
    if code == 1 and not debug:
        print("This is a bug in jaxgpt: repeat the command with --debug and report what it prints.", file=sys.stderr)
    flush_or_drop(sys.stdout)
    if "jax" in sys.modules:
        from jaxgpt.devices import processes

        if processes.is_multi_process():  # an orderly exit would wait for the others, which wait for this one
            processes.exit_process(code)
    return code


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and its message as one printable line; the message of a bug stays as it is."""
    code, message = _translate(error)
    return code, message if code == 1 else one_line(message)


def _translate(error: BaseException) -> tuple[int, str]:
    from jaxgpt.files import storage

    text = str(error) or type(error).__name__
    if isinstance(error, JaxgptError):
        return error.exit_code, text
    halve = "halve --data.batch_size, double --optim.grad_accumulation (and add --run.resume changed to a begun run)"
    if "jax" in sys.modules:
        from jaxgpt.devices import processes

        if processes.lost_peer(error):
            again = "run the same command again on all of them; the last checkpoint is intact"
            return 8, f"another process of the run is gone ({text.splitlines()[0][:200]}): {again}"
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text:
            first = text.splitlines()[0]
            return 9, f"out of memory ({first}): {halve}"
        if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
            return 2, f"jax cannot use the device ({text.splitlines()[0]}): set JAX_PLATFORMS, or see `jaxgpt doctor`"
    if isinstance(error, MemoryError):
        return 9, f"out of memory ({text}): {halve}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by Ctrl-C"
    if isinstance(error, BrokenPipeError):
        return 0, ""  # the reader of a pipe has closed it, as `head` does
    if isinstance(error, OSError) and error.errno in storage.ERRNOS:
        return storage.StorageError.exit_code, storage.cannot_write(error.filename, error.errno)
    return 1, f"{type(error).__name__}: {text}"


def quieten_libraries(debug: bool) -> None:
    """Show each warning of ours as one line, and hide what libraries log about errors that they raise as well."""

    def formatted(message, category, *where):
        if issubclass(category, JaxgptWarning):
            return f"jaxgpt: warning: {one_line(str(message))}\n"
        return _format_warning(message, category, *where)

    warnings.formatwarning = formatted
    if not debug:
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None  # tensorstore's threads report here
