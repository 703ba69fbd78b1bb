"""guardctl expect: what a model of a known geometry takes on a device, by arithmetic."""

from __future__ import annotations

from typing import Annotated

import typer

from guard_service.cli import options

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="1b, 8b or 11b-vision as published; or a checkpoint's folder or config.json.",
    ),
]
Tflops = Annotated[
    float,
    typer.Option(min=0.001, metavar="N", help="The device's dense matrix rate, 10^12 a second."),
]
Bandwidth = Annotated[
    float, typer.Option("--gb-per-s", min=0.001, metavar="N", help="Its memory's, 10^9 bytes.")
]
Gib = Annotated[float, typer.Option(min=0.001, metavar="N", help="Its memory, 2^30 bytes.")]
Name = Annotated[str, typer.Option("--device-name", metavar="TEXT", help="For the heading.")]
MatrixShare = Annotated[
    float, typer.Option(min=0.001, max=1, help="Of the matrix rate that is reached.")
]
BandwidthShare = Annotated[float, typer.Option(min=0.001, max=1, help="Of the bandwidth.")]
Held = Annotated[
    str, typer.Option("--weights", metavar="NAME", help="bfloat16, float32, int8 or int4.")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the conversation.")]


def expect(
    model: Model,
    tflops: Tflops = 989.0,
    gb_per_s: Bandwidth = 4800.0,
    gib: Gib = 141.0e9 / 2**30,
    name: Name = "H200 as its data sheet has it",
    matrix_share: MatrixShare = 0.4,
    bandwidth_share: BandwidthShare = 0.7,
    held: Held = "bfloat16",
    tokens: Tokens = 40,
    as_json: options.AsJson = False,
) -> None:
    """What to expect of a checkpoint in torch: bytes, products and times; nothing is run.

    A run takes as long as its products at the share of the matrix rate, or its bytes at the share
    of the bandwidth, whichever is longer. What a device really reaches, `guardctl bench engine`
    measures.
    """
    from guard_service.cli import expecting

    device = expecting.Device(name, tflops, gb_per_s, gib, matrix_share, bandwidth_share)
    raise typer.Exit(expecting.run(model, device, held, tokens, as_json))
