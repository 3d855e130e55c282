#include "cbam.cuh"

namespace visattn::cuda {

template Kernel cbam_for<CbamForward<PlainMemory, BFloat16>>(const Plan&, bool);
template Kernel cbam_for<CbamBackward<PlainMemory, BFloat16>>(const Plan&, bool);

}  // namespace visattn::cuda
