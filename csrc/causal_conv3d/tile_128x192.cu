#include "causal_conv3d/sm90_conv.cuh"

namespace liveavatar::sm90 {

const ConvInstance kConv128x192{"128x192", Conv<_128, _192, _64>::run};

}  // namespace liveavatar::sm90
