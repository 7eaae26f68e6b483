//! Checkpoint folders, good and bad: what is read from them, and what is said about them.

mod bad_config;
mod bad_input;
mod bad_torch;
mod corruption;
mod dtypes;
mod families;
mod prompts;
mod saved;
mod support;
mod tokenizers;
mod torch;
