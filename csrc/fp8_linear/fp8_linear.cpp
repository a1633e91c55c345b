#include "fp8_linear/fp8_linear.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fp8_linear/sm90_instances.h"

namespace liveavatar {
namespace {

const sm90::Instance& instance_of(Fp8Tile tile) {
  switch (tile) {
    case Fp8Tile::kFast128x128:
      return sm90::kFast128x128;
    case Fp8Tile::kFast128x256:
      return sm90::kFast128x256;
    case Fp8Tile::kPrecise128x128:
      return sm90::kPrecise128x128;
  }
  throw std::invalid_argument("fp8_linear: there is no tile " + std::to_string(static_cast<int>(tile)));
}

std::string sizes(int m, int n, int k) {
  return "m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k);
}

void check_sizes(int m, int n, int k) {
  if (m < 1 || n < 1 || k < 1 || n % 16 != 0 || k % 16 != 0) {
    throw std::invalid_argument("fp8_linear: m must be positive, n and k positive multiples of 16, not " +
                                sizes(m, n, k));
  }
}

void check_pointer(const char* name, const void* pointer, std::uintptr_t alignment) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address == 0) {
    throw std::invalid_argument(std::string("fp8_linear: ") + name + " is a null pointer");
  }
  if (address % alignment != 0) {
    throw std::invalid_argument(std::string("fp8_linear: ") + name + " must be aligned to " +
                                std::to_string(alignment) + " bytes");
  }
}

// A descriptor that TMA refuses is only printed by CUTLASS, so whatever TMA would refuse has to be found here.
void check(const Fp8Linear& problem) {
  constexpr std::uintptr_t kTma = 16;
  check_sizes(problem.m, problem.n, problem.k);
  check_pointer("a", problem.a, kTma);
  check_pointer("b", problem.b, kTma);
  check_pointer("out", problem.out, kTma);
  check_pointer("x_scale", problem.x_scale, alignof(float));
  check_pointer("w_scale", problem.w_scale, alignof(float));
  if (problem.bias != nullptr) {
    check_pointer("bias", problem.bias, alignof(float));
  }
}

void check_workspace(void* workspace, std::size_t bytes, std::size_t needed) {
  if (bytes < needed) {
    throw std::invalid_argument("fp8_linear: the workspace must have " + std::to_string(needed) + " bytes, not " +
                                std::to_string(bytes));
  }
  if (needed > 0) {
    check_pointer("workspace", workspace, 16);
  }
}

void check_cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string("fp8_linear: ") + call + ": " + cudaGetErrorString(status));
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

int multiprocessors_of_hopper() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) {
    throw std::runtime_error("fp8_linear: device " + std::to_string(device) + " is sm_" + std::to_string(major) +
                             std::to_string(minor) + ", and the kernel is built for sm_90a alone");
  }
  return attribute(cudaDevAttrMultiProcessorCount, device);
}

// Often empty: CUTLASS clears the error of a launch that failed.
std::string what_cuda_says() {
  const cudaError_t last = cudaGetLastError();
  return last == cudaSuccess ? "" : std::string("; CUDA: ") + cudaGetErrorString(last);
}

}  // namespace

std::size_t fp8_linear_workspace(int m, int n, int k, Fp8Tile tile) {
  check_sizes(m, n, k);
  Fp8Linear problem{};
  problem.m = m;
  problem.n = n;
  problem.k = k;
  return instance_of(tile).workspace_bytes(problem);
}

void fp8_linear(const Fp8Linear& problem, Fp8Tile tile, void* workspace, std::size_t workspace_bytes,
                cudaStream_t stream) {
  const sm90::Instance& instance = instance_of(tile);
  check(problem);
  check_workspace(workspace, workspace_bytes, instance.workspace_bytes(problem));
  const int multiprocessors = multiprocessors_of_hopper();
  const char* failure = instance.run(problem, multiprocessors, workspace, stream);
  if (failure != nullptr) {
    throw std::runtime_error(std::string("fp8_linear ") + instance.name + ", " +
                             sizes(problem.m, problem.n, problem.k) + ": CUTLASS: " + failure + what_cuda_says());
  }
}

}  // namespace liveavatar
