// out[t, h, w, o] = bias[o] + residual[t, h, w, o]
//     + sum over dt, dh, dw, c of weight[o, dt, dh, dw, c] * x[t + dt, h + dh - kh / 2, w + dw - kw / 2, c],
// with zeros around the picture, on Hopper's tensor cores; the sum in float32.
#pragma once

#include <cuda_runtime_api.h>

namespace liveavatar {

// Pixels by output channels that a thread block computes.
enum class ConvTile : int {
  k256x96 = 0,
  k128x192 = 1,
};

// Device pointers to dense tensors, channels last, aligned to 16 bytes.
struct CausalConv3d {
  const void* x;         // bf16 [frames + kt - 1, height, width, channels_in]
  const void* weight;    // bf16 [channels_out, kt, kh, kw, channels_in]
  const float* bias;     // [channels_out] or null
  const void* residual;  // bf16, like out, or null; it may be out
  void* out;             // bf16 [frames, height, width, channels_out]
  int frames, height, width;
  int channels_in, channels_out;  // multiples of 8
  int kt, kh, kw;                 // kh and kw are 1 or 3
};

// Enqueues the convolution on a stream of the current device: allocates nothing, waits for nothing, can be captured.
// Throws std::invalid_argument for a problem that it cannot take, std::runtime_error with the status of what failed.
void causal_conv3d(const CausalConv3d& problem, ConvTile tile, cudaStream_t stream);

}  // namespace liveavatar
