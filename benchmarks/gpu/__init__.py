"""One command for one NVIDIA GPU, python -m benchmarks.gpu: correctness and speed of kernels and training steps."""
