#include "fp8_linear/sm90_gemm.cuh"

namespace liveavatar::sm90 {

// Ping-pong: one warpgroup's epilogue runs under the other's products.
using Fast128x128 = Gemm<Shape<_128, _128, _128>, Shape<_2, _1, _1>,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                         cutlass::epilogue::TmaWarpSpecialized>;

const Instance kFast128x128{"fast_128x128", Fast128x128::workspace_bytes, Fast128x128::run};

}  // namespace liveavatar::sm90
