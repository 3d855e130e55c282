#include "cbam.cuh"

namespace visattn::cuda {

template void launch_cbam<Half>(const char*, CbamForward<PlainMemory, Half>&, const Plan&, bool, float*,
                                const Call&);
template void launch_cbam<Half>(const char*, CbamBackward<PlainMemory, Half>&, const Plan&, bool, float*,
                                const Call&);

}  // namespace visattn::cuda
