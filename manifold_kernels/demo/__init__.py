"""A small convolutional network on images of digits or clothes, trained by every method: ``manifold-kernels train``."""
