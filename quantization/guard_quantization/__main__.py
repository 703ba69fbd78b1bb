"""guard-quantize: train, export and evaluate guards from a shell."""

from __future__ import annotations

import typer

from guard_quantization.commands.checkpoints import export, random_checkpoint
from guard_quantization.commands.evaluate import evaluate
from guard_quantization.commands.peers import agree, gguf, reference
from guard_quantization.commands.run import run

app = typer.Typer(
    help="From checkpoint and data to a guard artifact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(export)
app.command("random")(random_checkpoint)
app.command()(gguf)
app.command()(reference)
app.command()(agree)
app.command()(evaluate)


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
