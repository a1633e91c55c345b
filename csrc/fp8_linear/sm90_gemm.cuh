// The kernel behind fp8_linear: a persistent, warp-specialised CUTLASS GEMM whose epilogue is a tree of visitors.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#include "fp8_linear/gelu_or_identity.cuh"
#include "fp8_linear/sm90_instances.h"

namespace liveavatar::sm90 {

using cute::_0;
using cute::_1;
using cute::_2;
using cute::_128;
using cute::_256;
using cute::Shape;
using cute::Stride;

// act(w_scale[n] * (x_scale[m] * sum) + bias[n]), in float32 until it is rounded to bf16.
template <class TileShape>
struct Epilogue {
  template <template <class> class Operation, class Out, class... Inputs>
  using Node = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Operation, Out, float, cutlass::FloatRoundStyle::round_to_nearest>,
      Inputs...>;

  // One element is the only alignment asked of the vectors, so that they may be slices.
  static constexpr int kAlignment = 1;
  template <bool MayBeNull>
  using PerColumn = cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, float, float, Stride<_0, _1, _0>,
                                                                kAlignment, MayBeNull>;
  using WeightScale = PerColumn<false>;
  using Bias = PerColumn<true>;
  using InputScale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, TileShape, float, float, Stride<_1, _0, _0>,
                                                                 kAlignment, false>;

  using Scaled = Node<cutlass::multiplies, float, InputScale, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Biased = Node<cutlass::homogeneous_multiply_add, float, WeightScale, Scaled, Bias>;
  using Tree = Node<GeluOrIdentity, cutlass::bfloat16_t, Biased>;

  // A node's arguments are those of its inputs, in order, and then its operation's.
  static typename Tree::Arguments arguments(const Fp8Linear& problem) {
    const typename InputScale::Arguments x_scale{problem.x_scale};
    const typename WeightScale::Arguments w_scale{problem.w_scale};
    const typename Bias::Arguments bias{problem.bias};
    return {{w_scale, {x_scale, {}, {}}, bias, {}}, {problem.gelu}};
  }
};

template <class TileShape, class ClusterShape, class MainloopSchedule, class EpilogueSchedule>
struct Gemm {
  using Fp8 = cutlass::float_e4m3_t;
  using Bf16 = cutlass::bfloat16_t;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  // Elements in the 16 bytes that TMA wants rows to be multiples of.
  static constexpr int kFp8Alignment = 16;
  static constexpr int kBf16Alignment = 8;

  using EpilogueOf = Epilogue<TileShape>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float,
      void, RowMajor, kBf16Alignment,  // no matrix is added
      Bf16, RowMajor, kBf16Alignment, EpilogueSchedule, typename EpilogueOf::Tree>::CollectiveOp;

  using StagesBesideEpilogue = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename CollectiveEpilogue::SharedStorage))>;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, RowMajor, kFp8Alignment,
      Fp8, ColumnMajor, kFp8Alignment,  // as [k, n]: row-major [n, k] in memory
      float, TileShape, ClusterShape, StagesBesideEpilogue, MainloopSchedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Device::Arguments arguments(const Fp8Linear& problem, int multiprocessors) {
    typename Device::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {problem.m, problem.n, problem.k, 1};
    arguments.mainloop.ptr_A = static_cast<const Fp8*>(problem.a);
    arguments.mainloop.dA = {problem.k, _1{}, 0};
    arguments.mainloop.ptr_B = static_cast<const Fp8*>(problem.b);
    arguments.mainloop.dB = {problem.k, _1{}, 0};
    arguments.epilogue.thread = EpilogueOf::arguments(problem);
    arguments.epilogue.ptr_D = static_cast<Bf16*>(problem.out);
    arguments.epilogue.dD = {problem.n, _1{}, 0};
    arguments.hw_info.sm_count = multiprocessors;
    return arguments;
  }

  static std::size_t workspace_bytes(const Fp8Linear& problem) {
    return Device::get_workspace_size(arguments(problem, 1));
  }

  static const char* run(const Fp8Linear& problem, int multiprocessors, void* workspace, cudaStream_t stream) {
    const auto lowered = arguments(problem, multiprocessors);
    cutlass::Status status = Device::can_implement(lowered);
    if (status == cutlass::Status::kSuccess) {
      status = Device{}.run(lowered, workspace, stream);
    }
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

}  // namespace liveavatar::sm90
