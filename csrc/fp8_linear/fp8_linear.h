// out[m, n] = act(x_scale[m] * w_scale[n] * sum_k a[m, k] * b[n, k] + bias[n]) on Hopper's FP8 tensor cores.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

namespace liveavatar {

// "Fast" leaves the whole sum in the tensor core's accumulator, which keeps fewer bits than float32. "Precise" adds the
// sums of 128 k each in float32 registers; a 128x256 tile would not have enough of them.
enum class Fp8Tile : int {
  kFast128x128 = 0,
  kFast128x256 = 1,
  kPrecise128x128 = 2,
};

// Device pointers, row-major and dense; a, b and out are aligned to 16 bytes.
struct Fp8Linear {
  const void* a;         // e4m3 [m, k]
  const void* b;         // e4m3 [n, k]
  const float* x_scale;  // [m]
  const float* w_scale;  // [n]
  const float* bias;     // [n] or null
  void* out;             // bf16 [m, n]
  int m, n, k;           // n and k are multiples of 16
  bool gelu;             // act is GELU in its tanh form, else the identity
};

// Bytes of device memory that fp8_linear needs; they depend on m, n, k and the tile alone.
// Throws std::invalid_argument for sizes that fp8_linear cannot take.
std::size_t fp8_linear_workspace(int m, int n, int k, Fp8Tile tile);

// Enqueues the product on a stream of the current device: allocates nothing, waits for nothing, can be captured.
// Throws std::invalid_argument for a problem that it cannot take, std::runtime_error with the status of what failed.
void fp8_linear(const Fp8Linear& problem, Fp8Tile tile, void* workspace, std::size_t workspace_bytes,
                cudaStream_t stream);

}  // namespace liveavatar
