/// The plan of one query head, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostPlan {
    /// Whether the head attends to all keys; its bands are then all kept and it has no stripes.
    pub dense: bool,
    /// For each block distance, whether it is kept.
    pub bands: Vec<bool>,
    /// Kept columns, ascending.
    pub stripes: Vec<i32>,
    /// Kept over causal query-key pairs, the tail's included.
    pub density: f32,
}

impl HostPlan {
    /// All keys.
    pub fn dense(blocks: usize) -> Self {
        Self { dense: true, bands: vec![true; blocks], stripes: Vec::new(), density: 1.0 }
    }
}
