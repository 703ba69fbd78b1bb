"""guardctl bench: how fast a guard answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options

What = Annotated[
    str,
    typer.Argument(
        metavar="[service|engine|middleware]",
        help="The service; or the bare engine, without service or network; or what middleware and "
        "sidecar add to a backend.",
    ),
]
Concurrency = Annotated[
    int, typer.Option("--concurrency", "-c", min=1, max=4096, help="Callers at a time.")
]
Duration = Annotated[
    float, typer.Option("--duration", "-d", min=0.1, metavar="SECONDS", help="How long to run.")
]
Count = Annotated[
    int, typer.Option("--count", "-n", min=0, help="Stop after so many calls; 0: by time only.")
]
WarmUp = Annotated[
    float, typer.Option("--warm-up", min=0, metavar="SECONDS", help="Run first, not counted.")
]
File = Annotated[
    Path | None,
    typer.Option(
        exists=True, help="Conversations to send, JSON lines as of bulk, not our own sentences."
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache/--cache", help="Ask for fresh verdicts.")]
CompareEngine = Annotated[
    bool,
    typer.Option(
        "--compare-engine",
        help="Run the bare engine on the same prompts too and tell what the service adds.",
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Of the bare engine: keep what precedes every conversation, or compute it anew.",
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        metavar="KIND=PATH",
        help="Of the bare engine: measure another one beside it, on the same conversations. "
        "gguf=FILE (llama.cpp), transformers=FOLDER (also transformers-fp32, transformers-bf16), "
        "onnx=FOLDER (optimum's export), torch=FOLDER (our own torch engine; also torch-fp32, "
        "torch-bf16). May be repeated.",
    ),
]
TemplateName = Annotated[
    str,
    typer.Option(
        "--template",
        metavar="NAME",
        help="Of the bare engine: another template than the model's own, for its speed only.",
    ),
]
Threads = Annotated[
    int,
    typer.Option("--threads", min=0, max=1024, help="Of the bare engine; 0: one for each core."),
]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=0,
        max=1000,
        help="Of the bare engine: turns at each figure; 0: only throughput in batches. Of the "
        "middleware: turns.",
    ),
]
Streams = Annotated[
    int,
    typer.Option(
        "--streams", min=0, max=4000, help="Of the middleware: streams open at once; 0: none."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Of a checkpoint: auto, cpu, cuda.")]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", help="Of a checkpoint: auto, bfloat16, float32.")
]
Weights = Annotated[str, typer.Option(metavar="NAME", help="Of a checkpoint: stored, int8, int4.")]


def bench(
    what: What = "service",
    concurrency: Concurrency = 8,
    duration_s: Duration = 10.0,
    count: Count = 0,
    warm_up_s: WarmUp = 2.0,
    file: File = None,
    no_cache: NoCache = True,
    compare_engine: CompareEngine = False,
    prefix_cache: PrefixCache = True,
    peers: Peers = None,
    template: TemplateName = "",
    threads: Threads = 0,
    repeats: Repeats = 5,
    streams: Streams = 100,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "stored",
    policy: options.PolicyName = "",
    server: options.Server = "",
    model: options.Model = "",
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 30.0,
    as_json: options.AsJson = False,
) -> None:
    """Measure latency and throughput, in a closed loop: each caller waits for its answer.

    The built-in sentences are harmless and each is sent once only. The load is made in this
    process; for figures of the service alone, run it on other cores.

    The bare engine is measured more closely: cold start, time to a verdict at several lengths with
    a known and a new prefix, a growing reply, memory, and what share of this machine's speed it
    reaches; beside peers, if there are any. Each runs in a process of its own.

    Of a checkpoint in torch (--model FOLDER): time to a verdict with and without an image, with and
    without what is kept, beside transformers' `generate` on the same weights; batches, memory, and
    what shares of the device's matrix rate and bandwidth are reached.

    Of the middleware: an application that answers at once, alone, inside the middleware and behind
    the sidecar, each in a process of its own, in turns: latency, throughput, streams, memory.
    """
    if what == "middleware":
        from guard_service.cli import bench_middleware

        plan = bench_middleware.Plan(
            max(1, repeats), count or 200, concurrency, duration_s, streams
        )
        raise typer.Exit(bench_middleware.run(plan, as_json))
    from guard_service.cli import bench_run, exits
    from guard_service.cli.place import Place
    from guard_service.config import CHOICES

    how = bench_run.How(
        what,
        concurrency,
        duration_s,
        count,
        warm_up_s,
        file,
        no_cache,
        policy,
        timeout_s,
        prefix_cache,
        tuple(peers or ()),
        template,
        threads,
        repeats,
        device,
        dtype,
        weights,
    )
    for name, value in (("device", device), ("dtype", dtype), ("weights", weights)):
        if value not in CHOICES[name]:
            exits.fail(f"--{name} must be one of {', '.join(CHOICES[name])}", exits.USAGE)
    place = Place(server, model, (), ca, cert, key, token_file)
    raise typer.Exit(bench_run.run(place, how, compare_engine, as_json))
