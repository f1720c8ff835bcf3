"""Which block of the paged KV cache holds what, and for whom. Numbers only: the tensors are on the ranks.

A full block whose keys and values have been computed is published under a hash of everything that they depend on: the
salt, the adapter if there is one, all tokens before the block, and its own. A later sequence of the same adapter that begins
with the same tokens under the same salt shares it. A published block that nobody holds stays in the free list and is found
there until its turn to be taken.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from model_parallel.config import CacheConfig


class BlockPool:
    """Holders, free list and published hashes of single blocks. Every operation takes constant time. Memory grows with the blocks
    that have been used, not with those that there are.

    Free blocks are taken in this order: those that hold nothing of use, the last released first; those never used; published
    ones, the least recently released first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_holders: dict[int, int] = {}
        """Of blocks that are held."""
        self._worthless: list[int] = []
        """Free blocks that were used and are not published; the last is the next to be taken."""
        self._num_used = 0
        """Blocks of this number and above have never been taken."""
        self._reusable = OrderedDict[int, None]()
        """Free blocks that are published, in the order in which they will be taken."""
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._num_holders)

    def is_free(self, block_id: int) -> bool:
        return block_id not in self._num_holders

    def free_blocks(self) -> list[int]:
        """In the order in which they will be taken."""
        return [*reversed(self._worthless), *range(self._num_used, self.num_blocks), *self._reusable]

    def find(self, block_hash: bytes) -> int | None:
        """The block published under this hash, held or free."""
        return self._block_of.get(block_hash)

    def take(self, num_blocks: int) -> list[int]:
        """Blocks for new content, with one holder each; what they held until now is no longer found. Raises IndexError when
        fewer are free."""
        if num_blocks > self.num_free:
            raise IndexError(f"{num_blocks} blocks are asked for and {self.num_free} are free")
        taken = self._worthless[: -num_blocks - 1 : -1]
        del self._worthless[len(self._worthless) - len(taken) :]
        num_new = min(num_blocks - len(taken), self.num_blocks - self._num_used)
        taken.extend(range(self._num_used, self._num_used + num_new))
        self._num_used += num_new
        while len(taken) < num_blocks:
            block_id, _ = self._reusable.popitem(last=False)
            self.forget(block_id)
            taken.append(block_id)
        self._num_holders.update(dict.fromkeys(taken, 1))
        return taken

    def hold(self, block_id: int) -> None:
        """One more holder for a published block."""
        self._reusable.pop(block_id, None)
        self._num_holders[block_id] = self._num_holders.get(block_id, 0) + 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One holder fewer for each in turn. Without any, a block is free, and is still found if it was published."""
        num_holders, hash_of = self._num_holders, self._hash_of
        for block_id in block_ids:
            if num_left := num_holders[block_id] - 1:
                num_holders[block_id] = num_left
                continue
            del num_holders[block_id]
            if block_id in hash_of:
                self._reusable[block_id] = None
            else:
                self._worthless.append(block_id)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let others find the block. The first of two equal blocks keeps the hash; the second stays private."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Let nobody find the block any more. Those who hold it keep it."""
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Compare with `held`, which names a block once for each of its holders. RuntimeError when they disagree."""
        holders, free = Counter(held), Counter(self.free_blocks())
        for block_id in range(self.num_blocks):
            num_holders = self._num_holders.get(block_id, 0)
            if num_holders != holders[block_id]:
                raise RuntimeError(f"block {block_id} counts {num_holders} holders and has {holders[block_id]}")
            if free[block_id] != (num_holders == 0):
                raise RuntimeError(f"block {block_id} has {num_holders} holders and is {free[block_id]} times free")
        if free.total() + len(self._num_holders) != self.num_blocks:
            raise RuntimeError(f"{len(self._num_holders)} blocks held + {free.total()} free is not {self.num_blocks}")
        if {block_hash: block_id for block_id, block_hash in self._hash_of.items()} != self._block_of:
            raise RuntimeError("the two directions of the hash table disagree")


@dataclass(slots=True, eq=False)
class BlockTable:
    """One sequence's blocks, in the order of its tokens."""

    chain: list[bytes]
    """Hash of salt and adapter, then of each full block that was hashed so far. Outlives a preemption: the tokens stay."""
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    """Leading blocks that need no publishing any more."""


