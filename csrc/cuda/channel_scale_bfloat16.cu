#include "channel_scale.cuh"

namespace visattn::cuda {

template Kernel channel_scale_for<ChannelForward<PlainMemory, BFloat16>>(const Plan&, bool);
template Kernel channel_scale_for<ChannelBackward<PlainMemory, BFloat16>>(const Plan&, bool);

}  // namespace visattn::cuda
