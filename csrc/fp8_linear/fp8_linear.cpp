#include "fp8_linear/fp8_linear.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fp8_linear/sm90_instances.h"
#include "host.h"

namespace liveavatar {
namespace {

constexpr char kOp[] = "fp8_linear";

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

// A descriptor that TMA refuses is only printed by CUTLASS, so whatever TMA would refuse has to be found here.
void check(const Fp8Linear& problem) {
  constexpr std::uintptr_t kTma = 16;
  check_sizes(problem.m, problem.n, problem.k);
  check_pointer(kOp, "a", problem.a, kTma);
  check_pointer(kOp, "b", problem.b, kTma);
  check_pointer(kOp, "out", problem.out, kTma);
  check_pointer(kOp, "x_scale", problem.x_scale, alignof(float));
  check_pointer(kOp, "w_scale", problem.w_scale, alignof(float));
  if (problem.bias != nullptr) {
    check_pointer(kOp, "bias", problem.bias, alignof(float));
  }
}

void check_workspace(void* workspace, std::size_t bytes, std::size_t needed) {
  if (bytes < needed) {
    throw std::invalid_argument("fp8_linear: the workspace must have " + std::to_string(needed) + " bytes, not " +
                                std::to_string(bytes));
  }
  if (needed > 0) {
    check_pointer(kOp, "workspace", workspace, 16);
  }
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
  const int multiprocessors = multiprocessors_of_hopper(kOp);
  const char* failure = instance.run(problem, multiprocessors, workspace, stream);
  if (failure != nullptr) {
    throw std::runtime_error(std::string("fp8_linear ") + instance.name + ", " +
                             sizes(problem.m, problem.n, problem.k) + ": CUTLASS: " + failure + what_cuda_says());
  }
}

}  // namespace liveavatar
