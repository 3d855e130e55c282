#include "cbam.cuh"

namespace visattn::cuda {

template void launch_cbam<BFloat16>(const char*, CbamForward<PlainMemory, BFloat16>&, const Plan&, bool,
                                    float*, const Call&);
template void launch_cbam<BFloat16>(const char*, CbamBackward<PlainMemory, BFloat16>&, const Plan&, bool,
                                    float*, const Call&);

}  // namespace visattn::cuda
