// The compiled kernels. Each has a source file of its own, because one takes most of a minute and 3.6 GB to compile.
#pragma once

#include <cstddef>

#include "fp8_linear.h"

namespace liveavatar::sm90 {

struct Instance {
  const char* name;
  std::size_t (*workspace_bytes)(const Fp8Linear& problem);
  // Returns null when the kernel was enqueued, else CUTLASS's description of its status.
  const char* (*run)(const Fp8Linear& problem, int multiprocessors, void* workspace, cudaStream_t stream);
};

extern const Instance kFast128x128;
extern const Instance kFast128x256;
extern const Instance kPrecise128x128;

}  // namespace liveavatar::sm90
