//! Where the time of a forward pass goes.
//!
//! Parts of a pass are timed only between [`start`] and [`stop`]: the device then finishes what it has before
//! and after each part, which takes time of its own. Otherwise nothing waits.

use std::cell::Cell;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;

/// A part of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Attention with its key/value cache.
    Attention,
    /// Projections: matrix products.
    Products,
}

/// The time of each part; what is left of a pass is norms, rotary embedding, gates and sums.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Parts {
    /// Of [`Part::Attention`].
    pub attention: Duration,
    /// Of [`Part::Products`].
    pub products: Duration,
}

thread_local! {
    static RUNNING: Cell<Option<Parts>> = const { Cell::new(None) };
}

/// Times the parts of passes on this thread from now on.
pub fn start() {
    RUNNING.set(Some(Parts::default()));
}

/// The times since [`start`]; none where it was not called.
pub fn stop() -> Parts {
    RUNNING.take().unwrap_or_default()
}

/// Does `work`, and times it where the stopwatch runs.
pub(crate) fn part<B: Backend, T>(part: Part, device: &B::Device, work: impl FnOnce() -> T) -> T {
    if RUNNING.get().is_none() {
        return work();
    }
    // A device that fails here fails again where its results are read.
    let _ = B::sync(device);
    let begin = Instant::now();
    let result = work();
    let _ = B::sync(device);
    if let Some(mut parts) = RUNNING.get() {
        match part {
            Part::Attention => parts.attention += begin.elapsed(),
            Part::Products => parts.products += begin.elapsed(),
        }
        RUNNING.set(Some(parts));
    }
    result
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;

    #[test]
    fn parts_are_timed_between_start_and_stop() {
        let device = Default::default();
        let wait = |which| part::<Flex, _>(which, &device, || std::thread::sleep(Duration::from_millis(2)));
        wait(Part::Products);
        assert_eq!(stop(), Parts::default());
        start();
        wait(Part::Attention);
        let parts = stop();
        assert!(parts.attention >= Duration::from_millis(2) && parts.products.is_zero(), "{parts:?}");
        wait(Part::Attention);
        assert_eq!(stop(), Parts::default());
    }
}
