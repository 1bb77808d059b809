"""What kernels/reference.py and kernels/ggml.py compute, as Triton kernels for a GPU: torch tensors in and out, the same bytes.

Triton is no dependency of the package: these modules are for callers who have it (torch's CUDA builds bring it along). Nothing is left to the
hardware's or the compiler's idea of arithmetic: float8 and 4-bit codes are rounded in integers or by one float32 addition, as in kernels/floats.py;
quotients are `div_rn`, since Triton's `/` is not IEEE's; no product is fused into a sum (`launch`); subnormals are kept (tests/kernels/test_triton.py
looks for what would flush or fuse them in the compiled code).
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError("glmconv.kernels.gpu needs Triton, which is not installed here: pip install triton") from error
