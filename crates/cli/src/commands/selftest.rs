use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use long_context_runtime::{Device, Row};

use super::print;
use crate::args::SelftestArgs;
use crate::error::Error;

pub fn run(args: SelftestArgs) -> Result<ExitCode, Error> {
    let device = Device::find(args.backend.into(), None)?;
    // Fresh numbers every time, and told, so that a failure can be repeated.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let seed = args.seed.unwrap_or(now);
    print(&format!("{} · {} · seed {seed}\n{}\n", device.backend, device.name, Row::HEAD))?;
    let mut printed = Ok(());
    let passed = device.selftest(&args.golden, args.dtype.into(), seed, |row| {
        if printed.is_ok() {
            printed = print(&format!("{row}\n"));
        }
    })?;
    printed?;
    if passed { Ok(ExitCode::SUCCESS) } else { Err(Error::Selftest) }
}
