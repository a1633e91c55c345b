// The kernel behind causal_conv3d: CUTLASS's implicit GEMM. TMA gathers the pixels of a tap (im2col) and fills in the
// zeros around the picture; thread blocks in pairs share what they load of the weights.
#pragma once

#include "cutlass/kernel_hardware_info.h"  // the next ones need it and do not include it

#include "cute/tensor.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/device/conv_universal_adapter.hpp"
#include "cutlass/conv/kernel/conv_universal.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"

#include "causal_conv3d/sm90_instances.h"

namespace liveavatar::sm90 {

using cute::_1;
using cute::_128;
using cute::_192;
using cute::_2;
using cute::_256;
using cute::_32;
using cute::_64;
using cute::_96;
using cute::Shape;

// Depth is of input channels of one tap.
template <class Pixels, class Channels, class Depth>
struct Conv {
  using Bf16 = cutlass::bfloat16_t;
  using ChannelsLast = cutlass::layout::TensorNDHWC;
  using TileShape = Shape<Pixels, Channels, Shape<Depth>>;
  using ClusterShape = Shape<_2, _1, _1>;
  static constexpr auto kForward = cutlass::conv::Operator::kFprop;
  // Elements in the 16 bytes that TMA wants everything to be a multiple of.
  static constexpr int kAlignment = 8;
  // The bias may be a slice, and lie anywhere.
  static constexpr int kBiasAlignment = 1;

  // sum + bias, and + residual where its factor is not zero.
  using Sum = cutlass::epilogue::fusion::LinCombPerColBias<Bf16, float, float, Bf16, float, kBiasAlignment>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Bf16, ChannelsLast, kAlignment, Bf16, ChannelsLast,
      kAlignment, cutlass::epilogue::TmaWarpSpecialized, Sum>::CollectiveOp;

  // Beside the tiles lie the barriers of the epilogue; the tiles of mainloop and epilogue take turns in the same memory.
  static constexpr int kReserved = 1024;
  using Stages = cutlass::conv::collective::StageCountAutoCarveout<kReserved>;
  using CollectiveMainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kForward, Bf16, ChannelsLast, kAlignment, Bf16, ChannelsLast,
      kAlignment, float, TileShape, ClusterShape, Stages,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;

  using ProblemShape = cutlass::conv::ConvProblemShape<kForward, 3>;
  using Kernel = cutlass::conv::kernel::ConvUniversal<ProblemShape, CollectiveMainloop, CollectiveEpilogue>;
  using Device = cutlass::conv::device::ConvUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  static ProblemShape shape(const CausalConv3d& problem) {
    const int above = problem.kh / 2;
    const int beside = problem.kw / 2;
    return ProblemShape(cutlass::conv::Mode::kCrossCorrelation,
                        {1, problem.frames + problem.kt - 1, problem.height, problem.width, problem.channels_in},
                        {problem.channels_out, problem.kt, problem.kh, problem.kw, problem.channels_in},
                        {0, above, beside}, {0, above, beside}, {1, 1, 1}, {1, 1, 1}, 1);
  }

  static const char* run(const CausalConv3d& problem, cudaStream_t stream) {
    typename Device::Arguments arguments{};
    arguments.problem_shape = shape(problem);
    arguments.mainloop = {static_cast<const Bf16*>(problem.x), static_cast<const Bf16*>(problem.weight)};
    // Of columns, rows, frames and batch: the other way round.
    const auto& strides = arguments.problem_shape.stride_C;
    typename Kernel::StrideD stride{};
    cute::for_each(cute::make_seq<4>{}, [&](auto axis) { cute::get<0, axis>(stride) = strides[3 - axis]; });
    // Without a residual nothing is read there, but TMA wants an address.
    arguments.epilogue.ptr_C = static_cast<const Bf16*>(problem.residual == nullptr ? problem.out : problem.residual);
    arguments.epilogue.dC = stride;
    arguments.epilogue.ptr_D = static_cast<Bf16*>(problem.out);
    arguments.epilogue.dD = stride;
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = problem.residual == nullptr ? 0.0f : 1.0f;
    arguments.epilogue.thread.bias_ptr = problem.bias;
    cutlass::Status status = Device::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) {
      status = Device{}.run(arguments, nullptr, stream);
    }
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

}  // namespace liveavatar::sm90
