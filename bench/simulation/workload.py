"""Requests of a scenario as columns. A pure function of the scenario: the same one gives the same bytes."""

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from bench.loadtest.curves import arrival_times
from bench.loadtest.files import left_out, read_contents
from bench.loadtest.scenario import OpenLoop, Synthetic, Tenant, Trace, TraceTimes
from bench.loadtest.work import MOONCAKE_BLOCK, Entry, sample
from bench.simulation.clock import to_ticks
from bench.simulation.requests import Requests, TenantTraits
from bench.simulation.scenario import SimulatedTenant, SimulationScenario
from model_parallel.errors import ConfigError

MAX_TOTAL_REQUESTS = 20_000_000


@dataclass(slots=True)
class _Rows:
    """One tenant's requests before they are put in order. Later turns follow their session's first at once."""

    at_s: list[float] = field(default_factory=list)
    """Of a first turn: when it arrives."""
    think_s: list[float] = field(default_factory=list)
    """Of a later turn: how long after the answer before; below 0 for a first turn."""
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    prefix: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """By row: (content below 0, tokens)."""
    num_cut: int = 0
    num_ended_early: int = 0
    """Sessions without their last turns, which would have been longer than the model's length."""
    notes: list[str] = field(default_factory=list)

    def add(self, at_s: float, think_s: float, prompt: int, output: int) -> int:
        self.at_s.append(at_s)
        self.think_s.append(think_s)
        self.prompt.append(prompt)
        self.output.append(output)
        return len(self.at_s) - 1


