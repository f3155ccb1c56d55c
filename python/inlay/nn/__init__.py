"""TunedLinear, and the fused blocks that partial backpropagation needs."""
