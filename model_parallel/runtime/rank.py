"""One rank of a replica group: its shard of the weights, its shard of the KV cache, and the steps it computes.

Shape suffixes: T tokens of a step · E hidden · R rows that logits are wanted for · V local vocabulary
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, islice
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.fingerprint import weights_fingerprint
from model_parallel.checkpoint.loader import load_shard
from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.config import GroupConfig, ModelConfig
from model_parallel.engine.messages import Row, RowResult, StepPlan, StepResult
from model_parallel.engine.request import TokenLogprobs
from model_parallel.errors import CheckpointError, ConfigError, EngineError
from model_parallel.gpus import check_multiplies_fp8
from model_parallel.host_memory import reserve_heap
from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.fp8 import FP8
from model_parallel.kernels.interface import AdaptedRun, Kernels, LayerCache
from model_parallel.kernels.select import select_kernels
from model_parallel.memory import Workload, activation_bytes, check_cache_fits
from model_parallel.model.batch import SequenceState, build_batch, by_adapter, lay_out, rotary_frequencies
from model_parallel.model.llama import Llama
from model_parallel.model.partition import EMBEDDING, LM_HEAD, even_range, partition_heads, shard_table
from model_parallel.model.quantization import converter
from model_parallel.model.sampler import Sampled, Sampler
from model_parallel.runtime.adapter_store import AdapterStore, check_takes_adapters
from model_parallel.runtime.cuda_graphs import DecodeGraphs
from model_parallel.runtime.draft_model import DraftModel
from model_parallel.runtime.rank_grammars import RankGrammars
from model_parallel.runtime.recorded_steps import RecordedSteps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCORED_ROWS = 64
"""Prompt positions whose logits are held at a time."""


class Rank:
    """Computes its part of every step, in the order the leader sends them."""

    def __init__(
        self,
        config: GroupConfig,
        rank: int,
        collectives: Collectives,
        progress: Callable[[int, int], None] | None = None,
        *,
        kernels: Kernels | None = None,
    ) -> None:
        """Loads the shard and allocates the cache. progress(bytes done, bytes in all) is called while loading. `kernels`: instead
        of the fastest that can compute what the configuration says.

        Raises ConfigError, CheckpointError.
        """
        info = describe(Path(config.checkpoint_path))
        if config.weights and weights_fingerprint(info) != config.weights:
            raise CheckpointError(
                f"{info.path} is not what the model was deployed from: its weights have changed, or differ on this node; put "
                "back what was there, or undeploy the model and deploy it again"
            )
        model_config, tp_size = info.config, config.parallel.tp_size
        config.parallel.check_fits(model_config)
        self.config = config
        self.collectives = collectives
        self.device = _device(config.parallel.device)
        dtype = DTYPES[config.parallel.dtype]
        self.kernels = kernels or self._select_kernels(dtype)
        if config.parallel.deterministic and not self.deterministic:
            raise ConfigError(f"deterministic is true, and {self._why_not_deterministic()}; set it to false")
        table = shard_table(model_config, tp_size, rank)
        quantization = config.parallel.quantization
        if quantization == "packed" and not model_config.weight_formats:
            raise ConfigError(
                f"parallel.quantization is 'packed', and {info.path} holds no weights that are quantised in groups"
            )
        model_config.check_fp8("parallel.quantization", quantization)
        convert = None if model_config.fp8_weights else converter(quantization, table, collectives)
        weights = load_shard(
            info,
            table,
            dtype=dtype,
            device=self.device,
            progress=progress,
            convert=convert,
            keep_groups=quantization == "packed",
            keep_fp8=quantization == "fp8",
        )
        if quantization == "int8" and convert is not None and model_config.tie_word_embeddings:
            weights[LM_HEAD] = convert(LM_HEAD, weights[EMBEDDING])
        if config.adapters is not None:
            check_takes_adapters(weights, self.kernels.adapted_multiple)
        self.model = Llama(model_config, weights, kernels=self.kernels, collectives=collectives)
        if self.kernels.has_threads:
            torch.set_num_threads(1)  # torch's own would fight them for the cores
        self.frequencies = rotary_frequencies(model_config, self.device)
        self.draft_model: DraftModel | None = None
        if config.draft is not None and rank == 0:
            self.draft_model = DraftModel(config, model_config, self.kernels, self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            check_cache_fits(config, model_config, rank, free_bytes=torch.cuda.mem_get_info(self.device)[0])
        self.caches = self._allocate_caches(model_config, rank, dtype)
        self.graphs = self._capture_graphs()
        largest_part = len(even_range(model_config.vocab_size, tp_size, 0))
        self.sampler = Sampler(self.kernels, collectives, self.model.vocabulary, largest_part)
        self.sequences: dict[int, SequenceState] = {}
        self.grammars = RankGrammars(config.tokens, collectives, self.device, config.parallel.num_threads)
        self.adapters = AdapterStore(config, model_config, self.model, collectives, dtype)
        self.last_step_id = 0
        if self.device.type == "cpu":
            scheduler = config.scheduler
            workload = Workload(
                max_model_len=scheduler.max_model_len,
                max_num_seqs=scheduler.max_num_seqs,
                max_num_batched_tokens=scheduler.max_num_batched_tokens,
            )
            dtype_name = config.parallel.dtype
            reserve_heap(activation_bytes(model_config, tp_size, rank, dtype=dtype_name, workload=workload))

    def _select_kernels(self, dtype: torch.dtype) -> Kernels:
        parallel = self.config.parallel
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else self.device.type
        capability = torch.cuda.get_device_capability(self.device) if is_gpu else None
        if parallel.quantization == "fp8":
            check_multiplies_fp8("parallel.quantization", name, capability)
        if parallel.kv_cache_dtype == "fp8":
            check_multiplies_fp8("parallel.kv_cache_dtype", name, capability, instead="auto")
        return select_kernels(self.device.type, dtype, parallel.num_threads, deterministic=parallel.deterministic)

    def _allocate_caches(self, model: ModelConfig, rank: int, dtype: torch.dtype) -> list[LayerCache]:
        heads = partition_heads(model.num_query_heads, model.num_kv_heads, self.config.parallel.tp_size, rank)
        cache = self.config.cache
        return [
            self.kernels.allocate_cache(
                num_blocks=cache.num_blocks,
                block_size=cache.block_size,
                num_kv_heads=len(heads.kv_heads),
                head_dim=model.head_dim,
                dtype=FP8 if self.config.parallel.kv_cache_dtype == "fp8" else dtype,
            )
            for _ in range(model.num_layers)
        ]

    @torch.inference_mode()
    def _capture_graphs(self) -> DecodeGraphs | RecordedSteps | None:
        """Where all that a step calls only enqueues work, on a GPU, or is native, on a CPU."""
        if isinstance(self.kernels, CpuKernels) and isinstance(
            self.collectives, SoloCollectives | SharedMemoryCollectives
        ):
            return RecordedSteps(
                self.model, self.caches, self.frequencies, kernels=self.kernels, collectives=self.collectives
            )
        if not (self.kernels.only_enqueue and self.collectives.only_enqueue):
            return None
        return DecodeGraphs(
            self.model,
            self.caches,
            self.frequencies,
            max_num_seqs=self.config.scheduler.max_num_seqs,
            max_model_len=self.config.scheduler.max_model_len,
            num_blocks=self.config.cache.num_blocks,
            block_size=self.config.cache.block_size,
        )

    @property
    def kernels_name(self) -> str:
        return f"{self.kernels.name} {self.config.parallel.quantization}".rstrip()

    @property
    def deterministic(self) -> bool:
        return self.kernels.batch_invariant and self.collectives.in_rank_order

    def _why_not_deterministic(self) -> str:
        if not self.kernels.batch_invariant:
            return f"with the {self.kernels.name} kernels a row's last bits depend on what else is in a step"
        return (
            "the ranks' sums go over NCCL, which adds in an order of its own; they do not where all of a group's GPUs are of "
            "one host and can map each other's memory"
        )

    @property
    def num_done(self) -> int:
        """Layers, and pieces of them where the kernels can tell: grows all the while a step is computed."""
        num_drafting = 0 if self.draft_model is None else self.draft_model.num_layers_done
        return self.model.num_layers_done + num_drafting + self.kernels.num_done

    @property
    def is_compiling(self) -> bool:
        return self.kernels.is_compiling or self.grammars.is_renewing

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Every rank returns the same result, but for drafts, which rank 0 alone proposes.

        Raises EngineError for a plan that is out of turn."""
        if plan.epoch != self.config.epoch or plan.step_id != self.last_step_id + 1:
            raise EngineError(
                f"step {plan.step_id} of epoch {plan.epoch} arrived; "
                f"step {self.last_step_id + 1} of epoch {self.config.epoch} is next"
            )
        self.last_step_id = plan.step_id
        self._take_in(plan)
        results = self._compute(plan.rows) if plan.rows else ()
        proposals: tuple[tuple[int, ...], ...] = ()
        if self.draft_model is not None:
            proposals = self.draft_model.propose(plan.draft_requests, self.sequences)
        is_idle = not (plan.rows or plan.draft_requests)
        compiled = self.grammars.take_compiled(is_idle=is_idle)
        adapters = self.adapters.settle(may_wait=is_idle)
        return StepResult(plan.epoch, plan.step_id, results, compiled, adapters, proposals)

    def _take_in(self, plan: StepPlan) -> None:
        for adapter_id in plan.adapters_to_drop:
            self.adapters.drop(adapter_id)
        for load in plan.adapters_to_load:
            self.adapters.begin(load)
        for seq_id in plan.finished:
            self.sequences.pop(seq_id, None)
        if self.draft_model is not None:
            self.draft_model.forget(plan.finished)
        for new in plan.new_sequences:
            self.sequences[new.seq_id] = SequenceState.begin(new, self.grammars.matcher_for(new))
        self.grammars.take_in(plan)
        for row in plan.rows:
            state = self.sequences[row.seq_id]
            if row.reset_blocks:
                state.block_ids.clear()
            state.block_ids += row.new_block_ids

    def _compute(self, rows: tuple[Row, ...]) -> tuple[RowResult, ...]:
        computed = by_adapter(rows, self.sequences) if self.adapters.num_loaded else rows
        first_rows = list(accumulate((row.num_tokens for row in computed), initial=0))
        hidden_TE = self._forward(computed)
        scored = self._score_prompts(computed, first_rows[:-1], hidden_TE)
        sampled = self._sample(computed, first_rows[1:], hidden_TE)
        # Of a list: a tuple made of a generator is allocated at one length and freed at another, and CPython keeps 2,000
        # freed tuples of each length, which takes minutes to fill and 0.3 MB a length.
        return tuple([self._result(row, sampled, scored) for row in rows])

    def _forward(self, rows: tuple[Row, ...]) -> Tensor:
        """[T, E]: hidden states, row after row, then padding."""
        block_size = self.config.cache.block_size
        adapted = self._adapted_runs(rows) if self.adapters.num_loaded else []
        if all(row.num_tokens == 1 + len(row.draft_token_ids) for row in rows):
            if isinstance(self.graphs, RecordedSteps):
                return self.graphs.forward(lay_out(rows, self.sequences, block_size=block_size), adapted)
            if self.graphs is not None and not adapted:
                return self.graphs.forward(lay_out(rows, self.sequences, block_size=block_size, in_runs_of_one=True))
        batch = build_batch(
            rows,
            self.sequences,
            block_size=block_size,
            num_blocks=self.config.cache.num_blocks,
            row_multiple=self.kernels.row_multiple,
            frequencies=self.frequencies,
        )
        adapted_rows = self.kernels.adapted_rows(adapted) if adapted else None
        return self.model.forward(batch.token_ids_T, batch.attention, self.caches, adapted_rows=adapted_rows)

    def _adapted_runs(self, rows: tuple[Row, ...]) -> list[AdaptedRun]:
        """Of the step's tokens, those that adapters change. `rows` are in the order of `by_adapter`."""
        runs, first_row = [], 0
        for adapter_id, same in groupby(rows, key=lambda row: self.sequences[row.seq_id].adapter_id):
            num_rows = sum(row.num_tokens for row in same)
            if adapter_id:
                runs.append(AdaptedRun(first_row, num_rows, self.adapters.of(adapter_id)))
            first_row += num_rows
        return runs

    def _result(
        self, row: Row, sampled: dict[int, RowResult], scored: dict[int, list[TokenLogprobs | None]]
    ) -> RowResult:
        result = sampled.get(row.seq_id, RowResult(row.seq_id))
        if row.sample:  # After an error, too: the next step is planned already and counts on a token.
            state = self.sequences[row.seq_id]
            num_more = 0
            state.append(result.token_id or 0)
            for token_id in result.more_token_ids:
                if state.matcher is not None and state.matcher.is_complete:
                    break
                state.append(token_id)
                num_more += 1
            if state.matcher is not None or num_more:
                result = msgspec.structs.replace(
                    result,
                    is_complete=state.matcher is not None and state.matcher.is_complete,
                    more_token_ids=result.more_token_ids[:num_more],
                    more_logprobs=result.more_logprobs[:num_more],
                )
            if row.draft_token_ids:  # so the leader does, which gives the other blocks away
                del state.block_ids[-(-(len(state.token_ids) - 1) // self.config.cache.block_size) :]
        prompt_logprobs = tuple([entry for entry in scored.get(row.seq_id, []) if entry is not None])
        if len(prompt_logprobs) < len(scored.get(row.seq_id, [])):
            return RowResult(row.seq_id, error_kind="numerical_error")
        return msgspec.structs.replace(result, prompt_logprobs=prompt_logprobs)

    def _logits(self, hidden_TE: Tensor, rows: list[int]) -> Tensor:
        """float32 [R, V], R padded by repeating the first row."""
        padded = rows + [rows[0]] * (-len(rows) % self.kernels.row_multiple)
        if padded == list(range(len(rows))):  # as in decode: an index would have to wait for the GPU
            return self.model.logits(hidden_TE[: len(rows)])
        return self.model.logits(hidden_TE[torch.tensor(padded, device=self.device)])

    def _sample(self, rows: tuple[Row, ...], ends: list[int], hidden_TE: Tensor) -> dict[int, RowResult]:
        """By sequence. `ends`: where each row ends among the step's tokens."""
        drawn = [(row, end) for row, end in zip(rows, ends, strict=True) if row.sample]
        if not drawn:
            return {}
        states: list[SequenceState] = []
        indices: list[int] = []
        for row, end in drawn:
            state, num_drafts = self.sequences[row.seq_id], len(row.draft_token_ids)
            states += accumulate(row.draft_token_ids, SequenceState.ahead, initial=state)
            indices += range(end - 1 - num_drafts, end)
        samples = iter(self.sampler.sample(self._logits(hidden_TE, indices), states))
        return {row.seq_id: _accept(row, list(islice(samples, 1 + len(row.draft_token_ids)))) for row, _ in drawn}

    def _score_prompts(
        self, rows: tuple[Row, ...], first_rows: list[int], hidden_TE: Tensor
    ) -> dict[int, list[TokenLogprobs | None]]:
        """Log-probabilities of prompt tokens by sequence, for those that asked. The row at position p − 1 speaks for p."""
        wanted: list[tuple[SequenceState, int, int]] = []
        for row, first_row in zip(rows, first_rows, strict=True):
            state = self.sequences[row.seq_id]
            if state.sampling.prompt_logprobs is None:
                continue
            begin = max(row.start + 1, state.sampling.prompt_logprobs_start)
            end = min(row.start + row.num_tokens + 1, state.num_prompt_tokens)
            wanted += [(state, p, first_row + p - 1 - row.start) for p in range(begin, end)]
        scored: dict[int, list[TokenLogprobs | None]] = {}
        for chunk_start in range(0, len(wanted), SCORED_ROWS):
            chunk = wanted[chunk_start : chunk_start + SCORED_ROWS]
            num_top = max(state.sampling.prompt_logprobs or 0 for state, _, _ in chunk)
            targets = [state.token_ids[p] for state, p, _ in chunk]
            entries = self.sampler.score(self._logits(hidden_TE, [r for _, _, r in chunk]), targets, num_top)
            for (state, _, _), entry in zip(chunk, entries, strict=True):
                asked = state.sampling.prompt_logprobs or 0
                cut = entry and TokenLogprobs(entry.token_id, entry.logprob, entry.top[:asked])
                scored.setdefault(state.seq_id, []).append(cut)
        return scored

    def close(self) -> None:
        """Leave the group and let go of the memory."""
        self.graphs = self.draft_model = None
        self.grammars.close()
        self.adapters.close()
        self.collectives.close()
        self.caches.clear()
        self.sequences.clear()


def _accept(row: Row, samples: Sequence[Sampled]) -> RowResult:
    """Of what a row and its drafts drew: the first, and what follows each draft that is what was drawn before it.

    Logits that are not finite end it. The next step then computes them again for what is a sequence's last token.
    """
    first, *rest = samples
    more: list[Sampled] = []
    for draft, before, sample in zip(row.draft_token_ids, samples, rest, strict=False):
        if before.token_id != draft or sample.error_kind:
            break
        more.append(sample)
    return RowResult(
        row.seq_id,
        first.token_id,
        first.logprobs,
        error_kind=first.error_kind,
        more_token_ids=tuple([sample.token_id for sample in more if sample.token_id is not None]),
        more_logprobs=tuple([sample.logprobs for sample in more if sample.logprobs is not None]),
    )


def _device(name: str) -> torch.device:
    """The device of this process; Ray and the spawner show each rank the one GPU that is its own."""
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")
