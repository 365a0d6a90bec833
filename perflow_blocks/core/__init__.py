"""The mathematics of piecewise rectified flow: pure functions on tensors and numbers, torch only."""
