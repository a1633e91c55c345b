#include "host.h"

#include <stdexcept>

#include <cuda_runtime_api.h>

namespace liveavatar {
namespace {

void check_cuda(const char* op, cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorString(status));
  }
}

int attribute(const char* op, cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(op, cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void check_pointer(const char* op, const char* name, const void* pointer, std::uintptr_t alignment) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address == 0) {
    throw std::invalid_argument(std::string(op) + ": " + name + " is a null pointer");
  }
  if (address % alignment != 0) {
    throw std::invalid_argument(std::string(op) + ": " + name + " must be aligned to " + std::to_string(alignment) +
                                " bytes");
  }
}

int multiprocessors_of_hopper(const char* op) {
  int device = 0;
  check_cuda(op, cudaGetDevice(&device), "cudaGetDevice");
  const int major = attribute(op, cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(op, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) {
    throw std::runtime_error(std::string(op) + ": device " + std::to_string(device) + " is sm_" +
                             std::to_string(major) + std::to_string(minor) +
                             ", and the kernel is built for sm_90a alone");
  }
  return attribute(op, cudaDevAttrMultiProcessorCount, device);
}

std::string what_cuda_says() {
  const cudaError_t last = cudaGetLastError();
  return last == cudaSuccess ? "" : std::string("; CUDA: ") + cudaGetErrorString(last);
}

}  // namespace liveavatar
