"""The command itself: its commands, and how interruptions and errors end it."""

import io
import sys
import time
import traceback
import warnings
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import click

from bitwright.cli.grouped import WIDE, Context
from bitwright.errors import MissingExtraError, printable
from bitwright.process.interruption import (
    INTERRUPTED,
    OTHERS_WAIT,
    TERMINATED,
    Terminated,
    while_ending,
    while_running,
)
from bitwright.process.standard_streams import flush_output, tell_of_lost_output
from bitwright.ranks import launched, spread_over, world
from bitwright.warned import BitwrightWarning

FAILED = 1
# What each does, as its help says first; a command's module is imported when it is asked for.
COMMANDS = {
    "quantize": "Quantize the checkpoint folder MODEL.",
    "dynamic": "Quantize MODEL to a target size, with more bits where they matter.",
    "dwq": "Train the scales of the quantized MODEL to say what the original, --reference, says.",
    "salient": "Quantize MODEL to symmetric INT4, protecting the weights that large activations meet.",
    "refine": "Improve the codes and scales of MODEL, quantized by any tool; its format and size stay.",
    "convert": "Store MODEL, a checkpoint folder or GGUF file, in another format.",
    "inspect": "Describe MODEL: its layers, what would be quantized, and what a run would take and write.",
    "evaluate": "Measure the perplexity of MODEL, and its KL divergence from a reference.",
    "generate": "Let MODEL go on from a text, with the weights in memory as they are stored.",
    "chat": "Chat with MODEL: every line of standard input is a message, until the input ends.",
    "score": "Score MODEL on multiple-choice questions, as lm-evaluation-harness does.",
    "compare": "Quantize MODEL in several ways, and compare what each loses with its size.",
    "sensitivities": "Estimate how much the precision of each layer of MODEL matters.",
    "statistics": "Collect what the layers of a model see, on several machines if need be, for "
    "quantize --statistics.",
    "upload": "Put the checkpoint FOLDER on the hub as NAME (ORG/NAME, or ORG/NAME@BRANCH).",
    "demo": "Do the whole job on a small model that the package carries.",
    "info": "Print which kernels run here.",
}
SPREAD = ("quantize", "refine", "statistics", "sensitivities", "dynamic", "dwq")
"""Over MPI ranks."""


class _Commands(click.Group):
    """Commands whose interruption is told by `main` alone; click would add a line."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return super().get_command(ctx, name)
        command: click.Command = getattr(import_module(f"bitwright.cli.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interruption from error


class _Interruption(BaseException):
    """A KeyboardInterrupt, its cause."""


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": WIDE,
    },
)
@click.version_option(package_name="bitwright", prog_name="bitwright")
@click.option(
    "--fixed-order",
    is_flag=True,
    help="Take all sums over tokens in an order that does not depend on the number of MPI ranks.",
)
@click.pass_context
def cli(context: click.Context, fixed_order: bool) -> None:
    """Quantize language models on any CPU.

    Started by mpirun, quantize, refine, statistics, sensitivities, dynamic and dwq spread over all ranks;
    other commands run on the first.
    """
    if launched():
        spread = context.invoked_subcommand in SPREAD
        if not spread and world().Get_rank() > 0:
            context.exit()
        if spread:
            ranks = context.with_resource(spread_over(world(), fixed_order))
            if not ranks.is_first:  # reports are printed once
                context.with_resource(redirect_stdout(io.StringIO()))
            return
    context.with_resource(spread_over(None, fixed_order))


def main() -> None:
    """Run the command line; errors that a user can mend are one line on standard error."""
    try:
        _main()
    except KeyboardInterrupt as error:  # while it was about to end in another way
        _interrupted(error)


def _main() -> None:
    try:
        _import_command()
        while_running()
        tell_of_lost_output()
        _show_warnings_as_lines()
        status = cli.main(standalone_mode=False, obj=sys.argv[1:])
        flush_output()
    except (click.exceptions.Abort, _Interruption) as error:
        _interrupted(error.__cause__)
    except click.ClickException as error:
        message = printable(error.format_message())
        click.UsageError(message, getattr(error, "ctx", None)).show()
        _end("", error.exit_code)
    except KeyboardInterrupt as error:
        _interrupted(error)
    except SystemExit as error:  # where nobody reads what is printed
        _end("", error.code if isinstance(error.code, int) else FAILED)
    except (ValueError, TypeError, OSError, MemoryError, MissingExtraError) as error:
        _end(f"bitwright: {error or type(error).__name__}", FAILED)
    except BaseException:
        if launched():
            traceback.print_exc()
            _end("", FAILED)
        raise
    while_ending(status or 0)
    sys.exit(status)


def _import_command() -> None:
    """Import what the command takes while an interruption still ends it at once: one that is raised in the
    middle of an import may be swallowed, or become another exception."""
    asked = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    if asked:
        import_module(f"bitwright.cli.{asked}")
        import_module("bitwright.public")


def _show_warnings_as_lines() -> None:
    """Print each warning once, though a command may open a model several times."""
    shown, printed = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BitwrightWarning):
            if str(message) not in printed:
                click.echo(f"bitwright: warning: {message}", err=True)
            printed.add(str(message))
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", BitwrightWarning)


def _interrupted(error: BaseException | None) -> NoReturn:
    terminated = isinstance(error, Terminated)
    what = "terminated" if terminated else "interrupted"
    reason = str(error or "") or "nothing was written"
    if sys.stderr is not None and sys.stderr.isatty():
        click.echo(err=True)  # after the ^C
    _end(f"{what}; {reason}", TERMINATED if terminated else INTERRUPTED)


def _end(message: str, status: int) -> NoReturn:
    """Leave with a message; of several MPI ranks, which may wait for this one, all."""
    while_ending(status)
    ranks = launched()
    if ranks and world().Get_rank() > 0:
        time.sleep(OTHERS_WAIT)  # which ends here if the first has the same to say
    if message:
        click.echo(printable(message), err=True)
    if ranks and sys.stderr is not None:
        sys.stderr.flush()
    if ranks:
        world().Abort(status)
    sys.exit(status)
