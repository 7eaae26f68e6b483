//! Which keys a query tile attends to, tile by tile: stripes first, then bands from left to right.
//!
//! The stripes left of a query block are a prefix of the sorted list. Every tile product asks here
//! for the positions of a key tile's slots; what follows the load does not know where keys are.

use cubecl::prelude::*;

use crate::{Plan, square_tile::NO_ROW, tensor::array};

/// Runtime sizes that all kernels share.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    pub q_heads: u32,
    /// Query heads per key/value head.
    pub group: u32,
    pub q_len: u32,
    pub kv_len: u32,
    /// First position of the tail.
    pub tail_start: u32,
    /// Position blocks.
    pub blocks: u32,
    /// Sampled rows per head.
    pub samples: u32,
    /// Columns that have a score: those before the tail.
    pub columns: u32,
}

/// The plan as the flash kernels read it: see [`Plan`] for the layouts.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct PlanArgs {
    pub table: Array<u32>,
    pub stripes: Array<i32>,
}

/// Position in the table of a head's row: whether it is dense, how many stripes it has, the ranks
/// of its bands, the list of its bands. Few buffers, because adapters may offer only eight.
#[cube]
pub(crate) fn table_row(sizes: &Sizes, head: u32) -> u32 {
    head * (2 + 2 * sizes.blocks)
}

/// The arguments of a plan; without one, buffers that a kernel compiled without a plan never reads.
pub(crate) fn plan_args<R: Runtime>(client: &ComputeClient<R>, plan: Option<&Plan>) -> PlanArgsLaunch<R> {
    match plan {
        Some(plan) => PlanArgsLaunch::new(
            array(&plan.table, plan.table_len()),
            array(&plan.stripes, plan.heads * plan.columns),
        ),
        None => {
            let unused = client.empty(size_of::<u32>());
            PlanArgsLaunch::new(array(&unused, 1), array(&unused, 1))
        }
    }
}

/// Sizes of the tiles a walk is cut into. All divide the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct WalkTile {
    pub block: u32,
    pub query_tile: u32,
    pub key_tile: u32,
    /// Ignore the plan: causal attention over all keys.
    pub dense: bool,
}

/// The walk of one query tile of one head.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Walk {
    /// Key tiles to visit.
    pub tiles: u32,
    stripe_tiles: u32,
    /// Stripes left of the query block.
    prefix: u32,
    dense: bool,
    block: u32,
    /// Kept bands that reach back no further than the first block.
    bands: u32,
    /// Where the head's ranks, bands and stripes start.
    rank_base: u32,
    band_base: u32,
    stripe_base: usize,
}

/// Plans the walk of the query tile that starts at position `start`.
#[cube]
pub(crate) fn start_walk(
    plan: &PlanArgs,
    sizes: &Sizes,
    head: u32,
    start: u32,
    #[comptime] tile: WalkTile,
) -> Walk {
    let block = start / tile.block;
    let row = table_row(sizes, head);
    let rank_base = row + 2;
    let band_base = rank_base + sizes.blocks;
    let stripe_base = head as usize * sizes.columns as usize;
    let diagonal = (start % tile.block + tile.query_tile).div_ceil(tile.key_tile);
    let all = (start + tile.query_tile).div_ceil(tile.key_tile);

    let mut walk = Walk {
        tiles: all,
        stripe_tiles: 0u32.runtime(),
        prefix: 0u32.runtime(),
        dense: true.runtime(),
        block,
        bands: block + 1,
        rank_base,
        band_base,
        stripe_base,
    };
    if comptime!(!tile.dense) {
        let dense = plan.table[row as usize] != 0 || start >= sizes.tail_start;
        if !dense {
            walk.dense = false;
            let border = block * tile.block;
            // Binary search for the first stripe that is not left of the block.
            let mut low = 0u32.runtime();
            let mut high = plan.table[(row + 1) as usize];
            while low < high {
                let middle = (low + high) / 2;
                if (plan.stripes[stripe_base + middle as usize] as u32) < border {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            walk.prefix = low;
            walk.stripe_tiles = low.div_ceil(tile.key_tile);
            walk.bands = plan.table[(rank_base + block) as usize];
            walk.tiles =
                walk.stripe_tiles + (walk.bands - 1) * comptime!(tile.block / tile.key_tile) + diagonal;
        }
    }
    walk
}

/// Position of the key in `slot` of key tile `index`, or [`NO_ROW`].
#[cube]
pub(crate) fn key_at(
    walk: &Walk,
    plan: &PlanArgs,
    sizes: &Sizes,
    index: u32,
    slot: u32,
    #[comptime] tile: WalkTile,
) -> u32 {
    key_of(walk, plan, sizes, index, slot, stripe_at(walk, plan, index, slot, tile), tile)
}

/// The stripe in `slot` of key tile `index`; any number if none is there.
#[cube]
pub(crate) fn stripe_at(
    walk: &Walk,
    plan: &PlanArgs,
    index: u32,
    slot: u32,
    #[comptime] tile: WalkTile,
) -> u32 {
    let mut stripe = 0u32.runtime();
    if comptime!(!tile.dense) {
        let entry = index * tile.key_tile + slot;
        // Without a stripe, or in a dense walk, the prefix is empty.
        if entry < walk.prefix {
            stripe = plan.stripes[walk.stripe_base + entry as usize] as u32;
        }
    }
    stripe
}

/// [`key_at`], given its [`stripe_at`].
#[cube]
pub(crate) fn key_of(
    walk: &Walk,
    plan: &PlanArgs,
    sizes: &Sizes,
    index: u32,
    slot: u32,
    stripe: u32,
    #[comptime] tile: WalkTile,
) -> u32 {
    let mut key = index * tile.key_tile + slot;
    if comptime!(!tile.dense) {
        if !walk.dense {
            if index < walk.stripe_tiles {
                let entry = key;
                key = NO_ROW;
                if entry < walk.prefix {
                    // A stripe inside a kept band is visited with that band.
                    let distance = walk.block - stripe / tile.block;
                    let rank = walk.rank_base + distance;
                    let above = plan.table[rank as usize];
                    let below = plan.table[(rank - 1) as usize];
                    if above == below {
                        key = stripe;
                    }
                }
            } else {
                let per_band = comptime!(tile.block / tile.key_tile);
                let step = index - walk.stripe_tiles;
                let band = walk.bands - 1 - step / per_band;
                let distance = plan.table[(walk.band_base + band) as usize];
                key = (walk.block - distance) * tile.block + (step % per_band) * tile.key_tile + slot;
            }
        }
    }
    if key >= sizes.kv_len {
        key = NO_ROW;
    }
    key
}
