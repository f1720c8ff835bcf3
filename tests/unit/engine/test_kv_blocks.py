import hashlib
from types import SimpleNamespace

import pytest

from model_parallel.config import CacheConfig
from model_parallel.engine import kv_blocks
from model_parallel.engine.kv_blocks import BlockPool, BlockTable, KVBlocks


def make_blocks(num_blocks: int = 8, *, block_size: int = 4, enable_prefix_caching: bool = True) -> KVBlocks:
    return KVBlocks(
        CacheConfig(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching)
    )


def admit(blocks: KVBlocks, token_ids: list[int], *, salt: bytes = b"", max_cached: int = 1 << 30) -> BlockTable:
    """A table for `token_ids`, all of them computed and published."""
    table = blocks.new_table(salt)
    assert blocks.admit(table, token_ids, max_cached=max_cached, num_spare=0) is not None
    blocks.publish(table, token_ids, len(token_ids))
    return table


def num_cached(blocks: KVBlocks, token_ids: list[int], *, salt: bytes = b"") -> int:
    """Tokens of a prompt that a new sequence would find, without any change by looking."""
    return len(blocks._find_prefix(blocks.new_table(salt), token_ids, len(token_ids))) * blocks._block_size


def test_blocks_are_counted_and_come_back() -> None:
    blocks = make_blocks(4)
    table = admit(blocks, [1, 2, 3, 4, 5])
    assert (len(table.block_ids), blocks.num_free) == (2, 2)
    assert blocks.grow(table, 8) == ()
    added = blocks.grow(table, 9)
    assert added is not None
    assert (table.block_ids[2:], blocks.num_free) == (list(added), 1)
    blocks.check_integrity([table])
    blocks.release(table)
    assert (table.block_ids, blocks.num_free) == ([], 4)
    blocks.check_integrity([])


def test_nothing_changes_when_too_few_blocks_are_free() -> None:
    blocks = make_blocks(3)
    table = admit(blocks, list(range(8)))
    other = blocks.new_table(b"")
    assert blocks.grow(table, 17) is None
    assert blocks.admit(other, [9] * 5, max_cached=0, num_spare=0) is None
    assert blocks.admit(other, [9] * 4, max_cached=0, num_spare=1) is None
    assert (len(table.block_ids), other.block_ids, blocks.num_free) == (2, [], 1)
    blocks.check_integrity([table, other])


def test_free_blocks_of_a_prefix_count_as_taken_when_revived() -> None:
    blocks = make_blocks(3)
    blocks.release(admit(blocks, list(range(8))))
    table = blocks.new_table(b"")
    assert blocks.admit(table, list(range(16)), max_cached=15, num_spare=0) is None
    assert blocks.num_free == 3
    assert blocks.admit(table, list(range(12)), max_cached=11, num_spare=0) == 8
    assert blocks.num_free == 0
    blocks.check_integrity([table])


def test_only_full_computed_blocks_are_shared() -> None:
    blocks = make_blocks()
    table = blocks.new_table(b"")
    token_ids = list(range(11))
    blocks.admit(table, token_ids, max_cached=0, num_spare=0)
    assert num_cached(blocks, token_ids) == 0
    blocks.publish(table, token_ids, 7)
    assert num_cached(blocks, token_ids) == 4
    blocks.publish(table, token_ids, 11)
    assert num_cached(blocks, token_ids) == 8


@pytest.mark.parametrize(("max_cached", "expected"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (100, 8)])
def test_a_prefix_hit_keeps_to_its_limit(max_cached: int, expected: int) -> None:
    blocks = make_blocks()
    admit(blocks, list(range(8)))
    table = blocks.new_table(b"")
    assert blocks.admit(table, [*range(8), 9, 9], max_cached=max_cached, num_spare=0) == expected


def test_shared_blocks_have_several_holders() -> None:
    blocks = make_blocks()
    first = admit(blocks, [*range(8), 1])
    second = admit(blocks, [*range(8), 2])
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2]
    assert blocks.num_free == 4
    blocks.release(first)
    assert blocks.num_free == 5
    blocks.check_integrity([second])


