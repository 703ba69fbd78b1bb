"""How a server comes by its second guard."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_middleware import GuardClient
from guard_policies.loader import builtin_policies
from guard_service.artifact import ArtifactError
from guard_service.config import ConfigError, Settings
from guard_service.engines import EngineFailed
from guard_service.hosted import engines_of
from guard_service.local import local_server
from guard_service.server import GuardServer
from tests.service.cascade.guards import LARGE, SMALL, Told

POLICY = "name: tiered\nversion: '1'\ncascade: {band: [0, 1]}\n"


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"second_model": "fake", "second_guard": "a:1"}, "has one second guard"),
        ({"second_guard": "https://a.example"}, "neither host:port nor unix:/path"),
        ({"second_guard": "a.example"}, "neither host:port nor unix:/path"),
        ({"second_guard_ca": Path(__file__)}, "needs second_guard too"),
        ({"second_guard": "a:1", "second_guard_ca": Path("none.pem")}, "none.pem is not a file"),
        ({"second_guard": "a:1", "second_guard_cert": Path(__file__)}, "set both or neither"),
        (
            {
                "second_guard": "a:1",
                "second_guard_cert": Path(__file__),
                "second_guard_key": Path(__file__),
            },
            "needs second_guard_ca too",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(knobs: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["guard.internal:50051", "[::1]:50051", "unix:/run/guard"])
def test_addresses_of_second_guards_are_as_those_of_servers(target: str) -> None:
    assert Settings(second_guard=target).second_guard == target


def test_a_second_model_is_loaded_beside_the_first(tmp_path: Path) -> None:
    (tmp_path / "tiered.yaml").write_text(POLICY)
    settings = Settings(model="fake", second_model="fake-vision", policies=(tmp_path,))
    with local_server(settings) as target, GuardClient(target) as guard:
        models = guard.info().models
        assert [(one.model.tier, one.judges_images) for one in models] == [
            ("first", False),
            ("second", True),
        ]
        verdict = guard.classify("tell me of the fake-bomb", policy="tiered")
        assert verdict.judged and verdict.model.tier_reason == "IN_BAND"


def test_a_second_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    settings = Settings(model="fake", second_model=str(tmp_path))
    with pytest.raises(ArtifactError), engines_of(settings):
        pass


async def test_a_second_model_that_scores_otherwise_than_recorded_is_not_served(
    tmp_path: Path,
) -> None:
    class Changed(Told):
        def self_test(self) -> None:
            raise EngineFailed("other scores than recorded")

    settings = Settings(host=f"unix:{tmp_path / 'socket'}", metrics=False)
    server = GuardServer(settings, Told(SMALL), builtin_policies(), Changed(LARGE))
    with pytest.raises(EngineFailed):
        await server.start()
