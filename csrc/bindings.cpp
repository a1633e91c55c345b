// liveavatar_kernels._C. Device pointers and streams are integers, as from tensor.data_ptr() and stream.cuda_stream.
#include <cstddef>
#include <cstdint>

#include <pybind11/pybind11.h>

#include "causal_conv3d/causal_conv3d.h"
#include "fp8_linear/fp8_linear.h"

namespace py = pybind11;
using liveavatar::ConvTile;
using liveavatar::Fp8Tile;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void fp8_linear(std::uintptr_t a, std::uintptr_t b, std::uintptr_t x_scale, std::uintptr_t w_scale,
                std::uintptr_t bias, std::uintptr_t out, int m, int n, int k, bool gelu, int tile,
                std::uintptr_t workspace, std::size_t workspace_bytes, std::uintptr_t stream) {
  liveavatar::Fp8Linear problem{};
  problem.a = pointer<const void>(a);
  problem.b = pointer<const void>(b);
  problem.x_scale = pointer<const float>(x_scale);
  problem.w_scale = pointer<const float>(w_scale);
  problem.bias = pointer<const float>(bias);
  problem.out = pointer<void>(out);
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.gelu = gelu;
  liveavatar::fp8_linear(problem, static_cast<Fp8Tile>(tile), pointer<void>(workspace), workspace_bytes,
                         reinterpret_cast<cudaStream_t>(stream));
}

std::size_t fp8_linear_workspace(int m, int n, int k, int tile) {
  return liveavatar::fp8_linear_workspace(m, n, k, static_cast<Fp8Tile>(tile));
}

void causal_conv3d(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                   std::uintptr_t out, int frames, int height, int width, int channels_in, int channels_out, int kt,
                   int kh, int kw, int tile, std::uintptr_t stream) {
  liveavatar::CausalConv3d problem{};
  problem.x = pointer<const void>(x);
  problem.weight = pointer<const void>(weight);
  problem.bias = pointer<const float>(bias);
  problem.residual = pointer<const void>(residual);
  problem.out = pointer<void>(out);
  problem.frames = frames;
  problem.height = height;
  problem.width = width;
  problem.channels_in = channels_in;
  problem.channels_out = channels_out;
  problem.kt = kt;
  problem.kh = kh;
  problem.kw = kw;
  liveavatar::causal_conv3d(problem, static_cast<ConvTile>(tile), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using py::literals::operator""_a;

  module.doc() = "CUDA C++ kernels of the Live Avatar engine; see csrc/README.md.";
  module.attr("FAST_128X128") = static_cast<int>(Fp8Tile::kFast128x128);
  module.attr("FAST_128X256") = static_cast<int>(Fp8Tile::kFast128x256);
  module.attr("PRECISE_128X128") = static_cast<int>(Fp8Tile::kPrecise128x128);

  module.def("fp8_linear", &fp8_linear, "a"_a, "b"_a, "x_scale"_a, "w_scale"_a, "bias"_a, "out"_a, "m"_a, "n"_a, "k"_a,
             "gelu"_a, "tile"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a,
             py::call_guard<py::gil_scoped_release>(),
             "out[m, n] = act(x_scale[m] * w_scale[n] * sum_k a[m, k] b[n, k] + bias[n]), enqueued on a stream of the\n"
             "current device. a, b: e4m3 [m, k], [n, k]; scales and bias: float32; out: bf16; bias 0: none.\n"
             "ValueError: a problem that it cannot take. RuntimeError: the status of what failed.");
  module.def("fp8_linear_workspace", &fp8_linear_workspace, "m"_a, "n"_a, "k"_a, "tile"_a,
             "Bytes of device memory that fp8_linear needs as its workspace.");

  module.attr("CONV_256X96") = static_cast<int>(ConvTile::k256x96);
  module.attr("CONV_128X192") = static_cast<int>(ConvTile::k128x192);
  module.def("causal_conv3d", &causal_conv3d, "x"_a, "weight"_a, "bias"_a, "residual"_a, "out"_a, "frames"_a, "height"_a,
             "width"_a, "channels_in"_a, "channels_out"_a, "kt"_a, "kh"_a, "kw"_a, "tile"_a, "stream"_a,
             py::call_guard<py::gil_scoped_release>(),
             "Convolution of frames, channels last, whose past lies at the head of x, enqueued on a stream of the current\n"
             "device. x, weight, residual, out: bf16; bias: float32; bias or residual 0: none. Sizes are the result's.\n"
             "ValueError: a problem that it cannot take. RuntimeError: the status of what failed.");
}
