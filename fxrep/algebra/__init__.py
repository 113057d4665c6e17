"""The mathematics of affine convolution maps: integers and tensors, no graphs."""
