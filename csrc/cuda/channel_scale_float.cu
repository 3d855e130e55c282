#include "channel_scale.cuh"

namespace visattn::cuda {

template void launch_channel_scale<float>(const char*, ChannelForward<PlainMemory, float>&, const Plan&, bool,
                                          float*, const Call&);
template void launch_channel_scale<float>(const char*, ChannelBackward<PlainMemory, float>&, const Plan&,
                                          bool, float*, const Call&);

}  // namespace visattn::cuda
