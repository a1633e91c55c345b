#include "causal_conv3d/sm90_conv.cuh"

namespace liveavatar::sm90 {

const ConvInstance kConv256x96{"256x96", Conv<_256, _96, _32>::run};

}  // namespace liveavatar::sm90
