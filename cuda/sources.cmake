# The .cu files, for nvcc and for the emulation, and how nvcc compiles them.
set(INLAY_CUDA_SOURCES
    cuda/adamw.cu
    cuda/adamw_bf16.cu
    cuda/causal_conv1d.cu
    cuda/cross_entropy.cu
    cuda/lora_backward.cu
    cuda/lora_linear.cu
    cuda/quantize_blockwise.cu
    cuda/quantized_linear.cu
    cuda/rms_norm.cu
    cuda/rope.cu
    cuda/runtime.cu
    cuda/scale_shift.cu
    cuda/submatrix_grad.cu
    cuda/submatrix_linear.cu
    cuda/swiglu.cu)

# Products and sums are fused where the source says fmaf and nowhere else, as in the emulation: a value that is
# computed in two places has the same bits in both. No --use_fast_math.
set(INLAY_NVCC_OPTIONS --expt-relaxed-constexpr --fmad=false)
