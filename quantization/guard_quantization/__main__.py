"""guard-quantize: train, export and evaluate guards from a shell."""

from __future__ import annotations

import typer

from guard_quantization.commands.checkpoints import export, random_checkpoint
from guard_quantization.commands.evaluate import compare, evaluate, thresholds
from guard_quantization.commands.learnt import steps, student
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
app.command()(student)
app.command()(steps)
app.command("random")(random_checkpoint)
app.command()(gguf)
app.command()(reference)
app.command()(agree)


def main() -> None:
    """Run guard-quantize; a mistake of the caller's is told in a line and ends with status 1."""
    from guard_service.artifact import ArtifactError
    from guard_service.engines import EngineFailed

    try:
        app()
    except (OSError, ValueError, ArtifactError, EngineFailed) as error:
        raise SystemExit(f"guard-quantize: {error}") from None


if __name__ == "__main__":
    main()
