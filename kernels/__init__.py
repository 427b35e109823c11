"""Device code: one folder per kernel, each tested against its numpy reference. Kernels know the core and never a pass."""
