#include "cbam.cuh"

namespace visattn::cuda {

template void launch_cbam<float>(const char*, CbamForward<PlainMemory, float>&, const Plan&, bool, float*,
                                 const Call&);
template void launch_cbam<float>(const char*, CbamBackward<PlainMemory, float>&, const Plan&, bool, float*,
                                 const Call&);

}  // namespace visattn::cuda