def test_a_hit_depends_on_everything_before_the_block() -> None:
    blocks = make_blocks(16)
    admit(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert num_cached(blocks, [1, 2, 3, 4, 5, 6, 7, 8]) == 8
    assert num_cached(blocks, [9, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert num_cached(blocks, [5, 6, 7, 8]) == 0
    assert num_cached(blocks, [1, 2, 3, 4, 5, 6, 7, 9]) == 4


def test_salts_do_not_share() -> None:
    blocks = make_blocks()
    admit(blocks, list(range(8)), salt=b"one tenant")
    assert num_cached(blocks, list(range(8)), salt=b"another tenant") == 0
    assert num_cached(blocks, list(range(8))) == 0
    assert num_cached(blocks, list(range(8)), salt=b"one tenant") == 8


def test_sharing_can_be_off() -> None:
    blocks = make_blocks(enable_prefix_caching=False)
    admit(blocks, list(range(8)))
    assert num_cached(blocks, list(range(8))) == 0


def test_the_least_recently_released_prefix_is_evicted_first_and_its_tail_before_its_head() -> None:
    blocks = make_blocks(6, block_size=1)
    old, new = [1, 2, 3], [4, 5, 6]
    first, second = admit(blocks, old), admit(blocks, new)
    blocks.release(first)
    blocks.release(second)
    admit(blocks, [7])
    assert (num_cached(blocks, old), num_cached(blocks, new)) == (2, 3)


def test_a_hit_makes_a_prefix_recent_again() -> None:
    blocks = make_blocks(4, block_size=1)
    first, second = admit(blocks, [1, 2]), admit(blocks, [3, 4])
    blocks.release(first)
    blocks.release(second)
    blocks.release(admit(blocks, [1, 2]))
    admit(blocks, [5, 6])
    assert (num_cached(blocks, [1, 2]), num_cached(blocks, [3, 4])) == (2, 0)


def test_blocks_that_were_never_shared_are_taken_before_shared_ones() -> None:
    blocks = make_blocks(2, block_size=4)
    shared, private = admit(blocks, list(range(4))), admit(blocks, [7])
    blocks.release(shared)
    blocks.release(private)
    taken = admit(blocks, [8])
    assert taken.block_ids == [1]
    assert num_cached(blocks, list(range(4))) == 4


def test_the_second_of_two_equal_blocks_stays_private() -> None:
    blocks = make_blocks()
    first = admit(blocks, list(range(4)), max_cached=0)
    second = admit(blocks, list(range(4)), max_cached=0)
    assert first.block_ids != second.block_ids
    blocks.release(second)
    assert num_cached(blocks, list(range(4))) == 4
    blocks.check_integrity([first])


def test_distrusted_blocks_are_not_found_again() -> None:
    blocks = make_blocks()
    table = admit(blocks, list(range(8)))
    blocks.release(table)
    blocks.forget(table)
    assert num_cached(blocks, list(range(8))) == 0
    blocks.check_integrity([])


def test_blocks_are_shared_again_after_a_release() -> None:
    """A preempted sequence comes back with its table's hashes, but its new blocks are not published yet."""
    blocks = make_blocks(2)
    table = admit(blocks, list(range(8)))
    blocks.release(table)
    blocks.release(admit(blocks, [9] * 8))
    assert blocks.admit(table, list(range(8)), max_cached=7, num_spare=0) == 0
    blocks.publish(table, list(range(8)), 8)
    blocks.release(table)
    assert num_cached(blocks, list(range(8))) == 8


def test_each_block_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_hashed: list[int] = []

    def counting(data: bytes) -> "hashlib._Hash":
        num_hashed.append(len(data))
        return hashlib.sha256(data)

    monkeypatch.setattr(kv_blocks, "hashlib", SimpleNamespace(sha256=counting))
    blocks = make_blocks()
    table = blocks.new_table(b"salt")
    token_ids = list(range(5))
    blocks.admit(table, token_ids, max_cached=4, num_spare=0)
    for token_id in range(5, 17):
        blocks.publish(table, token_ids, len(token_ids))
        token_ids.append(token_id)
        blocks.grow(table, len(token_ids))
    blocks.release(table)
    blocks.admit(table, token_ids, max_cached=16, num_spare=0)
    assert num_hashed == [4] + [32 + 4 * 8] * 4


@pytest.mark.parametrize("break_it", ["leak", "double", "twice", "stale hash"])
def test_check_integrity_notices(break_it: str) -> None:
    blocks = make_blocks()
    table, other = admit(blocks, list(range(8))), admit(blocks, [9] * 8)
    tables = [table, other]
    blocks.check_integrity(tables)
    if break_it == "leak":
        tables = [table]
    elif break_it == "double":
        other.block_ids[1] = table.block_ids[1]
    elif break_it == "twice":
        other.block_ids[1] = other.block_ids[0]
    else:
        blocks._pool._block_of[b"stale"] = 0
    with pytest.raises(RuntimeError):
        blocks.check_integrity(tables)


def test_pool_check_compares_free_list_and_holders() -> None:
    pool = BlockPool(2)
    (block_id,) = pool.take(1)
    pool.check_integrity([block_id])
    pool._worthless.append(block_id)
    with pytest.raises(RuntimeError, match="block 0 has 1 holders and is 1 times free"):
        pool.check_integrity([block_id])


def test_a_pool_takes_memory_for_what_was_used_not_for_what_there_is() -> None:
    pool = BlockPool(1 << 60)
    block_ids = pool.take(3)
    pool.release(block_ids[:1])
    assert (pool.num_free, pool.take(2)) == ((1 << 60) - 2, [0, 3])


def test_free_blocks_are_taken_worthless_ones_first_then_unused_then_the_longest_released() -> None:
    pool = BlockPool(5)
    first, second, third = pool.take(3)
    for block_id in (first, third):
        pool.publish(block_id, bytes([block_id]))
    pool.release([third, second, first])
    assert pool.free_blocks() == [second, 3, 4, third, first]
    assert pool.take(4) == [second, 3, 4, third]
    assert pool.find(bytes([third])) is None and pool.find(bytes([first])) == first
    with pytest.raises(IndexError, match="2 blocks are asked for and 1 are free"):
        pool.take(2)