class KVBlocks:
    """Gives sequences their blocks and shares equal prefixes among them."""

    def __init__(self, config: CacheConfig) -> None:
        self._block_size = config.block_size
        self._shares_prefixes = config.enable_prefix_caching
        self._pool = BlockPool(config.num_blocks)

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self._block_size

    @property
    def shares_prefixes(self) -> bool:
        """Full blocks are published and found again."""
        return self._shares_prefixes

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, published ones included."""
        return self._pool.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def new_table(self, salt: bytes, adapter_digest: str = "") -> BlockTable:
        """`adapter_digest` (hexadecimal) is that of the adapter which changes the keys and values, if one does."""
        first = hashlib.sha256(salt).digest()
        if adapter_digest:
            first = hashlib.sha256(first + bytes.fromhex(adapter_digest)).digest()
        return BlockTable([first])

    def admit(self, table: BlockTable, token_ids: Sequence[int], *, max_cached: int, num_spare: int) -> int | None:
        """Fill an empty table with blocks for all of `token_ids`, shared ones first.

        Returns how many leading tokens are in the cache already, `max_cached` at most; or None, with nothing changed,
        when that would leave fewer than `num_spare` blocks free.
        """
        shared = self._find_prefix(table, token_ids, max_cached)
        num_new = self.num_blocks_for(len(token_ids)) - len(shared)
        num_revived = sum(self._pool.is_free(block_id) for block_id in shared)
        if num_new + num_revived + num_spare > self.num_free:
            return None
        for block_id in shared:
            self._pool.hold(block_id)
        table.block_ids = shared + self._pool.take(num_new)
        return len(shared) * self._block_size

    def grow(self, table: BlockTable, num_tokens: int) -> tuple[int, ...] | None:
        """Make room for `num_tokens` in all. Returns the blocks added, or None when too few are free."""
        num_new = self.num_blocks_for(num_tokens) - len(table.block_ids)
        if num_new <= 0:
            return ()
        if num_new > self.num_free:
            return None
        new_block_ids = self._pool.take(num_new)
        table.block_ids += new_block_ids
        return tuple(new_block_ids)

    def grow_each(self, tables: Sequence[BlockTable]) -> list[int]:
        """One block more for each table in turn; a table may be named several times. Returns them. Raises IndexError when too few
        are free."""
        new_block_ids = self._pool.take(len(tables))
        for table, block_id in zip(tables, new_block_ids, strict=True):
            table.block_ids.append(block_id)
        return new_block_ids

    def shrink(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks that the first `num_tokens` do not need. They must not be published."""
        num_kept = self.num_blocks_for(num_tokens)
        self._pool.release(reversed(table.block_ids[num_kept:]))
        del table.block_ids[num_kept:]

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Share the blocks that the first `num_computed` tokens fill. Each is hashed once, when it becomes full."""
        if not self._shares_prefixes:
            return
        for index in range(table.num_published, num_computed // self._block_size):
            self._pool.publish(table.block_ids[index], self._hash(table, token_ids, index))
            table.num_published = index + 1

    def forget(self, table: BlockTable) -> None:
        """Stop sharing all blocks of the sequence's content, released ones too: it is not to be trusted."""
        for block_hash in table.chain[1:]:
            block_id = self._pool.find(block_hash)
            if block_id is not None:
                self._pool.forget(block_id)

    def release(self, table: BlockTable) -> None:
        """Give all blocks back."""
        # Last block first: a prefix is of use without its continuation, never the other way round.
        self._pool.release(reversed(table.block_ids))
        table.block_ids = []
        table.num_published = 0

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise RuntimeError unless `tables` are all that hold blocks, and every count agrees."""
        held: list[int] = []
        for table in tables:
            if len(set(table.block_ids)) != len(table.block_ids):
                raise RuntimeError(f"a block table names a block twice: {table.block_ids}")
            held += table.block_ids
        self._pool.check_integrity(held)

    def _find_prefix(self, table: BlockTable, token_ids: Sequence[int], max_cached: int) -> list[int]:
        found: list[int] = []
        if self._shares_prefixes:
            for index in range(max_cached // self._block_size):
                block_id = self._pool.find(self._hash(table, token_ids, index))
                if block_id is None:
                    break
                found.append(block_id)
        return found

    def _hash(self, table: BlockTable, token_ids: Sequence[int], index: int) -> bytes:
        """Hash of block `index`, whose predecessors are hashed already."""
        if index + 1 == len(table.chain):
            begin = index * self._block_size
            tokens = array("q", token_ids[begin : begin + self._block_size]).tobytes()
            table.chain.append(hashlib.sha256(table.chain[-1] + tokens).digest())
        return table.chain[index + 1]
