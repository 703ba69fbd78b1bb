"""guard-quantize gguf, reference and agree: a checkpoint as others run it, and as we do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[Path, typer.Argument(help="Checkpoint folder in the Hugging Face layout.")]


def gguf(
    source: Source,
    out: Annotated[Path, typer.Argument(help="GGUF file to make.")],
    kind: Annotated[str, typer.Option("--type", help="q4_0, q4_k_m or f16.")] = "q4_0",
) -> None:
    """Write a checkpoint as GGUF for llama.cpp, which wants an output row for every token.

    Where the checkpoint's head is cut to the tokens of verdicts, the others are rows of zeros.
    """
    from guard_quantization.export.gguf import write_gguf

    write_gguf(source, out, kind)
    typer.echo(f"made {out}: {out.stat().st_size / 2**20:.0f} MiB")


def reference(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Export a checkpoint with optimum to a plain float32 ONNX graph, checked against torch."""
    from guard_quantization.export.reference import export_reference

    record = export_reference(source, out)
    typer.echo(
        f"made {out}: its logits are at most {record['torch_difference']:.1g} from torch's, the "
        f"largest of which is {record['largest_logit']:.3g}"
    )


def agree(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    reference: Annotated[Path, typer.Argument(help="Folder that `reference` made.")],
    prompts: Annotated[
        int, typer.Option(help="How many conversations of the packaged probe sets.", min=1)
    ] = 64,
    most: Annotated[
        float, typer.Option(help="End with status 1 when P(unsafe) differs by more somewhere.")
    ] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads that compute.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score the same prompts with an artifact and its reference: how far they are apart."""
    from guard_quantization.export.agree import agreement, probe_prompts
    from guard_quantization.export.reference import Reference
    from guard_service.artifact import load

    loaded, plain = load(artifact), Reference(reference, threads)
    found = agreement(loaded, probe_prompts(loaded, prompts), plain.logits, plain.head, threads)
    typer.echo(json.dumps(found, indent=1) if as_json else _table(found))
    if found["unsafe"]["max"] > most:
        raise typer.Exit(1)


def _table(found: dict[str, Any]) -> str:
    unsafe, codes, verdicts = found["unsafe"], found["categories"], found["verdicts"]
    lines = [
        f"{found['prompts']} prompts, absolute differences",
        f"P(unsafe)   at most {unsafe['max']:.2e}, {unsafe['mean']:.2e} on average",
        f"categories  at most {codes['max']:.2e}",
        *(f"  {code:<4}      {most:.2e}" for code, most in codes["by_code"].items()),
        f"verdicts    {verdicts['agree']:.1%} the same, {verdicts['differ']} not",
    ]
    return "\n".join(lines)
