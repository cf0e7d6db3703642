"""What the GPU benchmarks share: rows on disk, timing on the device, rooflines, models, and the kernels' cases."""
