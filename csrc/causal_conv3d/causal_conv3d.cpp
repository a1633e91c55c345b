#include "causal_conv3d/causal_conv3d.h"

#include <stdexcept>
#include <string>

#include "causal_conv3d/sm90_instances.h"
#include "host.h"

namespace liveavatar {
namespace {

constexpr char kOp[] = "causal_conv3d";

const sm90::ConvInstance& instance_of(ConvTile tile) {
  switch (tile) {
    case ConvTile::k256x96:
      return sm90::kConv256x96;
    case ConvTile::k128x192:
      return sm90::kConv128x192;
  }
  throw std::invalid_argument("causal_conv3d: there is no tile " + std::to_string(static_cast<int>(tile)));
}

std::string sizes(const CausalConv3d& p) {
  return "frames=" + std::to_string(p.frames) + " height=" + std::to_string(p.height) +
         " width=" + std::to_string(p.width) + " channels=" + std::to_string(p.channels_in) + "->" +
         std::to_string(p.channels_out) + " kernel=" + std::to_string(p.kt) + "x" + std::to_string(p.kh) + "x" +
         std::to_string(p.kw);
}

void require(bool holds, const char* what, const CausalConv3d& problem) {
  if (!holds) {
    throw std::invalid_argument(std::string("causal_conv3d: ") + what + ", not " + sizes(problem));
  }
}

// A descriptor that TMA refuses is only printed by CUTLASS, so whatever TMA would refuse has to be found here.
void check(const CausalConv3d& p) {
  constexpr std::uintptr_t kTma = 16;
  require(p.frames > 0 && p.height > 0 && p.width > 0, "frames, height and width must be positive", p);
  require(p.channels_in > 0 && p.channels_out > 0 && p.channels_in % 8 == 0 && p.channels_out % 8 == 0,
          "channels must be positive multiples of 8", p);
  require(p.kt > 0 && (p.kh == 1 || p.kh == 3) && (p.kw == 1 || p.kw == 3), "kh and kw must be 1 or 3", p);
  check_pointer(kOp, "x", p.x, kTma);
  check_pointer(kOp, "weight", p.weight, kTma);
  check_pointer(kOp, "out", p.out, kTma);
  if (p.bias != nullptr) {
    check_pointer(kOp, "bias", p.bias, alignof(float));
  }
  if (p.residual != nullptr) {
    check_pointer(kOp, "residual", p.residual, kTma);
  }
}

}  // namespace

void causal_conv3d(const CausalConv3d& problem, ConvTile tile, cudaStream_t stream) {
  const sm90::ConvInstance& instance = instance_of(tile);
  check(problem);
  multiprocessors_of_hopper(kOp);
  const char* failure = instance.run(problem, stream);
  if (failure != nullptr) {
    throw std::runtime_error(std::string("causal_conv3d ") + instance.name + ", " + sizes(problem) +
                             ": CUTLASS: " + failure + what_cuda_says());
  }
}

}  // namespace liveavatar
