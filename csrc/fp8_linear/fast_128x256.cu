#include "fp8_linear/sm90_gemm.cuh"

namespace liveavatar::sm90 {

// Cooperative: two warpgroups share the tile, because neither has the registers for all of it.
using Fast128x256 = Gemm<Shape<_128, _256, _128>, Shape<_2, _1, _1>,
                         cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                         cutlass::epilogue::TmaWarpSpecializedCooperative>;

const Instance kFast128x256{"fast_128x256", Fast128x256::workspace_bytes, Fast128x256::run};

}  // namespace liveavatar::sm90
