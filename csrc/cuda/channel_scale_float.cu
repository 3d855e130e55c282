#include "channel_scale.cuh"

namespace visattn::cuda {

template Kernel channel_scale_for<ChannelForward<PlainMemory, float>>(const Plan&, bool);
template Kernel channel_scale_for<ChannelBackward<PlainMemory, float>>(const Plan&, bool);

}  // namespace visattn::cuda
