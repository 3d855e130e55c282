#include "cbam.cuh"

namespace visattn::cuda {

template void launch_cbam<BFloat16>(const char*, CbamForward<PlainMemory, BFloat16>&, const Plan&, bool,
                                    const Call&);

}  // namespace visattn::cuda
