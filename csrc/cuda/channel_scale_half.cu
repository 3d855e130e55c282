#include "channel_scale.cuh"

namespace visattn::cuda {

template Kernel channel_scale_for<ChannelForward<PlainMemory, Half>>(const Plan&, bool);
template Kernel channel_scale_for<ChannelBackward<PlainMemory, Half>>(const Plan&, bool);

}  // namespace visattn::cuda
