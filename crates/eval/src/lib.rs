//! What sparse attention costs in quality, on a real model behind [`Engine`](long_context::generate::Engine):
//! keys hidden in long texts, perplexity and divergence from dense attention, LongBench, and a look at what
//! every head kept and lost.

mod answer;
mod attention;
mod error;
mod font;
pub mod inspect;
pub mod longbench;
pub mod needle;
pub mod perplexity;
mod picture;
mod prompter;
pub mod rules;
#[cfg(test)]
mod testing;

use std::ops::ControlFlow;

pub use answer::{Ask, answer};
pub use attention::{Kept, NamedAttention};
pub use error::{Error, Result};
pub use picture::Picture;
pub use prompter::Prompter;

/// Hears how many steps are done, of how many, and may end the work after one: what is done by then is kept.
pub type Progress<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;
