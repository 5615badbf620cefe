"""`make bench`: every benchmark, one after the other. Run it while nothing else runs."""

from __future__ import annotations

import os

from benchmarks import (
    compact_cache,
    decode,
    filtered_prompt,
    grouped_attention,
    half_precision,
    latent_attention,
    lazy_layers,
    partitioned_attention,
    pass_overhead,
)
from benchmarks._report import console


def main() -> None:
    """Run all benchmarks."""
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]load average is {load:.1f}: something else is running, timings will lie")
    grouped_attention.main()
    partitioned_attention.main()
    pass_overhead.main()
    decode.main()
    compact_cache.main()
    filtered_prompt.main()
    lazy_layers.main()
    half_precision.main()
    latent_attention.main()


if __name__ == "__main__":
    main()
