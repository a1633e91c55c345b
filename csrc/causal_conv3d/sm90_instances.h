// The compiled kernels, one per source file, because each takes most of a minute to compile.
#pragma once

#include "causal_conv3d.h"

namespace liveavatar::sm90 {

struct ConvInstance {
  const char* name;
  // Returns null when the kernel was enqueued, else CUTLASS's description of its status.
  const char* (*run)(const CausalConv3d& problem, cudaStream_t stream);
};

extern const ConvInstance kConv256x96;
extern const ConvInstance kConv128x192;

}  // namespace liveavatar::sm90
