"""BlockPool: counts, the prefix table, the order of eviction."""

import pytest

from nybble.engine.block_pool import BlockPool, Root, salted_root

NO_SALT = salted_root("")
TOKENS = list(range(100, 132))


def fill(pool: BlockPool, token_ids: list[int], root: Root = NO_SALT) -> list[int]:
    """Do what a sequence does: take what is cached, allocate and register the rest."""
    num_blocks = len(token_ids) // pool.block_size
    hit = pool.match(root, token_ids, num_blocks)
    pool.share(hit.block_ids)
    block_ids, prefix = hit.block_ids, hit.prefix
    for i in range(len(block_ids), num_blocks):
        block_ids.append(pool.allocate())
        prefix = pool.register(block_ids[i], prefix, token_ids[i * pool.block_size : (i + 1) * pool.block_size])
    return block_ids


def make_pool(num_blocks: int = 8, *, keeps_idle_blocks: bool = True) -> BlockPool:
    return BlockPool(num_blocks, 4, keeps_idle_blocks=keeps_idle_blocks)


def test_every_block_is_given_once_and_comes_back() -> None:
    pool = make_pool(5)
    blocks = [pool.allocate() for _ in range(5)]
    assert sorted(blocks) == list(range(5))
    assert (pool.num_free, pool.num_used) == (0, 5)
    with pytest.raises(AssertionError, match="all 5 blocks are in use"):
        pool.allocate()
    pool.free(blocks)
    assert (pool.num_free, pool.num_used) == (5, 0)
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.free(blocks[:1])


def test_a_prefix_is_found_as_far_as_it_is_equal() -> None:
    pool = make_pool()
    blocks = fill(pool, TOKENS[:12])
    assert pool.match(NO_SALT, TOKENS, 8).block_ids == blocks
    assert pool.match(NO_SALT, TOKENS, 2).block_ids == blocks[:2]
    assert pool.match(NO_SALT, [*TOKENS[:7], 0, *TOKENS[8:]], 3).block_ids == blocks[:1]
    assert pool.match(NO_SALT, [0, *TOKENS[1:]], 3).block_ids == []
    # The second block's tokens alone are no prefix: K/V depends on what comes before.
    assert pool.match(NO_SALT, TOKENS[4:], 1).block_ids == []
    assert pool.match(salted_root("salt"), TOKENS, 3).block_ids == []


def test_colliding_hashes_do_not_serve_other_tokens() -> None:
    """-1 and -2 have the same hash in CPython, and so have tuples of them; -1 stands for any colliding token here."""
    assert hash((-1,) * 4) == hash((-2,) * 4)
    pool = make_pool()
    ones, twos = fill(pool, [-1] * 8), fill(pool, [-2] * 8)
    assert not set(ones) & set(twos)
    assert pool.match(NO_SALT, [-1] * 8, 2).block_ids == ones
    assert pool.match(NO_SALT, [-2] * 8, 2).block_ids == twos
    assert pool.match(NO_SALT, [-1] * 4 + [-2] * 4, 2).block_ids == ones[:1]


def test_shared_blocks_are_held_until_the_last_holder_lets_go() -> None:
    pool = make_pool()
    first = fill(pool, TOKENS[:8])
    assert fill(pool, TOKENS[:8]) == first
    pool.free(first)
    assert pool.num_used == 2
    assert pool.match(NO_SALT, TOKENS, 2).num_idle == 0
    pool.free(first)
    assert pool.num_used == 0
    assert pool.match(NO_SALT, TOKENS, 2).num_idle == 2


def test_the_tail_goes_before_the_head_and_the_oldest_chain_first() -> None:
    pool = make_pool(4)
    for tokens in (TOKENS[:8], TOKENS[8:16]):
        pool.free(fill(pool, tokens))
    lengths = []
    for _ in range(4):
        pool.allocate()
        lengths.append([len(pool.match(NO_SALT, t, 2).block_ids) for t in (TOKENS[:8], TOKENS[8:16])])
    assert lengths == [[1, 2], [0, 2], [0, 1], [0, 0]]


def test_a_hit_makes_a_chain_young_again() -> None:
    pool = make_pool(4)
    for tokens in (TOKENS[:8], TOKENS[8:16], TOKENS[:8]):
        pool.free(fill(pool, tokens))
    pool.allocate()
    assert len(pool.match(NO_SALT, TOKENS[:8], 2).block_ids) == 2
    assert len(pool.match(NO_SALT, TOKENS[8:16], 2).block_ids) == 1


def test_without_caching_contents_live_as_long_as_a_holder() -> None:
    pool = make_pool(keeps_idle_blocks=False)
    blocks = fill(pool, TOKENS[:8])
    assert pool.match(NO_SALT, TOKENS, 2).block_ids == blocks
    pool.free(blocks)
    assert pool.match(NO_SALT, TOKENS, 2).block_ids == []


def test_the_newer_of_two_equal_blocks_is_found_and_the_chain_goes_on() -> None:
    """A prompt that ends at a block's border has its last block computed again by each request."""
    pool = make_pool()
    old = fill(pool, TOKENS[:12])
    pool.free(old)
    head = pool.match(NO_SALT, TOKENS, 1)
    pool.share(head.block_ids)
    new = pool.allocate()
    pool.register(new, head.prefix, TOKENS[4:8])
    assert pool.match(NO_SALT, TOKENS, 3).block_ids == [old[0], new, old[2]]
    assert pool.num_free == 6
    pool.free([old[0], new])
    assert pool.num_free == 8


def test_forgotten_blocks_are_not_found() -> None:
    pool = make_pool()
    held = fill(pool, TOKENS[:8])
    idle = fill(pool, TOKENS[:12])[2:]
    pool.free([*held, *idle])
    pool.forget([held[1], idle[0], 7])  # one held, one idle, one that was never known
    assert pool.match(NO_SALT, TOKENS, 3).block_ids == held[:1]
    pool.free(held)
    assert pool.num_free == 8
    assert sorted(pool.allocate() for _ in range(8)) == list(range(8))


def test_private_roots_are_never_equal() -> None:
    pool = make_pool()
    first, second = pool.new_root(), pool.new_root()
    pool.register(pool.allocate(), first, TOKENS[:4])
    assert pool.match(first, TOKENS, 1).block_ids
    assert not pool.match(second, TOKENS, 1).block_ids


def test_no_salt_of_any_type_is_a_number_of_the_pools() -> None:
    pool = make_pool()
    pool.new_root()
    head = fill(pool, TOKENS[:4])
    private = pool.new_root()
    pool.register(pool.allocate(), private, TOKENS[4:8])
    pool.register(pool.allocate(), pool.match(NO_SALT, TOKENS, 1).prefix, TOKENS[4:8])
    assert pool.match(NO_SALT, TOKENS, 2).block_ids[:1] == head
    for number in range(10):
        assert not pool.match(salted_root(number), TOKENS[4:], 1).block_ids  # type: ignore[arg-type]


def test_forgetting_all() -> None:
    pool = BlockPool(4, 2, keeps_idle_blocks=True)
    root = salted_root("")
    held, idle = pool.allocate(), pool.allocate()
    prefix = pool.register(held, root, (1, 2))
    pool.register(idle, prefix, (3, 4))
    pool.free([idle])
    assert pool.match(root, [1, 2, 3, 4], 2).block_ids == [held, idle]
    pool.forget_all()
    assert pool.match(root, [1, 2, 3, 4], 2).block_ids == []
    assert pool.num_free == 3
    pool.free([held])
    assert pool.num_free == 4
    assert sorted(pool.allocate() for _ in range(4)) == [0, 1, 2, 3]
