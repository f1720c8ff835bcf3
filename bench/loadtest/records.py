"""One request of a run, as it goes from the processes that send to the one that sums up. Seconds count from the run's start."""

import msgspec

from bench.loadtest.replies import Outcome, Stages


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What was measured of one request."""

    tenant: int
    """Its place in the scenario."""
    session: int
    turn: int
    intended_s: float
    """When it was due. Latencies count from here."""
    sent_s: float
    """When it was sent, the first time."""
    ended_s: float
    outcome: Outcome
    code: str
    reason: str
    attempts: int
    first_s: float | None
    """Arrival of the first token."""
    last_s: float | None
    """Arrival of the last one."""
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int
    gaps: bytes
    """Seconds between the arrivals of chunks, as float32."""
    stages: Stages | None
    seen_tokens: int = 0
    """Of output_tokens, what chunks told of; of a server that does not tell, the number of chunks."""
    seen_chunks: int = 0
    hidden_tokens: int = 0
    """Of output_tokens, what the server says it thought and no chunk showed."""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_s is None else self.first_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None of an answer of one token, and of one that came in one piece."""
        num_paced = self.output_tokens - self.hidden_tokens
        if self.first_s is None or self.last_s is None or num_paced < 2 or self.seen_chunks == 1:
            return None
        return (self.last_s - self.first_s) / (num_paced - 1)

    @property
    def closed_s(self) -> float:
        """When the last token was there, or the end of an answer that came whole."""
        return self.ended_s if self.last_s is None else self.last_s

    @property
    def e2el_s(self) -> float:
        """To the last token, or the end of an answer that came whole."""
        return self.closed_s - self.intended_s


class Health(msgspec.Struct, frozen=True, array_like=True):
    """How a sending process itself fared: whether it could have been the bottleneck."""

    process: int
    wall_s: float
    cpu_s: float
    lags_s: list[float]
    """Lateness of sends: a sample of at most LAG_SAMPLES, and the largest."""
    max_lag_s: float
    loop_delays_s: list[float]
    """How late the event loop was, a sample likewise."""
    max_loop_delay_s: float
    num_held_back: int
    """Requests that waited for room under max_concurrency."""
    num_held_back_by_bound: int
    """Requests that waited for room under max_in_flight, which is no part of the load."""
    num_unsent: int
    """Requests (sessions) that were due and still waited for room when sending ended."""
    num_gaps_dropped: int
    """Inter-token latencies that were not kept, for the sake of memory."""
    bound_reached_s: float | None = None
    """When max_requests, which is no part of the load, kept the first request that was due from being sent."""
    num_connections: int = 0
    """That were opened, warm-up requests included."""
