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
    artifact: Annotated[str, typer.Argument(help='Artifact folder, or "starter".')],
    reference: Annotated[
        Path | None,
        typer.Argument(help="Folder that `reference` made; none: the artifact's kernel plan fp32."),
    ] = None,
    prompts: Annotated[
        int, typer.Option(help="How many conversations of the packaged probe sets.", min=1)
    ] = 64,
    most: Annotated[
        float, typer.Option(help="End with status 1 when P(unsafe) differs by more somewhere.")
    ] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads that compute.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score the same prompts by every kernel plan: how far each is from the reference."""
    from guard_quantization.export import agree as scores
    from guard_quantization.export.reference import Reference
    from guard_service.artifact import load_named
    from guard_service.engines.loading import plans_of
    from guard_service.engines.plans import FP32

    loaded = load_named(artifact)
    asked = scores.probe_prompts(loaded, prompts)
    if reference:
        plain = Reference(reference, threads)
        wanted = scores.reference_scores(loaded, asked, plain.logits, plain.head)
    else:
        wanted = scores.plan_scores(loaded, asked, FP32, threads)
    plans = {
        plan: scores.agreement(asked, scores.plan_scores(loaded, asked, plan, threads), wanted)
        for plan in plans_of(loaded)
        if reference or plan != FP32
    }
    found = {
        "artifact": {"name": loaded.manifest.name, "digest": loaded.digest},
        "reference": reference.name if reference else FP32,
        "prompts": len(asked),
        "plans": plans,
    }
    typer.echo(json.dumps(found, indent=1) if as_json else _table(found))
    if any(plan["unsafe"]["max"] > most for plan in plans.values()):
        raise typer.Exit(1)


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['prompts']} prompts, absolute differences from {found['reference']}",
        "plan    P(unsafe) max      mean  category max  at  same verdict",
    ]
    for name, plan in found["plans"].items():
        unsafe, categories = plan["unsafe"], plan["categories"]
        worst = max(categories["by_code"], key=lambda code: categories["by_code"][code])
        lines.append(
            f"{name:<8}{unsafe['max']:>13.2e}{unsafe['mean']:>10.2e}{categories['max']:>14.2e}"
            f"  {worst:<4}{plan['verdicts']['agree']:>10.1%}"
        )
    return "\n".join(lines)
