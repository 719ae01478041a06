"""CUDA C++ implementations: `.cu` files compiled at run time by NVRTC (`nvrtc.py`), one Python file an operation."""
