//! The whole workspace against golden vectors, on every backend that this machine has.

mod attention;
mod layers;
mod models;
mod sparse;
mod trained;
