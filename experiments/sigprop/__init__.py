"""Signal propagation on real images: accuracy beside backprop and frozen layers, memory against
depth, time per step."""
