//! Everything that a run found out.

use serde::{Deserialize, Serialize};

use super::row::Row;
use super::seconds::Seconds;

/// The JSON of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The arguments of the command line.
    pub command: Vec<String>,
    pub version: String,
    pub rows: Vec<Row>,
    /// What did not fit into a row: densities out of reach, peers left out.
    pub notes: Vec<String>,
    pub seconds: Wall,
}

/// The run's time by the clock on the wall, and by the sum of what was timed apart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Wall {
    pub total: f64,
    pub reported: f64,
    pub parts: Seconds,
}

impl Report {
    pub fn new() -> Self {
        Self {
            command: std::env::args().skip(1).collect(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            rows: Vec::new(),
            notes: Vec::new(),
            seconds: Wall::default(),
        }
    }
}