class _Contents:
    """Numbers for what requests share: below 0, each used once in a simulation."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int], int] = {}

    def of(self, tenant: str, number: int) -> int:
        return self._numbers.setdefault((tenant, number), -2 - len(self._numbers))


def make_requests(scenario: SimulationScenario, *, max_model_len: int) -> Requests:
    """All tenants' requests together, in order of arrival. Prompt and answer are cut to `max_model_len`, as traces of other
    models need: a server refuses such requests, and then says nothing of the load that they would have been. `notes` tells how
    many they are. Raises ConfigError."""
    contents = _Contents()
    parts = [_rows_of(tenant, scenario, contents, max_model_len) for tenant in scenario.tenants]
    total = sum(len(part.at_s) for part in parts)
    if total > MAX_TOTAL_REQUESTS:
        raise ConfigError(f"the scenario has {total} requests; at most {MAX_TOTAL_REQUESTS} are simulated")
    order = sorted(
        ((at_s, number, row) for number, part in enumerate(parts) for row, at_s in enumerate(part.at_s)),
        key=lambda item: item[0],
    )
    place = {(number, row): index for index, (_, number, row) in enumerate(order)}
    traits = [
        TenantTraits(
            name=tenant.name, weight=tenant.weight, priority=tenant.priority,
            deadline_s=tenant.deadline_s, patience_s=tenant.patience_s,
        )
        for tenant in scenario.tenants
    ]  # fmt: skip
    requests = Requests(
        tenants=traits, ticks=array("q"), tenant=array("H"), prompt_tokens=array("i"), output_tokens=array("i"),
        max_tokens=array("i"),
    )  # fmt: skip
    later = set()
    for index, (at_s, number, row) in enumerate(order):
        part, tenant = parts[number], scenario.tenants[number]
        think_s, output = part.think_s[row], part.output[row]
        requests.ticks.append(to_ticks(at_s if think_s < 0 else think_s))
        requests.tenant.append(number)
        requests.prompt_tokens.append(part.prompt[row])
        requests.output_tokens.append(output)
        requests.max_tokens.append(output if tenant.max_tokens is None else tenant.max_tokens)
        if row in part.prefix:
            requests.prefixes[index] = part.prefix[row]
        if think_s >= 0:
            later.add(index)
            requests.next_turn[place[number, row - 1]] = index
    requests.later_turns = frozenset(later)
    requests.num_cut = sum(part.num_cut for part in parts)
    requests.notes = [
        *(note for part in parts for note in part.notes),
        *_notes_of_length(requests, sum(part.num_ended_early for part in parts), max_model_len),
    ]
    return requests


def _notes_of_length(requests: Requests, num_ended_early: int, longest: int) -> Iterator[str]:
    if requests.num_cut:
        yield (
            f"{requests.num_cut} of {len(requests)} requests were cut to the model's length, {longest} tokens of prompt and "
            "answer; a server refuses such requests"
        )
    if num_ended_early:
        yield f"{num_ended_early} sessions end before the turn that would be longer than the model's length, {longest} tokens"


def _rows_of(tenant: SimulatedTenant, scenario: SimulationScenario, contents: _Contents, longest: int) -> _Rows:
    draw = random.Random(f"{scenario.seed}/{tenant.name}")
    rows, work = _Rows(), tenant.work
    entries: list[Entry] = []
    if isinstance(work, Trace):
        times = TraceTimes(process="trace")
        entries, num_unanswered = read_contents(Tenant(name=tenant.name, work=work, arrivals=times))
        if isinstance(tenant.arrivals, TraceTimes):
            rows.notes += left_out(
                tenant.name, work, entries, tenant.max_requests, scenario.duration_s, num_unanswered=num_unanswered
            )
    for number, at_s in enumerate(islice(_times(tenant, scenario, entries), tenant.max_requests)):
        if isinstance(work, Synthetic):
            _add_session(rows, tenant, work, at_s, draw, contents, longest)
        else:
            _add_entry(rows, tenant, entries[number % len(entries)], at_s, contents, longest)
    return rows


def _times(tenant: SimulatedTenant, scenario: SimulationScenario, entries: list[Entry]) -> Iterator[float]:
    if isinstance(tenant.arrivals, OpenLoop):
        draw = random.Random(f"{scenario.seed}/{tenant.name}/arrivals")
        return arrival_times(tenant.arrivals, scenario.duration_s, draw)
    return (entry.at_s for entry in entries if entry.at_s < scenario.duration_s)


def _add_session(
    rows: _Rows,
    tenant: SimulatedTenant,
    work: Synthetic,
    at_s: float,
    draw: random.Random,
    contents: _Contents,
    longest: int,
) -> None:
    total = 0
    for turn in range(sample(work.turns.count, draw, "output")):
        shared = work.prefix.tokens if work.prefix and not turn else 0
        prompt = shared + sample(work.input_tokens, draw, "input")
        output = _allowed(tenant, sample(work.output_tokens, draw, "output"))
        room = longest - total - _asked(tenant, output)
        if turn and prompt > room:
            rows.num_ended_early += 1
            break
        rows.num_cut += 1 <= room < prompt  # below 1, the answer alone is too long, and the group refuses it
        prompt = max(1, min(prompt, room))
        total += prompt + output
        think_s = -1.0
        if turn:
            think_s = draw.expovariate(1 / work.turns.think_s) if work.turns.think_s else 0.0
        row = rows.add(at_s, think_s, prompt, output)
        if shared and work.prefix:
            rows.prefix[row] = ((contents.of(tenant.name, draw.randrange(work.prefix.count)), shared),)


def _add_entry(
    rows: _Rows, tenant: SimulatedTenant, entry: Entry, at_s: float, contents: _Contents, longest: int
) -> None:
    own_limit = tenant.work.max_tokens if isinstance(tenant.work, Trace) else longest
    prompt, output = _cut(tenant, entry, min(longest, own_limit))
    is_cut = (prompt, output) != _cut(tenant, entry, own_limit)
    rows.num_cut += is_cut and prompt + _asked(tenant, output) <= longest
    row = rows.add(at_s, -1.0, prompt, output)
    if entry.blocks:
        rows.prefix[row] = tuple((contents.of(tenant.name, block), MOONCAKE_BLOCK) for block in entry.blocks)


def _cut(tenant: SimulatedTenant, entry: Entry, limit: int) -> tuple[int, int]:
    """Tokens of prompt and answer."""
    output = _allowed(tenant, max(1, min(entry.output_tokens or 1, limit - 1)))
    return max(1, min(entry.input_tokens, limit - _asked(tenant, output))), output


def _allowed(tenant: SimulatedTenant, output: int) -> int:
    return output if tenant.max_tokens is None else min(output, tenant.max_tokens)


def _asked(tenant: SimulatedTenant, output: int) -> int:
    return output if tenant.max_tokens is None else tenant.max_tokens
