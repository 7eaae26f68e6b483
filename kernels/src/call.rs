//! One attention call, checked and ready to launch: what all stages share.

use cubecl::{ir::DeviceProperties, prelude::*};

use crate::{
    AttentionShape, Error, SampleAttentionOptions, TileProduct,
    filter::FilterNumbersLaunch,
    flash_mma::flash_bytes,
    flash_plane::plane_flash_bytes,
    ladder::levels,
    mma_columns::sample_bytes,
    mma_tile::MmaTile,
    plane_columns,
    plane_tile::PlaneTile,
    square_tile::SquareTile,
    tensor::{Inputs, TensorView},
    walk::SizesLaunch,
};

/// Inputs, settings and derived numbers of a call.
pub(crate) struct Call<'a, R: Runtime> {
    pub client: &'a ComputeClient<R>,
    pub inputs: Inputs<'a, R>,
    pub shape: AttentionShape,
    pub options: &'a SampleAttentionOptions,
    /// Sampled query rows, ascending.
    pub rows: Vec<u32>,
    pub scale: f32,
    /// Tiles of plain units.
    pub square: SquareTile,
    /// Row tiles of cooperative matrices, where they are used instead.
    pub plane: Option<PlaneTiles>,
    /// Tiles of `mma` products, where they are used instead.
    pub mma: Option<MmaTiles>,
}

/// Tiles of the `mma` kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MmaTiles {
    pub flash: MmaTile,
    pub sample: MmaTile,
}

impl MmaTiles {
    fn new<R: Runtime>(
        properties: &DeviceProperties,
        inputs: &Inputs<'_, R>,
        options: &SampleAttentionOptions,
    ) -> Option<Self> {
        if !MmaTile::is_supported(properties, inputs.q.dtype) || inputs.vector_width(8) != 8 {
            return None;
        }
        let levels = levels(options.rule);
        let largest = |bytes: &dyn Fn(&MmaTile) -> usize| {
            MmaTile::largest(properties, options.block_size, inputs.shape.head_dim, bytes)
        };
        let (flash, sample) = (largest(&flash_bytes)?, largest(&|tile| sample_bytes(tile, levels))?);
        Some(Self { flash, sample })
    }
}

/// Tiles of the kernels with cooperative matrices.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlaneTiles {
    pub flash: PlaneTile,
    pub sample: PlaneTile,
}

impl PlaneTiles {
    fn new<R: Runtime>(
        properties: &DeviceProperties,
        inputs: &Inputs<'_, R>,
        options: &SampleAttentionOptions,
    ) -> Option<Self> {
        let (head_dim, levels) = (inputs.shape.head_dim, levels(options.rule));
        let first = |bytes: &dyn Fn(&PlaneTile) -> usize| {
            PlaneTile::first(properties, options.block_size, head_dim, inputs.q.dtype, bytes)
        };
        Some(Self {
            flash: first(&plane_flash_bytes)?,
            sample: first(&|tile| plane_columns::sample_bytes(tile, levels))?,
        })
    }
}

impl<'a, R: Runtime> Call<'a, R> {
    /// Checks everything and chooses the tile product.
    pub fn new(
        client: &'a ComputeClient<R>,
        [q, k, v, out]: [&'a TensorView<R>; 4],
        options: &'a SampleAttentionOptions,
    ) -> Result<Self, Error> {
        options.validate()?;
        let inputs = Inputs::new(client, q, k, v, out)?;
        let shape = inputs.shape;
        let properties = client.properties();
        let (block_size, head_dim) = (options.block_size, shape.head_dim);
        let product = options.product;
        let (mut mma, mut plane) = (None, None);
        if matches!(product, TileProduct::Auto | TileProduct::Mma) {
            mma = MmaTiles::new(properties, &inputs, options);
        }
        if product == TileProduct::Cmma || (product == TileProduct::Auto && mma.is_none()) {
            plane = PlaneTiles::new(properties, &inputs, options);
        }
        let missing = match product {
            TileProduct::Auto | TileProduct::Units => false,
            TileProduct::Cmma => plane.is_none(),
            TileProduct::Mma => mma.is_none(),
        };
        if missing {
            let what = format!("{product} products of {} rows of {head_dim}", inputs.q.dtype);
            return Err(Error::Unsupported(what));
        }
        let rows = shape.sampled_rows(options);
        let scores = shape.heads() * levels(options.rule) * shape.tail_start(options);
        if !rows.is_empty() && u32::try_from(scores).is_err() {
            let expected = "at most 2^32 column scores, 16 times fewer with rules other than joint";
            return Err(Error::tensor("k", "heads x levels x length", scores, expected));
        }
        Ok(Self {
            client,
            rows,
            scale: shape.scale(options) as f32,
            square: SquareTile::new(&properties.hardware, block_size, head_dim),
            plane,
            mma,
            inputs,
            shape,
            options,
        })
    }

    pub fn samples(&self) -> usize {
        self.rows.len()
    }

    pub fn heads(&self) -> usize {
        self.shape.heads()
    }

    pub fn block(&self) -> u32 {
        self.options.block_size as u32
    }

    /// Runtime sizes as a kernel argument.
    pub fn sizes(&self) -> SizesLaunch<R> {
        let (shape, options) = (&self.shape, self.options);
        SizesLaunch::new(
            shape.q_heads as u32,
            shape.group() as u32,
            shape.q_len as u32,
            shape.kv_len as u32,
            shape.tail_start(options) as u32,
            shape.blocks(options) as u32,
            self.samples() as u32,
            shape.tail_start(options).max(1) as u32,
        )
    }

    /// The filter's numbers as a kernel argument.
    pub fn filter_numbers(&self) -> FilterNumbersLaunch<R> {
        let (options, samples) = (self.options, self.samples() as f64);
        FilterNumbersLaunch::new(
            self.shape.window(options) as u32,
            (options.alpha * samples) as f32,
            ((1.0 - options.alpha) * samples) as f32,
            options.dense_cost.unwrap_or(2.0) as f32,
        )
    }

    /// An uninitialised buffer of 32-bit elements.
    pub fn words(&self, count: usize) -> cubecl::server::Handle {
        self.client.empty(count * size_of::<u32>())
    }
}
