"""Which rows a program multiplies by which weight: groups of rows go in, blocks of rows go out.

No row is moved or padded: a block names the rows it works on, all of one group, so that a matrix product can gather
them as it loads and scatter its results as it stores. The number of blocks depends on shapes alone.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class GroupPlan:
    """M rows in G groups, in B blocks of X rows."""

    group_of_row: Array  # i32[M] 0..G-1; G where the row has no group
    block_group: Array  # i32[B] the group of a block's rows, G as above; -1 for blocks that are not needed
    block_rows: Array  # i32[B, X] the rows; M, which is out of bounds, where a group does not fill its last block


def plan_groups(group_of_row: Array, num_groups: int, block_size: int) -> GroupPlan:
    """The plan of rows in any order, by a stable sort.

    group_of_row: i32[M]; any number outside 0..num_groups-1 means no group. With k experts for each token, row
    t * k + j is token t's j-th choice: `router_choice.reshape(-1)`.
    """
    known = (group_of_row >= 0) & (group_of_row < num_groups)
    group = jnp.where(known, group_of_row, num_groups).astype(jnp.int32)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    sizes = jnp.zeros((num_groups + 1,), jnp.int32).at[group].add(1)
    return _plan(group, sizes, order, block_size)


def plan_sorted(group_sizes: Array, num_rows: int, block_size: int) -> GroupPlan:
    """The plan of rows that lie sorted: i32[G] sizes of the groups, one after another; rows beyond have no group."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    sizes = jnp.append(group_sizes.astype(jnp.int32), num_rows - ends[-1])
    # A binary search would be a loop, which keeps a step from being one CUDA graph.
    group = jnp.searchsorted(ends, rows, side="right", method="compare_all").astype(jnp.int32)
    return _plan(group, sizes, rows, block_size)


def num_blocks(num_rows: int, num_groups: int, block_size: int) -> int:
    """Blocks that suffice for any division of the rows: every group may leave its last one unfilled but for a row."""
    return (num_rows + min(num_groups, num_rows) * (block_size - 1)) // block_size


def _plan(group: Array, sizes: Array, order: Array, block_size: int) -> GroupPlan:
    """sizes: i32[G+1], the rows without a group last. order: i32[M] the rows group by group."""
    num_rows, last = order.shape[0], sizes.shape[0] - 1
    group_end = jnp.cumsum(sizes)
    group_blocks = -(-sizes // block_size)
    block_end = jnp.cumsum(group_blocks)
    block = jnp.arange(num_blocks(num_rows, last + 1, block_size), dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(block_end, block, side="right", method="compare_all"), last).astype(jnp.int32)
    number = block - (block_end - group_blocks)[owner]  # of the block within its group
    place = (group_end - sizes)[owner][:, None] + number[:, None] * block_size + jnp.arange(block_size)
    needed = block < block_end[-1]
    inside = needed[:, None] & (place < group_end[owner][:, None])
    rows = order.at[jnp.where(inside, place, num_rows)].get(mode="fill", fill_value=num_rows)
    return GroupPlan(group_of_row=group, block_group=jnp.where(needed, owner, -1), block_rows=rows)
