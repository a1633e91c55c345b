#include "fp8_linear/sm90_gemm.cuh"

namespace liveavatar::sm90 {

// Cooperative: the float32 sums double what a tile needs in registers, so that two warpgroups have to share it.
using Precise128x128 = Gemm<Shape<_128, _128, _128>, Shape<_2, _1, _1>,
                            cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                            cutlass::epilogue::TmaWarpSpecializedCooperative>;

const Instance kPrecise128x128{"precise_128x128", Precise128x128::workspace_bytes, Precise128x128::run};

}  // namespace liveavatar::sm90
