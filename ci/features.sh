#!/usr/bin/env bash
# What only exists with all features: faults on demand, real memory, the registration cache, Vulkan,
# and every example in the documentation.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo test --all-features --lib --test test_util --test contract --test cache --test soak --test observe --test hmm --test allocations --test stats --test sweep --test source_rules --test vulkan
# Each case with the quick ways and without: tracing and metrics would turn them off.
cargo test --features test-util --test fuzz
cargo test --all-features --doc
for example in uffd_tokio uffd_async_io trace; do
    cargo build --quiet --all-features --example "$example"
done
