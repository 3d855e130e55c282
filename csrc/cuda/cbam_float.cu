#include "cbam.cuh"

namespace visattn::cuda {

template Kernel cbam_for<CbamForward<PlainMemory, float>>(const Plan&, bool);
template Kernel cbam_for<CbamBackward<PlainMemory, float>>(const Plan&, bool);

}  // namespace visattn::cuda
