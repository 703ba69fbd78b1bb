"""A new model beside the old one: checked by itself, then given to new calls; failing, left out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from guard_policies.schema import Policy
from guard_service.artifact import MANIFEST_FILE, ArtifactError, named_folder
from guard_service.cascade import Cascade
from guard_service.config import Settings
from guard_service.engines import FAKE, FAKE_VISION, Engine, EngineFailed
from guard_service.errors import GuardServiceError, PolicyNotSupported, UnknownPolicy
from guard_service.hosted import Hosted
from guard_service.live.memory import NoRoom, check_room
from guard_service.live.policies import check_policies
from guard_service.live.reloads import Reloads
from guard_service.live.serving import Guards, Live, Makers, second_policies
from guard_service.live.watching import Watched, contents
from guard_service.logs import FIELDS
from guard_service.manifest import ManifestError, parse_manifest

LOG = logging.getLogger(__name__)
MODELS = "models"  # the name under which they are watched

# Opens a model by name or path and kernel plan. Raises what `open_engine` does.
Open = Callable[[str, str], Engine]
Marks = Mapping[str, bytes]  # by model: what stands for its files


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Engines that were opened; None where the one of before stays."""

    first: Engine | None
    second: Engine | None


class ModelFiles:
    """Has the models of the settings exchanged when their folders have others."""

    def __init__(
        self, settings: Settings, live: Live, makers: Makers, open_model: Open, reloads: Reloads
    ) -> None:
        self._settings = settings
        self._live = live
        self._makers = makers
        self._open = open_model
        self._reloads = reloads
        self._used = self._marks()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders of the models; none of those that have no files."""
        models = (self._settings.model, self._settings.second_model)
        return tuple(named_folder(m) for m in models if m and m not in (FAKE, FAKE_VISION))

    def watched(self) -> Watched[Marks]:
        """For a watcher."""
        return Watched(MODELS, self.paths, self._marks, self._use, self._failed, marks)

    def _marks(self) -> Marks:
        return {str(path): marks([path]) for path in self.paths}

    async def _use(self, found: Marks) -> None:
        """Load what is new, check it, and give it to new calls. Raises what went wrong."""
        settings, guards = self._settings, self._live.guards
        first = self._is_new(settings.model, guards.first, found)
        second = guards.second is not None and self._is_new(
            settings.second_model, guards.second, found
        )
        if not first and not second:
            self._used = found
            self._reloads.nothing_new()
            return
        LOG.info("a new model is being loaded beside the old one")
        loaded = await _in_thread(lambda: self._loaded(guards, first, second))
        try:
            await self._exchange(loaded)
        except BaseException:
            _close(loaded)
            raise
        self._used = found
        self._reloads.succeeded()

    def _is_new(self, model: str, hosted: Hosted, found: Marks) -> bool:
        folder = named_folder(model)
        if found.get(str(folder)) == self._used.get(str(folder)):
            return False
        return _digest(folder) != hosted.card.digest

    def _loaded(self, guards: Guards, first: bool, second: bool) -> _Loaded:
        """In a thread. What is open is closed again where the other cannot be opened."""
        opened = self._opened(self._settings.model, guards.first) if first else None
        try:
            other = None
            if second and guards.second is not None:
                other = self._opened(self._settings.second_model, guards.second)
        except BaseException:
            _close(_Loaded(opened, None))
            raise
        return _Loaded(opened, other)

    def _opened(self, model: str, before: Hosted) -> Engine:
        """With the kernel plan of before, which need not be measured while calls are served; where
        the new model has no such, with the one that is set."""
        plan = before.card.plan or self._settings.kernel_plan
        check_room(named_folder(model), plan, self._settings.weights)
        try:
            return self._open(model, plan)
        except EngineFailed:
            if plan == self._settings.kernel_plan:
                raise
            return self._open(model, self._settings.kernel_plan)

    async def _exchange(self, loaded: _Loaded) -> None:
        """Golden prompts and a greeting, then, in one step, for all new calls."""
        before, makers = self._live.guards, self._makers
        first = makers.first(loaded.first) if loaded.first else before.first
        second = makers.second(loaded.second) if loaded.second else before.second
        new = [one for one in (first, second) if one not in before.hosted and one is not None]
        try:
            policies = self._live.judge.policies
            default = policies[self._live.judge.default_policy]
            if first in new:
                await first.start((default,))
            if second is not None and second in new:
                await second.start(second_policies(policies))
            guards = makers.guards(first, second)
            judge = self._judge(guards)
        except BaseException:
            for one in new:
                await one.close()
            raise
        self._live.exchange(judge, guards)
        makers.on_health()  # the one of before may hang
        digests = [one.card.digest for one in guards.hosted]
        LOG.info("new calls are judged by another model", extra={FIELDS: {"digests": digests}})

    def _judge(self, guards: Guards) -> Cascade:
        """Of the policies of now. Raises when the models cannot serve what those of before can."""
        before = self._live.judge
        guards.prepare_for(before.policies)
        judge = self._live.judge_of(guards, before.policies)
        for policy in before.policies.values():
            if _serves(before, policy):
                judge.policy(policy.name)
        check_policies(judge)
        return judge

    def _failed(self, error: Exception) -> None:
        known = (ArtifactError, EngineFailed, GuardServiceError, NoRoom, OSError)
        if isinstance(error, known):  # whose texts are safe to show
            LOG.error("the model of before stays in use: %s", error)
        else:
            LOG.error("the model of before stays in use", exc_info=error)
        self._reloads.failed([type(error).__name__])


def marks(paths: Sequence[Path]) -> bytes:
    """What stands for model folders: where links lead, small files by what they hold, large ones by
    place, size and time."""
    digest = hashlib.sha256(contents(paths))
    for path in paths:
        digest.update(os.fsencode(os.path.realpath(path)) + b"\0")
    return digest.digest()


def _digest(folder: Path) -> str:
    """Of an artifact, by its manifest; empty where that must be found out by loading it."""
    with suppress(OSError, ManifestError):
        return parse_manifest((folder / MANIFEST_FILE).read_bytes()).digest
    return ""


def _serves(judge: Cascade, policy: Policy) -> bool:
    try:
        judge.policy(policy.name)
    except (PolicyNotSupported, UnknownPolicy):
        return False
    return True


def _close(loaded: _Loaded) -> None:
    for engine in (loaded.first, loaded.second):
        if engine is not None:
            engine.close()


async def _in_thread(load: Callable[[], _Loaded]) -> _Loaded:
    """Run in a thread that the end of the process does not wait for; what it loads for nobody is
    closed."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Loaded] = loop.create_future()

    def deliver(loaded: _Loaded | None, error: BaseException | None) -> None:
        if error is not None and not done.done():
            done.set_exception(error)
        elif loaded is not None and not done.done():
            done.set_result(loaded)
        elif loaded is not None:
            _close(loaded)

    def run() -> None:
        loaded, failed = None, None
        try:
            loaded = load()
        except BaseException as error:
            failed = error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(deliver, loaded, failed)

    threading.Thread(target=run, name="guard-load", daemon=True).start()
    return await done
