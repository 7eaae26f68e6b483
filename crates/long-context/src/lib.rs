//! ChatGLM2/3, GLM-4 and InternLM2 on any Burn backend, for documents of many thousand tokens.

pub mod backend;
pub mod cache;
pub mod generate;
pub mod layers;
pub mod models;
pub mod sampler;
mod stop;
pub mod stopwatch;
