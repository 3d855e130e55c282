#include "cbam.cuh"

namespace visattn::cuda {

template void launch_cbam<float>(const char*, CbamForward<PlainMemory, float>&, const Plan&, bool,
                                 const Call&);

}  // namespace visattn::cuda
