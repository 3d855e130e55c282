#include "cbam.cuh"

namespace visattn::cuda {

template void launch_cbam<Half>(const char*, CbamForward<PlainMemory, Half>&, const Plan&, bool, const Call&);

}  // namespace visattn::cuda
