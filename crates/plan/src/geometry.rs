//! Lengths, positions and sampled rows: everything about a call that the host knows beforehand.

use serde::Deserialize;

use crate::{Error, SampleAttentionOptions};

/// The sizes of one attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query rows per sequence, at most `kv_len`.
    pub q_len: usize,
    /// Keys per sequence.
    pub kv_len: usize,
    /// Elements per row: a multiple of 16, at most 256.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the tensor and the size that does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let Self { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = *self;
        for (tensor, what, size) in [
            ("q", "batch", batch),
            ("q", "heads", q_heads),
            ("k", "heads", kv_heads),
            ("q", "length", q_len),
            ("k", "length", kv_len),
        ] {
            if size == 0 {
                return Err(Error::tensor(tensor, what, 0, "at least 1"));
            }
        }
        if !q_heads.is_multiple_of(kv_heads) {
            let expected = format!("a multiple of the {kv_heads} kv heads");
            return Err(Error::tensor("q", "heads", q_heads, expected));
        }
        if q_len > kv_len {
            let expected = format!("at most the key length {kv_len}");
            return Err(Error::tensor("q", "length", q_len, expected));
        }
        if !(16..=256).contains(&head_dim) || !head_dim.is_multiple_of(16) {
            let expected = "a multiple of 16 in 16..=256";
            return Err(Error::tensor("q", "head_dim", head_dim, expected));
        }
        // Positions, list entries and cube numbers are 31-bit on the device.
        if kv_len > 1 << 30 || batch * q_heads > 1 << 24 {
            return Err(Error::tensor(
                "k",
                "length x heads",
                format!("{kv_len} x {}", batch * q_heads),
                "at most 2^30 keys and 2^24 heads over the batch",
            ));
        }
        Ok(())
    }

    /// Position of the first query row (bottom-right alignment).
    pub fn offset(&self) -> usize {
        self.kv_len - self.q_len
    }

    /// Query heads over all sequences; plans are indexed by `sequence * q_heads + head`.
    pub fn heads(&self) -> usize {
        self.batch * self.q_heads
    }

    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// The factor on the scores.
    pub fn scale(&self, options: &SampleAttentionOptions) -> f64 {
        options.scale.unwrap_or_else(|| 1.0 / (self.head_dim as f64).sqrt())
    }

    /// Position blocks.
    pub fn blocks(&self, options: &SampleAttentionOptions) -> usize {
        self.kv_len.div_ceil(options.block_size)
    }

    /// First position of the tail: a block border.
    pub fn tail_start(&self, options: &SampleAttentionOptions) -> usize {
        self.kv_len.saturating_sub(options.tail_rows) / options.block_size * options.block_size
    }

    /// Bands `0..=window` are always kept.
    pub fn window(&self, options: &SampleAttentionOptions) -> usize {
        let blocks = options.window_ratio * self.kv_len as f64 / options.block_size as f64;
        blocks.ceil() as usize
    }

    /// The sampled query rows, ascending; empty when every head is dense from the start
    /// (short sequences, or no row above the tail).
    pub fn sampled_rows(&self, options: &SampleAttentionOptions) -> Vec<u32> {
        let rows = self.tail_start(options).saturating_sub(self.offset());
        if rows == 0 || self.kv_len <= options.dense_below {
            return Vec::new();
        }
        let wanted = (options.row_ratio * rows as f64).ceil() as usize;
        let count = wanted.max(options.min_rows).min(options.max_rows.unwrap_or(usize::MAX)).min(rows);
        (1..=count).map(|t| (t * rows / count - 1) as u32).collect()
    }

    /// Query tiles of a head. Tiles are cut by position, so the first one may begin before the
    /// first row.
    pub fn query_tiles(&self, rows: usize) -> usize {
        self.kv_len.div_ceil(rows) - self.offset() / rows
    }

    /// Query-key pairs of causal attention.
    pub fn causal_pairs(&self) -> f64 {
        let (rows, offset) = (self.q_len as f64, self.offset() as f64);
        rows * offset + rows * (rows + 1.0) / 2.0
    }
}
