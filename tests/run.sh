#!/usr/bin/env bash
# Everything that must pass, on a fresh machine with Rust: installs a software Vulkan adapter where there
# is none, makes the small trained checkpoint, then formatting, lints, documentation and all tests.
set -euo pipefail
cd "$(dirname "$0")/.."
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

has_vulkan() {
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' &&
        ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json >/dev/null 2>&1 || [ -n "${VK_DRIVER_FILES:-}" ]
}
if ! has_vulkan; then
    command -v apt-get >/dev/null || { echo "error: Vulkan: found no driver and no apt-get to install one" >&2; exit 2; }
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq libvulkan1 mesa-vulkan-drivers >/dev/null
fi

cargo fmt --all --check
cargo clippy --workspace --all-targets --release -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --release --quiet
./examples/checkpoint.sh target/checkpoint
cargo test --workspace --release
# A build with Vulkan compiles every kernel to SPIR-V; this one compiles them to WGSL.
cargo test --release -p sample-attention-kernels --features wgpu golden
