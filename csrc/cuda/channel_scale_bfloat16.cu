#include "channel_scale.cuh"

namespace visattn::cuda {

template void launch_channel_scale<BFloat16>(const char*, ChannelForward<PlainMemory, BFloat16>&, const Plan&,
                                             bool, float*, const Call&);
template void launch_channel_scale<BFloat16>(const char*, ChannelBackward<PlainMemory, BFloat16>&,
                                             const Plan&, bool, float*, const Call&);

}  // namespace visattn::cuda
