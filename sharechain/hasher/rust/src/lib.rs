//! The native half of `sharechain.hasher`: proof of work, and the payout draw.
//!
//! The feature `python` adds the bindings. Without it the crate needs no Python to build, so `cargo test
//! --no-default-features` runs where no Python library can be linked.
#![deny(unsafe_code)]
#![cfg_attr(not(feature = "python"), allow(dead_code))]

mod buckets;
mod draw;
mod headers;
mod kernels;
mod payment;
#[cfg(feature = "python")]
mod python;
mod scanner;
mod sha256;
mod weights;
