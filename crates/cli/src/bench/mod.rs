//! Measurements: what is asked for, who answers, and what is made of the answers.
//!
//! Every backend runs in a child process of its own, and so do the peers: a device that is lost or out of memory
//! takes its process along, costs the row that was at work, and leaves the rest of the run alone.

pub mod args;
pub mod child;
pub mod inputs;
pub mod job;
pub mod model;
pub mod op;
pub mod page;
pub mod peers;
pub mod report;
pub mod row;
pub mod run;
pub mod seconds;
pub mod table;
pub mod worker;
