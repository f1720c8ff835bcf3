"""What a scheduler tells of itself. All are numbers, and reading them takes constant time."""

from dataclasses import dataclass

from model_parallel.engine.request import FinishReason


@dataclass(kw_only=True, slots=True)
class Totals:
    """Counts since the group started."""

    num_preemptions: int = 0
    num_pauses: int = 0
    num_prefix_query_tokens: int = 0
    """Tokens looked up in the prefix cache, once for each sequence."""
    num_prefix_hit_tokens: int = 0
    num_prompt_tokens: int = 0
    """Of sequences that were admitted, once for each; those from the prefix cache included."""
    num_generation_tokens: int = 0
    """Delivered; tokens of discarded rows are not among them."""
    num_draft_tokens: int = 0
    """Computed because they might come next."""
    num_accepted_tokens: int = 0
    """Of those, what did and was delivered; they are among num_generation_tokens."""
    num_refused: int = 0
    """Client requests that were refused as overloaded."""
    num_finished_stop: int = 0
    num_finished_length: int = 0
    num_finished_cancelled: int = 0
    num_finished_deadline: int = 0
    num_finished_error: int = 0
    num_corrupted: int = 0
    """Ended because their logits were not finite; they are among num_finished_error."""

    def count_finished(self, reason: FinishReason) -> None:
        """One more has ended."""
        name = f"num_finished_{reason}"
        setattr(self, name, getattr(self, name) + 1)


@dataclass(kw_only=True, slots=True)
class SchedulerStats(Totals):
    """Totals, and the load at this moment."""

    num_running: int
    num_waiting: int
    """Preempted ones included."""
    num_waiting_tokens: int
    """Prompt tokens of those."""
    num_paused: int
    """Whose readers do not keep up."""
    num_grammars: int = 0
    """That the ranks keep, or compile now."""
    num_compiled_grammars: int = 0
    """Since the group started."""
    kv_usage: float
    """Share of the KV cache that sequences hold, 0 to 1. Published blocks that nobody holds count as free."""
    estimated_wait_s: float
    """Until all that waits now is admitted, at the pace of the last half minute; 0 before anything was measured."""
