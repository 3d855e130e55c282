#include "cbam.cuh"

namespace visattn::cuda {

template Kernel cbam_for<CbamForward<PlainMemory, Half>>(const Plan&, bool);
template Kernel cbam_for<CbamBackward<PlainMemory, Half>>(const Plan&, bool);

}  // namespace visattn::cuda
