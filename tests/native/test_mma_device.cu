// The same test for nvcc.
#include "test_mma_cuda.cpp"
