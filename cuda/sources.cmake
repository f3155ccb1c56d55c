# The .cu files, for nvcc and for the emulation.
set(INLAY_CUDA_SOURCES
    cuda/adamw.cu
    cuda/cross_entropy.cu
    cuda/quantize_blockwise.cu
    cuda/quantized_linear.cu
    cuda/rms_norm.cu
    cuda/rope.cu
    cuda/runtime.cu
    cuda/submatrix_linear.cu
    cuda/swiglu.cu)
