"""What `guardctl info` and `guardctl policies` show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

from guard_middleware.client import GuardClient
from guard_middleware.errors import GuardError
from guard_middleware.service_info import Candidate, ModelInfo, PolicySummary
from guard_middleware.terms import Terms
from guard_policies.assessment import Action
from guard_service.cli import exits, show
from guard_service.cli.exits import printable
from guard_service.cli.place import Place


@contextmanager
def _client(place: Place, timeout_s: float) -> Iterator[GuardClient]:
    try:
        with (
            place.open() as (target, tls),
            GuardClient(target, Terms(timeout_s=timeout_s, tls=tls, token=place.token)) as guard,
        ):
            yield guard
    except GuardError as error:
        exits.fail(str(error))


def info(place: Place, timeout_s: float, as_json: bool) -> int:
    """Show version, health, models and limits; fails when the guard does not serve."""
    with _client(place, timeout_s) as guard:
        serves, found = guard.health(), guard.info()
    if as_json:
        whole = json.loads(show.as_json(found))
        print(json.dumps({"serves": serves, **whole}))
        return exits.OK if serves else exits.NO_VERDICT
    to = show.console()
    state = Text("serving", "green") if serves else Text("NOT SERVING", "bold red")
    since = found.started_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    to.print(Text.assemble(f"guard {printable(found.version)}  ", state, f"  since {since}"))
    for model in found.models:
        for line in _model_lines(model):
            to.print(line)
    for what, reloads in (("policies", found.policy_reloads), ("models", found.model_reloads)):
        if reloads is not None and reloads.problems:
            places = printable(", ".join(reloads.problems))
            to.print(Text(f"changed {what} could not be loaded, see its log: {places}", "red"))
    limits = found.limits
    to.print(
        f"limits  {limits.max_conversation_tokens} tokens and {limits.max_messages} messages a "
        f"conversation, {limits.max_batch_items} a batch, {limits.max_message_bytes} bytes a call, "
        f"deadline {limits.default_deadline_s:g} s unless the call has one"
    )
    if limits.max_images:
        to.print(
            f"        {limits.max_images} images a conversation, of {limits.max_image_bytes} bytes "
            f"and {limits.max_image_pixels} pixels each"
        )
    return exits.OK if serves else exits.NO_VERDICT


def _model_lines(model: ModelInfo) -> Iterator[Text]:
    yield Text.assemble(
        f"{printable(model.model.tier) or 'model':<8}",
        (printable(model.model.name), "bold"),
        f"  {model.parameters / 1e6:.1f} M parameters, engine {printable(model.engine)}, "
        f"template {printable(model.template)}, window {model.window_tokens} tokens",
    )
    yield Text(f"        {printable(model.model.digest)}", "dim")
    yield Text(
        f"        judges {'text and images' if model.judges_images else 'text only'}; "
        f"categories {printable(' '.join(model.categories))}"
        f"{', custom ones too' if model.custom_categories else ''}"
    )
    if model.notice:
        yield Text(f"        {printable(model.notice)}", "dim")


def policies(place: Place, timeout_s: float, as_json: bool) -> int:
    """Show the loaded policies; the default one first."""
    with _client(place, timeout_s) as guard:
        found = guard.list_policies()
    if as_json:
        print(show.as_json(found))
        return exits.OK
    to = show.console()
    by_name = sorted(
        found.policies, key=lambda one: (one.policy.name != found.default_policy, one.policy.name)
    )
    for summary in by_name:
        for line in _policy_lines(summary, summary.policy.name == found.default_policy):
            to.print(line)
    return exits.OK


def _policy_lines(summary: PolicySummary, default: bool) -> Iterator[Text]:
    marks = [mark for mark, on in (("default", default), ("shadow", summary.shadow)) if on]
    yield Text.assemble(
        (printable(summary.policy.name), "bold"),
        f" {printable(summary.policy.version)}",
        (f"  ({', '.join(marks)})" if marks else "", "cyan"),
        f"  {printable(summary.description)}",
    )
    yield Text(
        f"    categories {printable(' '.join(summary.categories))}; when it cannot judge: prompts "
        f"{summary.on_unavailable_prompt.value}, responses {summary.on_unavailable_response.value}",
        "dim",
    )
    if summary.candidate is not None:
        yield Text(f"    {printable(_compared(summary.candidate))}", "cyan")


def _compared(candidate: Candidate) -> str:
    """One line: for whose place, its share, how often both wish the same, and where not."""
    total = sum(count for _, _, count in candidate.wishes)
    same = sum(count for one, other, count in candidate.wishes if one is other)
    line = f"candidate for {candidate.policy}, decides {candidate.share:g} %"
    if not total:
        return f"{line}; nothing compared yet"
    apart = sorted(
        ((count, one, other) for one, other, count in candidate.wishes if one is not other),
        key=lambda entry: -entry[0],
    )
    cases = ", ".join(f"{_word(one)} -> {_word(other)} {count}" for count, one, other in apart)
    line += f"; agrees on {100 * same / total:.1f} % of {total}"
    return f"{line}: {cases}" if cases else line


def _word(action: Action | None) -> str:
    return action.value if action is not None else "no decision"
