"""guard-quantize: train, export and evaluate guards from a shell."""

from __future__ import annotations

import typer

from guard_quantization.commands.checkpoints import export, random_checkpoint
from guard_quantization.commands.evaluate import compare, evaluate, thresholds
from guard_quantization.commands.learnt import grow, renew, steps
from guard_quantization.commands.peers import agree, gguf, reference
from guard_quantization.commands.run import run
from guard_quantization.commands.stages import distill, prune, quantize

app = typer.Typer(
    help="From checkpoint and data to a guard artifact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(prune)
app.command()(distill)
app.command()(quantize)
app.command()(export)
app.command()(evaluate)
app.command()(compare)
app.command()(thresholds)
app.command()(grow)
app.command()(renew)
app.command()(steps)
app.command("random")(random_checkpoint)
app.command()(gguf)
app.command()(reference)
app.command()(agree)


def main() -> None:
    """Run guard-quantize; a mistake of the caller's is told in a line and ends with status 1."""
    from guard_service.engines import EngineFailed

    try:
        app()
    except OSError as error:
        told = ": ".join(str(one) for one in (error.filename, error.strerror) if one)
        raise SystemExit(f"guard-quantize: {told or error}") from None
    except (ValueError, EngineFailed) as error:
        raise SystemExit(f"guard-quantize: {error}") from None


if __name__ == "__main__":
    main()
