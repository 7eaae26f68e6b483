//! The plan: which keys every query head keeps.

use cubecl::{bytes::Bytes, prelude::*, server::Handle};

use crate::{AttentionShape, Error, HostPlan, SampleAttentionOptions};

/// Bands and stripes of every query head, in device memory.
///
/// Heads are numbered `sequence * q_heads + head`; `blocks` is the number of position blocks and
/// `columns` the number of keys before the tail.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `u32 [heads, 2 + 2 * blocks]`. A row holds: whether the head is dense; its number of
    /// stripes; for each distance `d`, how many of `0..=d` are kept; the kept distances,
    /// ascending (what follows the last one is undefined).
    pub table: Handle,
    /// `i32 [heads, columns]`: kept columns, ascending, padded with -1.
    pub stripes: Handle,
    /// `f32 [heads]`: kept over causal pairs.
    pub density: Handle,
    /// Query heads over all sequences.
    pub heads: usize,
    /// Position blocks.
    pub blocks: usize,
    /// Keys before the tail, at least 1.
    pub columns: usize,
}

impl Plan {
    pub(crate) fn empty<R: Runtime>(
        client: &ComputeClient<R>,
        shape: &AttentionShape,
        options: &SampleAttentionOptions,
    ) -> Self {
        let heads = shape.heads();
        let blocks = shape.blocks(options);
        let columns = shape.tail_start(options).max(1);
        let words = |count: usize| client.empty(count * size_of::<u32>());
        Self {
            table: words(heads * (2 + 2 * blocks)),
            stripes: words(heads * columns),
            density: words(heads),
            heads,
            blocks,
            columns,
        }
    }

    /// Entries of the table.
    pub(crate) fn table_len(&self) -> usize {
        self.heads * self.row_len()
    }

    fn row_len(&self) -> usize {
        2 + 2 * self.blocks
    }

    /// Whether the plan was made for such a call.
    pub(crate) fn check(
        &self,
        shape: &AttentionShape,
        options: &SampleAttentionOptions,
    ) -> Result<(), Error> {
        let expected = (shape.heads(), shape.blocks(options), shape.tail_start(options).max(1));
        let found = (self.heads, self.blocks, self.columns);
        if found != expected {
            let [found, expected] = [found, expected].map(|size| format!("{size:?}"));
            return Err(Error::tensor("plan", "(heads, blocks, columns)", found, expected));
        }
        Ok(())
    }

    /// Copies the plan to the host.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails to hand the buffers over.
    pub fn read<R: Runtime>(&self, client: &ComputeClient<R>) -> Result<Vec<HostPlan>, Error> {
        let read = |handle: &Handle| -> Result<Bytes, Error> {
            client.read_one(handle.clone()).map_err(Error::device)
        };
        let (table, stripes, density) = (read(&self.table)?, read(&self.stripes)?, read(&self.density)?);
        let table = u32::from_bytes(&table);
        let stripes = i32::from_bytes(&stripes);
        let density = f32::from_bytes(&density);
        Ok((0..self.heads)
            .map(|head| {
                let row = &table[head * self.row_len()..][..self.row_len()];
                let rank = &row[2..][..self.blocks];
                let kept = (row[1] as usize).min(self.columns);
                HostPlan {
                    dense: row[0] != 0,
                    bands: (0..self.blocks).map(|d| d == 0 || rank[d] != rank[d - 1]).collect(),
                    stripes: stripes[head * self.columns..][..kept].to_vec(),
                    density: density[head],
                }
            })
            .collect())
    }
}
