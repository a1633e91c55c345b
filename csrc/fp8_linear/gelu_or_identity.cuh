// The activation as a visitor's operation: which one is a runtime flag, so that one kernel serves both.
#pragma once

#include "cutlass/array.h"
#include "cutlass/cutlass.h"

namespace liveavatar::sm90 {

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3). Unlike tanh.approx, whose error is
// 2^-11 of 1, this keeps its relative accuracy where 1 + tanh(u) cancels.
CUTLASS_DEVICE float gelu_tanh(float x) {
  constexpr float kTwiceRootTwoOverPi = 1.5957691216057308f;
  float const twice_u = kTwiceRootTwoOverPi * x * fmaf(0.044715f * x, x, 1.0f);
  return __fdividef(x, 1.0f + __expf(-twice_u));
}

struct GeluSwitch {
  bool gelu;
};

template <class T>
struct GeluOrIdentity {
  using Arguments = GeluSwitch;
};

template <int N>
struct GeluOrIdentity<cutlass::Array<float, N>> {
  using Arguments = GeluSwitch;

  CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> x, Arguments const& chosen) const {
    if (chosen.gelu) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        x[i] = gelu_tanh(x[i]);
      }
    }
    return x;
  }
};

}  // namespace liveavatar::sm90
