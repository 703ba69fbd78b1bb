"""The command guard-service: flags to settings, settings to a running server; pull, verify."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from guard_policies.positions import PolicyError
from guard_policies.schema import Policy
from guard_service import __version__, logs, pull, verify
from guard_service.artifact import ArtifactError
from guard_service.config import FIELDS, TYPES, ConfigError, Loaded, Settings, load
from guard_service.engines import Engine, EngineFailed, ModelCard
from guard_service.errors import GuardServiceError
from guard_service.hosted import engines_of
from guard_service.live.policies import loaded_policies
from guard_service.logs import FIELDS as LOG_FIELDS
from guard_service.security import signatures
from guard_service.security.auth_file import read_auth_file
from guard_service.server import GuardServer

LOG = logging.getLogger("guard_service")
FAILED, USAGE, INTERRUPTED = 1, 2, 130
CONFIG_VARIABLE = "GUARD_CONFIG"
COMMANDS = {"pull": pull.main, "verify": verify.main, "sign": signatures.main}  # flags alone serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop, or a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parser = _parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        possible = [*COMMANDS, *parser._option_string_actions]
        near = difflib.get_close_matches(unknown[0], possible, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        parser.error(f"unknown argument {unknown[0]}; {hint}")
    arguments = vars(known)
    try:
        loaded = _settings(arguments)
    except ConfigError as error:
        return _fail("the settings are wrong", error.problems, USAGE)
    if arguments["print_config"]:
        print("\n".join(loaded.lines()))
        return 0
    logs.set_up(loaded.settings.log_level, loaded.settings.log_format)
    return _run(loaded.settings)


def _run(settings: Settings) -> int:
    if not _has_terminal():  # that could hang up: it asks for what the first look does anyway
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    try:
        policies = loaded_policies(settings)
    except PolicyError as error:
        return _fail("a policy is broken", [str(p) for p in error.problems], USAGE)
    try:  # before a model is loaded, which takes time
        if settings.auth is not None:
            read_auth_file(settings.auth, settings.default_policy)
    except PolicyError as error:
        return _fail("the auth file is broken", [str(p) for p in error.problems], USAGE)
    with ExitStack() as stack:
        try:
            first, second = stack.enter_context(engines_of(settings))
        except (ArtifactError, EngineFailed, OSError) as error:
            return _fail("the model cannot be loaded", [str(error)], FAILED)
        try:
            return asyncio.run(_serve(settings, first, second, policies))
        except (GuardServiceError, EngineFailed, OSError) as error:
            return _fail("the service cannot start", [str(error)], FAILED)


async def _serve(
    settings: Settings, engine: Engine, second: Engine | None, policies: Mapping[str, Policy]
) -> int:
    server = GuardServer(settings, engine, policies, second)
    told = _on_signal(server.watcher.now)
    await server.start()
    _announce(server, settings, engine.card, sorted(policies))
    await told.wait()
    LOG.info("draining", extra={LOG_FIELDS: {"timeout_s": settings.drain_timeout_s}})
    drained = await server.stop(settings.drain_timeout_s)
    LOG.info("stopped", extra={LOG_FIELDS: {"drained": drained}})
    return 0 if drained else FAILED


def _on_signal(reload: Callable[[], None]) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once. SIGHUP reloads."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if told.is_set():
            os._exit(INTERRUPTED)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    attached = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    loop.add_signal_handler(
        signal.SIGHUP, lambda: stop() if attached and not _has_terminal() else reload()
    )
    return told


def _has_terminal() -> bool:
    """Whether there is a terminal that controls this process; it is gone once it hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _announce(
    server: GuardServer, settings: Settings, card: ModelCard, policies: Sequence[str]
) -> None:
    """Say what runs and how to talk to it: a log line for machines, a few lines for people."""
    http = f"http://{settings.metrics_host}:{server.metrics_port}" if settings.metrics else ""
    if logs.is_text(settings.log_format):
        lines = _greeting(server.address, http, settings, card, policies)
        print("\n".join(lines), file=sys.stderr, flush=True)
        return
    fields = {
        "version": __version__,
        "address": server.address,
        "http": http,
        "model": card.name,
        "digest": card.digest,
        "kernel_plan": card.plan,
        "notice": card.notice,
        "second": settings.second_model or settings.second_guard,
        "policies": list(policies),
        "default_policy": settings.default_policy,
    }
    LOG.info("serving", extra={LOG_FIELDS: fields})


def _greeting(
    address: str, http: str, settings: Settings, card: ModelCard, policies: Sequence[str]
) -> Iterator[str]:
    named = [f"{p} (default)" if p == settings.default_policy else p for p in policies]
    yield f"guard-service {__version__}"
    yield f"  model     {card.name}, {card.parameters / 1e6:.1f} M parameters, {card.digest[:19]}"
    if card.notice:
        yield f"            {card.notice}"
    if second := settings.second_model or settings.second_guard:
        yield f"  second    {second}, for policies with a cascade"
    yield f"  policies  {', '.join(named)}"
    yield f"  gRPC      {address}{' (TLS)' if settings.tls_cert else ''}"
    if http:
        yield f"  HTTP      {http}/metrics, /livez, /readyz"
    plain = "" if settings.tls_cert else "-plaintext "
    yield "Talk to it from another shell:"
    yield f'  guardctl check --server {address} "How do I kill a Python process?"'
    yield (
        f'  grpcurl {plain}-d \'{{"conversation": {{"messages": [{{"role": "ROLE_USER", "parts": '
        f'[{{"text": "hello"}}]}}]}}}}\' {address} guard_api.v1.GuardService/Classify'
    )
    yield "Stop it with Ctrl-C."


def _settings(arguments: Mapping[str, str | None]) -> Loaded:
    environment = dict(os.environ)
    file = arguments["config"] or environment.get(CONFIG_VARIABLE)
    environment.pop(CONFIG_VARIABLE, None)
    flags = {
        name: ":".join(value) if isinstance(value, list) else str(value)
        for name, value in arguments.items()
        if name in FIELDS and value is not None
    }
    return load(flags, environment, Path(file) if file else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-service",
        usage="guard-service [--config FILE] [--model FOLDER] [--port N] [...]\n"
        "       guard-service pull OWNER/NAME [...]\n"
        "       guard-service verify FOLDER\n"
        "       guard-service sign FOLDER --key FILE",
        description="Judge conversations over gRPC. `pull` downloads a model, `verify` checks a "
        "model folder, `sign` signs one; each has its own --help.",
        epilog="Every setting may come from a flag, from the environment (GUARD_PORT for --port) "
        "or from the file of --config, and counts in this order.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"guard-service {__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings [GUARD_CONFIG]")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print every setting, and where it came from, and exit",
    )
    for name, knob in FIELDS.items():
        flag = f"--{name.replace('_', '-')}"
        shown = str(knob.default) if knob.default not in ((), None) else "none"
        text = f"{knob.metadata['why']} [{shown}]".replace("%", "%%")
        if TYPES[name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(knob.default, tuple):
            parser.add_argument(flag, metavar="PATH", action="append", help=f"{text}; repeatable")
        else:
            parser.add_argument(flag, metavar=_metavar(name), help=text)
    return parser


def _metavar(name: str) -> str:
    kind = TYPES[name]
    if kind in (int, float):
        return "SECONDS" if name.endswith("_s") else "N"
    return "TEXT" if kind is str else "FILE"


def _fail(what: str, problems: Sequence[str], code: int) -> int:
    print(f"guard-service: {what}:", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
